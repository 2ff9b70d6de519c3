"""Random outputs of each head, before and after a change, with labels of the kind that the head takes."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from compressor.quality.heads.base import Head
from compressor.quality.heads.registry import head_for

ROWS, TOKENS, CLASSES = 24, 9, 5


@dataclass(frozen=True)
class Case:
    """A head with the shape of its output and its labels.

    `labels` returns all labels from a generator, `tokens` tells that the output has one value per token.
    """

    name: str
    head: Head
    shape: tuple[int, ...]
    labels: Callable | None = None
    tokens: bool = False
    positive: bool = False

    def __str__(self):
        return self.name

    def outputs(self):
        """Return the output of the original and of a changed model, float32 [rows, ...]."""
        rng = np.random.default_rng(1)
        original = rng.normal(size=(ROWS, *self.shape)).astype(np.float32) * 2
        changed = original + rng.normal(size=original.shape).astype(np.float32)
        return (np.exp(original), np.exp(changed)) if self.positive else (original, changed)

    def batch(self, rows):
        """Return feeds, labels and scored positions of some rows."""
        rng = np.random.default_rng(2)
        mask = (np.arange(TOKENS) < rng.integers(3, TOKENS + 1, (ROWS, 1))).astype(np.int64)
        feeds = {"input_ids": rng.integers(0, CLASSES, (ROWS, TOKENS)), "attention_mask": mask} if self.tokens else {}
        labels = None if self.labels is None else self.labels(rng)
        if labels is not None and self.tokens and labels.shape == mask.shape:
            labels = np.where(mask > 0, labels, -100)
        index = list(rows)
        cut = {name: value[index] for name, value in feeds.items()}
        scored = mask[index].astype(bool) if self.tokens and self.name != "next tokens" else None
        return cut, None if labels is None else labels[index], scored


def rows_of(values, rows):
    """Return some rows as a new array."""
    return values[list(rows)]


def spans(rng):
    first = rng.integers(0, 3, (ROWS, 2))
    return np.stack([first, first], -1)


def _cases():
    classes = ("single class", head_for("image-classification"), (CLASSES,), lambda rng: rng.integers(0, CLASSES, ROWS))
    sets = lambda rng: rng.integers(0, 2, (ROWS, CLASSES))  # noqa: E731
    by_token = lambda rng: rng.integers(0, CLASSES, (ROWS, TOKENS))  # noqa: E731
    labels = Case("label sets", head_for("text-classification", "multi_label_classification"), (CLASSES,), sets)
    numbers = Case("numbers", head_for("text-classification", "regression"), (1,), lambda rng: rng.normal(size=ROWS))
    masked = Case("masked tokens", head_for("fill-mask"), (TOKENS, CLASSES), by_token, tokens=True)
    tagged = Case("tagged tokens", head_for("token-classification"), (TOKENS, CLASSES), by_token, tokens=True)
    answers = Case("spans", head_for("question-answering"), (2, TOKENS), spans, tokens=True)
    pixels = Case(
        "pixels", head_for("image-segmentation"), (CLASSES, 4, 6), lambda rng: rng.integers(0, CLASSES, (ROWS, 4, 6))
    )
    yield from ((Case(*classes), metric) for metric in ("accuracy", "agreement"))
    yield from ((labels, metric) for metric in ("f1", "set_agreement"))
    yield from ((numbers, metric) for metric in ("mae", "rank_correlation", "r_squared"))
    yield Case("next tokens", head_for("text-generation"), (TOKENS, CLASSES), tokens=True), "perplexity"
    yield from ((masked, metric) for metric in ("masked_perplexity", "token_agreement"))
    translated = Case("target tokens", head_for("text2text-generation"), (TOKENS, CLASSES), by_token, tokens=True)
    yield from ((translated, metric) for metric in ("perplexity", "token_agreement"))
    described = Case("texts behind images", head_for("image-text-to-text"), (TOKENS, CLASSES), by_token, tokens=True)
    yield from ((described, metric) for metric in ("perplexity", "token_agreement"))
    yield from ((tagged, metric) for metric in ("token_accuracy", "token_agreement"))
    frames = Case("frames", head_for("ctc"), (TOKENS, CLASSES), tokens=True)
    yield frames, "frame_agreement"
    yield Case("object queries", head_for("object-detection"), (TOKENS, CLASSES)), "query_agreement"
    yield from ((answers, metric) for metric in ("exact_match", "span_agreement"))
    yield from ((pixels, metric) for metric in ("mean_iou", "pixel_agreement"))
    yield Case("depth", head_for("depth-estimation"), (4, 6), positive=True), "depth_agreement"
    yield Case("features", head_for("feature-extraction"), (CLASSES,)), "fidelity"
    zero_shot = Case("classes as texts", head_for("zero-shot-image-classification"), (CLASSES,), classes[3])
    yield from ((zero_shot, metric) for metric in ("accuracy", "agreement"))
    yield Case("embeddings of two towers", head_for("feature-extraction"), (2, CLASSES)), "fidelity"
    yield Case("embedding", head_for("sentence-similarity"), (CLASSES,)), "fidelity"


CASES = tuple(_cases())
