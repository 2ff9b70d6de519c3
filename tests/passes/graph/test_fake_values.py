"""Values of operators that are computed once: equal to those that torch derives, and separate where they must be."""

import itertools

import pytest
import torch

from passes.execute.interpreter import run
from passes.graph.edit import propagate_fake_value, resymbolize_size
from passes.graph.fake_values import FakeValues
from passes.graph.graph import value_of
from passes.torch_internals import FakeTensorMode, expression
from tests.samples import small, traced

aten = torch.ops.aten
MODE = FakeTensorMode()


class Counted:
    """An operator that counts its calls."""

    def __init__(self, operator=aten.add.Tensor):
        self.operator, self.calls = operator, 0
        self.tags = getattr(operator, "tags", ())

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return self.operator(*args, **kwargs)


def fake(*sizes, **options):
    with MODE:
        return torch.empty(sizes, **options)


def about(value):
    return value.shape, value.stride(), value.dtype, value.device, value.storage_offset()


def test_an_operator_is_called_once_for_inputs_of_the_same_kind():
    add, values = Counted(), FakeValues()
    first = values.of(add, (fake(2, 3), fake(3)), {}, MODE)
    assert values.of(add, (fake(2, 3), fake(3)), {}, MODE) is first
    assert add.calls == 1
    assert about(first) == about(aten.add.Tensor(fake(2, 3), fake(3)))


def test_inputs_of_another_kind_have_values_of_their_own():
    """Each pair differs in one property on which a value can depend."""
    kinds = [
        fake(4, 3),
        fake(3, 4),
        fake(3, 4).t(),
        fake(4, 3, dtype=torch.float64),
        fake(4, 3, dtype=torch.int64),
        fake(5, 3)[1:],
        fake(4, 3, requires_grad=True),
    ]
    values = FakeValues()
    for kind in (*kinds, *reversed(kinds)):
        ours, expected = (of(aten.add.Tensor, (kind, kind), {}, MODE) for of in (values.of, FakeValues().of))
        assert (about(ours), ours.requires_grad) == (about(expected), expected.requires_grad)


@pytest.mark.parametrize(
    ("target", "options"),
    [(aten.add.Scalar, (1, True, 1.0)), (aten.sum.dim_IntList, ([0], [1], [-1])), (aten.select.int, (0, -1))],
)
def test_arguments_that_are_no_tensors_tell_values_apart(target, options):
    values, tensor = FakeValues(), fake(4, 3, dtype=torch.int64)
    further = (0,) if target == aten.select.int else ()
    for option in (*options, *reversed(options)):
        ours = values.of(target, (tensor, option, *further), {}, MODE)
        assert about(ours) == about(target(tensor, option, *further))


def test_options_by_name_tell_values_apart():
    values = FakeValues()
    for dtype in (torch.float32, torch.int64, torch.float32):
        assert values.of(aten.arange.default, (4,), {"dtype": dtype}, MODE).dtype == dtype


def test_operators_that_write_or_return_new_symbols_are_called_each_time():
    values = FakeValues()
    for tensor in (fake(3), fake(3)):
        assert values.of(aten.add_.Tensor, (tensor, 1.0), {}, MODE) is tensor
    data_dependent = Counted(aten.nonzero.default)
    with pytest.raises(RuntimeError):
        values.of(data_dependent, (fake(3),), {}, MODE)  # without symbols for sizes
    with pytest.raises(RuntimeError):
        values.of(data_dependent, (fake(3),), {}, MODE)
    assert data_dependent.calls == 2


def test_a_tensor_with_elements_is_not_taken_for_another():
    values, add = FakeValues(), Counted()
    for number in (1.0, 2.0):
        tensor = torch.full((2,), number)
        assert torch.equal(values.of(add, (tensor, tensor), {}, None), tensor + tensor)
    assert add.calls == 2


@pytest.mark.parametrize("name", ["vit_registers", "beit", "caformer", "hf_bert"])
def test_derived_values_are_the_traced_ones(name):
    """All operators of real architectures, derived in two forks that share their values, and once without any."""
    _, graph, _ = traced(name)
    for values in (graph.values, graph.values, FakeValues()):
        fork = graph.fork()
        fork.values = values
        for node in [node for node in fork.nodes() if node.op == "call_function"]:
            recorded = value_of(node)
            propagate_fake_value(fork, node)
            assert shapes(value_of(node)) == shapes(recorded), node


def shapes(value):
    if isinstance(value, torch.Tensor):
        return tuple(map(str, map(expression, value.shape))), value.dtype
    return [shapes(item) for item in value] if isinstance(value, list | tuple) else str(expression(value))


def test_equal_sizes_get_one_symbol():
    _, graph, _, _ = small()
    symbols = []
    for fork in (graph.fork(), graph.fork()):
        (first, *_) = fork.placeholders()
        with fork.module.graph.inserting_after(first):
            size = fork.module.graph.call_function(aten.sym_size.int, (first, 0))
        with fork.module.graph.inserting_after(size):
            half = fork.module.graph.call_function(torch.sym_max, (size, 3))
        for node in (size, half):
            propagate_fake_value(fork, node)
        resymbolize_size(fork, half)
        symbols.append((expression(value_of(size)), expression(value_of(half))))
    assert symbols[0] == symbols[1]
    assert all(symbol.is_Symbol for symbol in itertools.chain(*symbols))
    assert symbols[0][0] != symbols[0][1]


def test_a_fork_generates_no_code_until_it_is_called():
    _, graph, _, split = small()
    fork = graph.fork()
    assert fork.module._needs_recompile()
    feeds = {name: torch.as_tensor(value) for name, value in next(iter(split.batches(4))).feeds.items()}
    expected = run(fork, feeds)
    assert fork.module._needs_recompile()
    called = fork.module(*feeds.values())
    assert not fork.module._needs_recompile()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(called, expected, strict=True))
