"""Stand-ins for weights on disk: their shape tells the truth, their values show that nobody read them."""

import torch
from torch._subclasses.fake_tensor import FakeTensor

from passes.analysis.counted_cost import Costs
from passes.base import apply
from passes.execute.interpreter import Program, run
from passes.execute.offloaded_weights import has_offloaded, in_memory, is_offloaded, offloaded, shapes_alone
from passes.graph.graph import Graph
from passes.rewrite.fold_linear import Fuse


class Branches(torch.nn.Module):
    """Two residual branches with weights of different sizes, the first used twice, and a constant."""

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
    """Reads a weight and counts how often."""

    def __init__(self, weight):
        self.weight, self.reads = weight.detach().clone(), 0

    def __call__(self):
        self.reads += 1
        return self.weight.clone()


def on_disk(graph):
    """The same graph with every weight behind a stand-in, and what reads them by name."""
    readers = {}
    for name, weight in list(graph.module.named_parameters()):
        readers[name] = Counted(weight)
        owner, _, leaf = name.rpartition(".")
        graph.module.get_submodule(owner).register_parameter(leaf, offloaded(weight, readers[name]))
    return graph, readers


def test_a_stand_in_has_the_form_of_its_weight_and_no_memory():
    weight = torch.nn.Parameter(torch.zeros(300, 200, dtype=torch.bfloat16))
    stand_in = offloaded(weight, lambda: weight.data)
    assert (stand_in.shape, stand_in.dtype, stand_in.device.type) == (weight.shape, weight.dtype, "cpu")
    assert stand_in.untyped_storage().nbytes() == weight.itemsize
    assert not stand_in.requires_grad
    assert is_offloaded(stand_in)
    assert torch.equal(in_memory(stand_in), weight)
    assert not is_offloaded(weight)
    assert in_memory(weight) is weight
    assert in_memory(3) == 3


def test_whatever_computes_with_a_stand_in_shows():
    graph, _ = on_disk(traced())
    assert torch.isnan(graph.module(torch.ones(3, 8))).all()


def test_a_run_reads_a_weight_for_every_node_that_takes_it():
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


def test_shapes_alone_are_those_of_the_values_and_need_no_memory():
    graph, readers = on_disk(traced())
    program = Program(graph)
    feeds = {"x": torch.ones(3, 8)}
    shapes = {}
    with shapes_alone(program, feeds) as values:
        for node in program.walk(values):
            shapes[node.name] = tuple(values[node].shape)
            assert isinstance(values[node], FakeTensor)
    program = Program(traced())
    values = program.start(feeds)
    assert shapes == {node.name: tuple(values[node].shape) for node in program.walk(values)}
    assert not any(reader.reads for reader in readers.values())


class Scaled(torch.nn.Module):
    """A linear map with a scale behind it, which can be folded into it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.map, self.scale = torch.nn.Linear(8, 8), torch.nn.Parameter(torch.rand(8))

    def forward(self, x):
        return x + self.map(x) * self.scale


def test_a_weight_on_disk_is_not_folded():
    """What is linear around it would be folded with its stand-in."""
    assert apply(Fuse(), traced(Scaled())).changed
    graph, readers = on_disk(traced(Scaled()))
    assert not apply(Fuse(), graph).changed
    feeds = {"x": torch.ones(2, 8)}
    assert torch.equal(run(graph, feeds)[0], run(traced(Scaled()), feeds)[0])
    assert {reader.reads for reader in readers.values()} == {1}
