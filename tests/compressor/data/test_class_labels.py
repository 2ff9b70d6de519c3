"""Class names in the data get the model's numbers; oracles are transformers' pipeline, timm and torchvision."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import timm
import torch
import transformers
from PIL import Image
from timm.data import ImageNetInfo
from torchvision.models import _meta

from compressor import models
from compressor.data.class_labels import with_class_numbers
from compressor.data.readers.dataset.columns import dataset_samples
from compressor.data.splits import Data, load
from compressor.errors import DataError
from compressor.models import Model
from compressor.models.base import ModelError
from compressor.models.class_names import ClassNames, from_config, from_timm_config, of_module, of_timm, with_synsets
from tests.paths import SHARED_DATA
from tests.samples import tokenizer_of_words

NLI = ("neutral", "entailment", "contradiction")  # not in sorted order
DEIT, IMAGES = SHARED_DATA / "deit_tiny_patch16_224", SHARED_DATA / "imagenet_sample"


def named(*names: str) -> ClassNames:
    return ClassNames(tuple((name,) for name in names))


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a BERT classifier of three classes on the words w3, w4, ..., whose predictions vary from text to text."""
    folder = tmp_path_factory.mktemp("nli")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, vocab_size=40,
        max_position_embeddings=32, num_labels=3, id2label=dict(enumerate(NLI)), initializer_range=0.8,
    )  # fmt: skip
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer_of_words(folder, vocabulary=40)
    return folder


@pytest.fixture(scope="module")
def texts() -> list[str]:
    rng = np.random.default_rng(0)
    return [" ".join(f"w{token}" for token in rng.integers(3, 40, 6)) for _ in range(60)]


def write_csv(path: Path, texts: list[str], labels: list[Any]) -> str:
    path.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in zip(texts, labels, strict=True)))
    return str(path)


def read(spec: str, model: Model) -> Data:
    return load(spec, model.preprocess, task=model.task, class_names=model.class_names)


def accuracy(data: Data, model: Model) -> float:
    """Return the share of correct predictions, computed with torch alone."""
    correct: list[bool] = []
    for part in (data.calibration, data.validation, data.test):
        for batch in part.batches(32):
            assert batch.labels is not None
            with torch.inference_mode():
                inputs = [torch.from_numpy(batch.feeds[name]) for name in model.inputs]
                (logits,) = model.call(model.module, *inputs)
            correct += (logits.argmax(-1).numpy() == batch.labels).tolist()
    return float(np.mean(correct))


def features(data: Data) -> list[str]:
    return [limitation.feature for limitation in data.limitations]


# --------------------------------------------------------------------------------------------------------------- texts


@pytest.mark.parametrize("spelled", [str, str.upper, lambda name: f" {name.title()} "])
def test_labels_of_the_pipeline_are_all_correct(
    classifier: Path, texts: list[str], spelled: Any, tmp_path: Path
) -> None:
    """In sorted order, contradiction would be class 0, and no label that the pipeline returns would be correct."""
    pipeline = transformers.pipeline("text-classification", model=str(classifier))
    labels = [answer["label"] for answer in pipeline(texts)]
    assert set(labels) == set(NLI)
    model = models.load(classifier)
    data = read(write_csv(tmp_path / "t.csv", texts, [spelled(label) for label in labels]), model)
    assert accuracy(data, model) == 1.0
    assert data.reading.endswith("class 'label', classes by name")
    assert features(data) == []


def test_another_id2label_gives_another_numbering(classifier: Path, texts: list[str], tmp_path: Path) -> None:
    """The labels are the same, but the model names its classes in another order."""
    model = models.load(classifier)
    labels = [NLI[number % 3] for number in range(60)]
    spec = write_csv(tmp_path / "t.csv", texts, labels)
    for order in (NLI, NLI[::-1], ("contradiction", "neutral", "entailment")):
        data = load(spec, model.preprocess, task=model.task, class_names=named(*order))
        assert data.test.labels is not None
        assert [order[label] for label in data.test.labels] == [labels[int(id)] for id in data.test.ids]


def test_names_that_match_none_are_numbered_in_sorted_order_with_the_pairs(
    classifier: Path, texts: list[str], tmp_path: Path
) -> None:
    model = models.load(classifier)
    data = read(write_csv(tmp_path / "t.csv", texts, ["b", "c", "a"] * 20), model)
    assert data.test.labels is not None
    assert data.test.labels.tolist() == [(1, 2, 0)[int(id) % 3] for id in data.test.ids]
    (limitation,) = data.limitations
    assert str(limitation) == (
        "class order: the model has none of the data's class names, so they have numbers in sorted order "
        '(a = 0, the model\'s "neutral"; b = 1, the model\'s "entailment"; c = 2, the model\'s "contradiction"); the '
        "model must use the same numbers, or its accuracy is wrong."
    )


def refusal(labels: list[str], names: ClassNames | None, texts: list[str], path: Path, model: Model) -> str:
    spec = write_csv(path, texts, (labels * 60)[:60])
    with pytest.raises(DataError) as error:
        load(spec, model.preprocess, task=model.task, class_names=names)
    return str(error.value).replace(spec, "t.csv")


def test_names_that_cannot_be_numbered_are_refused(classifier: Path, texts: list[str], tmp_path: Path) -> None:
    model, path = models.load(classifier), tmp_path / "t.csv"
    assert refusal(["neutral", "contradict", "entailment"], named(*NLI), texts, path, model) == (
        "t.csv has 1 class names that the model does not have (contradict), beside 2 that it has (entailment, "
        "neutral); expected names of the model's classes, such as neutral, entailment, contradiction; rename or remove "
        "the others"
    )
    partly = ClassNames((("neutral",), ("entailment",), ()))
    assert refusal(["neutral", "contradict", "entailment"], partly, texts, path, model).endswith(
        "such as neutral, entailment; 1 of its 3 classes have no name, so complete its id2label, or give class numbers"
    )
    assert refusal(
        ["crane", "tench"], ClassNames((("crane", "n1"), ("crane", "n2"), ("tench",))), texts, path, model
    ) == (
        "t.csv has the class name 'crane', which is a name of 2 classes of the model (0, 1); give class numbers, or "
        "names that differ"
    )
    assert refusal(["0", "1", "other"], None, texts, path, model) == (
        "t.csv has both numbers (0, 1) and names (other) as class labels; expected class numbers only, or names of the "
        "model's classes only"
    )
    config = transformers.BertConfig(id2label={0: "no", 1: "yes"}, label2id={"yes": 0, "no": 1})
    assert refusal(["no", "yes"], from_config(config, 2), texts, path, model) == (
        "t.csv has class names, which the model cannot number, because id2label of its config names class 0 'no', but "
        "label2id names class 1 so; correct its config.json, or give class numbers instead of names"
    )


@pytest.mark.parametrize(
    ("labels", "names", "expected"),
    [
        (["0", "1", "2"], NLI, [0, 1, 2]),
        (["1.0", "2.0", "0.0"], NLI, [1, 2, 0]),
        (["0", "1", "2"], ("LABEL", "x", "y"), [0, 1, 2]),
        (["1", "2", "3"], ("1", "2", "3"), [0, 1, 2]),
        (["0", "1", "2"], ("2", "0", "1"), [1, 2, 0]),
        (["0", "1", "2"], ("1", "2", "3"), [0, 1, 2]),
        (["True", "False", "True"], ("false", "true"), [1, 0, 1]),
    ],
    ids=["numbers", "floats", "other names", "stars from 1", "permuted digits", "digits in part", "booleans"],
)
def test_numbers_are_class_numbers_unless_all_are_names(
    classifier: Path, texts: list[str], labels: list[str], names: tuple[str, ...], expected: list[int], tmp_path: Path
) -> None:
    model = models.load(classifier)
    spec = write_csv(tmp_path / "t.csv", texts, labels * 20)
    data = load(spec, model.preprocess, task=model.task, class_names=named(*names))
    assert data.test.labels is not None
    assert data.test.labels.tolist() == [expected[int(id) % 3] for id in data.test.ids]
    renamed = names in (("1", "2", "3"), ("2", "0", "1")) and expected != [int(float(label)) for label in labels]
    assert features(data) == (["label numbers"] if renamed else [])


def test_rows_marked_as_unlabelled_are_skipped(classifier: Path, texts: list[str], tmp_path: Path) -> None:
    model = models.load(classifier)
    data = read(write_csv(tmp_path / "t.csv", texts, [-1, 0, 1] * 20), model)
    assert {sample.reason for sample in data.skipped} == {"its class is -1, which marks a sample without a label"}
    assert len(data.skipped) == 20
    (left_out,) = (each.reason for each in data.limitations if each.feature == "samples left out")
    assert left_out.startswith("20 of 60 cannot be used: 0, ")
    assert "marks a sample without a label" in left_out


def test_the_task_decides_between_two_label_columns(classifier: Path, texts: list[str], tmp_path: Path) -> None:
    """Before, the column label of a table of scored pairs was used as the score."""
    model, path = models.load(classifier), tmp_path / "t.csv"
    rows = "".join(f"{text},{text},{row % 2},{row / 10}\n" for row, text in enumerate(texts))
    path.write_text(f"sentence1,sentence2,label,score\n{rows}")
    classes = load(str(path), model.preprocess, task="text-classification")
    scores = load(str(path), model.preprocess, task="sentence-similarity")
    assert (classes.label_kind, scores.label_kind) == ("class", "score")
    assert [each.reason for each in classes.limitations] == ["'score' not read; 'label' is used as label"]
    assert [each.reason for each in scores.limitations] == ["'label' not read; 'score' is used as label"]


# --------------------------------------------------------------------------------------------------- arrays and the hub


def vectors(folder: Path, labels: Any) -> str:
    np.savez(folder / "x.npz", x=np.zeros((6, 4), np.float32), labels=np.array(labels))
    return str(folder / "x.npz")


@pytest.mark.parametrize("kind", ["U", "S"])
def test_strings_beside_arrays_are_matched(tmp_path: Path, kind: str) -> None:
    model = module(id2label=["cat", "dog", "eel"])
    data = read(vectors(tmp_path, np.array(["Eel", "dog", "cat "] * 2).astype(kind)), model)
    assert data.test.labels is not None
    assert data.test.labels.tolist() == [(2, 1, 0)[int(id) % 3] for id in data.test.ids]


def test_the_names_of_a_hub_dataset_are_matched_and_its_own_numbers_are_kept_otherwise(
    classifier: Path, texts: list[str]
) -> None:
    """The classes of the data set are numbered in the order of its names, which is neither the model's nor sorted."""
    model, own = models.load(classifier), ("entailment", "neutral", "contradiction")
    dataset = datasets.Dataset.from_dict(
        {"text": texts, "label": [0, 1, 2] * 20, "ok": [True] * 60},
        features=datasets.Features(
            text=datasets.Value("string"), label=datasets.ClassLabel(names=list(own)), ok=datasets.Value("bool")
        ),
    )
    samples = dataset_samples(dataset, "o/n", model.preprocess, model.task)
    matched = with_class_numbers(samples, model.class_names, "o/n")
    assert matched.labels is not None
    assert [NLI[label] for label in matched.labels] == [own[row % 3] for row in range(60)]
    other = with_class_numbers(samples, named("a", "b", "c"), "o/n")
    assert other.labels is not None
    assert other.labels.tolist() == [0, 1, 2] * 20
    assert "have the numbers of the data set (entailment = 0" in other.limitations[-1].reason
    assert samples.limitations[0].reason == "'ok' not read"


@pytest.mark.parametrize(
    ("feature", "labels"),
    [
        (datasets.ClassLabel(names=["6", "9", "3"]), [0, 1, 2] * 2),
        (datasets.Value("string"), ["6", "9", "3"] * 2),
        (datasets.Value("int64"), [6, 9, 3] * 2),
    ],
    ids=["ClassLabel", "string", "int64"],
)
def test_label_columns_of_hub_images(feature: Any, labels: list[Any]) -> None:
    """Before, a column label of another type than ClassLabel was not read, and nothing said so."""
    columns = {"image": [Image.new("L", (8, 8), 9)] * 6, "label": labels, "fine_label": [0] * 6}
    schema = datasets.Features(image=datasets.Image(), label=feature, fine_label=datasets.Value("int64"))
    model = models.load()
    dataset = datasets.Dataset.from_dict(columns, features=schema)
    samples = dataset_samples(dataset, "o/n", model.preprocess, model.task)
    matched = with_class_numbers(samples, model.class_names, "o/n")
    assert matched.labels is not None
    assert matched.labels.tolist() == [6, 9, 3] * 2
    assert samples.limitations[0].reason == "'fine_label' not read; 'label' is used as label"


# -------------------------------------------------------------------------------------------------------------- folders


def folders(root: Path, *names: str) -> str:
    for number, name in enumerate(names):
        for copy in range(3):
            (root / name).mkdir(parents=True, exist_ok=True)
            Image.new("L", (8, 8), 10 * number + copy).save(root / name / f"{copy}.png")
    return str(root)


def labels_by_folder(data: Data) -> dict[str, int]:
    parts = (data.calibration, data.validation, data.test)
    pairs = [pair for part in parts if part.labels is not None for pair in zip(part.ids, part.labels, strict=True)]
    return {id.split("/")[0]: int(label) for id, label in pairs}


def test_a_part_of_the_class_folders_is_enough_if_their_names_match(tmp_path: Path) -> None:
    sample = models.load()
    data = load(
        folders(tmp_path, "Great_White-shark", "cafe\u0301", "hen"), sample.preprocess, task=sample.task,
        class_names=named("hen", "tench", "great white shark", "caf\u00e9", "eel"),
    )  # fmt: skip
    assert labels_by_folder(data) == {"Great_White-shark": 2, "cafe\u0301": 3, "hen": 0}
    assert features(data) == []


def test_numbers_as_folder_names_are_class_numbers(tmp_path: Path) -> None:
    """Sorted as text, folder 10 would be class 1."""
    sample = models.load()
    data = load(folders(tmp_path, "0", "2", "10"), sample.preprocess, task=sample.task)
    assert labels_by_folder(data) == {"0": 0, "2": 2, "10": 10}
    assert "torchvision's ImageFolder" in data.limitations[0].reason
    padded = load(folders(tmp_path / "padded", "00", "02", "10"), sample.preprocess, task=sample.task)
    assert labels_by_folder(padded) == {"00": 0, "02": 2, "10": 10}
    assert features(padded) == []


def test_synsets_and_words_of_imagenet_are_the_classes_of_timm(tmp_path: Path) -> None:
    info = ImageNetInfo("imagenet-1k")
    names, limitations = of_timm(timm.create_model("vit_tiny_patch16_224.augreg_in21k_ft_in1k", pretrained=False))
    assert names is not None
    assert limitations == ()
    for number in (0, 1, 2, 517, 999):
        assert names.numbers(info.index_to_label_name(number)) == (number,)
    assert names.numbers("Tinca tinca") == names.numbers("tench") == (0,)
    assert names.numbers("crane") == (134, 517)
    with_tag, said = of_timm(timm.create_model("vit_tiny_patch16_224.augreg_in21k", pretrained=False))
    assert with_tag is None or len(with_tag) != 1000
    assert said == ()


def test_a_list_of_imagenet_names_also_has_the_synsets() -> None:
    """The list of torchvision has other names for a few classes."""
    names = with_synsets(named(*_meta._IMAGENET_CATEGORIES))
    assert names is not None
    info = ImageNetInfo("imagenet-1k")
    assert [names.numbers(info.index_to_label_name(number)) for number in range(1000)] == [(n,) for n in range(1000)]
    shuffled = named(*_meta._IMAGENET_CATEGORIES[::-1])
    assert with_synsets(shuffled) is shuffled


def test_names_in_the_config_of_timm(tmp_path: Path) -> None:
    """They are read from a folder in timm's format, and the exported config.json keeps them."""
    source = json.loads((models.SAMPLE / "config.json").read_text())
    names = [f"n{number}" for number in range(10)][::-1]
    source |= {"label_names": names, "label_descriptions": {name: f"digit, {name[1:]}" for name in names}}
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(source))
    (tmp_path / "model" / "model.safetensors").write_bytes((models.SAMPLE / "model.safetensors").read_bytes())
    model = models.load(tmp_path / "model")
    assert model.class_names is not None
    assert (model.class_names.first(0), model.class_names.numbers("n9"), model.class_names.numbers("9")) == (
        "digit, 9", (0,), (0,),
    )  # fmt: skip
    model.save(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["label_names"] == names


@pytest.mark.parametrize("count", [8, 12])
def test_timm_names_of_another_number_of_classes_number_nothing(tmp_path: Path, count: int) -> None:
    names = [f"n{number}" for number in range(count)]
    found = from_timm_config({"label_names": names}, 10)
    assert found is not None
    assert found.contradiction == f"its config names {count} classes in label_names, but it has 10"
    for place, name in enumerate(("n3", "n4", "n5")):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8), (place, 0, 0)).save(tmp_path / name / "image.png")
    model = models.load(models.SAMPLE)
    with pytest.raises(DataError, match=rf"names {count} classes in label_names, but it has 10; correct its config"):
        load(str(tmp_path), model.preprocess, task=model.task, class_names=found)
    assert from_timm_config({"label_names": names[:8], "num_classes": 8}, 10) is None


@pytest.mark.skipif(not DEIT.is_dir() or not IMAGES.is_dir(), reason="the real data in ../shared/data is not here")
def test_a_part_of_imagenet_in_any_form_of_its_names_has_the_accuracy_of_the_whole(tmp_path: Path) -> None:
    """Folders of every 50th class, named by synset or by word, hold the samples of the right classes."""
    model, info = models.load(DEIT), ImageNetInfo("imagenet-1k")
    synsets = info.label_names()
    assert isinstance(synsets, list)
    for name in (info.index_to_label_name, info.index_to_description):
        root = tmp_path / name(0)
        for number in range(0, 1000, 50):
            (root / name(number)).mkdir(parents=True)
            (picture,) = (IMAGES / synsets[number]).iterdir()
            (root / name(number) / picture.name).symlink_to(picture)
        data = read(str(root), model)
        assert accuracy(data, model) >= 0.6  # 79.5 % on all 1,000; in sorted order it would be about 0
        assert labels_by_folder(data) == {name(number): number for number in range(0, 1000, 50)}


# ------------------------------------------------------------------------------------------------------ names of models


def module(**attributes: Any) -> Model:
    linear = torch.nn.Linear(4, 3)
    for name, value in attributes.items():
        setattr(linear, name, value)
    return models.load(linear, example_inputs=torch.zeros(2, 4))


def test_a_module_names_its_classes_by_id2label(tmp_path: Path) -> None:
    for names in (["a", "b", "c"], {0: "a", 1: "b", 2: "c"}, {"0": "a", "1": "b", "2": "c"}):
        model = module(id2label=names)
        assert model.class_names == named("a", "b", "c")
    model.save(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["id2label"] == {"0": "a", "1": "b", "2": "c"}
    assert module(config=transformers.BertConfig(id2label={0: "x", 1: "y", 2: "z"})).class_names == named("x", "y", "z")
    assert module().class_names is None
    assert module(config=transformers.BertConfig(num_labels=3)).class_names is None  # LABEL_0, LABEL_1, LABEL_2
    assert of_module(timm.create_model("vit_tiny_patch16_224", num_classes=3), 3) is None
    with pytest.raises(ModelError, match=r"id2label or label2id of Linear cannot be read .*expected class numbers"):
        module(id2label={"a": 0})


def test_label2id_adds_names_and_must_not_contradict() -> None:
    config = transformers.BertConfig(id2label={0: "NEG", 1: "POS"}, label2id={"negative": 0, "positive": 1})
    assert from_config(config, 2) == ClassNames((("NEG", "negative"), ("POS", "positive")))
    made_up = transformers.BertConfig(num_labels=2, label2id={"no": 1, "yes": 0})
    made_up.label2id = {"no": 1, "yes": 0}
    assert from_config(made_up, 2) == named("yes", "no")
    outside = from_config(transformers.BertConfig(id2label={1: "a", 2: "b"}), 2)
    assert outside is not None
    assert outside.contradiction == "its config gives 'b' the class number 2, but it has 2 classes"


def test_the_exported_config_of_transformers_keeps_id2label(classifier: Path, tmp_path: Path) -> None:
    models.load(classifier).save(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["id2label"] == {
        str(n): name for n, name in enumerate(NLI)
    }


@pytest.mark.parametrize("form", ["csv", "jsonl", "npz"])
def test_the_placeholders_of_transformers_are_class_numbers(form: str, classifier: Path, tmp_path: Path) -> None:
    """As names in sorted order, LABEL_10 was class 2 and LABEL_2 class 4."""
    texts, numbers = [f"w{3 + row % 30}" for row in range(36)], [row % 12 for row in range(36)]
    path = tmp_path / f"x.{form}"
    if form == "csv":
        write_csv(path, texts, [f"LABEL_{number}" for number in numbers])
    elif form == "jsonl":
        pairs = zip(texts, numbers, strict=True)
        path.write_text("".join(json.dumps({"text": text, "label": f"LABEL_{each}"}) + "\n" for text, each in pairs))
    else:
        ids = np.array([[3 + row % 30] for row in range(36)])
        np.savez(path, input_ids=ids, labels=np.array([f"LABEL_{number}" for number in numbers]))
    model = models.load(str(classifier))
    data = load(str(path), model.preprocess, task=model.task, class_names=None)
    found = {
        id: label
        for part in data.parts
        for batch in part.batches(1)
        for id, label in zip(batch.ids, batch.labels, strict=True)
    }
    assert found == {str(row): number for row, number in enumerate(numbers)}
    assert not [each for each in data.limitations if each.feature == "class order"]
