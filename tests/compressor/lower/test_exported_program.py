"""Exported programs made from graphs: they compute the same as the graph and share its weights."""

import pytest
import torch
from torch import nn

from compressor import models
from compressor.lower import write_onnx
from compressor.lower.exported_program import exported_program
from compressor.lower.trace import trace
from compressor.lower.write_onnx import LowerError, lower
from compressor.search.rewriter import Rewriter
from passes.execute.interpreter import run
from passes.graph.edit import insert_constant, replace_input
from passes.graph.graph import GraphError
from runtimes.base.protocols import BuildOptions
from runtimes.base.registry import runtime
from tests.samples import digits, small, spread, traced


def feeds(model, rows=3):
    """Return inputs of another batch size than the example."""
    return {name: torch.cat([value[:1]] * rows) for name, value in model.example.items()}


def check(graph, model):
    program = exported_program(graph)
    for rows in (1, 3):
        given = feeds(model, rows)
        expected = run(graph, given)
        found = program.module()(*given.values())
        assert len(found) == len(expected)
        for ours, right in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, right)
    return program


@pytest.mark.parametrize("name", ["vit_swiglu", "beit", "hf_bert", "caformer"])
def test_a_program_computes_the_same_for_every_batch(name):
    model, graph, _ = traced(name)
    before = graph.signature()
    check(graph, model)
    assert graph.signature() == before


def test_merged_tokens_and_fitted_maps_are_part_of_the_program():
    """Symbols of their own, and parameters that the model does not have."""
    model, graph, sites, split = small(spread(0.1), depth=3)
    rewriter = Rewriter(graph, sites, split)
    changes = {sites[1].name: "linear", sites[2].name: "merge:25%"}
    program = check(rewriter.rewritten(changes), model)
    assert any("fitted" in name for name in program.state_dict)


def test_weights_are_shared_and_tied_ones_are_one_input():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
            self.second.weight = self.first.weight
            self.register_buffer("shift", torch.arange(4.0))

        def forward(self, x):
            return self.second(self.first(x)) + self.shift

    model = models.load(Tied(), example_inputs={"x": torch.randn(2, 4)}, task="feature-extraction")
    graph = trace(model)
    program = check(graph, model)
    tensors = list(program.state_dict.values())
    assert len(tensors) == 4
    pointers = {tensor.data_ptr() for tensor in model.module.state_dict().values()}
    assert {tensor.data_ptr() for tensor in tensors} <= pointers
    assert len(program.graph_signature.parameters) == 3
    assert len(program.graph_signature.buffers) == 1


def test_a_new_constant_has_a_value_of_the_same_mode():
    model, _, traced_graph, _ = digits()
    graph = traced_graph.fork()
    (output,) = [node for node in graph.nodes() if node.op == "output"]
    last = output.all_input_nodes[0]
    scale = insert_constant(graph, "scale", torch.tensor(2.0), before=output)
    with graph.module.graph.inserting_before(output):
        scaled = graph.module.graph.call_function(torch.ops.aten.mul.Tensor, (last, scale))
    scaled.meta["val"] = last.meta["val"]
    replace_input(graph, output, last, scaled)
    check(graph, model)


def test_calls_of_modules_are_refused():
    _, graph, _ = traced("vit_swiglu")
    fork = graph.fork()
    fork.module.add_submodule("inner", nn.Identity())
    (output,) = [node for node in fork.nodes() if node.op == "output"]
    with fork.module.graph.inserting_before(output):
        fork.module.graph.call_module("inner", (output.all_input_nodes[0],))
    with pytest.raises(GraphError, match="found a call of the module inner"):
        exported_program(fork)


class Counting(nn.Module):
    """A module that writes into a buffer."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x):
        self.calls.add_(1.0)
        return x + self.inner(x)


def test_a_graph_that_writes_into_a_buffer_is_traced_again(tmp_path):
    model = models.load(Counting(), example_inputs={"x": torch.randn(2, 4)}, task="feature-extraction")
    graph = trace(model)
    with pytest.raises(GraphError, match="writes into a tensor"):
        exported_program(graph)
    path = lower(graph, model, tmp_path / "model.onnx")
    feeds = {"x": torch.randn(3, 4)}
    with runtime("onnxruntime").load(path, BuildOptions()) as engine:
        (found, *_) = engine.run({name: value.numpy() for name, value in feeds.items()}).values()
    torch.testing.assert_close(torch.from_numpy(found), model.module(feeds["x"]).detach())


def test_a_size_that_an_operator_fixed_is_an_error(tmp_path, monkeypatch):
    """No file is written that takes one batch size only, where the model takes any."""
    model, graph, _ = traced("vit_swiglu")

    def fixed(graph):
        twin = graph.fork()
        (node,) = twin.placeholders()
        value = node.meta["val"]
        node.meta["val"] = value.fake_mode.from_tensor(torch.zeros(2, *value.shape[1:]), static_shapes=True)
        return exported_program(twin)

    monkeypatch.setattr(write_onnx, "exported_program", fixed)
    with pytest.raises(LowerError, match="fixed size"):
        lower(graph, model, tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()
