"""The learned cosine form against a reference loop over stacked rows, and against a rotation as known target."""

import pytest
import torch
from torch import nn

from compressor import models
from compressor.lower.trace import trace
from compressor.search.rewriter import Rewriter
from passes.analysis.replaceme_cosine import FitCosine
from passes.base import PassError, apply
from passes.execute.interpreter import run
from passes.graph.sites import find_sites
from passes.rewrite.drop import Drop
from passes.rewrite.replace import Replace
from tests.samples import small, spread, states

WIDTH = 16
# The reference loop subtracts float32 states in float64, the sweep in float32. States are some ten times the target.
STATES = 1e-5


@pytest.fixture(scope="module")
def subject():
    """Return a ViT graph, the graph without one attention, sites, data split and batches of images."""
    _, graph, sites, split = small(spread())
    split.most = 8
    now = graph.fork()
    apply(Drop((sites[2].name,)), now)
    images = torch.from_numpy(split.feeds["x"])
    return graph, now, sites, split, [{"x": part} for part in images.split(10)]


def values(graph, feeds, *names):
    """Return the values of named nodes as float64 rows [tokens, width]."""
    return [value.double().flatten(0, -2) for value in states(graph, feeds, *names)]


def stacked(subject):
    """Return M and L - Y of each batch, in the notation of the paper: Y includes M, L is the state after the span."""
    graph, now, sites, _, batches = subject
    pairs = []
    for feeds in batches:
        m, x = values(now, feeds, sites[1].branch, sites[1].root)
        (after,) = values(graph, feeds, sites[3].root)
        pairs.append((m, after - (x - m)))
    return pairs


def objective(transform, pairs):
    cosines = [torch.cosine_similarity(m @ transform, goal, dim=-1) for m, goal in pairs]
    return float((1.0 - torch.cat(cosines)).mean())


def reference_loop(pairs, *, epochs, rate, rows):
    """Run the loop of the paper with an explicit gradient and Adam (Kingma and Ba, arXiv 1412.6980, algorithm 1)."""
    transform = torch.eye(WIDTH, dtype=torch.float64)
    first, second, count = torch.zeros_like(transform), torch.zeros_like(transform), 0
    for m, goal in [pair for _ in range(epochs) for pair in pairs]:
        for start in range(0, len(m), rows):
            part, target = m[start : start + rows], goal[start : start + rows]
            mapped = part @ transform
            length = mapped.norm(dim=1, keepdim=True)
            unit, target_unit = mapped / length, target / target.norm(dim=1, keepdim=True)
            cosine = (unit * target_unit).sum(1, keepdim=True)
            gradient = -part.T @ ((target_unit - cosine * unit) / length)
            count += 1
            first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
            step = first / (1 - 0.9**count) / ((second / (1 - 0.999**count)).sqrt() + 1e-8)
            transform = transform - rate * step
    return transform


def learned(subject, site=3, **options):
    graph, now, sites, _, batches = subject
    return apply(FitCosine(graph, sites[site], **options), now, batches)


@pytest.mark.parametrize("rows", [64, 1024])
def test_map_equals_the_reference_loop(subject, rows):
    """Batches are streamed, with at most `rows` tokens per step."""
    stand_in = learned(subject, rows=rows, epochs=3, rate=1e-3)
    expected = reference_loop(stacked(subject), epochs=3, rate=1e-3, rows=rows)
    assert (stand_in.source, stand_in.map.bias) == ("previous", None)
    assert stand_in.map.matrix(WIDTH).dtype == torch.float64
    torch.testing.assert_close(stand_in.map.matrix(WIDTH).T, expected, rtol=STATES, atol=STATES)
    assert float((expected - torch.eye(WIDTH)).abs().max()) > 1e-3  # the map has left the identity


def test_defaults_are_the_published_settings(subject):
    expected = reference_loop(stacked(subject), epochs=10, rate=1e-4, rows=1024)
    torch.testing.assert_close(learned(subject).map.matrix(WIDTH).T, expected, rtol=STATES, atol=STATES)


def test_objective_decreases_with_epochs(subject):
    pairs = stacked(subject)
    losses = [objective(torch.eye(WIDTH, dtype=torch.float64), pairs)]
    losses += [objective(learned(subject, epochs=epochs).map.matrix(WIDTH).T, pairs) for epochs in (1, 4, 10)]
    assert losses == sorted(losses, reverse=True)
    assert len(set(losses)) == len(losses)


def test_unexplained_is_the_share_of_the_squared_error(subject):
    """Dropping the branch has 1, so t is the state after the site minus the trunk."""
    stand_in = learned(subject, rate=1e-2)
    m, goal = (torch.cat(rows) for rows in zip(*stacked(subject), strict=True))
    error = (m @ stand_in.map.matrix(WIDTH).T - goal).square().sum() / (goal - m).square().sum()
    assert stand_in.unexplained == pytest.approx(float(error), rel=STATES)


class Rotated(nn.Module):
    """Two linear branches whose sum is a scaled rotation of the output of the first one."""

    def __init__(self, rotation):
        super().__init__()
        self.first, self.second = (nn.Linear(len(rotation), len(rotation), bias=False) for _ in range(2))
        eye = torch.eye(len(rotation))
        with torch.no_grad():
            self.second.weight.copy_((rotation - eye) @ self.first.weight @ torch.linalg.inv(eye + self.first.weight))

    def forward(self, x):
        x = torch.sin(x)
        x = x + self.first(x)
        return x + self.second(x)


def test_rotation_is_recovered_up_to_scale():
    torch.manual_seed(0)
    skew = torch.randn(6, 6)
    rotation = 1.7 * torch.matrix_exp(0.2 * (skew - skew.T))
    graph = trace(models.load(Rotated(rotation).eval(), example_inputs=torch.rand(2, 5, 6)))
    step = FitCosine(graph, find_sites(graph)[1], epochs=150, rate=1e-2)
    data = [{"x": torch.randn(40, 5, 6)} for _ in range(4)]
    matrix = apply(step, graph, data).map.matrix(6)
    direction, expected = matrix / matrix.norm(), rotation.double() / rotation.double().norm()
    before = float((torch.eye(6) / 6**0.5 - expected).norm())
    assert before > 0.3
    # After 600 steps Adam has not converged along the directions in which the branch varies least.
    assert float((direction - expected).norm()) < 1e-2 * before


def test_fit_is_deterministic(subject):
    first, second = (learned(subject, epochs=2) for _ in range(2))
    assert torch.equal(first.map.matrix(WIDTH), second.map.matrix(WIDTH))
    assert first.unexplained == second.unexplained


def test_fit_works_in_inference_mode(subject):
    with torch.inference_mode():
        inside = learned(subject, epochs=2)
    assert torch.equal(inside.map.matrix(WIDTH), learned(subject, epochs=2).map.matrix(WIDTH))


def test_errors_state_the_reason(subject):
    graph, now, sites, _, batches = subject
    with pytest.raises(PassError, match=r"blocks\.0\.attn.* that branch does not end in a linear map\.$"):
        learned(subject, site=0)
    with pytest.raises(PassError, match=r"the branch of blocks\.1\.attn is no longer in the graph"):
        learned(subject, site=2)
    with pytest.raises(PassError, match="needs calibration data"):
        apply(FitCosine(graph, sites[3]), now)
    with pytest.raises(PassError, match="found an iterator, which supports one pass only; pass a list"):
        apply(FitCosine(graph, sites[3]), now, iter(batches))
    with pytest.raises(PassError, match="no batches of data in epoch 1 of 10"):
        apply(FitCosine(graph, sites[3]), now, [])
    with pytest.raises(PassError, match="found epochs=0"):
        learned(subject, epochs=0)


def test_exhausted_data_raises_with_the_epoch(subject):
    graph, now, sites, _, batches = subject

    class Once:
        left = iter(batches)

        def __iter__(self):
            return self.left

    with pytest.raises(PassError, match="no batches of data in epoch 2 of 10"):
        apply(FitCosine(graph, sites[3]), now, Once())


def test_rewriter_inserts_the_learned_map_and_counts_sweeps(subject):
    graph, now, sites, split, _ = subject
    rewriter = Rewriter(graph, sites, split)
    replaced = rewriter.changed(now, sites[3].name, "replaceme-cosine")
    assert rewriter.sweeps == 20.0  # ten of the original and ten of the current graph
    expected = now.fork()
    batches = [{"x": torch.from_numpy(batch.feeds["x"])} for batch in split.batches(32)]
    apply(Replace(sites[3], apply(FitCosine(graph, sites[3]), now.fork(), batches)), expected)
    feeds = {"x": torch.from_numpy(split.feeds["x"])}
    assert torch.equal(run(replaced, feeds)[0], run(expected, feeds)[0])
    assert not torch.equal(run(replaced, feeds)[0], run(now, feeds)[0])
    with pytest.raises(PassError, match="cannot be folded into the previous branch"):
        rewriter.changed(graph, sites[0].name, "replaceme-cosine")
    assert rewriter.sweeps == 20.0
