"""Token statistics against a model with analytic cosines and norms, and against direct sums."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor import models
from compressor.lower.trace import trace
from passes.analysis.token_statistics import Kinds, MeasureTokenStatistics
from passes.base import PassError, apply
from passes.graph.sites import find_sites
from tests import samples

FLOAT32 = 1e-5  # the states are float32, and batches of another size sum in another order
VISION = Kinds(("class", "register"), rest="patch")
FACTORS = torch.tensor([0.1, 0.5, 1.0, 2.0, 0.0])  # c of each position: class, register, three patches


class Rotating(torch.nn.Module):
    """Model whose branches add c times their input rotated by 90 degrees: cosine 1 / sqrt(1 + c^2), update |c|."""

    def __init__(self, factors):
        super().__init__()
        self.first, self.second = torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2, bias=False)
        for part in (self.first, self.second):
            part.weight = torch.nn.Parameter(torch.tensor([[0.0, -1.0], [1.0, 0.0]]))
        self.leading = torch.nn.Parameter(torch.tensor([[[3.0, 4.0], [0.0, 2.0]]]))
        self.factors = torch.nn.Parameter(factors[:, None])

    def forward(self, x):
        x = torch.cat([self.leading.expand(x.shape[0], -1, -1), x], 1)
        x = x + self.factors * self.first(x)
        return x + 2 * self.factors * self.second(x)


@pytest.fixture(scope="module")
def rotating():
    model = models.load(Rotating(FACTORS), example_inputs=torch.ones(2, 3, 2))
    graph = trace(model)
    return graph, find_sites(graph)


def studied(graph, *batches, **options):
    return apply(MeasureTokenStatistics(**options), graph, batches)


def test_cosines_updates_and_norms_by_position_and_kind(rotating):
    graph, sites = rotating
    x = torch.tensor([[[1.0, 0.0], [0.0, 6.0], [8.0, 0.0]]] * 4)
    statistics = studied(graph, {"x": x}, kinds=VISION)
    assert statistics.kinds == ("class", "register", "patch")
    norms = torch.tensor([5.0, 2.0, 1.0, 6.0, 8.0])
    for site, factors in zip(sites, (FACTORS, 2 * FACTORS), strict=True):
        changes, cosines = statistics.sites[site.name], 1 / (1 + factors**2).sqrt()
        tokens, cosine, update = changes.positions / 4
        torch.testing.assert_close(tokens, torch.ones(5).double())
        torch.testing.assert_close(cosine, cosines.double(), rtol=0, atol=FLOAT32)
        torch.testing.assert_close(update, factors.double(), rtol=0, atol=FLOAT32)
        by_kind = changes.kinds / torch.tensor([4.0, 4.0, 12.0])
        expected = torch.stack([cosines[0], cosines[1], cosines[2:].mean()]).double()
        torch.testing.assert_close(by_kind[1], expected, rtol=0, atol=FLOAT32)
        sizes = factors * norms
        expected = torch.stack([sizes[0], sizes[1], sizes[2:].mean()]).double()
        torch.testing.assert_close(by_kind[3], expected, rtol=FLOAT32, atol=FLOAT32)
        torch.testing.assert_close(changes.samples[1], cosines.sum().double().expand(4), rtol=0, atol=FLOAT32)
        norms = norms * (1 + factors**2).sqrt()
    first = next(iter(statistics.states.values()))
    torch.testing.assert_close(first.kinds[1] / first.kinds[0], torch.tensor([5.0, 2.0, 5.0]).double())
    last = list(statistics.states.values())[-1].kinds
    expected = torch.stack([norms[0], norms[1], norms[2:].mean()]).double()
    torch.testing.assert_close(last[1] / last[0], expected, rtol=FLOAT32, atol=0)


def test_blocks_compare_first_and_last_state():
    _, graph, sites = samples.traced("vit")
    x = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    statistics = studied(graph, {"x": x})
    assert list(statistics.blocks) == list(dict.fromkeys(site.block for site in sites))
    before, after = samples.states(graph, {"x": x}, sites[0].trunk, sites[1].root)
    expected = torch.nn.functional.cosine_similarity(before, after, dim=-1).double().sum()
    assert float(statistics.blocks[sites[0].block].kinds[1].sum()) == pytest.approx(float(expected), abs=FLOAT32)


def test_largest_activation_with_channel_and_kind(rotating):
    graph, _ = rotating
    x = torch.ones(3, 3, 2)
    x[1, 2, 1] = -5000.0
    first = next(iter(studied(graph, {"x": x}, kinds=VISION).states.values()))
    largest, median, channel, kind = first.samples
    assert largest.tolist() == [4.0, 5000.0, 4.0]  # 4 is from the class token [3, 4]
    assert median.tolist() == [1.0, 1.0, 1.0]
    assert channel.tolist() == [1.0, 1.0, 1.0]
    assert kind.tolist() == [0.0, 2.0, 0.0]


def test_first_and_last_token_for_left_and_right_padding():
    kinds = Kinds(first="first", last="last", rest="other")
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1], [0, 0, 1, 0]])
    kind, position = kinds.of((3, 4), mask, 0)
    assert kind.tolist() == [[0, 2, 1, -1], [-1, 0, 2, 1], [-1, -1, 0, -1]]
    assert (position * mask).tolist() == [[0, 1, 2, 0], [0, 0, 1, 2], [0, 0, 0, 0]]
    kind, position = Kinds(("class",), rest="patch").of((1, 3), None, 1)
    assert (kind.tolist(), position.tolist()) == ([[0, 1, 1]], [[0, 1, 2]])


def test_late_class_token_counts_only_in_later_states():
    """CaiT concatenates its class token late: earlier states have none, later states start with it."""
    _, graph, _ = samples.traced("cait")
    statistics = studied(graph, {"x": torch.rand(2, 3, 32, 32)}, kinds=Kinds(("class",), rest="patch"))
    counts = [states.kinds[0].tolist() for states in statistics.states.values()]
    assert counts[0][0] == 0
    assert counts[0][1] > 0
    assert counts[-1][0] == 2


def direct_sums(graph, sites, feeds, kinds):
    """Sum token counts, cosines and updates by kind and position, token by token in float64."""
    by_kind, by_position = {}, {}
    for site in sites:
        before, change = samples.states(graph, feeds, site.trunk, site.branch)
        for row, mask in enumerate(feeds["attention_mask"].tolist()):
            present = [index for index, unpadded in enumerate(mask) if unpadded]
            for position, index in enumerate(present):
                x, f = before[row, index].double(), change[row, index].double()
                kind = 0 if position == 0 else 1 if position == len(present) - 1 else 2
                y = x + f
                values = 1.0, float(x @ y / (x.norm() * y.norm())), float(f.norm() / x.norm())
                for sums, key in ((by_kind, (site.name, kind)), (by_position, (site.name, position))):
                    sums[key] = [a + b for a, b in zip(sums.get(key, (0.0, 0.0, 0.0)), values, strict=True)]
    return by_kind, by_position


@settings(max_examples=6, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=6), st.integers(1, 5), st.booleans(), st.integers(0, 99))
def test_streamed_sums_equal_direct_sums(lengths, size, left, seed):
    """The sums do not depend on batches, padded length or padding side."""
    _, graph, sites = samples.traced("hf_distilbert")
    numbers = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, 50, (length,), generator=numbers) for length in lengths]

    def batch(rows):
        longest = max(map(len, rows))
        pad = [(longest - len(row), 0) if left else (0, longest - len(row)) for row in rows]
        padded = [torch.nn.functional.pad(row, by) for row, by in zip(rows, pad, strict=True)]
        masks = [torch.nn.functional.pad(torch.ones_like(row), by) for row, by in zip(rows, pad, strict=True)]
        return {"input_ids": torch.stack(padded), "attention_mask": torch.stack(masks)}

    batches = [batch(ids[start : start + size]) for start in range(0, len(ids), size)]
    kinds = Kinds(first="first", last="last", rest="other")
    statistics = studied(graph, *batches, kinds=kinds)
    expected = [direct_sums(graph, sites, feeds, kinds) for feeds in batches]
    for site in sites:
        changes = statistics.sites[site.name]
        assert changes.samples[0].tolist() == [float(length) for length in lengths]
        for part, sums in enumerate((changes.kinds[:3], changes.positions)):
            for index in range(sums.shape[1]):
                parts = [batch_sums[part].get((site.name, index), (0.0, 0.0, 0.0)) for batch_sums in expected]
                total = [sum(values) for values in zip(*parts, strict=True)]
                assert sums[:, index].tolist() == pytest.approx(total, abs=FLOAT32 * max(1, len(lengths)))


def test_pair_of_texts_is_one_sample():
    _, graph, sites = samples.traced("hf_distilbert")
    ids = torch.randint(3, 50, (4, 5), generator=torch.Generator().manual_seed(0))
    feeds = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    statistics = studied(graph, feeds, kinds=Kinds(first="first", rest="other"), rows_per_sample=2)
    assert statistics.sites[sites[0].name].samples[0].tolist() == [10.0, 10.0]
    assert all(states.samples.shape == (4, 2) for states in statistics.states.values())


def test_grids_have_no_leading_tokens():
    model, graph, _ = samples.traced("swin")
    statistics = studied(graph, model.example, kinds=VISION)
    for changes in statistics.sites.values():
        assert changes.kinds[0, :2].tolist() == [0.0, 0.0]
        assert changes.kinds[0, 2] > 0


def test_tokens_without_a_direction_are_left_out():
    graph = trace(models.load(samples.Residual(2), example_inputs=torch.rand(2, 32)))
    rows = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    padded = torch.cat([rows, torch.zeros(3, 32)])
    (expected, *_), (found, *_) = (studied(graph, {"x": each}).sites.values() for each in (rows, padded))
    torch.testing.assert_close(found.kinds, expected.kinds)


def test_non_finite_values_and_no_data_raise(rotating):
    graph, sites = rotating
    with pytest.raises(PassError, match=rf"site {sites[0].name} computes values that are NaN or infinite"):
        studied(graph, {"x": torch.full((1, 3, 2), math.nan)})
    with pytest.raises(PassError, match="got no batches"):
        studied(graph)
