"""Every task on a small model of transformers: labels that the model itself predicts give a perfect score.

The labels come from transformers' own pipelines and classes, so that reading, tokenization and metric are checked
together.
"""

import functools
import json

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from PIL import Image

import compressor
from compressor import models
from compressor.data import splits
from compressor.errors import CompressorError
from compressor.lower.traced_model import load
from compressor.models import ModelError
from compressor.quality.evaluate import evaluate, graph_runner
from compressor.quality.validation_loss import ValidationLoss
from compressor.settings import Settings
from compressor.workspace.progress import Steps
from passes.base import apply
from passes.execute.interpreter import run
from passes.rewrite.drop import Drop

SPECIAL = ["<pad>", "<unk>", "<s>", "</s>", "<mask>"]
WORDS = [*SPECIAL, *(f"w{index}" for index in range(5, 40))]
NAMES = ["toxic", "severe", "obscene", "threat"]
TAGS = ["O", "B-PER", "I-PER"]


def save_tokenizer(folder):
    plain = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    plain.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    plain.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 2), ("</s>", 3)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", unk_token="<unk>", cls_token="<s>", sep_token="</s>",
        mask_token="<mask>",
    ).save_pretrained(folder)  # fmt: skip


def bert(folder, head, **options):
    """Save a small BERT with a head and a tokenizer of 35 words, and return the model."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=48, initializer_range=0.4, **options,
    )  # fmt: skip
    model = getattr(transformers, head)(config).eval()
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return model


def texts(count=48, seed=0):
    rng = np.random.default_rng(seed)
    return [" ".join(f"w{word}" for word in rng.integers(5, 40, rng.integers(3, 9))) for _ in range(count)]


def write_lines(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def names(labels):
    return {"id2label": dict(enumerate(labels)), "label2id": {label: index for index, label in enumerate(labels)}}


def tagged(folder):
    model = bert(folder / "m", "BertForTokenClassification", **names(TAGS))
    tag = transformers.pipeline("token-classification", model, tokenizer=str(folder / "m"), ignore_labels=[])
    rows = [{"tokens": text.split(), "ner_tags": [word["entity"] for word in tag(text)]} for text in texts()]
    return write_lines(folder / "ner.jsonl", rows), "token_accuracy"


def conll(folder):
    path, metric = tagged(folder)
    rows = map(json.loads, path.read_text().splitlines())
    sentences = ("\n".join(map(" _ ".join, zip(row["tokens"], row["ner_tags"], strict=True))) for row in rows)
    (folder / "ner.conll").write_text("-DOCSTART- O\n\n" + "\n\n".join(sentences))
    return folder / "ner.conll", metric


def label_sets(folder):
    options = {"problem_type": "multi_label_classification", **names(NAMES)}
    model = bert(folder / "m", "BertForSequenceClassification", **options)
    classify = transformers.pipeline("text-classification", model, tokenizer=str(folder / "m"), top_k=None)
    rows = []
    for text, found in zip(texts(), classify(texts()), strict=True):
        scores = {each["label"]: each["score"] for each in found}
        rows.append(",".join([text, *(str(int(scores[name] > 0.5)) for name in NAMES)]))
    (folder / "comments.csv").write_text("\n".join([",".join(["text", *NAMES]), *rows]))
    return folder / "comments.csv", "f1"


def label_lists(folder):
    path, metric = label_sets(folder)
    table = [line.split(",") for line in path.read_text().splitlines()[1:]]
    rows = [
        {"text": text, "labels": [name for name, cell in zip(NAMES, cells, strict=True) if cell == "1"]}
        for text, *cells in table
    ]
    return write_lines(folder / "comments.jsonl", rows), metric


def scores(folder):
    model = bert(folder / "m", "BertForSequenceClassification", num_labels=1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "m")
    with torch.no_grad():
        values = [float(model(**tokenizer(text, return_tensors="pt")).logits) for text in texts()]
    (folder / "scores.csv").write_text(
        "\n".join(["text,score", *(f"{text},{value}" for text, value in zip(texts(), values, strict=True))])
    )
    return folder / "scores.csv", "mae"


def questions(folder):
    """Answers are searched with a loop over all spans, independently of the head."""
    model = bert(folder / "m", "BertForQuestionAnswering")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "m")
    rows = []
    for question, context in zip(texts(seed=1), texts(seed=2), strict=True):
        encoded = tokenizer(question, context, return_tensors="pt", return_offsets_mapping=True)
        offsets = encoded.pop("offset_mapping")[0].tolist()
        with torch.no_grad():
            returned = model(**encoded)
        inside = [place for place, part in enumerate(encoded.sequence_ids(0)) if part == 1]
        spans = [(0, 0), *((first, last) for first in inside for last in inside if first <= last)]
        score = lambda span: float(returned.start_logits[0, span[0]] + returned.end_logits[0, span[1]])  # noqa: B023, E731
        first, last = max(spans, key=score)
        start, end = offsets[first][0], offsets[last][1]
        answers = {"text": [context[start:end]], "answer_start": [start]} if first else {"text": [], "answer_start": []}
        rows.append({"question": question, "context": context, "answers": answers})
    return write_lines(folder / "squad.jsonl", rows), "exact_match"


def scenes(folder, *, reduces=False):
    """Masks come from the post-processing of transformers' own image processor.

    With `reduces`, they are those of ADE20K, where 0 is no class and class 0 of the model is 1.
    """
    torch.manual_seed(0)
    config = transformers.SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[16, 32], patch_sizes=[7, 3],
        strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=16, num_labels=4,
        image_size=32, initializer_range=0.4,
    )  # fmt: skip
    model = transformers.SegformerForSemanticSegmentation(config).eval()
    processor = transformers.SegformerImageProcessor(size={"height": 32, "width": 32}, do_reduce_labels=reduces)
    model.save_pretrained(folder / "m")
    processor.save_pretrained(folder / "m")
    (folder / "scenes" / "images").mkdir(parents=True)
    (folder / "scenes" / "masks").mkdir()
    rng = np.random.default_rng(0)
    for index in range(24):
        image = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((40, 32))
        image.save(folder / "scenes" / "images" / f"{index}.png")
        with torch.no_grad():
            returned = model(**processor(image, return_tensors="pt"))
        (mask,) = processor.post_process_semantic_segmentation(returned, target_sizes=[(32, 32)])
        mask = mask.numpy().astype(np.uint8) + reduces
        mask[:4] = 0 if reduces else mask[:4]
        Image.fromarray(mask).save(folder / "scenes" / "masks" / f"{index}.png")
    return folder / "scenes", "mean_iou"


LABELLED = {"tags": tagged, "conll": conll, "sets": label_sets, "lists": label_lists, "scores": scores,
            "spans": questions, "masks": scenes, "reduced masks": functools.partial(scenes, reduces=True)}  # fmt: skip


@pytest.mark.parametrize("kind", LABELLED)
def test_labels_that_the_model_predicts_give_a_perfect_score(kind, tmp_path):
    data, metric = LABELLED[kind](tmp_path)
    traced = load(Settings(model=tmp_path / "m", data=data), Steps(None))
    assert traced.metric == metric
    runners = {"original": graph_runner(traced.model, functools.partial(run, traced.graph))}
    found = evaluate(traced.data.test, runners, head=traced.head, metric=metric, reference="original")
    perfect = 0.0 if metric == "mae" else 100.0
    assert found.value("original") == pytest.approx(perfect, abs=1e-5)
    fork = traced.graph.fork()
    apply(Drop(tuple(site.name for site in traced.sites)), fork)
    lost = ValidationLoss(traced.graph, traced.model, traced.data.validation, metric).loss(fork)
    assert lost.percent > 1.0


def test_masks_of_classes_that_the_model_lacks_are_refused_before_it_is_traced(tmp_path):
    data, _ = scenes(tmp_path)
    mask = data / "masks" / "0.png"
    Image.fromarray(np.full((32, 32), 4, np.uint8)).save(mask)
    with pytest.raises(CompressorError, match="has labels up to 4, but m has only 4 classes, 0 to 3"):
        load(Settings(model=tmp_path / "m", data=data), Steps(None))


def detector(folder):
    """Save a small YOLOS with random weights."""
    config = transformers.YolosConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=[32, 32],
        patch_size=8, num_detection_tokens=4,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.YolosForObjectDetection(config).save_pretrained(folder)
    transformers.YolosImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)


@pytest.mark.parametrize("layout", ["images/{}.png", "{}.png", "train/{}.png", "a/{}.png"])
def test_folders_of_detectors_are_no_classes(tmp_path, layout):
    """The layouts of YOLO and COCO: images beside labels, all splits, or a folder for each scene."""
    detector(tmp_path / "m")
    for number in range(8):
        path = tmp_path / "data" / layout.format(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (40, 32, 3), dtype=np.uint8)).save(path)
        if layout.startswith(("images", "train")):
            labels = tmp_path / "data" / "labels" / f"{number}.txt"
            labels.parent.mkdir(exist_ok=True)
            labels.write_text("0 0.5 0.5 0.2 0.2")
    found = load(Settings(model=tmp_path / "m", data=tmp_path / "data", drop="none"), Steps(None))
    assert (found.metric, found.data.label_kind) == ("query_agreement", None)
    said = {each.feature: each.reason for each in found.data.limitations}
    assert not {"classes of the data", "class folders", "class order"} & set(said)
    if layout.startswith("images"):
        assert said["labels"].startswith("'labels' beside 'images' not read; the classes of the object queries are")
    else:
        assert ("labels" in said) == (layout != "{}.png")


def test_perplexity_of_masked_tokens_equals_the_loss_of_transformers(tmp_path):
    model = bert(tmp_path / "m", "BertForMaskedLM")
    (tmp_path / "texts.txt").write_text("\n".join(texts()))
    traced = load(Settings(model=tmp_path / "m", data=tmp_path / "texts.txt", seed=3), Steps(None))
    assert traced.metric == "masked_perplexity"
    runners = {"original": graph_runner(traced.model, functools.partial(run, traced.graph))}
    found = evaluate(traced.data.test, runners, head=traced.head, metric=traced.metric, reference="original")
    total, count = 0.0, 0
    for batch in traced.data.test.batches(4):
        masked = batch.labels != -100
        plain = np.where(masked, batch.labels, batch.feeds["input_ids"])
        assert (batch.feeds["input_ids"][masked] == WORDS.index("<mask>")).all()
        assert (masked.sum(1) >= 1).all()
        assert not np.isin(plain[masked], range(len(SPECIAL))).any()
        with torch.no_grad():
            feeds = {name: torch.from_numpy(value) for name, value in batch.feeds.items()}
            loss = model(**feeds, labels=torch.from_numpy(batch.labels)).loss
        total, count = total + float(loss) * masked.sum(), count + masked.sum()
    assert found.value("original") == pytest.approx(float(np.exp(total / count)), rel=1e-4)
    other = splits.load(str(tmp_path / "texts.txt"), traced.model.preprocess, task="fill-mask", seed=4)
    again = splits.load(str(tmp_path / "texts.txt"), traced.model.preprocess, task="fill-mask", seed=3)
    first = [next(data.test.batches(4)) for data in (traced.data, again, other)]
    assert (first[0].labels == first[1].labels).all()
    assert first[0].labels.shape != first[2].labels.shape or (first[0].labels != first[2].labels).any()


def test_a_dominant_label_does_not_hide_what_a_search_would_lose(tmp_path):
    """The largest logit of every row is that of the first label, whatever is dropped; the label sets change."""
    options = {"problem_type": "multi_label_classification", **names(NAMES)}
    model = bert(tmp_path / "m", "BertForSequenceClassification", **options)
    with torch.no_grad():
        model.classifier.bias[0] = 30.0
    model.save_pretrained(tmp_path / "m")
    (tmp_path / "texts.txt").write_text("\n".join(texts()))
    traced = load(Settings(model=tmp_path / "m", data=tmp_path / "texts.txt"), Steps(None))
    assert traced.metric == "set_agreement"
    fork = traced.graph.fork()
    apply(Drop(tuple(site.name for site in traced.sites)), fork)
    feeds = {name: torch.from_numpy(value) for name, value in next(traced.data.validation.batches(12)).feeds.items()}
    sides = [run(graph, feeds)[0] for graph in (traced.graph, fork)]
    assert all((side.argmax(-1) == 0).all() for side in sides)
    parts = (traced.graph, traced.model, traced.data.validation, "set_agreement")
    lost = ValidationLoss(*parts, "agreement").loss(fork)
    differ = ((sides[0] > 0) != (sides[1] > 0)).any(-1).double().mean()
    assert lost.percent == pytest.approx(100 * float(differ))
    assert lost.percent > 20.0
    assert ValidationLoss(*parts).loss(fork).percent > 20.0  # F1 to expect by the original's probabilities


def test_two_outputs_are_exported_and_compared(tmp_path):
    data, _ = questions(tmp_path)
    done = compressor.export(tmp_path / "m", data=data, drop="none", rounds=1, output=tmp_path / "out")
    assert done.model["outputs"] == ["start_logits", "end_logits"]
    assert done.quality.metric == "exact_match"
    assert done.quality.figures["result"].value == 100.0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "question-answering" in card
    assert "`end_logits` give the last" in card


def test_rows_that_do_not_fit_are_skipped_with_the_reason(tmp_path):
    bert(tmp_path / "qa", "BertForQuestionAnswering")
    bert(tmp_path / "tags", "BertForTokenClassification", **names(TAGS))
    options = {"problem_type": "multi_label_classification", **names(NAMES)}
    bert(tmp_path / "sets", "BertForSequenceClassification", **options)
    good = {"question": "w5", "context": "w6 w7", "answers": ["w7"]}
    tagged = {"tokens": ["w5", "w6"], "ner_tags": ["O", -100]}
    labelled = {"text": "w5 w6", "labels": ["Toxic", 3]}
    cases = {
        "qa": (good, [
            ({"answers": ["w8"]}, "an answer is not in the context"),
            ({"answers": {"text": ["w7"], "answer_start": ["3"]}}, "answer_start is no list"),
            ({"answers": 7}, "the answers are no texts"),
            ({"question": " "}, "question or context is empty"),
        ]),
        "tags": (tagged, [
            ({"ner_tags": ["O"]}, "no list with a tag for each word"),
            ({"tokens": "w5 w6"}, "tokens is no list of words"),
        ]),
        "sets": (labelled, [({"labels": "toxic"}, "labels is no list of labels"), ({"text": ""}, "the text is empty")]),
    }  # fmt: skip
    for model, (row, changes) in cases.items():
        path = write_lines(tmp_path / f"{model}.jsonl", [*(row | change for change, _ in changes), *[row] * 6])
        loaded = models.load(tmp_path / model)
        read = splits.load(str(path), loaded.preprocess, task=loaded.task, class_names=loaded.class_names)
        assert len(read.skipped) == len(changes)
        for skipped, (_, reason) in zip(read.skipped, changes, strict=True):
            assert reason in skipped.reason
        batch = next(read.test.batches(2))
        if model == "sets":
            assert batch.labels[0].tolist() == [1, 0, 0, 1]
        if model == "tags":
            assert batch.labels[0].tolist() == [-100, 0, -100, -100]


def test_answers_and_questions_in_a_table(tmp_path):
    bert(tmp_path / "m", "BertForQuestionAnswering")
    rows = ["question,context,answer", "w5,w6 w7,w7,", *["w5,w6 w7,w7"] * 3, "w5,w6 w7,"]
    (tmp_path / "qa.csv").write_text("\n".join(rows))
    model = models.load(tmp_path / "m")
    read = splits.load(str(tmp_path / "qa.csv"), model.preprocess, task=model.task)
    assert [(each.id, each.reason) for each in read.skipped] == [("0", "4 columns, expected 3")]
    spans = [span for part in (read.calibration, read.validation, read.test) for span in next(part.batches(9)).labels]
    assert sorted(span[0].tolist() for span in spans) == [[0, 0], [4, 4], [4, 4], [4, 4]]
    (tmp_path / "bare.csv").write_text("w5 w6,w7\nw8 w9,w10\n")
    with pytest.raises(CompressorError, match="has the fields none; question answering needs question and context"):
        splits.load(str(tmp_path / "bare.csv"), model.preprocess, task=model.task)


def test_label_numbers_need_no_names_but_a_place_among_the_models_labels(tmp_path):
    bert(tmp_path / "m", "BertForSequenceClassification", problem_type="multi_label_classification", num_labels=4)
    model = models.load(tmp_path / "m")
    path = write_lines(tmp_path / "sets.jsonl", [{"text": "w5", "labels": [1]}] * 6)
    read = splits.load(str(path), model.preprocess, task=model.task)
    assert next(read.test.batches(1)).labels.tolist() == [[0, 1, 0, 0]]
    for label, message in (
        (4, "the label 4, but the model has 4 labels"),
        (-1, "the label -1, but the model does not"),
    ):
        path = write_lines(tmp_path / "sets.jsonl", [{"text": "w5", "labels": [label]}] * 6)
        with pytest.raises(CompressorError, match=message):
            splits.load(str(path), model.preprocess, task=model.task)


def test_fields_that_a_task_does_not_read_are_said(tmp_path):
    bert(tmp_path / "m", "BertForSequenceClassification", num_labels=2)
    rows = [{"text": "w5", "label": number % 2, "spans": [1]} for number in range(6)]
    model = models.load(tmp_path / "m")
    read = splits.load(str(write_lines(tmp_path / "t.jsonl", rows)), model.preprocess, task=model.task)
    assert read.label_kind == "class"
    assert "spans not read" in next(each.reason for each in read.limitations if each.feature == "fields of the data")


def test_contexts_that_are_truncated_are_counted(tmp_path):
    bert(tmp_path / "m", "BertForQuestionAnswering")
    rows = [{"question": "w5", "context": " ".join(["w6"] * length)} for length in (3, 4, 5, 6, 90)]
    model = models.load(tmp_path / "m")
    read = splits.load(str(write_lines(tmp_path / "t.jsonl", rows)), model.preprocess, task=model.task)
    reasons = [each.reason for each in read.limitations if each.feature != "equal samples"]
    assert reasons == ["1 of 5 texts have more than 48 tokens and are truncated"]


class Span(torch.nn.Module):
    """A module of one's own for question answering, or with other names of its outputs."""

    def __init__(self, *outputs):
        super().__init__()
        self.outputs, self.embedding = outputs, torch.nn.Embedding(40, 2)

    def forward(self, input_ids):
        return dict(zip(self.outputs, self.embedding(input_ids).unbind(-1), strict=True))


def test_ones_own_module_answers_questions_by_the_names_of_its_outputs():
    ids = torch.arange(12).reshape(2, 6)
    model = models.load(
        Span("start_logits", "end_logits"), example_inputs={"input_ids": ids}, task="question-answering"
    )
    assert (model.answer, model.stacked) == ("start_logits", ("end_logits",))
    with pytest.raises(
        ModelError, match="returns first, last, but question-answering needs start_logits and end_logits"
    ):
        models.load(Span("first", "last"), example_inputs={"input_ids": ids}, task="question-answering")
    with pytest.raises(ModelError, match=r"2 axes, but image-segmentation needs logits \[batch, classes"):
        models.load(Span("a", "b"), example_inputs={"input_ids": ids}, task="image-segmentation")


@pytest.mark.parametrize("task", ["image-segmentation", "depth-estimation", "fill-mask"])
def test_timm_models_have_no_other_heads(task):
    with pytest.raises(ModelError, match=f"timm model, which does not support the task {task}"):
        models.load("vit_tiny_patch16_224", task=task, random_weights=True)


def test_heads_that_are_not_known_are_refused(tmp_path):
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=32,
    )  # fmt: skip
    transformers.ViTForMaskedImageModeling(config).save_pretrained(tmp_path / "m")
    with pytest.raises(ModelError, match=r"ViTForMaskedImageModeling.*--task image-feature-extraction"):
        models.load(tmp_path / "m")


@pytest.mark.parametrize(
    ("head", "options", "data", "sentence"),
    [
        ("BertForQuestionAnswering", {}, "texts.txt", "needs a question and a context"),
        ("BertForTokenClassification", names(TAGS), "wrong.jsonl", "tags that the model does not name (B-LOC"),
        ("BertForTokenClassification", names(TAGS), "nested.jsonl", "tags that the model does not name (['O']"),
        ("BertForTokenClassification", names(TAGS), "huge.jsonl", f"tags that the model does not name ({10**30};"),
        ("BertForTokenClassification", names(TAGS), "true.jsonl", "tags that the model does not name (True;"),
        (
            "BertForTokenClassification",
            names(TAGS),
            "minus.npz",
            "holds the label -1; expected class numbers from 0, a",
        ),
        ("BertForTokenClassification", names(TAGS), "longer.npz", "labels of shape [12, 7]; expected [12, 6]"),
        (
            "BertForSequenceClassification",
            {"problem_type": "multi_label_classification", **names(NAMES)},
            "twos.npz",
            "holds the label 2; expected 0 or 1 for each label of the model",
        ),
        ("BertForSequenceClassification", names(NAMES), "sets.jsonl", "predicts one class; pass --problem-type"),
        (
            "BertForSequenceClassification",
            {"problem_type": "multi_label_classification", **names(NAMES)},
            "narrow.npz",
            "sets of 3 labels, but m has 4",
        ),
    ],
)
def test_data_that_does_not_fit_the_head_is_refused(head, options, data, sentence, tmp_path):
    bert(tmp_path / "m", head, **options)
    (tmp_path / "texts.txt").write_text("\n".join(texts()))
    write_lines(tmp_path / "wrong.jsonl", [{"tokens": ["w5", "w6"], "ner_tags": ["O", "B-LOC"]}] * 6)
    for name, tag in (("nested", ["O"]), ("huge", 10**30), ("true", True)):
        write_lines(tmp_path / f"{name}.jsonl", [{"tokens": ["w5", "w6"], "ner_tags": ["O", tag]}] * 6)
    ids = np.random.default_rng(0).integers(5, 40, (12, 6))
    np.savez(tmp_path / "minus.npz", input_ids=ids, labels=ids % 2 - 1)
    np.savez(tmp_path / "longer.npz", input_ids=ids, labels=np.zeros((12, 7), dtype=int))
    np.savez(tmp_path / "twos.npz", input_ids=ids, labels=ids[:, :4] % 3)
    np.savez(tmp_path / "narrow.npz", input_ids=ids, labels=np.eye(3, dtype=int)[np.arange(12) % 3])
    write_lines(tmp_path / "sets.jsonl", [{"text": text, "labels": ["toxic", "threat"]} for text in texts(12)])
    with pytest.raises(CompressorError) as caught:
        load(Settings(model=tmp_path / "m", data=tmp_path / data), Steps(None))
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("options", "requested", "expected"),
    [
        ({}, None, None),
        ({"num_labels": 1}, None, "regression"),
        ({"num_labels": 1}, "multi_label_classification", "multi_label_classification"),
        ({"problem_type": "multi_label_classification"}, None, "multi_label_classification"),
    ],
)
def test_the_problem_type_is_that_of_the_config_or_as_requested(options, requested, expected, tmp_path):
    bert(tmp_path / "m", "BertForSequenceClassification", **options)
    model = models.load(tmp_path / "m", problem_type=requested)
    assert model.problem_type == expected == model.preprocess.problem_type
    assumed = [each for each in model.limitations if each.feature == "problem type"]
    assert len(assumed) == (1 if (expected, requested) == ("regression", None) else 0)


def test_a_problem_type_is_refused_for_other_tasks(tmp_path):
    bert(tmp_path / "m", "BertForMaskedLM")
    with pytest.raises(ModelError, match="--problem-type is for classifiers, but"):
        models.load(tmp_path / "m", problem_type="regression")


def test_the_f1_of_entities_is_beside_the_accuracy_of_tokens(tmp_path):
    """The model itself made the tags, so all of its entities are right."""
    path, metric = tagged(tmp_path)
    traced = load(Settings(model=tmp_path / "m", data=path), Steps(None))
    runners = {"original": graph_runner(traced.model, functools.partial(run, traced.graph))}
    found = evaluate(traced.data.test, runners, head=traced.head, metric=metric, reference="original")
    assert {name: figure.value for name, figure in found.further("original").items()} == {"entity_f1": 100.0}
