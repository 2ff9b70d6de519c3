"""Private and unstable names of torch that `passes` uses.

No other module of `passes` imports them, so a release that renames one needs a change in this file only. All of them
exist in torch 2.14.1 and 2.15.0. tests/test_internals.py checks each name in the installed release.
"""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING, Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo import OptimizedModule
from torch._dynamo.source import ConstantSource
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.fx import config, traceback
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, make_fx
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    StatelessSymbolicContext,
    guard_or_true,
    statically_known_true,
)
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_structure

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import fx
    from torch.export import ExportedProgram

# OpOverload: the type of operators in a graph.
# FakeTensorMode: tensors with a shape and a type but no elements. Offloaded weights need it for shape-only runs.
# DataDependentOutputException: what such tensors raise where their values are asked for.
# enable_python_dispatcher: without it, addcmul rejects fake operands that broadcast.
# tree_leaves: the tensors in the nested value of a node. `fx.node.map_aggregate` is public, but treats named tuples of
# torch.return_types as leaves.
# tree_structure: the form of arguments and results, which the signature of an exported program states.
__all__ = [
    "COPYING_CASTS",
    "RUN_TIME_ASSERTIONS",
    "SAFE_SOFTMAX",
    "SOFTMAX",
    "UNSAFE_VIEWS",
    "DataDependentOutputException",
    "FakeTensorMode",
    "KnownValues",
    "OpOverload",
    "arguments",
    "enable_python_dispatcher",
    "expression",
    "fake_mode",
    "forward_hooks",
    "generate_code",
    "guards",
    "has_elements",
    "hint",
    "holds",
    "is_higher_order",
    "is_mutable",
    "lazy_graph_module",
    "make_fx",
    "may_differ",
    "new_symbolic_size",
    "onednn_linear",
    "operators",
    "registries",
    "remove_backward_hooks",
    "size_ranges",
    "storage_key",
    "tree_leaves",
    "tree_structure",
    "uncached",
    "uncompiled",
    "within_modules",
    "without_stack_traces",
]


# --------------------------------------------------------------------------------------------------------- operators


def operators(*names: str) -> frozenset[Any]:
    """Return the ATen operators of these names, without those that the installed torch does not have.

    Names that start with an underscore are private. A release may drop them, and then no graph contains them.

    >>> operators("relu.default", "relu.no_such_overload", "_no_such_operator.default")
    frozenset({<OpOverload(op='aten.relu', overload='default')>})
    """
    pairs = (name.split(".") for name in names)
    candidates = (getattr(getattr(torch.ops.aten, packet, None), overload, None) for packet, overload in pairs)
    return frozenset(operator for operator in candidates if operator is not None)


# If torch renames one of these operators, its set is empty and the operator is not recognised: an attention with that
# softmax is missed, a view is not turned into a reshape, an assertion stays in the graph.
SOFTMAX = operators("_softmax.default")  # decomposition of softmax.int
SAFE_SOFTMAX = operators("_safe_softmax.default")  # softmax that allows fully masked rows
UNSAFE_VIEWS = operators("_unsafe_view.default")
COPYING_CASTS = operators("_to_copy.default")
RUN_TIME_ASSERTIONS = operators("_assert_tensor_metadata.default", "_assert_async.msg", "_assert_scalar.default")


def is_mutable(target: object) -> bool:
    """Return whether a call of this target writes into its arguments; False for a target that is no `OpOverload`.

    Reads `OpOverload._schema`, which has no public equivalent. Without it, in-place operators cannot be recognised.
    """
    return isinstance(target, OpOverload) and bool(target._schema.is_mutable)


def is_higher_order(target: object) -> bool:
    """Return whether this target is an operator that calls graphs, such as torch.cond or a region under autocast.

    `HigherOrderOperator` has no public equivalent. Without it, what such a graph computes would be missed.
    """
    return isinstance(target, HigherOrderOperator)


def arguments(target: Any) -> Sequence[Any]:
    """Return the arguments of an operator in order, each with its `name` and its `default_value`.

    Reads `OpOverload._schema`, which has no public equivalent. Without it, arguments can be read by position only.
    """
    schema_arguments: Sequence[Any] = target._schema.arguments
    return schema_arguments


def onednn_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return x W^T + b, [..., out], of float32 tensors [..., in], [out, in] and [out] in oneDNN; no gradient is kept.

    `_linear_pointwise` has no public equivalent: the public functions call MKL for float32.
    """
    found: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    return found


# ------------------------------------------------------------------------------------------------------------- sizes


def expression(size: Any) -> Any:
    """Return the sympy expression of a symbolic size; a number is returned unchanged.

    Reads `SymInt.node.expr`. Without it, comparing two symbolic sizes specialises them to the traced example.
    """
    return size.node.expr if isinstance(size, torch.SymInt) else size


def guards(program: ExportedProgram) -> tuple[str, ...]:
    """Return the conditions on the sizes of its inputs under which an exported program holds, as Python expressions.

    Reads `ExportedProgram._guards_code`; the public `range_constraints` has only lower and upper bounds. Without it, a
    branch on a size is traced for one side without a word.
    """
    return tuple(program._guards_code)


def is_known(condition: bool | torch.SymBool) -> bool:
    """Return whether a condition on sizes is true for all of them, without a guard; False if that depends on values."""
    return bool(statically_known_true(condition))


def holds(guard: str, tensors: Sequence[torch.Tensor]) -> bool:
    """Return whether a condition of `guards` is true for the inputs of a program whose only argument is `*tensors`.

    Conditions call functions of torch, such as ``torch.sym_min``.
    """
    return bool(eval(guard, {"L": {"tensors": tensors}, "torch": torch, "math": math}))


def hint(size: Any) -> Any:
    """Return the size of the traced example behind a symbolic size; a number is returned unchanged.

    Reads `SymInt.node.hint`. Without it, no example of a traced value can be created.
    """
    return size.node.hint if isinstance(size, torch.SymInt) else size


def may_differ(size: Any, other: Any) -> bool:
    """Return whether two sizes differ, or are not known to be equal, as a size that is read from a tensor.

    Calls `guard_or_true`. A comparison of such a size raises an error.
    """
    return bool(guard_or_true(size != other))


def size_ranges(values: Sequence[torch.Tensor]) -> dict[Any, Any]:
    """Return the range of every symbol in the sizes of traced values, as `ExportedProgram.range_constraints` has it.

    Reads `ShapeEnv.var_to_range`. Without it, an exported program does not say between which limits its sizes are.
    """
    ranges: dict[Any, Any] = {}
    sizes: list[Any] = [size for value in values for size in value.shape]
    for size in sizes:
        if isinstance(size, torch.SymInt):
            known: Any = size.node.shape_env.var_to_range  # type: ignore[union-attr]
            ranges |= {symbol: known[symbol] for symbol in size.node.expr.free_symbols}
    return ranges


def new_symbolic_size(mode: FakeTensorMode, example: Any, name: str) -> Any:
    """Create a symbolic size with a symbol of its own.

    Uses `StatelessSymbolicContext`, `DimDynamic` and `ConstantSource`: torch creates a symbol only for the dynamic axis
    of a tensor. Without them, a size stays the expression it was computed by, and edits of the graph take longer.

    Args:
        mode: fake tensor mode of the new size.
        example: value of the size in the traced example.
        name: name of the source that torch records for the symbol.
    """
    tensor = torch.empty(example, device="meta")
    dynamic: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
    return mode.from_tensor(tensor, symbolic_context=dynamic, source=ConstantSource(name)).shape[0]


# ----------------------------------------------------------------------------------------------------------- tensors


def fake_mode(value: object) -> FakeTensorMode | None:
    """Return the fake tensor mode of a traced value; None for any value but a fake tensor.

    Reads `FakeTensor.fake_mode`. Without it, values derived after an edit share no symbols with the traced ones.
    """
    return value.fake_mode if isinstance(value, FakeTensor) else None


@contextlib.contextmanager
def uncached(mode: FakeTensorMode) -> Iterator[None]:
    """Enter a mode without its own cache of values, for callers that keep the values themselves.

    Describing a value for the cache takes longer than most operators on symbolic sizes. Sets `cache_enabled`.
    """
    before, mode.cache_enabled = mode.cache_enabled, False
    try:
        with mode:
            yield
    finally:
        mode.cache_enabled = before


def has_elements(tensor: torch.Tensor) -> bool:
    """Return whether the elements of a tensor are known: it is no fake tensor, or one of a constant.

    Reads `FakeTensor.constant`. Without it, a value computed from one constant could be taken for that of another.
    """
    return not isinstance(tensor, FakeTensor) or tensor.constant is not None


class KnownValues(TorchFunctionMode):
    """Computes functions of known values while torch.export traces the others, so that code can read their elements.

    Known are tensors with elements that are no weights, and what is computed from them alone, such as places in an
    image of a size that is known. Without it, torch.export traces these functions too, and a loop over their elements
    fails. Uses `unset_fake_temporarily` and `disable_proxy_modes_tracing`, which are not documented.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call a function, without tracing it if all its arguments are known."""
        named = kwargs or {}
        if any(isinstance(each, (FakeTensor, torch.nn.Parameter, torch.SymInt)) for each in tree_leaves((args, named))):
            return func(*args, **named)
        with disable_proxy_modes_tracing(), unset_fake_temporarily():
            return func(*args, **named)


@contextlib.contextmanager
def within_modules(stack: Any) -> Iterator[None]:
    """Let what is traced belong to the modules of a node, ``nn_module_stack`` of its metadata; None changes nothing.

    Sets `torch.fx.traceback.current_meta`. Without it, a site is not known by the path of its module.
    """
    if stack is None:
        yield
        return
    with traceback.preserve_node_meta():
        before, traceback.current_meta = traceback.current_meta, {"nn_module_stack": stack}
        try:
            yield
        finally:
            traceback.current_meta = before


def storage_key(tensor: torch.Tensor) -> int:
    """Return the identity of a tensor's storage: equal for two tensors if and only if they share memory.

    Reads `UntypedStorage._cdata`, because the public `data_ptr()` is 0 for every tensor without elements. Without it,
    the memory of views is counted twice.
    """
    key: int = tensor.untyped_storage()._cdata
    return key


def registries(module: torch.nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the dictionaries of a module's own parameters and buffers, which the caller may edit in place.

    Reads `Module._parameters` and `Module._buffers`, because the public iterators leave out names that hold None.
    """
    return module._parameters, module._buffers


# ----------------------------------------------------------------------------------------------------- graph modules


def lazy_graph_module(root: torch.nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """Return a graph module whose Python code is generated with its first call.

    Uses `_LazyGraphModule`. Without it, torch generates and compiles code for every fork and after every edit, most of
    which are run by an interpreter only.
    """
    return _LazyGraphModule(root, graph)


def generate_code(module: fx.GraphModule) -> fx.GraphModule:
    """Generate the Python code of a graph module if it has none yet, and return the module.

    torch.export traces the call that generates the code, if it is the first.
    """
    _LazyGraphModule.force_recompile(module)
    return module


@contextlib.contextmanager
def without_stack_traces() -> Iterator[None]:
    """Have torch.export note no line of code at the nodes that it records, which takes a tenth of its time.

    Its errors still name the line. Sets the option `torch.fx.config.do_not_emit_stack_traces`, which is not documented.
    """
    before, config.do_not_emit_stack_traces = config.do_not_emit_stack_traces, True
    try:
        yield
    finally:
        config.do_not_emit_stack_traces = before


# ------------------------------------------------------------------------------------------------------------- hooks


def uncompiled(module: torch.nn.Module) -> torch.nn.Module:
    """Return the module inside the one that `torch.compile` returns; any other module as it is."""
    return uncompiled(module._orig_mod) if isinstance(module, OptimizedModule) else module


def forward_hooks(module: torch.nn.Module) -> tuple[Any, ...]:
    """Return the hooks of the forward pass of a module, without those of its submodules.

    torch has functions to register hooks, but none to list them.
    """
    return (*module._forward_pre_hooks.values(), *module._forward_hooks.values())


def remove_backward_hooks(module: torch.nn.Module) -> None:
    """Remove the hooks of the backward pass of a module, without those of its submodules."""
    module._backward_pre_hooks.clear()
    module._backward_hooks.clear()
