"""The learned cosine form against a plain loop over stacked rows, and against a target that is a map of the branch."""

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
# The plain loop subtracts float32 states in float64, the sweep in float32: 1e-7 of states some ten times the target.
STATES = 1e-5


@pytest.fixture(scope="module")
def subject():
    """A ViT without the attention of its second block, its original, sites and split, and batches of its images."""
    _, graph, sites, split = small(spread())
    split.most = 8
    now = graph.fork()
    apply(Drop((sites[2].name,)), now)
    images = torch.from_numpy(split.feeds["x"])
    return graph, now, sites, split, [{"x": part} for part in images.split(10)]


def values(graph, feeds, *names):
    """Values of named nodes, float64 rows [tokens, width]."""
    return [value.double().flatten(0, -2) for value in states(graph, feeds, *names)]


def stacked(subject):
    """M and L - Y of each batch, by the paper's words: M was added last to Y, L is the state behind the span."""
    graph, now, sites, _, batches = subject
    found = []
    for feeds in batches:
        m, x = values(now, feeds, sites[1].branch, sites[1].root)
        (behind,) = values(graph, feeds, sites[3].root)
        found.append((m, behind - (x - m)))
    return found


def objective(transform, pairs):
    cosines = [torch.cosine_similarity(m @ transform, goal, dim=-1) for m, goal in pairs]
    return float((1.0 - torch.cat(cosines)).mean())


def plain(pairs, *, epochs, rate, rows):
    """The paper's loop with the gradient written out, and Adam as in algorithm 1 of Kingma and Ba, arXiv 1412.6980."""
    transform = torch.eye(WIDTH, dtype=torch.float64)
    first, second, count = torch.zeros_like(transform), torch.zeros_like(transform), 0
    for m, goal in [pair for _ in range(epochs) for pair in pairs]:
        for start in range(0, len(m), rows):
            part, wanted = m[start : start + rows], goal[start : start + rows]
            mapped = part @ transform
            length = mapped.norm(dim=1, keepdim=True)
            along, towards = mapped / length, wanted / wanted.norm(dim=1, keepdim=True)
            cosine = (along * towards).sum(1, keepdim=True)
            gradient = -part.T @ ((towards - cosine * along) / length)
            count += 1
            first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
            step = first / (1 - 0.9**count) / ((second / (1 - 0.999**count)).sqrt() + 1e-8)
            transform = transform - rate * step
    return transform


def learned(subject, site=3, **options):
    graph, now, sites, _, batches = subject
    return apply(FitCosine(graph, sites[site], **options), now, batches)


@pytest.mark.parametrize("rows", [64, 1024])
def test_it_is_the_plain_loop(subject, rows):
    """Streamed in batches of images, with steps of `rows` tokens at most."""
    found = learned(subject, rows=rows, epochs=3, rate=1e-3)
    expected = plain(stacked(subject), epochs=3, rate=1e-3, rows=rows)
    assert (found.source, found.map.bias) == ("previous", None)
    assert found.map.matrix(WIDTH).dtype == torch.float64
    torch.testing.assert_close(found.map.matrix(WIDTH).T, expected, rtol=STATES, atol=STATES)
    assert float((expected - torch.eye(WIDTH)).abs().max()) > 1e-3  # it has gone somewhere


def test_as_published_is_what_is_learned_without_options(subject):
    expected = plain(stacked(subject), epochs=10, rate=1e-4, rows=1024)
    torch.testing.assert_close(learned(subject).map.matrix(WIDTH).T, expected, rtol=STATES, atol=STATES)


def test_the_objective_falls(subject):
    pairs = stacked(subject)
    losses = [objective(torch.eye(WIDTH, dtype=torch.float64), pairs)]
    losses += [objective(learned(subject, epochs=epochs).map.matrix(WIDTH).T, pairs) for epochs in (1, 4, 10)]
    assert losses == sorted(losses, reverse=True)
    assert len(set(losses)) == len(losses)


def test_unexplained_is_the_share_of_the_squared_error(subject):
    """As everywhere: leaving the branch out has 1, so t is what the state behind the site has beyond the trunk."""
    found = learned(subject, rate=1e-2)
    m, goal = (torch.cat(rows) for rows in zip(*stacked(subject), strict=True))
    error = (m @ found.map.matrix(WIDTH).T - goal).square().sum() / (goal - m).square().sum()
    assert found.unexplained == pytest.approx(float(error), rel=STATES)


class Turned(nn.Module):
    """Two linear branches; together they add an exact rotation, scaled, of what the first alone adds."""

    def __init__(self, turn):
        super().__init__()
        self.first, self.second = (nn.Linear(len(turn), len(turn), bias=False) for _ in range(2))
        eye = torch.eye(len(turn))
        with torch.no_grad():
            self.second.weight.copy_((turn - eye) @ self.first.weight @ torch.linalg.inv(eye + self.first.weight))

    def forward(self, x):
        x = torch.sin(x)
        x = x + self.first(x)
        return x + self.second(x)


def test_a_rotation_is_found_but_for_its_scale():
    torch.manual_seed(0)
    skew = torch.randn(6, 6)
    turn = 1.7 * torch.matrix_exp(0.2 * (skew - skew.T))
    graph = trace(models.load(Turned(turn).eval(), example_inputs=torch.rand(2, 5, 6)))
    step = FitCosine(graph, find_sites(graph)[1], epochs=150, rate=1e-2)
    data = [{"x": torch.randn(40, 5, 6)} for _ in range(4)]
    matrix = apply(step, graph, data).map.matrix(6)
    found, expected = matrix / matrix.norm(), turn.double() / turn.double().norm()
    before = float((torch.eye(6) / 6**0.5 - expected).norm())
    assert before > 0.3
    # After 600 steps Adam is still in motion along the directions in which the branch varies least.
    assert float((found - expected).norm()) < 1e-2 * before


def test_it_is_deterministic(subject):
    first, second = (learned(subject, epochs=2) for _ in range(2))
    assert torch.equal(first.map.matrix(WIDTH), second.map.matrix(WIDTH))
    assert first.unexplained == second.unexplained


def test_it_is_learned_in_inference_mode_too(subject):
    with torch.inference_mode():
        inside = learned(subject, epochs=2)
    assert torch.equal(inside.map.matrix(WIDTH), learned(subject, epochs=2).map.matrix(WIDTH))


def test_what_cannot_be_learned_says_why(subject):
    graph, now, sites, _, batches = subject
    with pytest.raises(PassError, match=r"blocks\.0\.attn.* what is added before it does not end in a linear map\.$"):
        learned(subject, site=0)
    with pytest.raises(PassError, match=r"the branch of blocks\.1\.attn is gone already"):
        learned(subject, site=2)
    with pytest.raises(PassError, match="needs calibration data"):
        apply(FitCosine(graph, sites[3]), now)
    with pytest.raises(PassError, match="found an iterator, which is exhausted after one; pass a list"):
        apply(FitCosine(graph, sites[3]), now, iter(batches))
    with pytest.raises(PassError, match="no batches of data in epoch 1 of 10"):
        apply(FitCosine(graph, sites[3]), now, [])
    with pytest.raises(PassError, match="found 0 epochs"):
        learned(subject, epochs=0)


def test_data_that_runs_out_is_named(subject):
    graph, now, sites, _, batches = subject

    class Once:
        left = iter(batches)

        def __iter__(self):
            return self.left

    with pytest.raises(PassError, match="no batches of data in epoch 2 of 10"):
        apply(FitCosine(graph, sites[3]), now, Once())


def test_the_action_puts_what_is_learned_and_counts_its_sweeps(subject):
    graph, now, sites, split, _ = subject
    rewriter = Rewriter(graph, sites, split)
    found = rewriter.changed(now, sites[3].name, "replaceme-cosine")
    assert rewriter.sweeps == 20.0  # of the original and of the current graph, ten times
    expected = now.fork()
    batches = [{"x": torch.from_numpy(batch.feeds["x"])} for batch in split.batches(32)]
    apply(Replace(sites[3], apply(FitCosine(graph, sites[3]), now.fork(), batches)), expected)
    feeds = {"x": torch.from_numpy(split.feeds["x"])}
    assert torch.equal(run(found, feeds)[0], run(expected, feeds)[0])
    assert not torch.equal(run(found, feeds)[0], run(now, feeds)[0])
    with pytest.raises(PassError, match="cannot be folded backwards"):
        rewriter.changed(graph, sites[0].name, "replaceme-cosine")
    assert rewriter.sweeps == 20.0
