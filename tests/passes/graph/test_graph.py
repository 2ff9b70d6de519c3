"""Tests of the residual sites of many architectures, against counts from the module tree and committed listings.

``COMPRESSOR_UPDATE_GOLDEN=1 pytest tests/passes/graph/test_graph.py`` rewrites the listings that differ and fails for
each of them, so that no change passes unnoticed. Review the diff, then run the tests again without the variable.
"""

import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from compressor import models
from compressor.lower.trace import trace
from passes.base import apply
from passes.execute.interpreter import run
from passes.graph.edit import drop_branches, remove_dead
from passes.graph.graph import GraphError, live_nodes
from passes.graph.sites import find_sites, site_named
from passes.rewrite.drop import Drop
from passes.rewrite.narrow_tokens import NarrowTokens
from tests import samples
from tests.architectures import TIMM, TRANSFORMERS, expected_count
from tests.samples import check_listing

ALL = TIMM + TRANSFORMERS


# Variants of another architecture here; they run with `make slow`.
VARIANTS = {
    *("deit3", "beitv2", "vit_parallel_layerscale", "resmlp", "twins_svt", "coat_lite", "crossvit", "efficientformer"),
    *("efficientformerv2", "mobilevit", "edgenext", "convit", "volo", "visformer", "gcvit", "focalnet", "caformer"),
    *("nest", "hf_dinov2_registers", "hf_deit", "hf_siglip_vision", "hf_roberta", "hf_electra", "hf_mistral"),
    *("hf_olmo2", "hf_gemma", "hf_gpt_neox", "hf_swinv2", "hf_opt", "hf_qwen3", "maxvit", "tnt", "levit", "xcit"),
    *("samvit", "vit_parallel_things", "swinv2", "mvitv2", "davit"),
}
CASES = [
    pytest.param(architecture, id=architecture.name, marks=pytest.mark.slow if architecture.name in VARIANTS else ())
    for architecture in ALL
]


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return request.param, *samples.traced(request.param.name)


def unnumbered(sites):
    """Return the names without the number of shared weights, which changes when such a site is dropped."""
    return [site.name.split("#")[0] for site in sites]


def feeds(model, size, seed=0):
    """Draw `size` rows from the model's example, so that masks and ids stay valid."""
    rows = torch.randint(0, 2, (size,), generator=torch.Generator().manual_seed(seed))
    return {name: value[rows] for name, value in model.example.items()}


# ------------------------------------------------------------------------------------------------- every architecture


def test_number_of_sites_matches_the_module_tree(case):
    architecture, model, _, sites = case
    assert len(sites) == expected_count(model.module, architecture.branches) * architecture.repeats - architecture.fewer
    attention = sum(site.kind == "attention" for site in sites)
    expected = (
        expected_count(model.module, architecture.attention) * architecture.repeats - architecture.fewer_attention
    )
    assert attention == expected
    assert architecture.why or not (architecture.fewer or architecture.fewer_attention)


def test_listing(case):
    architecture, _, _, sites = case
    check_listing(architecture.name, sites)


def test_sites_are_described_by_nodes_of_the_graph(case):
    _, _, graph, sites = case
    by_name = {node.name: node for node in graph.nodes()}
    assert len({site.name for site in sites}) == len(sites)
    assert [site.order for site in sites] == list(range(len(sites)))
    for site in sites:
        assert by_name[site.branch] in by_name[site.add].all_input_nodes
        assert len(by_name[site.branch].users) == 1
        assert int(by_name[site.trunk].meta["val"].shape[site.channel_dim]) == site.width


@torch.inference_mode()
def test_skipping_equals_rewriting_at_other_batch_sizes_and_keeps_names(case):
    architecture, model, graph, sites = case
    chosen = random.Random(architecture.name).sample(sites, (len(sites) + 1) // 2)
    rewritten = graph.fork()
    apply(Drop(tuple(site.name for site in chosen)), rewritten)
    for size in (1, 3):
        batch = feeds(model, size)
        expected = run(graph, batch, skip=chosen)
        for outputs in (run(rewritten, batch), rewritten.module(*batch.values())):
            assert all(torch.equal(left, right) for left, right in zip(outputs, expected, strict=True))
    # A site is removed too if only dropped branches read it: GCViT's query generator feeds one attention.
    live = {node.name for node in rewritten.nodes()}
    remaining = [site for site in sites if site not in chosen and site.branch in live]
    assert unnumbered(find_sites(rewritten)) == unnumbered(remaining)
    assert len(remaining) == len(sites) - len(chosen) or architecture.name == "gcvit"


# The other models use all tokens: they pool them or return the last hidden state.
UNUSED_TOKENS = {
    *("vit", "deit_distilled", "deit3", "vit_registers", "vit_swiglu", "vit_post_norm", "coat_lite", "convit", "tnt"),
    *("vit_parallel_scaling", "vit_parallel_things", "vit_parallel_layerscale"),
}


@torch.inference_mode()
def test_unused_tokens_are_removed_and_outputs_do_not_change(case):
    architecture, model, graph, _ = case
    lean = graph.fork()
    changed = apply(NarrowTokens(), lean).changed
    assert bool(changed) == (architecture.name in UNUSED_TOKENS)
    assert bool(changed) or lean.signature() == graph.signature()
    for size in (1, 3) if changed else ():
        batch = feeds(model, size)
        for left, right in zip(run(graph, batch), run(lean, batch), strict=True):
            # Matrix products of one row and of many rows differ in the order of summation: float32 rounding.
            torch.testing.assert_close(right, left, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------------------- difficult cases, one module each


class Ops(nn.Module):
    """Model with linear maps of width 8, which `rule` combines between `stem` and `head`."""

    def __init__(self, rule):
        super().__init__()
        self.stem, self.a, self.b, self.c, self.head = (nn.Linear(8, 8) for _ in range(5))
        self.norm = nn.LayerNorm(8)
        self.rule = rule

    def forward(self, x):
        return self.head(self.rule(self, self.stem(x)))


def traced(rule, shape=(2, 5, 8)):
    torch.manual_seed(0)
    return trace(models.load(Ops(rule), example_inputs=torch.rand(shape)))


def names(rule):
    return [site.name for site in find_sites(traced(rule))]


def dropout_between(m, x):
    x = x + F.dropout(m.a(x), 0.1, m.training)
    return m.norm(x.contiguous()) + m.b(m.norm(x))


def norm_between(m, x):
    x = m.norm(x + m.a(x))
    return m.norm(x + m.b(x))


def scaled(m, x):
    return x + 0.5 * m.a(x) * torch.sigmoid(m.b(x))


def cast_between(m, x):
    return x + m.a(x.float()).to(torch.float64).to(x.dtype)


def long_skip(m, x):
    y = x + m.a(x)
    y = y + m.b(y)
    return x + m.c(y)


def no_weights(m, x):
    return m.a(x + torch.relu(x))


def two_readers(m, x):
    branch = m.a(x)
    return (x + branch) * branch


def no_trunk(m, x):
    return m.a(x) + m.b(x)


def other_shape(m, x):
    return x[:, :1] + m.a(x)


def weighted(m, x):
    return torch.add(x, m.a(x), alpha=0.5)


def subtracted(m, x):
    return x - m.a(x)


def summed_towers(m, x):
    left, right = m.norm(x), torch.relu(m.c(x))
    return (left + m.a(left)) + (right + m.b(right))


def skip_beside_blocks(m, x):
    y = x + m.a(x)
    z = y * m.norm(y)
    return x + (z + m.b(z))


def scaled_long_skip(m, x):
    y = x + m.a(m.norm(x))
    return 0.5 * x + 0.5 * (y + m.b(m.norm(y)))


def pooled_less_itself(m, x):
    """The mixer of PoolFormer: one branch, of which neither term is one."""
    y = m.norm(x)
    return x + (y.cumsum(1) - y)


def value_of_the_first_mixed_in(m, x, weight=1.0):
    """Value residual learning: a later branch adds a value of the first one."""
    first = m.norm(m.norm(x))
    x = x + m.a(first).relu()
    return x + m.b(weight * m.norm(x) + weight * first)


def scaled_value_of_the_first_mixed_in(m, x):
    return value_of_the_first_mixed_in(m, x, 0.5)


def queries_of_positions_and_a_value(m, x):
    """A decoder of DETR: the queries add positions to a value that was computed from them."""
    y = m.a(x)
    return y + m.b(x + m.c(y))


def mixed_with_the_token_before(m, x):
    """RWKV: the branch mixes each token with the one before, by a weight for each feature."""
    before = F.pad(x, (0, 0, 1, -1))
    first, second = (x * weight + before * (1 - weight) for weight in (m.norm.weight, m.norm.bias))
    return x + m.a(first * second)


def activated_beside_itself(m, x):
    y = m.a(x)
    return x + (y + torch.sigmoid(y))


def bias_beside_activation(m, x):
    return x + (torch.sigmoid(x) + m.a.bias)


def first_state_mixed_in(m, x):
    y = 0.9 * (x + m.a(x)) + 0.1 * x
    return 0.9 * (y + m.b(y)) + 0.1 * x


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (dropout_between, ["a"]),  # the trunk of the second sum is a norm that its branch does not read
        (norm_between, ["a", "b"]),
        (scaled, ["add"]),  # two matrices in one branch: their common path is that of the model
        (cast_between, ["a"]),
        (long_skip, ["a", "b"]),  # a skip over a chain of two blocks is no site
        (no_weights, []),
        (two_readers, []),  # a dropped branch would still have a consumer
        (no_trunk, []),
        (other_shape, []),
        (weighted, ["a"]),
        (subtracted, ["a"]),
        (summed_towers, ["a", "b"]),
        (skip_beside_blocks, ["a", "b"]),
        (scaled_long_skip, ["a", "b"]),
        (first_state_mixed_in, ["a", "b"]),
        (pooled_less_itself, ["norm"]),
        (value_of_the_first_mixed_in, ["a", "b"]),
        (scaled_value_of_the_first_mixed_in, ["a", "b"]),
        (queries_of_positions_and_a_value, ["add", "add_1"]),
        (mixed_with_the_token_before, ["a"]),
        (activated_beside_itself, ["a"]),
        (bias_beside_activation, []),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_sites_of_small_modules(rule, expected):
    assert names(rule) == expected


def test_tanh_gelu_is_no_site():
    """The term ``x + 0.0447 x^3`` of GELU adds a function of x to x inside a branch."""

    def rule(m, x):
        y = m.a(x)
        y = 0.5 * y * (1.0 + torch.tanh(0.79788456 * (y + 0.044715 * y**3)))
        return x + m.b(y)

    (site,) = find_sites(traced(rule))
    assert site.kind == "mlp"


def test_gpt2_has_only_its_blocks_as_sites():
    _, graph, _ = samples.traced("hf_gpt2")
    cubes = [node for node in graph.nodes() if "pow" in node.name]
    assert len(cubes) == 2  # one tanh GELU a block
    assert [site.name for site in find_sites(graph)] == ["h.0.attn", "h.0.mlp", "h.1.attn", "h.1.mlp"]


def test_a_branch_may_read_values_from_before_the_trunk():
    def rule(m, x):
        table = torch.cos(torch.arange(x.shape[1], dtype=x.dtype))[None, :, None]
        mask = (x.mean(-1, keepdim=True) > 0).to(x.dtype)
        x = x + m.a(x * table) * mask
        return x + m.b(x * table) * mask / x.shape[0]

    graph = traced(rule)
    assert [site.name for site in find_sites(graph)] == ["a", "b"]
    drop_branches(graph, find_sites(graph)[:1])
    remove_dead(graph)
    graph.check()
    assert [site.name for site in find_sites(graph)] == ["b"]
    for size in (1, 4):
        assert run(graph, {"x": torch.rand(size, 5, 8)})[0].shape == (size, 5, 8)


def test_dropout_and_fused_attention_without_consumers_are_dead():
    def rule(m, x):
        heads = m.a(x)[:, None]
        return x + m.b(F.scaled_dot_product_attention(heads, heads, heads, dropout_p=0.0)[:, 0])

    graph = traced(rule)
    attention = [node for node in graph.nodes() if "scaled_dot_product" in node.name]
    assert attention
    assert attention[0].is_impure()  # fx's dead code elimination would keep the branch
    drop_branches(graph, find_sites(graph))
    assert attention[0] not in live_nodes(graph)
    remove_dead(graph)
    assert graph.parameter_count() == 2 * (8 * 8 + 8)  # stem and head
    graph.check()


def test_a_dead_node_fails_the_check():
    graph = traced(lambda m, x: x + m.a(x))
    drop_branches(graph, find_sites(graph))
    with pytest.raises(GraphError, match=r"still holds \d+ dead nodes"):
        graph.check()


def test_an_error_names_the_unknown_site():
    with pytest.raises(GraphError, match="no site named 'nowhere'; it has 1"):
        site_named(find_sites(traced(lambda m, x: x + m.a(x))), "nowhere")


def test_feature_axis_of_a_channels_first_trunk():
    class Conv(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.depth = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, padding=1, groups=6)
            self.norm, self.wide, self.thin = nn.LayerNorm(6), nn.Linear(6, 12), nn.Linear(12, 6)

        def forward(self, x):
            x = self.stem(x)
            x = x + self.depth(x)
            return x + self.thin(self.wide(self.norm(x.permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)

    sites = find_sites(trace(models.load(Conv(), example_inputs=torch.rand(2, 3, 4, 5))))
    assert [(site.kind, site.channel_dim, site.width) for site in sites] == [("conv", 1, 6), ("mlp", 1, 6)]


def test_scores_whose_last_axis_varies_are_no_site():
    """ProphetNet adds a function of scores to them; the width of such a site would fix the number of tokens."""

    class Scores(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.weight = nn.Linear(3, 4), nn.Parameter(torch.rand(1))

        def forward(self, x):
            scores = self.stem(x).transpose(0, 1)  # [4, rows]
            return (scores + torch.tanh(scores * self.weight)).transpose(0, 1)

    graph = trace(models.load(Scores(), example_inputs=torch.rand(2, 3)))
    assert find_sites(graph) == ()
    rows = graph.placeholders()[0].meta["val"].shape[0]
    assert not str(rows).isdecimal()


class Block(nn.Module):
    """A norm and an MLP on a trunk of width 8, with the weights of `other` if there is one."""

    def __init__(self, other=None):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)
        if other is not None:
            self.up.weight, self.down.weight = other.up.weight, other.down.weight

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


def stacked(blocks):
    """Trace blocks one after the other, between linear maps; return the names of their sites."""
    model = nn.Sequential(nn.Linear(8, 8), *blocks, nn.Linear(8, 8))
    return [site.name for site in find_sites(trace(models.load(model, example_inputs=torch.rand(2, 5, 8))))]


def test_branches_with_shared_weights_have_the_names_of_their_modules():
    """Torch names a shared weight once, by one of the modules that hold it."""
    first = Block()
    assert stacked([first, Block(first), Block(first)]) == ["1.mlp", "2.mlp", "3.mlp"]
    assert stacked([first, Block(), first]) == ["1.mlp", "2.mlp", "3.mlp"]


def test_a_weight_that_the_whole_model_computes_with_keeps_its_own_module():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

        def forward(self, x):
            x = self.parts[0](x)
            return x + F.linear(x, self.parts[1].weight)

    graph = trace(models.load(Functional(), example_inputs=torch.rand(2, 5, 8)))
    assert [site.name for site in find_sites(graph)] == ["parts.1.other"]


def test_a_parametrized_weight_belongs_to_the_module_that_it_is_computed_for():
    block = Block()
    block.up = nn.Identity()
    block.down = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
    assert stacked([block]) == ["1.down"]
