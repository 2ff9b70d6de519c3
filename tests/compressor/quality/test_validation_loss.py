"""Tests of the validation loss: a pass stops early only if the loss is certain to exceed the limit."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from compressor.lower.trace import trace
from compressor.quality import validation_loss
from compressor.quality.evaluate import EvaluationError, tensor_batches
from compressor.quality.validation_loss import Loss, ValidationLoss
from passes.base import apply
from passes.execute.interpreter import run
from passes.graph.sites import find_sites
from passes.rewrite.drop import Drop
from tests.samples import BY_NAME, Tensors, digits, small, spread


def without(graph, sites):
    fork = graph.fork()
    apply(Drop(tuple(sites)), fork)
    return fork


@pytest.mark.parametrize(
    ("metric", "budget"),
    [
        ("accuracy", "accuracy"),
        ("agreement", "accuracy"),
        ("accuracy", "agreement"),
        ("agreement", "divergence"),
        ("fidelity", "accuracy"),
    ],
)
def test_lower_bound_never_exceeds_the_loss(metric, budget, monkeypatch):
    monkeypatch.setattr(validation_loss, "BATCH", 5)
    model, graph, sites, split = small(spread())
    model = dataclasses.replace(model, task="feature-extraction") if metric == "fidelity" else model
    split.labels = np.arange(24) % 5
    validation = ValidationLoss(graph, model, split, metric, budget)
    stopped = 0
    for skip in ([sites[0]], sites[:2], sites):
        whole = validation.loss(without(graph, skip))
        assert whole.samples == 24
        for limit in (0.0, whole.percent / 2, whole.percent, 1e9):
            before = validation.sweeps
            early = validation.loss(without(graph, skip), limit=limit)
            assert early.percent <= whole.percent + 1e-9
            assert (early.percent > limit + 1e-9) == (whole.percent > limit + 1e-9)
            assert early == whole or early.percent > limit
            assert validation.sweeps - before == pytest.approx(early.samples / 24)
            stopped += early.samples < 24
    assert stopped
    assert validation.loss(graph).percent == pytest.approx(0.0, abs=1e-5)  # float32 cosines


def test_budget_of_agreement_is_the_share_of_changed_predictions():
    model, graph, sites, split = small(spread())
    validation = ValidationLoss(graph, model, split, "agreement", "agreement")
    for site in sites:
        other = without(graph, [site])
        feeds = next(tensor_batches(split))
        differs = run(graph, feeds)[0].argmax(-1) != run(other, feeds)[0].argmax(-1)
        assert validation.loss(other).percent == pytest.approx(float(differs.double().mean()) * 100)


def test_without_labels_the_loss_is_the_accuracy_to_expect_by_the_original():
    model, graph, sites, split = small(spread())
    validation = ValidationLoss(graph, model, split, "agreement")
    feeds = next(tensor_batches(split))
    shares = run(graph, feeds)[0].double().softmax(-1)
    for site in sites:
        chosen = run(without(graph, [site]), feeds)[0].argmax(-1, keepdim=True)
        expected = (shares.amax(-1) - shares.gather(-1, chosen)[:, 0]).mean() * 100
        assert validation.loss(without(graph, [site])).percent == pytest.approx(float(expected), abs=1e-4)
        assert validation.sample_losses(without(graph, [site])).mean() * 100 == pytest.approx(float(expected), abs=1e-4)


def test_budget_of_divergence_is_in_hundredths_of_a_nat():
    model, graph, sites, split = small(spread())
    validation = ValidationLoss(graph, model, split, "agreement", "divergence")
    feeds = next(tensor_batches(split))
    before = run(graph, feeds)[0].double().log_softmax(-1)
    for site in sites:
        after = run(without(graph, [site]), feeds)[0].double().log_softmax(-1)
        rows = (before.exp() * (before - after)).sum(-1)
        nats = rows.mean()
        assert validation.loss(without(graph, [site])).percent == pytest.approx(float(nats) * 100, rel=1e-3, abs=1e-4)
        error = float(rows.std(correction=0)) / math.sqrt(len(rows)) * 100
        with_error = validation.loss(without(graph, [site]), with_error=True)
        assert with_error.error == pytest.approx(error, rel=1e-3, abs=1e-4)
        assert validation.sample_losses(without(graph, [site])) is None  # unbounded


def test_samples_with_the_smallest_margin_come_first():
    model, data, graph, _ = digits()
    validation = ValidationLoss(graph, model, data.validation, "accuracy")
    assert sorted(validation.split.indices) == sorted(data.validation.indices)
    with torch.inference_mode():
        answers = torch.cat([run(graph, feeds)[0] for feeds in tensor_batches(validation.split)])
    best = answers.topk(2).values
    assert ((best[:, 0] - best[:, 1]).diff() >= -1e-5).all()  # outputs round differently in other batches
    assert validation.loss(graph).percent == 0.0


def test_perplexity_stops_early_only_above_the_limit(monkeypatch):
    monkeypatch.setattr(validation_loss, "BATCH", 1)
    model = dataclasses.replace(BY_NAME["hf_bert"].load(), task="text-generation")
    graph = trace(model)
    feeds = {name: value.numpy() for name, value in model.example.items()}
    feeds["input_ids"] = feeds["input_ids"] % 8  # the hidden state serves as logits of 8 or more classes
    split = Tensors({name: np.concatenate([value] * 3) for name, value in feeds.items()})
    validation = ValidationLoss(graph, model, split, "perplexity")
    bare = without(graph, find_sites(graph))
    whole = validation.loss(bare)
    early = validation.loss(bare, limit=-99.0)
    assert early.samples < whole.samples == 6
    assert -99.0 < early.percent <= whole.percent
    assert validation.loss(graph).percent == pytest.approx(0.0, abs=1e-9)
    assert validation.evaluations == pytest.approx(3 + early.samples / 6, abs=0.005)


def test_non_finite_output_has_infinite_loss():
    model, graph, _, split = small()
    broken = small(lambda module: module.blocks[1].mlp.fc2.weight.fill_(math.nan))[1]
    assert ValidationLoss(graph, model, split, "agreement").loss(broken, limit=50.0) == Loss(math.inf, 24)


def test_original_with_nan_raises():
    model, graph, _, split = small(lambda module: module.head.weight.fill_(math.nan))
    with pytest.raises(EvaluationError, match="gave NaN or infinity for sample 0"):
        ValidationLoss(graph, model, split, "agreement")


@pytest.mark.parametrize("metric", ["accuracy", "agreement", "fidelity"])
def test_outputs_of_the_original_that_are_not_kept_are_computed_again(metric, monkeypatch):
    monkeypatch.setattr(validation_loss, "BATCH", 5)
    model, graph, sites, split = small(spread())
    model = dataclasses.replace(model, task="feature-extraction") if metric == "fidelity" else model
    split.labels = np.arange(24) % 5
    kept = ValidationLoss(graph, model, split, metric)
    monkeypatch.setattr(validation_loss, "KEPT", 0)
    again = ValidationLoss(graph, model, split, metric)
    assert again._originals == [None] * 5
    fork = without(graph, sites[:2])
    assert again.loss(fork).percent == pytest.approx(kept.loss(fork).percent, abs=1e-5)  # float32
    assert again.sweeps - kept.sweeps == pytest.approx(1.0)  # the original ran once more
