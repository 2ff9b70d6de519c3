"""Tests of disagreements: the streamed worst samples against those computed from all outputs at once."""

from types import SimpleNamespace

import numpy as np
import pytest

from compressor.quality.disagreements import KEPT
from compressor.quality.evaluate import evaluate
from compressor.quality.heads.registry import head_for


class Rows:
    """A split whose only input is the row index, so that runners can look up prepared outputs."""

    def __init__(self, count, labels=None):
        self.count, self.labels = count, labels

    def __len__(self):
        return self.count

    def bounded_batches(self, size):
        for start in range(0, self.count, size):
            part = np.arange(start, min(start + size, self.count))
            labels = None if self.labels is None else self.labels[part]
            yield SimpleNamespace(
                feeds={"x": part}, labels=labels, rows_per_sample=1, ids=tuple(f"s{row}" for row in part)
            )


@pytest.mark.parametrize("count", [5, 60])
@pytest.mark.parametrize("labelled", [True, False])
def test_worst_disagreements_are_sorted_by_regret(count, labelled):
    rng = np.random.default_rng(count)
    before, after = rng.standard_normal((2, count, 3)).astype(np.float32) * 2.0
    labels = rng.integers(0, 3, count) if labelled else None
    metric = "accuracy" if labelled else "agreement"
    runners = {"old": lambda feeds: before[feeds["x"]], "new": lambda feeds: after[feeds["x"]]}
    evaluation = evaluate(
        Rows(count, labels),
        runners,
        head=head_for("image-classification"),
        metric=metric,
        reference="old",
        batch_size=7,
    )
    assert evaluation.changed["old"] == []
    changed = evaluation.changed["new"]
    differing = np.flatnonzero(before.argmax(-1) != after.argmax(-1))
    expected = sorted(differing.tolist(), key=lambda row: -evaluation.columns["new"]["regret"][row])[:KEPT]
    assert [sample.place for sample in changed] == expected
    probabilities = [np.exp(side) / np.exp(side).sum(-1, keepdims=True) for side in (before, after)]
    for sample in changed:
        assert sample.id == f"s{sample.place}"
        assert sample.label == (None if labels is None else labels[sample.place])
        for (answer, probability), side in zip((sample.before, sample.after), probabilities, strict=True):
            assert answer == side[sample.place].argmax()
            assert probability == pytest.approx(side[sample.place].max(), rel=1e-5)  # float32 against float64


def test_other_metrics_have_no_disagreements():
    answers = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
    runners = {"old": lambda feeds: answers[feeds["x"]], "new": lambda feeds: -answers[feeds["x"]]}
    assert evaluate(
        Rows(6), runners, head=head_for("feature-extraction"), metric="fidelity", reference="old"
    ).changed == {"old": [], "new": []}
