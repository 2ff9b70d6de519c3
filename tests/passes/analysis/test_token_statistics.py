"""Studies against models whose cosines, norms and tokens are known by hand, and against sums written out directly."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor import models
from compressor.lower.trace import trace
from passes.analysis.token_statistics import Kinds, Study
from passes.base import PassError, apply
from passes.graph.sites import find_sites
from tests import samples

FLOAT32 = 1e-5  # the states are float32, and batches of another size sum in another order
VISION = Kinds(("class", "register"), rest="patch")
TURNS = torch.tensor([0.1, 0.5, 1.0, 2.0, 0.0])  # of each position: class, register, three patches


class Turning(torch.nn.Module):
    """Each branch adds c times its input turned by 90 degrees: cosine 1 / sqrt(1 + c^2), update |c|."""

    def __init__(self, turns):
        super().__init__()
        self.turn, self.again = torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2, bias=False)
        for part in (self.turn, self.again):
            part.weight = torch.nn.Parameter(torch.tensor([[0.0, -1.0], [1.0, 0.0]]))
        self.front = torch.nn.Parameter(torch.tensor([[[3.0, 4.0], [0.0, 2.0]]]))
        self.turns = torch.nn.Parameter(turns[:, None])

    def forward(self, x):
        x = torch.cat([self.front.expand(x.shape[0], -1, -1), x], 1)
        x = x + self.turns * self.turn(x)
        return x + 2 * self.turns * self.again(x)


@pytest.fixture(scope="module")
def turning():
    model = models.load(Turning(TURNS), example_inputs=torch.ones(2, 3, 2))
    graph = trace(model)
    return graph, find_sites(graph)


def studied(graph, *batches, **options):
    return apply(Study(**options), graph, batches)


def test_known_cosines_updates_and_norms_by_position_and_kind(turning):
    graph, sites = turning
    x = torch.tensor([[[1.0, 0.0], [0.0, 6.0], [8.0, 0.0]]] * 4)
    found = studied(graph, {"x": x}, kinds=VISION)
    assert found.kinds == ("class", "register", "patch")
    norms = torch.tensor([5.0, 2.0, 1.0, 6.0, 8.0])
    for site, turns in zip(sites, (TURNS, 2 * TURNS), strict=True):
        changes, cosines = found.sites[site.name], 1 / (1 + turns**2).sqrt()
        tokens, cosine, update = changes.positions / 4
        torch.testing.assert_close(tokens, torch.ones(5).double())
        torch.testing.assert_close(cosine, cosines.double(), rtol=0, atol=FLOAT32)
        torch.testing.assert_close(update, turns.double(), rtol=0, atol=FLOAT32)
        by_kind = changes.kinds / torch.tensor([4.0, 4.0, 12.0])
        expected = torch.stack([cosines[0], cosines[1], cosines[2:].mean()]).double()
        torch.testing.assert_close(by_kind[1], expected, rtol=0, atol=FLOAT32)
        sizes = turns * norms
        expected = torch.stack([sizes[0], sizes[1], sizes[2:].mean()]).double()
        torch.testing.assert_close(by_kind[3], expected, rtol=FLOAT32, atol=FLOAT32)
        torch.testing.assert_close(changes.samples[1], cosines.sum().double().expand(4), rtol=0, atol=FLOAT32)
        norms = norms * (1 + turns**2).sqrt()
    first = next(iter(found.states.values()))
    torch.testing.assert_close(first.kinds[1] / first.kinds[0], torch.tensor([5.0, 2.0, 5.0]).double())
    last = list(found.states.values())[-1].kinds
    expected = torch.stack([norms[0], norms[1], norms[2:].mean()]).double()
    torch.testing.assert_close(last[1] / last[0], expected, rtol=FLOAT32, atol=0)


def test_blocks_are_compared_from_their_first_state_to_their_last():
    _, graph, sites = samples.traced("vit")
    x = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = studied(graph, {"x": x})
    assert list(found.blocks) == list(dict.fromkeys(site.block for site in sites))
    before, after = samples.states(graph, {"x": x}, sites[0].trunk, sites[1].root)
    expected = torch.nn.functional.cosine_similarity(before, after, dim=-1).double().sum()
    assert float(found.blocks[sites[0].block].kinds[1].sum()) == pytest.approx(float(expected), abs=FLOAT32)


def test_the_largest_activation_is_found_with_its_channel_and_kind(turning):
    graph, _ = turning
    x = torch.ones(3, 3, 2)
    x[1, 2, 1] = -5000.0
    first = next(iter(studied(graph, {"x": x}, kinds=VISION).states.values()))
    largest, median, channel, kind = first.samples
    assert largest.tolist() == [4.0, 5000.0, 4.0]  # of the class token, [3, 4], elsewhere
    assert median.tolist() == [1.0, 1.0, 1.0]
    assert channel.tolist() == [1.0, 1.0, 1.0]
    assert kind.tolist() == [0.0, 2.0, 0.0]


def test_texts_have_a_first_and_a_last_token_on_whichever_side_the_padding_is():
    kinds = Kinds(first="first", last="last", rest="other")
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1], [0, 0, 1, 0]])
    kind, place = kinds.of((3, 4), mask, 0)
    assert kind.tolist() == [[0, 2, 1, -1], [-1, 0, 2, 1], [-1, -1, 0, -1]]
    assert (place * mask).tolist() == [[0, 1, 2, 0], [0, 0, 1, 2], [0, 0, 0, 0]]
    kind, place = Kinds(("class",), rest="patch").of((1, 3), None, 1)
    assert (kind.tolist(), place.tolist()) == ([[0, 1, 1]], [[0, 1, 2]])


def test_class_tokens_count_only_where_they_stand():
    """CaiT's class token joins late: the patches' states before have none, the later states begin with it."""
    _, graph, _ = samples.traced("cait")
    found = studied(graph, {"x": torch.rand(2, 3, 32, 32)}, kinds=Kinds(("class",), rest="patch"))
    counts = [states.kinds[0].tolist() for states in found.states.values()]
    assert counts[0][0] == 0
    assert counts[0][1] > 0
    assert counts[-1][0] == 2


def directly(graph, sites, feeds, kinds):
    """Tokens, cosines and updates by kind and position, token by token in float64."""
    by_kind, by_place = {}, {}
    for site in sites:
        before, change = samples.states(graph, feeds, site.trunk, site.branch)
        for row, mask in enumerate(feeds["attention_mask"].tolist()):
            present = [place for place, there in enumerate(mask) if there]
            for position, place in enumerate(present):
                x, f = before[row, place].double(), change[row, place].double()
                kind = 0 if position == 0 else 1 if position == len(present) - 1 else 2
                y = x + f
                values = 1.0, float(x @ y / (x.norm() * y.norm())), float(f.norm() / x.norm())
                for sums, key in ((by_kind, (site.name, kind)), (by_place, (site.name, position))):
                    sums[key] = [a + b for a, b in zip(sums.get(key, (0.0, 0.0, 0.0)), values, strict=True)]
    return by_kind, by_place


@settings(max_examples=6, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=6), st.integers(1, 5), st.booleans(), st.integers(0, 99))
def test_streamed_sums_are_those_of_all_tokens(lengths, size, left, seed):
    """Whatever the batches are, and padded to whichever length, on either side."""
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
    found = studied(graph, *batches, kinds=kinds)
    expected = [directly(graph, sites, each, kinds) for each in batches]
    for site in sites:
        changes = found.sites[site.name]
        assert changes.samples[0].tolist() == [float(length) for length in lengths]
        for part, sums in enumerate((changes.kinds[:3], changes.positions)):
            for place in range(sums.shape[1]):
                parts = [each[part].get((site.name, place), (0.0, 0.0, 0.0)) for each in expected]
                wanted = [sum(values) for values in zip(*parts, strict=True)]
                assert sums[:, place].tolist() == pytest.approx(wanted, abs=FLOAT32 * max(1, len(lengths)))


def test_a_pair_of_texts_is_one_sample():
    _, graph, sites = samples.traced("hf_distilbert")
    ids = torch.randint(3, 50, (4, 5), generator=torch.Generator().manual_seed(0))
    feeds = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    found = studied(graph, feeds, kinds=Kinds(first="first", rest="other"), rows_per_sample=2)
    assert found.sites[sites[0].name].samples[0].tolist() == [10.0, 10.0]
    assert all(states.samples.shape == (4, 2) for states in found.states.values())


def test_grids_have_no_token_in_front():
    model, graph, _ = samples.traced("swin")
    found = studied(graph, model.example, kinds=VISION)
    for changes in found.sites.values():
        assert changes.kinds[0, :2].tolist() == [0.0, 0.0]
        assert changes.kinds[0, 2] > 0


def test_what_is_not_finite_and_no_data_are_said(turning):
    graph, sites = turning
    with pytest.raises(PassError, match=rf"site {sites[0].name} computes values that are NaN or infinite"):
        studied(graph, {"x": torch.full((1, 3, 2), math.nan)})
    with pytest.raises(PassError, match="got no batches"):
        studied(graph)
