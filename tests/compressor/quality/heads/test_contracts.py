"""Contracts of all heads: the divergence of equal outputs, bounds of the loss, and equal columns in any batches."""

import numpy as np
import pytest
import torch

from compressor.data.splits import Batch
from compressor.quality.evaluate import join, loss, metric_value, sample_columns
from compressor.quality.heads.registry import CLASSIFIERS, HEADS, head_for
from compressor.quality.metrics import METRICS
from tests.compressor.quality.heads.outputs import CASES, rows_of

ROWS = 24


def batch_of(case, rows, labelled):
    feeds, labels, scored = case.batch(rows) if labelled else (case.batch(rows)[0], None, case.batch(rows)[2])
    return Batch(feeds, labels, 1, tuple(f"s{row}" for row in rows), scored)


def all_columns(case, metric, answer, original, size):
    parts = []
    for start in range(0, ROWS, size):
        rows = range(start, min(start + size, ROWS))
        batch = batch_of(case, rows, not METRICS[metric].compares)
        parts.append(sample_columns(case.head, metric, batch, rows_of(answer, rows), rows_of(original, rows)))
    return join(parts)


def test_every_head_has_a_case():
    heads = {type(head) for head in (*HEADS.values(), *CLASSIFIERS.values())}
    assert {type(case.head) for case, _ in CASES} == heads
    assert {metric for _, metric in CASES} | {"spearman", "entity_f1"} == set(METRICS)  # reported beside others


@pytest.mark.parametrize(("case", "metric"), CASES, ids=str)
def test_an_unchanged_output_loses_nothing(case, metric):
    original, _ = case.outputs()
    columns = all_columns(case, metric, original, original, ROWS)
    same, other = torch.from_numpy(original), torch.from_numpy(case.outputs()[1])
    assert case.head.divergence(same, same).abs().max() < 1e-6
    assert (case.head.divergence(other, same) > 0).all()
    assert float(case.head.training_loss(other, same)) > 0
    if METRICS[metric].compares:
        assert metric_value(metric, columns) == pytest.approx(100.0)
    expected = case.head.expected_loss(metric, columns)
    assert expected is None or expected == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize(("case", "metric"), CASES, ids=str)
def test_columns_do_not_depend_on_the_batches(case, metric):
    original, answer = case.outputs()
    once, often = (all_columns(case, metric, answer, original, size) for size in (ROWS, 5))
    assert once.keys() == often.keys()
    for name, values in once.items():
        assert values.shape == (ROWS,)
        np.testing.assert_allclose(values, often[name], rtol=1e-5, atol=1e-6)  # float32 sums


@pytest.mark.parametrize(("case", "metric"), CASES, ids=str)
def test_the_bound_of_the_first_samples_never_exceeds_the_loss(case, metric):
    original, answer = case.outputs()
    before, after = (all_columns(case, metric, side, original, ROWS) for side in (original, answer))
    value = metric_value(metric, before)
    expected = None if METRICS[metric].compares else case.head.expected_loss(metric, after)
    lost = max(loss(metric, value, metric_value(metric, after)), -np.inf if expected is None else expected)
    bounds = [
        case.head.lower_bound(metric, {name: column[:count] for name, column in after.items()}, before, value)
        for count in (1, 7, ROWS - 1, ROWS)
    ]
    assert bounds == sorted(bounds) or metric in ("perplexity", "masked_perplexity")
    assert max(bounds) <= lost + 1e-9
    if metric in BOUNDED:
        assert bounds[-1] > 0


BOUNDED = {
    "accuracy", "agreement", "set_agreement", "token_accuracy", "token_agreement", "span_agreement", "pixel_agreement",
    "depth_agreement", "fidelity",
}  # fmt: skip


def test_a_task_with_a_problem_type_has_its_head():
    assert head_for("text-classification", "multi_label_classification").metric("labels") == "f1"
    assert head_for("image-classification", "regression").metric("score") == "mae"
    assert head_for("text-classification", "regression").metric("score", pairs=True) == "rank_correlation"
    assert head_for("text-classification").metric("class") == "accuracy"
    assert head_for("depth-estimation", None).metric("pixels") == "depth_agreement"
