"""Evidence in the report: scores of the sites, and the number of tokens that enter each site."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from compressor.data.readers.base import Samples
from compressor.data.splits import Split
from compressor.search.site_evidence import (
    SAMPLES,
    evidence,
    nested,
    of_zeros,
    scores_for_report,
    tokens_left,
    zeros_of,
)
from passes.analysis.redundancy import Score
from passes.base import apply
from passes.execute.interpreter import Program
from passes.merge_tokens.token_merging import ReduceTokens
from passes.rewrite.drop import Drop
from tests.samples import small


@pytest.fixture(scope="module")
def subject():
    """A ViT of three blocks with 40 images as a split."""
    _, graph, sites, images = small(depth=3)
    rows = np.concatenate([images.feeds["x"], images.feeds["x"]])[:40]
    ids = tuple(map(str, range(len(rows))))
    return graph, sites, Split("test", Samples(ids, lambda part: {"x": rows[list(part)]}, ""), tuple(range(len(rows))))


def test_scores_are_those_of_one_sweep_over_a_few_samples(subject):
    graph, sites, split = subject
    scores = scores_for_report(graph, split)
    few = [torch.from_numpy(split.head(SAMPLES).samples.feeds(split.head(SAMPLES).indices)["x"])]
    expected = apply(Score(), graph, [{"x": few[0]}])
    assert scores.samples == expected.samples == SAMPLES
    content = evidence(sites, scores, {sites[1].name: 0.25, sites[2].name: math.inf})
    assert json.loads(json.dumps(content, allow_nan=False)) == content
    for site in sites:
        # The same float32 states, summed in float64 in batches of another size.
        assert content["sites"][site.name]["cosine"] == pytest.approx(expected.cosine(site.name), rel=1e-5)
    effects = [content["sites"][site.name]["effect"] for site in sites[:3]]
    assert effects == [None, 0.25, None]
    assert content["states"] == [*(site.name for site in sites), "output"]
    assert np.shape(content["similarity"]) == (len(sites) + 1, len(sites) + 1)


def test_evidence_is_empty_without_measurements(subject):
    assert evidence(subject[1], None, {}) == {}
    assert "similarity" not in evidence(subject[1], None, {"a": 1.0})
    assert nested([[math.nan, 1.0]]) == [[None, 1.0]]


def test_tokens_that_scores_leave_out_are_a_limitation(subject):
    graph, sites, split = subject
    scores = scores_for_report(graph, split)
    assert zeros_of(scores) == {}
    assert list(of_zeros({})) == []
    first, second, *_ = scores.sites
    blank = {name: dataclasses.replace(scores.sites[name], zeros=5 + (name == second)) for name in (first, second)}
    found = dataclasses.replace(scores, sites={**scores.sites, **blank})
    content = evidence(sites, found, {})
    assert content["zeros"] == {first: 5, second: 6}
    (limitation,) = of_zeros(content["zeros"])
    assert limitation.reason.startswith(f"6 tokens at {second} and up to as many at 1 others are left out of cosines")
    (alone,) = of_zeros({second: 6})
    assert alone.reason.startswith(f"6 tokens at {second} are left out of cosines")


def test_there_are_no_scores_if_a_state_is_not_finite(subject):
    graph, _, split = subject
    rows = Samples(split.ids, lambda part: {"x": np.full((len(part), 3, 32, 32), np.nan, np.float32)}, "")
    broken = Split("test", rows, split.indices)
    assert scores_for_report(graph, broken) is None


def test_tokens_are_counted_at_every_site(subject):
    """The counts are compared with the shapes of a run of the reduced graph."""
    graph, sites, split = subject
    whole = tokens_left(graph, sites, split)
    count = next(iter(whole.values()))
    assert set(whole.values()) == {count}
    attentions = [site for site in sites if site.kind == "attention"]
    reduced = graph.fork()
    apply(Drop((sites[1], sites[-1])), reduced)  # the MLP behind the first merge, and the last branch of all
    apply(ReduceTokens({attentions[0].name: 1, attentions[1].name: 1}), reduced)
    left = tokens_left(reduced, sites, split)
    assert list(left) == [site.name for site in sites]
    assert list(left.values()) == [count, count - 1, count - 1, count - 2, count - 2, count - 2]
    nodes = {node.name: node for node in reduced.nodes()}
    program = Program(reduced, keep={sites[3].add})
    values = program.start({"x": torch.from_numpy(split.samples.feeds([0])["x"])})
    with torch.inference_mode():
        for _ in program.walk(values):
            pass
    assert values[nodes[sites[3].add]].shape[1] == left[sites[3].name]
    apply(Drop((sites[3], sites[4])), reduced)  # no site remains after the second merge
    assert tokens_left(reduced, sites, split) == left
