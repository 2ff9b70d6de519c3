"""Replaced branches against sums computed directly from the states of the original graph."""

import pytest
import torch
from torch import nn

from compressor import models
from compressor.lower.trace import trace
from passes.analysis.least_squares import Map, Replacement
from passes.analysis.site_location import locate_site
from passes.base import PassError, apply
from passes.execute.interpreter import Program, run
from passes.graph.graph import value_of
from passes.graph.sites import find_sites
from passes.rewrite.drop import Drop
from passes.rewrite.replace import Replace
from tests.samples import states, traced

# Matrix products sum the same float32 terms in another order: a few roundings of 1.2e-7.
FLOAT32 = 1e-5
FORMS = ("constant", "scale", "linear", "linear-unbiased", "low-rank")


def some_map(form, width, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    factors = {
        "constant": (),
        "scale": (draw(width),),
        "linear": (draw(width, width),),
        "linear-unbiased": (draw(width, width),),
        "low-rank": (draw(2, width), draw(width, 2)),
    }[form]
    return Map(factors, None if form == "linear-unbiased" else draw(width))


def mapped(value, fitted_map, dim):
    """Compute A r + b along one axis, in float64."""
    rows = value.double().movedim(dim, -1)
    result = rows @ fitted_map.matrix(rows.shape[-1]).T + (0.0 if fitted_map.bias is None else fitted_map.bias)
    return result.movedim(-1, dim)


def continued(graph, feeds, name, value):
    """Return the outputs of the graph with the value of one node overridden."""
    by_name = {node.name: node for node in graph.nodes()}
    program = Program(graph)
    values = program.start(feeds)
    position = program.order.index(by_name[name])
    with torch.inference_mode():
        for index, node in enumerate(program.order):
            if index == position:
                values[node] = value
            elif node not in values:
                values[node] = program.step(node, values)
        return program.results(values)


def close(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), rtol=FLOAT32, atol=FLOAT32 * max(float(b.abs().max()), 1.0))


def replaced(graph, site, source, fitted_map):
    edited = graph.fork()
    changed = apply(Replace(site, Replacement(source, fitted_map, 0.5)), edited).changed
    assert changed == (site.name,)
    edited.check()
    return edited


CASES = [
    *[(name, "state", 1, form) for name in ("vit", "poolformer", "vit_parallel_scaling", "hf_bert") for form in FORMS],
    *[(name, "state", 0, form) for name in ("convnext", "hf_llama", "hf_gpt2", "swinv2") for form in FORMS[1:3]],
    *[(name, "normalised", 1, form) for name in ("vit", "poolformer") for form in FORMS[1:]],
    *[(name, "normalised", 0, "low-rank") for name in ("vit_parallel_scaling", "hf_llama")],
    *[(name, "previous", 1, form) for name in ("vit", "hf_dinov2") for form in FORMS],
    *[(name, "previous", 1, "linear") for name in ("beit", "hf_llama", "cait")],
]  # fmt: skip


@pytest.mark.parametrize(("name", "source", "position", "form"), CASES)
def test_outputs_equal_the_direct_sum(name, source, position, form):
    model, graph, sites = traced(name)
    site = sites[position]
    before = [node.name for node in graph.nodes()]
    expected_before = run(graph, model.example)
    fitted_map, location = some_map(form, site.width), locate_site(graph, site)
    edited = replaced(graph, site, source, fitted_map)
    regressor, root, branch = states(graph, model.example, location.source(source), location.root, location.branch)
    rest = root - branch
    if source == "previous":
        rest = rest - regressor
    expected_sum = (rest.double() + mapped(regressor, fitted_map, site.channel_dim)).to(root.dtype)
    close(run(edited, model.example), continued(graph, model.example, location.root, expected_sum))
    # The original graph is unchanged, and the remaining nodes of the copy keep their names.
    assert [node.name for node in graph.nodes()] == before
    assert all(torch.equal(a, b) for a, b in zip(run(graph, model.example), expected_before, strict=True))
    assert set(before) - {node.name for node in edited.nodes()}
    assert (edited.inputs, edited.outputs) == (graph.inputs, graph.outputs)


@pytest.mark.parametrize(
    ("name", "source", "position"), [("vit", "state", 1), ("vit", "previous", 2), ("poolformer", "normalised", 1)]
)
@pytest.mark.parametrize("rows", [1, 3])
def test_batch_size_stays_symbolic(name, source, position, rows):
    model, graph, sites = traced(name)
    site = sites[position]
    edited = replaced(graph, site, source, some_map("low-rank", site.width))
    feeds = {"x": torch.rand(4, *model.example["x"].shape[1:], generator=torch.Generator().manual_seed(5))}
    some = {"x": feeds["x"][:rows]}
    assert run(edited, some)[0].shape == (rows, 5)
    close(run(edited, some), [run(edited, feeds)[0][:rows]])
    with torch.inference_mode():
        close(edited.module(some["x"]), run(edited, some))
    original = {node.name for node in graph.nodes()}
    shapes = [
        str(value_of(node).shape) for node in edited.nodes() if node.op != "get_attr" and node.name not in original
    ]
    assert shapes
    assert not any(shape.startswith("torch.Size([2,") for shape in shapes)  # symbolic, not the traced batch size


def parameters_of(graph, site):
    """Return the number of weight elements that only the branch of a site reads."""
    dropped = graph.fork()
    apply(Drop((site.name,)), dropped)
    return graph.parameter_count() - dropped.parameter_count()


@pytest.mark.parametrize(
    ("form", "added"), [("constant", 16), ("scale", 32), ("linear", 272), ("linear-unbiased", 256), ("low-rank", 80)]
)
@pytest.mark.parametrize("source", ["state", "previous"])
def test_parameter_count_is_that_of_the_map(form, added, source):
    """Width 16: b, a and b, A and b, A, and two factors of rank 2 and b. The weights of branch and norm are removed."""
    _, graph, sites = traced("vit")
    edited = replaced(graph, sites[1], source, some_map(form, 16))
    if (form, source) == ("constant", "previous"):
        added -= parameters_of(graph, sites[0])  # the constant replaces the previous branch
    assert edited.parameter_count() == graph.parameter_count() - parameters_of(graph, sites[1]) + added


def test_scale_of_the_state_replaces_the_sum():
    """x + (a x + b) is (1 + a) x + b, so one product and one sum remain of the branch."""
    _, graph, sites = traced("vit")
    edited, dropped = replaced(graph, sites[1], "state", some_map("scale", 16)), graph.fork()
    apply(Drop((sites[1].name,)), dropped)
    assert len(edited.nodes()) == len(dropped.nodes()) + 4  # and two constants
    assert sites[1].add not in {node.name for node in edited.nodes()}


def test_trunk_stays_a_term_next_to_a_parallel_branch():
    """The other branch can still be replaced. Both orders give the same outputs."""
    model, graph, sites = traced("vit_parallel_scaling")
    first, second = some_map("scale", 16), some_map("scale", 16, seed=1)
    edited = replaced(replaced(graph, sites[2], "state", first), sites[3], "state", second)
    swapped = replaced(replaced(graph, sites[3], "state", second), sites[2], "state", first)
    (x,) = states(graph, model.example, sites[2].trunk)
    root = (x.double() + mapped(x, first, 2) + mapped(x, second, 2)).float()
    expected = continued(graph, model.example, sites[2].root, root)
    close(run(edited, model.example), expected)
    close(run(swapped, model.example), expected)


def test_all_consecutive_sites_can_be_replaced():
    """Site names stay valid although each edit replaces the trunk node of the next site."""
    model, graph, sites = traced("vit")
    edited = graph.fork()
    (x,) = states(graph, model.example, sites[0].trunk)
    for number, (site, form) in enumerate(zip(sites, ("scale", "linear", "constant", "scale"), strict=True)):
        fitted_map = some_map(form, 16, seed=number)
        apply(Replace(site, Replacement("state", fitted_map, 0.5)), edited)
        x = x.double() + mapped(x, fitted_map, 2)
    close(run(edited, model.example), continued(graph, model.example, sites[-1].root, x.float()))
    edited.check()


def test_weights_have_the_dtype_of_the_state():
    _, graph, sites = traced("vit")
    edited = replaced(graph, sites[1], "state", some_map("linear", 16))
    added = [parameter for name, parameter in edited.module.named_parameters() if "fitted" in name]
    assert {parameter.dtype for parameter in added} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in added)


# ------------------------------------------------------------------------------------------------------------ refusals


class Shared(nn.Module):
    """Model in which the norm of the last branch has a consumer outside the branch."""

    def __init__(self):
        super().__init__()
        self.stem, self.first, self.norm, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 6)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.first(x.sin())
        read = self.norm(x)
        return x + self.last(read), read.mean(-1)


class Doubled(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.last = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        x = self.stem(x)
        x = x + x
        return x + self.last(x.sin())


def graph_of(module):
    torch.manual_seed(0)
    return trace(models.load(module.eval(), example_inputs=torch.rand(2, 5, 6)))


@pytest.mark.parametrize(
    ("graph", "position", "reason"),
    [
        (lambda: traced("swinv2")[1], 0, "its trunk is the output of layer_norm, not a sum"),
        (lambda: traced("hf_bert")[1], 1, "its trunk is the output of layer_norm_1, not a sum"),
        (lambda: traced("hf_llama")[1], 0, "its trunk is the output of embedding, not a sum"),
        (lambda: traced("vit_parallel_scaling")[1], 2, "has other consumers"),
        (lambda: traced("vit_post_norm")[1], 1, "does not end in a linear map"),
        (lambda: graph_of(Shared()), 1, "has other consumers"),
        (lambda: graph_of(Doubled()), 0, "does not end in a linear map"),
    ],
)
def test_error_states_why_a_map_cannot_be_folded(graph, position, reason):
    graph = graph().fork()
    site = find_sites(graph)[position]
    before = [node.name for node in graph.nodes()]
    with pytest.raises(PassError, match=f"cannot be folded into the previous branch: .*{reason}"):
        apply(Replace(site, Replacement("previous", some_map("linear", site.width), 0.5)), graph)
    assert [node.name for node in graph.nodes()] == before


def test_missing_source_raises():
    _, graph, sites = traced("hf_bert")
    with pytest.raises(PassError, match="its first linear map reads the trunk itself"):
        apply(Replace(sites[0], Replacement("normalised", some_map("linear", 16), 0.5)), graph.fork())


def test_dropped_or_changed_branch_raises():
    _, graph, sites = traced("vit")
    dropped = graph.fork()
    apply(Drop((sites[1].name,)), dropped)
    with pytest.raises(PassError, match=r"the branch of blocks\.0\.mlp is no longer in the graph"):
        apply(Replace(sites[1], Replacement("state", some_map("scale", 16), 0.5)), dropped)
    folded = replaced(graph, sites[1], "previous", some_map("linear", 16))
    with pytest.raises(PassError, match=r"the branch of blocks\.0\.attn is no longer a term of a sum"):
        apply(Replace(sites[0], Replacement("state", some_map("scale", 16), 0.5)), folded)


class ChannelsOfThree(nn.Module):
    """Model with features on axis 1 of 3."""

    def __init__(self):
        super().__init__()
        self.stem, self.inner = nn.Conv1d(4, 4, 1), nn.Conv1d(4, 4, 3, padding=1)

    def forward(self, x):
        x = self.stem(x)
        return x + self.inner(x)


def test_unsupported_feature_axis_takes_a_scale_only():
    torch.manual_seed(0)
    graph = trace(models.load(ChannelsOfThree().eval(), example_inputs=torch.rand(2, 4, 7)))
    (site,) = find_sites(graph)
    with pytest.raises(PassError, match="has its features on axis 1 of 3; a linear map needs"):
        apply(Replace(site, Replacement("state", some_map("linear", 4), 0.5)), graph.fork())
    fitted_map, feeds = some_map("scale", 4), {"x": torch.rand(3, 4, 7)}
    edited = replaced(graph, site, "state", fitted_map)
    (x,) = states(graph, feeds, site.trunk)
    close(run(edited, feeds), [x.double() + mapped(x, fitted_map, 1)])
