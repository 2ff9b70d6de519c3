"""Tests of placeholders for offloaded weights: the shape of the weight, and NaN unless it is read."""

import torch
from torch._subclasses.fake_tensor import FakeTensor

from passes.analysis.counted_cost import Costs
from passes.base import apply
from passes.execute.interpreter import Program, run
from passes.execute.offloaded_weights import fake_values, has_offloaded, in_memory, is_offloaded, offloaded
from passes.graph.graph import Graph
from passes.rewrite.fold_linear import FoldLinear


class Branches(torch.nn.Module):
    """Two residual branches with weights of different sizes, of which `other` is used twice, and a constant."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = torch.nn.Linear(8, 24), torch.nn.Linear(24, 8)
        self.other = torch.nn.Linear(8, 8, bias=False)
        self.head = torch.nn.Linear(8, 5)
        self.register_buffer("shift", torch.arange(8.0))

    def forward(self, x):
        x = x + self.down(torch.relu(self.up(x + self.shift)))
        x = x + torch.relu(self.other(x))
        return self.head(self.other(x))


def traced(module=None):
    module = Branches().eval() if module is None else module
    exported = torch.export.export(
        module, (torch.zeros(2, 8),), dynamic_shapes=({0: torch.export.Dim.AUTO},), strict=False
    )
    return Graph(exported.module(check_guards=False), ("x",), ("y",), "")


class Counted:
    """Reader of a weight that counts its calls."""

    def __init__(self, weight):
        self.weight, self.reads = weight.detach().clone(), 0

    def __call__(self):
        self.reads += 1
        return self.weight.clone()


def on_disk(graph):
    """Offload every weight of a graph; return the graph and the readers by name."""
    readers = {}
    for name, weight in list(graph.module.named_parameters()):
        readers[name] = Counted(weight)
        owner, _, leaf = name.rpartition(".")
        graph.module.get_submodule(owner).register_parameter(leaf, offloaded(weight, readers[name]))
    return graph, readers


def test_a_placeholder_has_the_shape_of_its_weight_and_the_memory_of_one_element():
    weight = torch.nn.Parameter(torch.zeros(300, 200, dtype=torch.bfloat16))
    placeholder = offloaded(weight, lambda: weight.data)
    assert (placeholder.shape, placeholder.dtype, placeholder.device.type) == (weight.shape, weight.dtype, "cpu")
    assert placeholder.untyped_storage().nbytes() == weight.itemsize
    assert not placeholder.requires_grad
    assert is_offloaded(placeholder)
    assert torch.equal(in_memory(placeholder), weight)
    assert not is_offloaded(weight)
    assert in_memory(weight) is weight
    assert in_memory(3) == 3


def test_values_computed_from_a_placeholder_are_nan():
    graph, _ = on_disk(traced())
    assert torch.isnan(graph.module(torch.ones(3, 8))).all()


def test_a_run_reads_a_weight_once_for_every_consumer():
    plain = traced()
    graph, readers = on_disk(traced())
    assert has_offloaded(graph)
    assert not has_offloaded(plain)
    feeds = {"x": torch.randn(3, 8, generator=torch.Generator().manual_seed(1))}
    assert torch.equal(run(graph, feeds)[0], run(plain, feeds)[0])
    assert {name: reader.reads for name, reader in readers.items()} == {
        "up.weight": 1, "up.bias": 1, "down.weight": 1, "down.bias": 1, "other.weight": 2,
        "head.weight": 1, "head.bias": 1,
    }  # fmt: skip


def test_costs_are_counted_without_reading():
    plain = Costs(traced(), {"x": torch.ones(4, 8)})
    graph, readers = on_disk(traced())
    costs = Costs(graph, {"x": torch.ones(4, 8)})
    assert costs.total == plain.total
    assert costs.total.parameters == sum(reader.weight.numel() for reader in readers.values())
    assert costs.by_node == plain.by_node
    assert not any(reader.reads for reader in readers.values())


def test_shapes_alone_equal_those_of_the_values_and_read_no_weight():
    graph, readers = on_disk(traced())
    program = Program(graph)
    feeds = {"x": torch.ones(3, 8)}
    shapes = {}
    with fake_values(program, feeds) as values:
        for node in program.walk(values):
            shapes[node.name] = tuple(values[node].shape)
            assert isinstance(values[node], FakeTensor)
    program = Program(traced())
    values = program.start(feeds)
    assert shapes == {node.name: tuple(values[node].shape) for node in program.walk(values)}
    assert not any(reader.reads for reader in readers.values())


class Scaled(torch.nn.Module):
    """A linear map followed by a scale that can be folded into it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.map, self.scale = torch.nn.Linear(8, 8), torch.nn.Parameter(torch.rand(8))

    def forward(self, x):
        return x + self.map(x) * self.scale


def test_an_offloaded_weight_is_not_folded():
    """A fold would compute with the NaN of the placeholder."""
    assert apply(FoldLinear(), traced(Scaled())).changed
    graph, readers = on_disk(traced(Scaled()))
    assert not apply(FoldLinear(), graph).changed
    feeds = {"x": torch.ones(2, 8)}
    assert torch.equal(run(graph, feeds)[0], run(traced(Scaled()), feeds)[0])
    assert {reader.reads for reader in readers.values()} == {1}
