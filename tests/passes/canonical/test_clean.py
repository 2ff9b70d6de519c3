"""Nodes that Clean removes, and nodes that it must keep."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from compressor import models
from compressor.lower.trace import trace
from passes.base import apply
from passes.canonical.clean import Clean
from passes.execute.interpreter import run
from passes.graph.graph import Graph


def exported(module, *inputs):
    """Return the graph of torch.export, before cleaning."""
    program = torch.export.export(module.eval(), inputs)
    names = tuple(f"x{position}" for position in range(len(inputs)))
    return Graph(program.module(check_guards=False), names, ("y",))


class NoOps(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused, self.dead = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        x = F.dropout(x, 0.5, training=False).clone().contiguous().to(torch.float32)
        self.dead(x)
        return self.used(x).detach() + 1


def targets(graph):
    return [str(node.target).rpartition("::")[2] for node in graph.nodes() if node.op == "call_function"]


def test_no_ops_and_dead_code_are_removed():
    module = NoOps()
    graph = exported(module, torch.rand(2, 4))
    result = apply(Clean(), graph)
    assert targets(graph) == ["aten.linear.default", "aten.add.Tensor"]
    assert result.changed
    assert graph.parameter_count() == 4 * 4 + 4
    x = torch.rand(2, 4)
    with torch.inference_mode():
        assert torch.equal(graph.module(x)[0] if isinstance(graph.module(x), tuple) else graph.module(x), module(x))


@pytest.mark.parametrize("shape", [(1, 1), (4, 1), (4, 4)])  # sizes of the axes behind the batch
def test_a_squeeze_without_axes_keeps_the_axis_of_the_batch(shape):
    class Squeezes(nn.Module):
        def forward(self, x):
            return x.squeeze() * 2

    batch = torch.rand(3, *shape)
    program = torch.export.export(Squeezes(), (batch,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    graph = Graph(program.module(check_guards=False), ("x",), ("y",))
    apply(Clean(), graph)
    for rows in (1, 2):
        expected = batch[:rows].reshape(rows, *(size for size in shape if size > 1)) * 2
        (found,) = run(graph, {"x": batch[:rows]})
        assert torch.equal(found, expected)


class Normalised(nn.Module):
    def forward(self, x):
        return nn.functional.normalize(x, dim=-1)


class Returned(nn.Module):
    """What reads the value is no element-wise operator."""

    def forward(self, x):
        return x[:, :1].expand_as(x).cumsum(-1)


@pytest.mark.parametrize(("module", "left"), [(Normalised(), 0), (Returned(), 1)])
def test_operators_broadcast_what_is_expanded_for_them(module, left):
    graph, x = exported(module, torch.rand(2, 4)), torch.rand(2, 4)
    apply(Clean(), graph)
    graph.check()
    assert sum("expand_as" in target for target in targets(graph)) == left
    assert torch.equal(run(graph, {graph.inputs[0]: x})[0], module(x))


def test_casts_to_another_dtype_stay():
    class Cast(nn.Module):
        def forward(self, x):
            return x.to(torch.float64).to(torch.float32).to(torch.float32)

    graph = exported(Cast(), torch.rand(2, 4))
    apply(Clean(), graph)
    assert sum("to." in target or "_to_copy" in target for target in targets(graph)) == 2


def test_dropout_in_training_mode_stays():
    class Always(nn.Module):
        def forward(self, x):
            return F.dropout(x, 0.5, training=True)

    graph = exported(Always(), torch.rand(2, 4))
    apply(Clean(), graph)
    assert targets(graph) == ["aten.dropout.default"]


def test_view_works_without_the_copy_before_it():
    """Windowed attention permutes, copies and views; without the copy, a view does not accept the strides."""

    class Windows(nn.Module):
        def forward(self, x):
            return x.permute(0, 2, 1).contiguous().view(x.shape[0], -1)

    module = Windows()
    model = models.load(module, example_inputs=torch.rand(2, 3, 4))
    graph = trace(model)
    x = torch.rand(5, 3, 4)
    assert not any("contiguous" in target or "clone" in target for target in targets(graph))
    assert torch.equal(run(graph, {"x": x})[0], module(x))


def test_cleaning_is_idempotent():
    graph = exported(NoOps(), torch.rand(2, 4))
    apply(Clean(), graph)
    before = graph.signature()
    assert apply(Clean(), graph).changed == ()
    assert graph.signature() == before
