"""A graph of one row, computed for several: every value that depends on the row has an axis of rows before its own.

A model that reads the size of its image in Python, such as in a loop over images, can be traced for one image of one
size (`trace_one_row`), as all that depends on the size alone is then known. `run_rows` computes that graph for any
number of images of that size. `torch.vmap` does the same, but keeps the number of rows fixed where torch.export traces
it through a convolution or a layer norm.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from passes.base import PassError
from passes.execute.instructions import Instruction, instructions_of
from passes.graph.cached_functions import forget_results
from passes.graph.graph import Graph, attribute
from passes.torch_internals import (
    RUN_TIME_ASSERTIONS,
    KnownValues,
    OpOverload,
    arguments,
    is_mutable,
    within_modules,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

MODULE = "model."
# Operators of the last axes, or of each element, in which the axis of rows is one more before them.
TRAILING = frozenset(
    [
        "linear",
        "layer_norm",
        "rms_norm",
        "clone",
        "contiguous",
        "to",
        "_to_copy",
        "dropout",
        "alias",
        "detach",
        "zeros_like",
        "ones_like",
        "full_like",
        "constant_pad_nd",
        "type_as",
    ]
)
# Operators whose first axis is a batch, which is joined with the rows.
BATCHED = frozenset(
    [
        "conv1d",
        "conv2d",
        "conv3d",
        "convolution",
        "upsample_bilinear2d",
        "_upsample_bilinear2d_aa",
        "upsample_bicubic2d",
        "_upsample_bicubic2d_aa",
        "upsample_nearest2d",
        "group_norm",
        "batch_norm",
        "pixel_shuffle",
        "pixel_unshuffle",
        "max_pool2d",
        "avg_pool2d",
        "adaptive_avg_pool2d",
        "im2col",
    ]
)
AXES = ("dim", "dims", "dim0", "dim1", "start_dim", "end_dim", "source", "destination")
INSERTED = ("unsqueeze", "stack")  # their axis is one of the result, which has one more


class RowsError(PassError):
    """A graph of one row that cannot be computed for several."""


@dataclass(frozen=True)
class Rows:
    """A value of each row.

    Attributes:
        value: [rows, *axes of the value of one row].
    """

    value: torch.Tensor

    @property
    def ndim(self) -> int:
        """Return the number of axes of the value of one row."""
        return self.value.ndim - 1

    def of_rank(self, rank: int) -> torch.Tensor:
        """Return the value with axes of size 1 behind that of rows, so that it has `rank` of its own."""
        value = self.value
        for _ in range(rank - self.ndim):
            value = value.unsqueeze(1)
        return value

    def joined(self) -> torch.Tensor:
        """Return the value with its first axis joined with that of rows."""
        return self.value.flatten(0, 1)


@dataclass(frozen=True)
class _Call:
    """A call of an operator.

    Attributes:
        target: the operator.
        named: its arguments by name, those with defaults too; `Rows` where a value depends on the row.
        shape: shape of its result for one row; empty if it has several.
    """

    target: Any
    named: dict[str, Any]
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        return str(self.target.overloadpacket.__name__)

    @property
    def rows(self) -> list[Rows]:
        """Return the values that depend on the row."""
        return [each for value in self.named.values() for each in _leaves(value) if isinstance(each, Rows)]

    @property
    def first(self) -> Any:
        return next(iter(self.named.values()))

    def only_first(self) -> Rows:
        """Return the first argument; no other may depend on the row.

        Raises:
            RowsError: another one does, or the first does not.
        """
        if not isinstance(self.first, Rows) or len(self.rows) > 1:
            raise RowsError(f"{self.target} has arguments that depend on the row beside its first")
        return self.first

    def with_first(self, value: torch.Tensor, **others: Any) -> Any:
        """Call the operator with another first argument, and others by name."""
        name = next(iter(self.named))
        return self._called({**self.named, name: value, **others})

    def with_all(self, change: Callable[[Any], Any]) -> Any:
        """Call the operator with each argument that is a tensor, or depends on the row, changed."""
        return self._called({name: _changed(value, change) for name, value in self.named.items()})

    def _called(self, named: dict[str, Any]) -> Any:
        placed = [named[each.name] for each in arguments(self.target) if not each.kwarg_only]
        others = {each.name: named[each.name] for each in arguments(self.target) if each.kwarg_only}
        return self.target(*placed, **others)


@dataclass(frozen=True)
class OneRow:
    """A graph of one row with one output, as plain data.

    Attributes:
        steps: its nodes in order.
        shapes: shape of the value of each for one row; empty if it has several.
        modules: the modules that each belongs to, ``nn_module_stack`` of its metadata; None if they are unknown.
        constants: the values of its attributes that are no weights, by name.
    """

    steps: tuple[Instruction, ...]
    shapes: tuple[tuple[int, ...], ...]
    modules: tuple[Any, ...]
    constants: dict[str, torch.Tensor]


def trace_one_row(module: torch.nn.Module, call: Callable[..., torch.Tensor], *row: torch.Tensor) -> OneRow:
    """Trace a call for one row. What depends on neither the row nor the weights is computed, and is a constant.

    Args:
        module: the module that is called.
        call: computes the output, given the module and the row.
        row: the inputs of one row, without an axis of rows.
    """
    with torch.no_grad(), forget_results(module):
        program = torch.export.export(_Called(module, call), row, strict=False)
        if any(is_mutable(node.target) for node in program.graph.nodes):
            program = program.run_decompositions({})
    names = tuple(f"row.{place}" for place in range(len(row)))
    graph = Graph(program.module(check_guards=False), names, ("found",), MODULE)
    nodes = [node for node in graph.nodes() if node.target not in RUN_TIME_ASSERTIONS]
    values = [node.meta.get("val") for node in nodes]
    held = {str(node.target): attribute(graph, node) for node in nodes if node.op == "get_attr"}
    return OneRow(
        tuple(instructions_of(nodes, graph, lambda node: node).values()),
        tuple(tuple(value.shape) if isinstance(value, torch.Tensor) else () for value in values),
        tuple(node.meta.get("nn_module_stack") for node in nodes),
        {name: value for name, value in held.items() if _weight(module, name) is None},
    )


class _Called(torch.nn.Module):
    def __init__(self, module: torch.nn.Module, call: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.model = module
        self._call = call

    def forward(self, *row: torch.Tensor) -> torch.Tensor:
        with KnownValues():
            return self._call(self.model, *row)


def run_rows(one: OneRow, module: torch.nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
    """Compute a graph of one row for several.

    Args:
        one: the graph.
        module: the module that it was traced from, whose weights are read.
        inputs: the inputs of all rows, each [rows, *axes of one row].

    Raises:
        RowsError: the graph has an operator that is not known for rows, or an output that depends on no input.
    """
    given, values = iter(inputs), list[Any]()
    for step, shape, modules in zip(one.steps, one.shapes, one.modules, strict=True):
        placed, named = step.arguments(values.__getitem__)
        if step.op == "placeholder":
            values.append(Rows(next(given)))
        elif step.op == "get_attr":
            weight = _weight(module, step.target)
            values.append(one.constants[step.target] if weight is None else weight)
        elif step.op == "output":
            values.extend(_leaves(placed))
        else:
            with within_modules(modules):
                values.append(_computed(step.target, placed, named, shape))
    if not isinstance(values[-1], Rows):
        raise RowsError("the output depends on no input")
    return values[-1].value


def _weight(module: torch.nn.Module, path: str) -> torch.Tensor | None:
    """Return the weight or the buffer of a module at a path of the graph; None for a constant of the graph."""
    value: Any = module
    for name in path.removeprefix(MODULE).split("."):
        value = getattr(value, name, None)
    return value if isinstance(value, torch.Tensor) else None


def _computed(target: Any, placed: Sequence[Any], named: dict[str, Any], shape: tuple[int, ...]) -> Any:
    """Return what a call computes, given its arguments."""
    if target is operator.getitem:
        return placed[0][placed[1]]
    if not any(isinstance(each, Rows) for each in _leaves((placed, named))):
        return target(*placed, **named)
    if not isinstance(target, OpOverload):
        raise RowsError(f"{target} is not known for rows")
    schema = arguments(target)
    values = {each.name: named.get(each.name, each.default_value) for each in schema}
    values |= {each.name: value for each, value in zip(schema, placed, strict=False)}
    found = _for_rows(_Call(target, values, shape))
    return _changed(found, lambda each: Rows(each) if isinstance(each, torch.Tensor) else each)


def _for_rows(call: _Call) -> Any:
    """Return what an operator computes for rows.

    Raises:
        RowsError: it is not known for rows.
    """
    if (rule := RULES.get(call.name)) is not None:
        return rule(call)
    if call.name in TRAILING:
        return call.with_first(call.only_first().value)
    if call.name in BATCHED:
        return _batched(call)
    if torch.Tag.pointwise in call.target.tags:
        rank = max(each.ndim for each in _tensors(call))
        return call.with_all(lambda each: each.of_rank(rank) if isinstance(each, Rows) else each)
    if any(name in call.named for name in AXES):
        return _along_axes(call)
    if call.name in ("sum", "mean"):
        return _of_all(call)
    raise RowsError(f"{call.target} is not known for rows")


def _along_axes(call: _Call) -> Any:
    """Call an operator along the same axes, each one further behind; what depends on no row is the same in all."""
    rank = call.rows[0].ndim
    rank += call.name in INSERTED
    axes = {name: _further(call.named[name], rank) for name in AXES if name in call.named}
    return _Call(call.target, {**call.named, **axes}, call.shape).with_all(_expanding(call))


def _further(axes: Any, rank: int) -> Any:
    """Return axes of the value of one row as axes of those of all rows; None and an empty list are all."""
    if isinstance(axes, int):
        return axes % rank + 1
    return [axis % rank + 1 for axis in axes] if axes else list(range(1, rank + 1))


def _expanding(call: _Call) -> Callable[[Any], Any]:
    """Return a change of arguments by which all have an axis of rows, but for lists of places along an axis."""
    count, places = call.rows[0].value.shape[0], call.named.get("index")

    def change(each: Any) -> Any:
        if isinstance(each, Rows):
            return each.value
        kept = each is places and call.name in ("index_select", "index_copy", "index_add")
        return each if kept or not isinstance(each, torch.Tensor) else each.expand(count, *each.shape)

    return change


def _batched(call: _Call) -> Any:
    """Call an operator whose first axis is a batch; a convolution also takes values without one."""
    first = call.only_first()
    weight = call.named.get("weight") if "conv" in call.name else None
    if weight is not None and first.ndim < weight.ndim:
        return call.with_first(first.value)
    return call.with_first(first.joined()).reshape(first.value.shape[0], *call.shape)


def _reshaped(call: _Call) -> Any:
    """Return the value in another shape, which that of one row tells."""
    value = call.only_first().value
    return value.reshape(value.shape[0], *call.shape)


def _expanded(call: _Call) -> Any:
    value = call.only_first()
    return value.of_rank(len(call.shape)).expand(value.value.shape[0], *call.shape)


def _repeated(call: _Call) -> Any:
    return call.only_first().of_rank(len(call.shape)).repeat(1, *call.named["repeats"])


def _permuted(call: _Call) -> Any:
    value = call.only_first()
    return value.value.permute(0, *_further(call.named["dims"], value.ndim))


def _transposed(call: _Call) -> Any:
    value = call.only_first()
    return value.value.permute(0, *range(value.ndim, 0, -1))


def _of_all(call: _Call) -> Any:
    """Return the sum or mean of all values of a row."""
    return getattr(call.only_first().value.flatten(1), call.name)(1)


def _product(call: _Call) -> Any:
    """Return a product of matrices."""
    left, right, *_ = call.named.values()
    return _matmul(left, right)


def _matmul(left: Any, right: Any) -> torch.Tensor:
    rank = max(left.ndim, right.ndim)
    if min(left.ndim, right.ndim) < 2:
        raise RowsError("a product of a matrix and a vector is not known for rows")
    first, second = (each.of_rank(rank) if isinstance(each, Rows) else each for each in (left, right))
    return torch.matmul(first, second)


def _added_product(call: _Call) -> Any:
    """Return a matrix and a product of two, as ``addmm`` does."""
    added, left, right = list(call.named.values())[:3]
    if (call.named["beta"], call.named["alpha"]) != (1, 1):
        raise RowsError(f"{call.target} with factors is not known for rows")
    found = _matmul(left, right)
    return found + (added.of_rank(found.ndim - 1) if isinstance(added, Rows) else added)


def _attention(call: _Call) -> Any:
    """Call an attention, whose first axis is joined with the rows if the values of one row have four axes."""
    if any(each.ndim not in (3, 4) for each in call.rows) or len({each.ndim for each in call.rows}) > 1:
        raise RowsError(f"{call.target} of values of several ranks is not known for rows")
    count = call.rows[0].value.shape[0]
    if call.rows[0].ndim == 3:
        return call.with_all(_expanding(call))
    mask = call.named["attn_mask"]
    every = {name: call.named[name] for name in ("query", "key", "value")}
    joined = {
        name: each.joined() if isinstance(each, Rows) else each.expand(count, *each.shape).flatten(0, 1)
        for name, each in every.items()
    }
    mask = mask.joined() if isinstance(mask, Rows) else mask
    found = _Call(call.target, {**call.named, **joined, "attn_mask": mask}, call.shape).with_all(lambda each: each)
    return found.reshape(count, *call.shape)


def _looked_up(call: _Call) -> Any:
    """Look tokens up in a table, which is the same for all rows."""
    if isinstance(call.first, Rows):
        raise RowsError(f"{call.target} in a table that depends on the row is not known for rows")
    return call.with_all(lambda each: each.value if isinstance(each, Rows) else each)


def _indexed(call: _Call) -> Any:
    """Take values at places, or put them there; the places are the same for all rows and adjacent axes."""
    places = list(call.named["indices"])
    known = [axis for axis, place in enumerate(places) if place is not None]
    if any(isinstance(place, Rows) for place in places) or known != list(range(known[0], known[-1] + 1)):
        raise RowsError(f"{call.target} at places that depend on the row is not known for rows")
    change = _expanding(call)
    if "values" not in call.named:
        return call.with_first(change(call.first), indices=[None, *places])
    values = call.named["values"]
    if isinstance(values, Rows):
        taken = call.first.value[0] if isinstance(call.first, Rows) else call.first
        values = values.of_rank(taken[tuple(slice(None) if place is None else place for place in places)].ndim)
    return call.with_first(change(call.first).clone(), indices=[None, *places], values=values)


def _new(call: _Call) -> Any:
    """Return new values, which are the same for all rows."""
    first = call.only_first().value
    return call.with_first(first).expand(first.shape[0], *call.shape)


RULES: dict[str, Callable[[_Call], Any]] = {
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "squeeze"), _reshaped),
    "expand": _expanded,
    "repeat": _repeated,
    "permute": _permuted,
    **dict.fromkeys(("t", "numpy_T"), _transposed),
    **dict.fromkeys(("mm", "bmm", "matmul"), _product),
    **dict.fromkeys(("addmm", "baddbmm"), _added_product),
    "scaled_dot_product_attention": _attention,
    "embedding": _looked_up,
    **dict.fromkeys(("index", "index_put"), _indexed),
    **dict.fromkeys(("new_zeros", "new_ones", "new_full"), _new),
}


def _tensors(call: _Call) -> list[Any]:
    values = [each for value in call.named.values() for each in _leaves(value)]
    return [each for each in values if isinstance(each, Rows | torch.Tensor)]


def _leaves(value: Any) -> list[Any]:
    """Return the values in nested lists and dictionaries."""
    if isinstance(value, dict):
        return [leaf for each in value.values() for leaf in _leaves(each)]
    if isinstance(value, list | tuple):
        return [leaf for each in value for leaf in _leaves(each)]
    return [value]


def _changed(value: Any, change: Callable[[Any], Any]) -> Any:
    """Return a value with each of its values in nested lists changed."""
    if isinstance(value, list | tuple):
        return type(value)(_changed(each, change) for each in value)
    return change(value)
