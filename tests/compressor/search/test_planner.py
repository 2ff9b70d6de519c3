"""Merges beside a plan; the journal of a search belongs to its settings, weights and samples, not to their names."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from compressor.lower.traced_model import TracedModel
from compressor.search.planner import ChoiceError, journal_of, merge_schedule
from compressor.settings import Settings
from passes.analysis.counted_cost import Costs
from passes.graph.graph import attribute
from tests.samples import DIGITS, digits


def traced() -> TracedModel:
    model, data, graph, sites = digits()
    return TracedModel(model, data, graph, sites, Costs(graph, {"pixel_values": model.example[model.inputs[0]]}))


def resumed(subject: TracedModel, output: Path, **changes: object) -> int:
    """Return the number of values that a search of this model and data takes over."""
    return journal_of(subject, Settings(data=DIGITS, output=output, **changes)).resumed  # type: ignore[arg-type]


def test_a_journal_is_resumed_with_the_same_weights_and_samples_only(tmp_path: Path) -> None:
    """A model that was trained further, or another file of the same name, once got the values of the one before."""
    subject, output = traced(), tmp_path / "out"

    def begin() -> None:
        journal_of(subject, Settings(data=DIGITS, output=output)).note("key", 0.5)

    begin()
    assert resumed(subject, output) == resumed(subject, output, rounds=9) == 1
    assert resumed(subject, output, seed=3) == 0

    begin()
    node = next(node for node in subject.graph.nodes() if node.op == "get_attr")
    with torch.no_grad():
        weight = attribute(subject.graph, node)
        before = weight.clone()
        weight.view(-1)[0] += 1.0
        assert resumed(subject, output) == 0
        weight.copy_(before)

    for part in ("calibration", "validation"):
        begin()
        split = getattr(subject.data, part)
        feeds = split.samples.feeds
        labelled = dataclasses.replace(split.samples, labels=(split.samples.labels + 1) % 10)
        darker = dataclasses.replace(
            split.samples, feeds=lambda rows, feeds=feeds: {name: value / 2 for name, value in feeds(rows).items()}
        )
        assert resumed(subject, output) == 1
        for samples in (labelled, darker):
            begin()
            other = dataclasses.replace(subject.data, **{part: dataclasses.replace(split, samples=samples)})
            assert resumed(dataclasses.replace(subject, data=other), output) == 0


def test_the_digest_of_a_split_is_that_of_its_content() -> None:
    split = digits()[1].validation
    assert split.digest() == split.digest()
    assert split.digest() != split.head(3).digest()
    assert split.digest() == dataclasses.replace(split, name="test").digest()
    turned = dataclasses.replace(split, indices=tuple(np.roll(split.indices, 1).tolist()))
    assert split.digest() != turned.digest()


def test_tokens_are_merged_after_the_attentions_that_a_plan_keeps() -> None:
    sites = digits()[3]
    names = [site.name for site in sites if site.kind == "attention"]
    kept = names[:1] + names[2:]
    assert merge_schedule("4", sites, names[1:2]) == dict.fromkeys(kept, "merge:4")
    share = merge_schedule("50%", sites, names[:3])
    assert list(share) == [names[3 + (len(names) - 3) // 4], names[3 + (len(names) - 3) // 2]]
    assert set(share.values()) == {"merge:29%"}  # (1 - 0.29)^2 is half
    assert merge_schedule("40%", sites, names[1:]) == {names[0]: "merge:40%"}
    numbers = ",".join("0" if name == names[1] else "2" for name in names)
    assert merge_schedule(numbers, sites, names[1:2]) == dict.fromkeys(kept, "merge:2")


def test_tokens_that_cannot_be_merged_are_one_sentence() -> None:
    sites = digits()[3]
    names = [site.name for site in sites if site.kind == "attention"]
    for changed, words in (
        (names, "the plan keeps no attention; leave out"),
        (names[1:], f"the only one that the plan keeps is {names[0]}, after which less than half"),
    ):
        with pytest.raises(ChoiceError, match=words):
            merge_schedule("50%", sites, changed)
    with pytest.raises(ChoiceError, match="the model has none; leave out"):
        merge_schedule("8", [site for site in sites if site.kind != "attention"])
