"""Folded graphs against unfolded ones: equal outputs with fewer nodes, and no fold that is not exact."""

import functools

import onnx
import pytest
import torch
from torch import nn

from compressor import models
from compressor.lower.trace import trace
from compressor.lower.write_onnx import lower
from passes.analysis.least_squares import Map, Replacement
from passes.base import apply
from passes.canonical.clean import Clean
from passes.execute.interpreter import run
from passes.graph.edit import insert_constant, remove_dead, set_arguments
from passes.graph.graph import attribute
from passes.graph.sites import find_sites
from passes.rewrite.drop import Drop
from passes.rewrite.fold_linear import FoldLinear
from passes.rewrite.replace import Replace
from tests.architectures import TIMM, TRANSFORMERS

aten = torch.ops.aten
BY_NAME = {architecture.name: architecture for architecture in TIMM + TRANSFORMERS}
# A folded product rounds once instead of twice: one float32 rounding (1.2e-7) for each of some twenty terms.
FLOAT32 = 3e-6


@functools.cache
def traced(name):
    """Trace a model with random vectors, because a LayerScale of 1e-5 and zero biases would hide errors of a fold."""
    model = BY_NAME[name].load()
    with torch.no_grad():
        for parameter in model.module.parameters():
            if parameter.numel() == max(parameter.shape, default=1):
                parameter.uniform_(0.2, 0.8)
    graph = trace(model)
    return model, graph, find_sites(graph)


def some_map(form, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    factors = {"constant": (), "scale": (torch.rand(width, generator=generator, dtype=torch.float64),)}
    linear = (torch.randn(width, width, generator=generator, dtype=torch.float64) / width,)
    bias = torch.randn(width, generator=generator, dtype=torch.float64)
    return Map(factors.get(form, linear), bias)


def close(left, right, tolerance=FLOAT32):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * max(float(b.abs().max()), 1e-3))


def count(graph, target):
    return sum(node.target is target for node in graph.nodes())


def calls(graph):
    return sum(node.op == "call_function" for node in graph.nodes())


def fused(graph):
    """Return a fused copy and the names of the removed nodes; check that the original does not change."""
    before, edited = [node.name for node in graph.nodes()], graph.fork()
    folded = apply(FoldLinear(), edited).changed
    assert [node.name for node in graph.nodes()] == before
    return edited, folded


# --------------------------------------------------------------------------------------------------------------- rules


class Net(nn.Module):
    """Module with the weights of all rules; `forward` is a function of the module and its input."""

    def __init__(self, forward):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.wide, self.narrow, self.plain = nn.Linear(6, 24), nn.Linear(24, 6), nn.Linear(6, 6, bias=False)
        self.up, self.down, self.one = nn.Linear(2, 6), nn.Linear(6, 2, bias=False), nn.Linear(6, 1)
        self.norm, self.bare = nn.LayerNorm(6), nn.LayerNorm(6, elementwise_affine=False)
        self.s, self.t, self.scalar = (nn.Parameter(torch.randn(shape)) for shape in ((6,), (6,), ()))
        self.tokens = nn.Parameter(torch.randn(5, 1))
        self.run_on = forward

    def forward(self, x):
        return self.run_on(self, x)


def then(value, step):
    return step(value)


def graph_of(forward):
    torch.manual_seed(0)
    model = models.load(Net(forward).eval(), example_inputs=torch.randn(2, 5, 6))
    graph = trace(model)
    apply(Clean(), graph)
    return graph


FIRES = {
    "scale after linear": (lambda n, x: n.a(x) * n.s, 1),
    "scale before the dot": (lambda n, x: n.s * n.a(x), 1),
    "one number after linear": (lambda n, x: n.a(x) * n.scalar, 1),
    "scale without bias": (lambda n, x: n.plain(x) * n.s, 1),
    "shift after linear": (lambda n, x: n.a(x) + n.t, 1),
    "shift gives a bias": (lambda n, x: n.t + n.plain(x), 1),
    "layer scale and shift": (lambda n, x: n.a(x) * n.s + n.t, 2),
    "shift after sum": (lambda n, x: x.sin() + n.a(x) + n.t, 1),
    "shift after sum, projection first": (lambda n, x: n.plain(x) + x.sin() + n.t, 1),
    "linear after linear": (lambda n, x: n.b(n.a(x)), 1),
    "projection and map": (lambda n, x: n.a(n.narrow(n.wide(x).relu())), 1),
    "three in a row": (lambda n, x: n.c(n.b(n.a(x))), 2),
    "down and down": (lambda n, x: n.down(n.a(x)), 1),
    "without a bias": (lambda n, x: n.plain(n.plain(x).sin()) + n.b(n.plain(x.cos())), 1),
    "two residuals": (lambda n, x: then(then(x.sin(), lambda z: z + n.a(z)), lambda y: y + n.b(y)), 1),
    "two residuals, one bias": (lambda n, x: then(then(x.sin(), lambda z: n.a(z) + z), lambda y: y + n.plain(y)), 1),
    "two residuals, other bias": (lambda n, x: then(then(x.sin(), lambda z: z + n.plain(z)), lambda y: n.a(y) + y), 1),
    "scale after norm": (lambda n, x: n.norm(x) * n.s, 1),
    "shift after norm": (lambda n, x: n.norm(x) + n.t, 1),
    "both after norm": (lambda n, x: n.norm(x) * n.s + n.t, 2),
}


@pytest.mark.parametrize("case", FIRES)
def test_rules_fire(case):
    forward, folds = FIRES[case]
    graph = graph_of(forward)
    edited, folded = fused(graph)
    assert len(folded) == folds
    assert calls(edited) < calls(graph)
    for rows in (1, 3):
        feeds = {"x": torch.randn(rows, 5, 6, generator=torch.Generator().manual_seed(1))}
        close(run(edited, feeds), run(graph, feeds))
    assert fused(edited)[1] == ()  # the pass is idempotent


def test_residual_maps_without_bias_get_no_bias():
    graph = graph_of(lambda n, x: then(then(x.sin(), lambda z: z + n.plain(z)), lambda y: y + n.plain(y)))
    edited, folded = fused(graph)
    assert len(folded) == 1
    (linear,) = (node for node in edited.nodes() if node.target is aten.linear.default)
    assert len(linear.args) == 2


STAYS = {
    "another reader of the projection": lambda n, x: then(n.a(x), lambda y: y * n.s + y.sin()),
    "another reader, shifted": lambda n, x: then(n.a(x), lambda y: (y + n.t).sin() + y.cos()),
    "the projection is an output": lambda n, x: then(n.a(x), lambda y: (y, y * n.s)),
    "an activation between": lambda n, x: n.b(n.a(x).relu()),
    "a norm between": lambda n, x: n.b(n.bare(n.a(x))),
    "an activation before the scale": lambda n, x: n.a(x).tanh() * n.s,
    "a scale of tokens": lambda n, x: n.a(x) * n.tokens,
    "a shift of tokens": lambda n, x: n.a(x) + n.tokens,
    "a scale that makes it wider": lambda n, x: n.one(x) * n.s,
    "a shift that makes it wider": lambda n, x: n.one(x) + n.t,
    "a larger product": lambda n, x: n.up(n.down(x)),
    "a reader of the sum": lambda n, x: then(x.sin() + n.a(x), lambda y: (y + n.t).sin() + y),
    "a sum of activations": lambda n, x: x.sin() + n.a(x).cos() + n.t,
    "a projection twice in a sum": lambda n, x: then(n.a(x), lambda y: (y + y) + n.t),
    "a sum with itself": lambda n, x: then(x.sin(), lambda y: y + y),
    "residuals with a reader between": lambda n, x: then(
        then(x.sin(), lambda z: z + n.a(z)), lambda y: (y + n.b(y), y)
    ),
    "residuals with a norm between": lambda n, x: then(
        then(x.sin(), lambda z: z + n.a(z)), lambda y: y + n.b(n.bare(y))
    ),
    "residuals that are not square": lambda n, x: then(then(x.sin(), lambda z: z + n.one(z)), lambda y: y + n.b(y)),
    "a reader of the norm": lambda n, x: then(n.norm(x), lambda y: y * n.s + y.sin()),
    "a norm without weights": lambda n, x: n.bare(x) * n.s,
    "an alpha": lambda n, x: torch.add(n.a(x), n.t, alpha=2),
}


@pytest.mark.parametrize("case", STAYS)
def test_rules_do_not_fire(case):
    graph = graph_of(STAYS[case])
    edited, folded = fused(graph)
    assert folded == ()
    assert [node.name for node in edited.nodes()] == [node.name for node in graph.nodes()]
    feeds = {"x": torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(1))}
    assert all(torch.equal(a, b) for a, b in zip(run(edited, feeds), run(graph, feeds), strict=True))


def test_scale_of_a_wider_dtype_stays():
    """A float32 projection times a float64 scale is float64; the folded projection would be float32."""
    graph = graph_of(lambda n, x: n.a(x) * n.s)
    (product,) = (node for node in graph.nodes() if node.target is aten.mul.Tensor)
    constant = insert_constant(graph, "s", torch.rand(6, dtype=torch.float64), before=product)
    set_arguments(graph, product, product.args[0], constant)
    remove_dead(graph)
    assert fused(graph)[1] == ()


def test_products_are_computed_in_float64():
    """W2 W1 cancels, so float32 products would have a relative error of 1e-3, 1e4 times the tolerance."""
    graph = graph_of(lambda n, x: n.b(n.a(x)))
    weights = [attribute(graph, node) for node in graph.nodes() if node.op == "get_attr"]
    a, b = (weight for weight in weights if weight.ndim == 2)
    with torch.no_grad():
        a[3:] = a[:3] * (1 + 1e-4)
        b[:, 3:] = -b[:, :3]
    expected = b.double() @ a.double()
    edited, _ = fused(graph)
    (linear,) = (node for node in edited.nodes() if node.target is aten.linear.default)
    torch.testing.assert_close(attribute(edited, linear.args[1]), expected.float(), rtol=2e-7, atol=0)  # one rounding


# ------------------------------------------------------------------------------------------------- real architectures

LAYER_SCALED = ("hf_dinov2", "beit", "deit3", "cait", "vit_registers")


@pytest.mark.parametrize("name", LAYER_SCALED)
def test_layer_scale_is_folded(name):
    """Every branch that ends in a projection loses its product, and the outputs do not change."""
    model, graph, sites = traced(name)
    edited, folded = fused(graph)
    scaled = {site.branch for site in sites}
    assert len(edited.nodes()) < len(graph.nodes())
    assert count(edited, aten.mul.Tensor) == count(graph, aten.mul.Tensor) - len(folded)
    assert len(scaled.intersection(folded)) >= len(sites) - (name == "cait")
    close(run(edited, model.example), run(graph, model.example))


# Tracing all of tests/architectures.py takes minutes. These are the ones with a fold, and one of each other kind.
FAMILIES = (
    *LAYER_SCALED, "resmlp", "efficientformer", "vit_parallel_layerscale", "vit", "mixer", "poolformer", "hf_bert",
    "hf_albert", "hf_llama",
)  # fmt: skip


VARIANTS = ("efficientformer", "vit_parallel_layerscale", "resmlp")  # of other families here; traced nowhere else


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in VARIANTS else ()) for name in FAMILIES]
)
def test_outputs_of_many_families_do_not_change(name):
    """Norms of a deep model amplify float32 roundings to 1e-4 of the largest output; a wrong fold exceeds this."""
    model, graph, _ = traced(name)
    edited, folded = fused(graph)
    assert len(edited.nodes()) <= len(graph.nodes()) - len(folded)
    close(run(edited, model.example), run(graph, model.example), 1e-4)


def test_shared_weights_keep_their_value():
    """ALBERT runs one layer twice; a fold into the first run must not change the second."""
    model, graph, sites = traced("hf_albert")
    edited = graph.fork()
    apply(Replace(sites[1], Replacement("state", some_map("scale", 16), 0.5)), edited)
    expected = run(edited, model.example)
    before = {name: value.clone() for name, value in graph.module.named_parameters()}
    folded, names = fused(edited)
    assert names
    close(run(folded, model.example), expected)
    for name, value in graph.module.named_parameters():
        assert torch.equal(value, before[name])


class Tied(nn.Module):
    """A projection that is used twice, once followed by a scale."""

    def __init__(self):
        super().__init__()
        self.shared, self.scale = nn.Linear(6, 6), nn.Parameter(torch.randn(6))

    def forward(self, x):
        return self.shared(x.sin()) * self.scale + self.shared(x.cos()).relu()


def test_tied_projection_is_folded_for_one_consumer_only():
    torch.manual_seed(0)
    graph = trace(models.load(Tied().eval(), example_inputs=torch.randn(2, 6)))
    edited, folded = fused(graph)
    feeds = {"x": torch.randn(3, 6)}
    assert len(folded) == 1
    close(run(edited, feeds), run(graph, feeds))
    assert edited.parameter_count() == 2 * 42


# ------------------------------------------------------------------------------------------------- number of nodes


def onnx_nodes(graph, model, path):
    return len(onnx.load(lower(graph, model, path)).graph.node)


@pytest.mark.parametrize(("name", "form"), [("vit", "previous"), ("vit", "constant"), ("hf_dinov2", "previous")])
def test_folded_map_adds_no_node(name, form, tmp_path):
    """Graph and ONNX file have as many nodes as after a drop."""
    model, graph, sites = traced(name)
    site, deleted, replaced = sites[2], graph.fork(), graph.fork()
    apply(Drop((site.name,)), deleted)
    source = "previous" if form == "previous" else "state"
    apply(Replace(site, Replacement(source, some_map(form, site.width), 0.5)), replaced)
    expected = run(replaced, model.example)
    for edited in (deleted, replaced):
        apply(Clean(), edited)
        apply(FoldLinear(), edited)
    close(run(replaced, model.example), expected)
    assert len(replaced.nodes()) == len(deleted.nodes())
    assert replaced.parameter_count() == deleted.parameter_count()
    sizes = [onnx_nodes(edited, model, tmp_path / f"{n}.onnx") for n, edited in enumerate((deleted, replaced))]
    assert sizes[0] == sizes[1]


def test_scale_after_a_norm_adds_no_node():
    """The trunk of BERT is the output of a norm, whose weights take a scale and a shift."""
    model, graph, sites = traced("hf_bert")
    deleted, replaced = graph.fork(), graph.fork()
    apply(Drop((sites[2].name,)), deleted)
    apply(Replace(sites[2], Replacement("state", some_map("scale", 16), 0.5)), replaced)
    edited, _ = fused(replaced)
    close(run(edited, model.example), run(replaced, model.example))
    assert len(edited.nodes()) == len(fused(deleted)[0].nodes())


def test_two_adjacent_maps_become_one_matrix_product():
    model, graph, sites = traced("vit")
    edited, one = graph.fork(), graph.fork()
    for number, site in enumerate(sites[1:3]):
        apply(Replace(site, Replacement("state", some_map("linear", 16, seed=number), 0.5)), edited)
    apply(Drop((sites[1].name,)), one)
    apply(Replace(sites[2], Replacement("state", some_map("linear", 16), 0.5)), one)
    both, folded = fused(edited)
    assert len(folded) == 1
    assert count(both, aten.linear.default) == count(edited, aten.linear.default) - 1
    assert len(both.nodes()) == len(one.nodes())
    close(run(both, model.example), run(edited, model.example))
