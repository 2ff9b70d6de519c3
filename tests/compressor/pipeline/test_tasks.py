"""Every task on a small model of transformers: labels that the model itself predicts give a perfect score.

The labels come from transformers' own pipelines and classes, so that reading, tokenization and metric are checked
together.
"""

import dataclasses
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


def scenes(folder):
    """Masks come from the post-processing of transformers' own image processor."""
    torch.manual_seed(0)
    config = transformers.SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[16, 32], patch_sizes=[7, 3],
        strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=16, num_labels=4,
        image_size=32, initializer_range=0.4,
    )  # fmt: skip
    model = transformers.SegformerForSemanticSegmentation(config).eval()
    processor = transformers.SegformerImageProcessor(size={"height": 32, "width": 32})
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
        Image.fromarray(mask.numpy().astype(np.uint8)).save(folder / "scenes" / "masks" / f"{index}.png")
    return folder / "scenes", "mean_iou"


LABELLED = {"tags": tagged, "conll": conll, "sets": label_sets, "lists": label_lists, "scores": scores,
            "spans": questions, "masks": scenes}  # fmt: skip


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
    lost = ValidationLoss(traced.graph, traced.model, traced.data.validation, "set_agreement").loss(fork)
    differ = ((sides[0] > 0) != (sides[1] > 0)).any(-1).double().mean()
    assert lost.percent == pytest.approx(100 * float(differ))
    assert lost.percent > 20.0


def test_two_outputs_are_exported_and_compared(tmp_path):
    data, _ = questions(tmp_path)
    done = compressor.export(tmp_path / "m", data=data, drop="none", rounds=1, output=tmp_path / "out")
    assert done.model["outputs"] == ["start_logits", "end_logits"]
    assert done.quality.metric == "exact_match"
    assert done.quality.figures["result"].value == 100.0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "question-answering" in card
    assert "`end_logits` give the last" in card


def test_heads_that_are_not_known_are_refused(tmp_path):
    config = transformers.YolosConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=[32, 32],
        num_detection_tokens=4,
    )  # fmt: skip
    transformers.YolosForObjectDetection(config).save_pretrained(tmp_path / "m")
    with pytest.raises(ModelError, match=r"YolosForObjectDetection.*--task image-feature-extraction"):
        models.load(tmp_path / "m")


@pytest.mark.parametrize(
    ("head", "options", "data", "sentence"),
    [
        ("BertForQuestionAnswering", {}, "texts.txt", "needs a question and a context"),
        ("BertForTokenClassification", names(TAGS), "wrong.jsonl", "tags that the model does not name (B-LOC"),
        ("BertForSequenceClassification", names(NAMES), "sets.npz", "predicts one class; pass --problem-type"),
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
    ids = np.random.default_rng(0).integers(5, 40, (12, 6))
    np.savez(tmp_path / "narrow.npz", input_ids=ids, labels=np.eye(3, dtype=int)[np.arange(12) % 3])
    write_lines(tmp_path / "sets.jsonl", [{"text": text, "labels": ["toxic", "threat"]} for text in texts(12)])
    if data == "sets.npz":
        settings = Settings(model=tmp_path / "m", data=tmp_path / "sets.jsonl")
        model = dataclasses.replace(models.load(tmp_path / "m"), problem_type="single_label_classification")
        preprocess = dataclasses.replace(model.preprocess, problem_type="multi_label_classification")
        read = splits.load(str(settings.data), preprocess, task=model.task, class_names=model.class_names)
        from compressor.lower.traced_model import _check_labels

        with pytest.raises(CompressorError, match=sentence):
            _check_labels(read, model)
        return
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
    with pytest.raises(ModelError, match="--problem-type is for image and text classifiers"):
        models.load(tmp_path / "m", problem_type="regression")
