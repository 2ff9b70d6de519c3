"""Symbolic cost against executed graphs, closed formulas and graphs of one operator. Multiply-adds are exact."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from compressor import models
from compressor.lower.trace import trace
from passes.analysis.counted_cost import Costs
from passes.analysis.least_squares import Map, Replacement
from passes.analysis.symbolic_cost import Counter, Shapes, Work, check_known_sizes
from passes.base import PassError, apply
from passes.merge_tokens.token_merging import ReduceTokens
from passes.rewrite.drop import Drop
from passes.rewrite.narrow_tokens import NarrowTokens
from passes.rewrite.replace import Replace
from tests.samples import traced

DEPTH, WIDTH, PATCH, CLASSES = 2, 16, 16, 5  # tests.architectures.VIT
TOKENS = (32 // PATCH) ** 2 + 1


def sized(model, batch, length=None):
    """Return feeds of a batch size; texts are cut or repeated to a length."""
    feeds = {name: value[:1].repeat(batch, *[1] * (value.ndim - 1)) for name, value in model.example.items()}
    if length is None:
        return feeds
    return {name: value.repeat(1, 9)[:, :length] for name, value in feeds.items()}


def counter_for(graph, feeds):
    return Counter(graph, {name: tuple(value.shape) for name, value in feeds.items()})


def multiply_adds_run(graph, feeds):
    """Count the multiply-adds of the whole batch by running the narrowed graph."""
    narrowed = graph.fork()
    apply(NarrowTokens(), narrowed)
    return Costs(narrowed, feeds).total.multiply_adds * len(next(iter(feeds.values())))


# --------------------------------------------------------------------------------------------- against executed graphs


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "name",
    [
        *("vit", "swin", "convnext", "poolformer", "vit_parallel_scaling"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("deit3", "hf_siglip_vision")),
    ],
)
def test_image_models_equal_the_executed_count(name, batch):
    model, graph, _ = traced(name)
    feeds = sized(model, batch)
    assert counter_for(graph, feeds).count(graph).multiply_adds == multiply_adds_run(graph, feeds)


@pytest.mark.parametrize(("batch", "length"), [(1, 7), (3, 7), (1, 12), (2, 19)])
@pytest.mark.parametrize("name", ["hf_bert", "hf_llama", "hf_gpt2"])
def test_text_models_equal_the_executed_count(name, batch, length):
    model, graph, _ = traced(name)
    feeds = sized(model, batch, length)
    assert counter_for(graph, feeds).count(graph).multiply_adds == multiply_adds_run(graph, feeds)


@pytest.mark.parametrize(("batch", "length"), [(1, 9), (2, 20)])
def test_text_models_with_merged_tokens_equal_the_executed_count(batch, length):
    """A reduced length has its own symbol, which is evaluated from the sizes it was computed from."""
    model, graph, sites = traced("hf_bert")
    feeds, fork = sized(model, batch, length), graph.fork()
    apply(ReduceTokens(tuple((site.name, 0.3) for site in sites if site.kind == "attention")), fork)
    assert counter_for(graph, feeds).count(fork).multiply_adds == multiply_adds_run(fork, feeds)


@settings(max_examples=12, deadline=None)
@given(st.sampled_from(["vit", "hf_bert", "hf_llama"]), st.sets(st.integers(0, 3)))
def test_rewritten_graphs_equal_the_executed_count(name, positions):
    """Keep one attention, because without any the class token reads no patch and `NarrowTokens` removes the stem."""
    model, graph, sites = traced(name)
    assume(name != "vit" or any(site.kind == "attention" for site in sites if site.order not in positions))
    feeds, fork = sized(model, 2), graph.fork()
    apply(Drop(tuple(sites[position] for position in positions)), fork)
    assert counter_for(graph, feeds).count(fork).multiply_adds == multiply_adds_run(fork, feeds)


@pytest.mark.parametrize("shapes", [((16, 16),), ((4, 16), (16, 4))])
def test_fitted_maps_equal_the_executed_count(shapes):
    """A pass inserts the maps, so their shapes are derived instead of traced."""
    model, graph, sites = traced("vit")
    feeds, fork = sized(model, 3), graph.fork()
    factors = tuple(torch.ones(shape, dtype=torch.float64) for shape in shapes)
    apply(Replace(sites[1], Replacement("state", Map(factors, torch.zeros(16, dtype=torch.float64)), 1.0)), fork)
    counter = counter_for(graph, feeds)
    assert counter.count(fork).multiply_adds == multiply_adds_run(fork, feeds)
    without = graph.fork()
    apply(Drop((sites[1],)), without)
    added = counter.count(fork).products - counter.count(without).products
    assert added == 3 * TOKENS * sum(rows * columns for rows, columns in shapes)


# --------------------------------------------------------------------------------------------------- closed formulas


@pytest.mark.parametrize("batch", [1, 4])
def test_deit_equals_the_closed_formula(batch):
    """The last block is read at the class token only. It computes the fused query, key and value projection for all
    tokens, but one query row and one row of the output projection and of the MLP."""
    model, graph, _ = traced("vit")
    work = counter_for(graph, sized(model, batch)).count(graph)
    d, n = WIDTH, TOKENS
    whole = 4 * n * d * d + 8 * n * d * d
    last = 3 * n * d * d + d * d + 8 * d * d
    stem_and_head = 3 * PATCH * PATCH * d * (n - 1) + d * CLASSES
    assert work.products == batch * (stem_and_head + (DEPTH - 1) * whole + last)
    assert work.attention == batch * ((DEPTH - 1) * 2 * n * n * d + 2 * n * d)
    assert work.multiply_adds == work.products + work.attention


@pytest.mark.parametrize("length", [5, 11])
def test_attention_grows_with_the_square_of_the_length(length):
    model, graph, sites = traced("hf_llama")
    work = counter_for(graph, sized(model, 2, length)).count(graph)
    layers = len(sites) // 2
    # Queries and output of 16, keys and values of 8 (one head for two), three maps of the gated MLP.
    assert work.products == 2 * length * layers * (2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 32)
    ratio = work.attention / counter_for(graph, sized(model, 1, 1)).count(graph).attention
    assert ratio == 2 * length**2


# ---------------------------------------------------------------------------------------------------- one operator


def graph_of(function, *shape):
    class Named(nn.Module):
        def forward(self, x):
            return function(x)

    rows = torch.rand(*shape)
    return trace(models.load(Named(), example_inputs=rows)), {"x": tuple(shape)}


def work_of(function, *shape):
    graph, shapes = graph_of(function, *shape)
    return Counter(graph, shapes).count(graph)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.reshape(x.shape[0], -1),
        lambda x: x.flatten(1),
        lambda x: x.unsqueeze(1),
        lambda x: x.unsqueeze(1).squeeze(1),
        lambda x: x.view(x.shape[0], 3, 2, 4),
        lambda x: x.unsqueeze(1).expand(-1, 5, -1, -1),
    ],
)
def test_views_cost_nothing(view):
    alone = work_of(torch.relu, 2, 6, 4)
    assert alone == Work(0, 0, 2 * 6 * 4, 1)
    assert work_of(lambda x: view(torch.relu(x)), 2, 6, 4) == alone


def test_elements_count_written_values():
    assert work_of(lambda x: torch.cat([x, x], 1) + 1.0, 2, 6, 4) == Work(0, 0, 4 * 6 * 4 * 2, 2)
    pieces = work_of(lambda x: torch.split(x, 3, dim=1)[1] * 2.0, 2, 6, 4)
    assert (pieces.elements, pieces.operators) == (2 * 6 * 4 + 2 * 3 * 4, 2)  # all pieces are written


def test_products_of_activations_count_as_attention():
    work = work_of(lambda x: x @ x.transpose(1, 2), 2, 6, 4)
    assert (work.products, work.attention) == (0, 2 * 6 * 6 * 4)


@pytest.mark.parametrize("padding", [1, "same", "valid"])
def test_convolutions_count_as_products_for_any_padding(padding):
    """String padding selects another overload of the operator."""

    class Convolution(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Conv2d(3, 7, 3, padding=padding)

        def forward(self, x):
            return self.inner(x)

    graph = trace(models.load(Convolution(), example_inputs=torch.rand(2, 3, 8, 8)))
    side = 6 if padding == "valid" else 8
    assert Counter(graph, {"x": (2, 3, 8, 8)}).count(graph) == Work(2 * side * side * 7 * 3 * 9, 0, 0, 1)


# -------------------------------------------------------------------------------------------------- shapes and caching


def test_shapes_follow_from_the_inputs():
    model, graph, _ = traced("hf_bert")
    shapes = Shapes(graph, dict.fromkeys(model.example, (3, 11)))
    last = [node for node in graph.nodes() if "layer_norm" in str(node.target)][-1]
    assert shapes.of(last.meta["val"]) == (3, 11, 16)


def test_counting_is_cached_and_does_not_change_the_graph(monkeypatch):
    model, graph, _ = traced("vit")
    before, counter = graph.signature(), counter_for(graph, sized(model, 1))
    first = counter.count(graph)
    assert graph.signature() == before
    monkeypatch.setattr("passes.analysis.symbolic_cost.multiply_adds", None)  # the second count must use the cache
    assert counter.count(graph) == first == counter.count(graph.fork())


def test_dropped_sites_are_not_counted():
    model, graph, sites = traced("hf_bert")
    counter, fork = counter_for(graph, sized(model, 2)), graph.fork()
    apply(Drop(sites), fork)
    dropped, whole = counter.count(fork), counter.count(graph)
    assert dropped.attention == 0 < whole.attention
    assert dropped.operators < whole.operators
    assert dropped.elements < whole.elements


# ----------------------------------------------------------------------------- sizes that depend on what a tensor holds


class Padded(nn.Module):
    """Embeds tokens, and computes what `rule` does with them and their mask in place of the padding."""

    def __init__(self, rule):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.inner, self.head, self.rule = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 3), rule

    def forward(self, tokens, mask):
        return self.head(self.rule(self, self.embed(tokens), mask))


def longest(m, x, mask):
    x = x[:, : mask.sum(1).max().item()]
    return (x + m.inner(x))[:, 0]


def packed(m, x, mask):
    found = torch.zeros_like(x)
    found[mask.bool()] = m.inner(x[mask.bool()])
    return (x + found)[:, 0]


def scattered(m, x, mask):
    rows, places = torch.where(mask == 1)
    return (x + m.inner(x))[:, 0].index_add(0, rows, x[rows, places])


@pytest.mark.parametrize("rule", [longest, packed, scattered])
def test_sizes_that_a_tensor_holds_have_no_price(rule):
    """Torch's own error about a guard was shown, by NarrowTokens and by the search."""
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    model = models.load(Padded(rule), example_inputs={"tokens": torch.ones_like(mask), "mask": mask})
    graph = trace(model)
    shapes = {name: tuple(value.shape) for name, value in model.example.items()}
    apply(NarrowTokens(), graph)
    with pytest.raises(PassError, match=r"sizes that depend on the contents of a tensor.*name what to drop"):
        check_known_sizes(graph, shapes)
    with pytest.raises(PassError, match="sizes that depend on the contents of a tensor"):
        Counter(graph, shapes).count(graph)


def test_sizes_of_inputs_are_known():
    model, graph, _ = traced("hf_bert")
    check_known_sizes(graph, {name: tuple(value.shape) for name, value in model.example.items()})
