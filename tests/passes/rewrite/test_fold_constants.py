"""What depends on weights alone is computed once: equal outputs, and weights that are stored in the file."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

from compressor import models
from compressor.lower.trace import trace
from compressor.lower.write_onnx import lower
from passes.base import apply
from passes.execute.interpreter import run
from passes.graph.graph import Graph
from passes.rewrite.fold_constants import FoldConstants, foldable

WIDTH = 16


class Layer(nn.Module):
    """One residual branch; what follows shows in the names of its subclasses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(2 * WIDTH, WIDTH) / 4)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head((x + self.branch(x)).mean(1))

    def branch(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class Split(Layer):
    def branch(self, x: torch.Tensor) -> torch.Tensor:
        left, right = self.weight.split([WIDTH, WIDTH])
        return (x @ left.T).relu() @ right


class CrossAttention(Layer):
    """A learned query that attends to the input: torch splits the packed weight of query, key and value."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)

    def branch(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(self.weight[:1].expand(len(x), -1, -1), x, x, need_weights=False)[0]


class WeightNorm(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))

    def branch(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


class Scaled(Layer):
    """A low-rank update that was not merged, as of LoRA; the sum is no larger than its terms."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(2, WIDTH)), nn.Parameter(torch.randn(WIDTH, 2))

    def branch(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.weight[:WIDTH] + 0.5 * self.b @ self.a)


class ReadElsewhere(Layer):
    def branch(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.weight[:WIDTH].sin()) + (x @ self.weight.T) @ self.weight


class Outer(Layer):
    """A product that is larger than what it is computed from."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(1, WIDTH)), nn.Parameter(torch.randn(WIDTH, 1))

    def branch(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.b @ self.a)


def traced(layer: type[Layer]) -> tuple[models.Model, Graph]:
    model = models.load(layer().eval(), example_inputs=torch.randn(2, 5, WIDTH))
    return model, trace(model)


def computed_weights(path: Path) -> list[str]:
    """Return the products whose second operand is neither stored nor computed from the input."""
    graph = onnx.load(path).graph
    fed = {value.name for value in graph.input}
    for node in graph.node:
        if fed & set(node.input):
            fed |= set(node.output)
    stored = {weight.name for weight in graph.initializer}
    return [
        node.name for node in graph.node if node.op_type in ("MatMul", "Gemm") and node.input[1] not in fed | stored
    ]


@pytest.mark.parametrize(
    ("layer", "count"),
    [(Split, 2), (CrossAttention, 5), (WeightNorm, 1), (Scaled, 1)],
    ids=lambda each: str(each)[-20:],
)
def test_outputs_are_equal_and_all_weights_are_stored(layer: type[Layer], count: int, tmp_path: Path) -> None:
    model, graph = traced(layer)
    fork = graph.fork()
    assert len(apply(FoldConstants(), fork).changed) == count
    fork.check()
    assert foldable(fork) == []
    x = torch.randn(3, 5, WIDTH)
    torch.testing.assert_close(run(fork, {"x": x})[0], run(graph, {"x": x})[0], rtol=1e-6, atol=1e-6)
    assert computed_weights(lower(graph, model, tmp_path / "model.onnx")) == []


@pytest.mark.parametrize("layer", [ReadElsewhere, Outer])
def test_no_weight_is_stored_twice_and_none_grows(layer: type[Layer]) -> None:
    _, graph = traced(layer)
    names = [node.name for node in graph.nodes()]
    assert foldable(graph) == []
    assert apply(FoldConstants(), graph).changed == ()
    assert [node.name for node in graph.nodes()] == names


def test_random_weights_are_drawn_at_each_run() -> None:
    class Noisy(Layer):
        def branch(self, x: torch.Tensor) -> torch.Tensor:
            return x @ (self.weight[:WIDTH] * torch.rand_like(self.weight[:WIDTH]))

    _, graph = traced(Noisy)
    assert not any("rand" in node.name or "mul" in node.name for node in foldable(graph))


class Kept(Layer):
    """The columns that a buffer marks, whose number depends on its values."""

    def __init__(self, find: str) -> None:
        super().__init__()
        self.find = find
        self.register_buffer("marks", torch.arange(WIDTH) % 2)

    def branch(self, x: torch.Tensor) -> torch.Tensor:
        if self.find == "nonzero":
            columns = self.marks.nonzero()[:, 0]
        elif self.find == "repeat_interleave":
            columns = torch.repeat_interleave(self.marks)
        elif self.find == "unique":
            columns = torch.unique(self.marks)
        else:
            columns = torch.arange(WIDTH).masked_select(self.marks.bool())
        return x[..., columns].sum(-1, keepdim=True)


@pytest.mark.parametrize("find", ["nonzero", "repeat_interleave", "unique", "masked_select"])
def test_a_value_whose_size_depends_on_a_weight_is_left(find: str) -> None:
    model = models.load(Kept(find), example_inputs=torch.randn(2, 5, WIDTH))
    graph, x = trace(model), torch.randn(2, 5, WIDTH)
    feeds = {model.inputs[0]: x}
    before = run(graph, feeds)
    apply(FoldConstants(), graph)
    for value, expected in zip(run(graph, feeds), before, strict=True):
        assert torch.equal(value, expected)
