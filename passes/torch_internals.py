"""What `passes` reads of torch's private parts: a name that a release changes is changed here, and nowhere else here.

All of it was seen in torch 2.14.1 and 2.15.0; of whichever is installed, tests/test_internals.py goes through it name
by name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from collections.abc import Sequence

# FakeTensorMode: values of shapes and types without elements. Without it nothing runs by shapes alone, as weights on
# disk need it.
# enable_python_dispatcher: without it addcmul refuses fake operands that broadcast.
# tree_leaves: the tensors in the nested value of a node. `fx.node.map_aggregate` is public, but takes named tuples of
# torch.return_types for leaves.
__all__ = [
    "COPYING_CASTS",
    "RUN_TIME_ASSERTIONS",
    "SAFE_SOFTMAX",
    "SOFTMAX",
    "UNSAFE_VIEWS",
    "FakeTensorMode",
    "arguments",
    "enable_python_dispatcher",
    "expression",
    "fake_mode",
    "free_size",
    "hint",
    "is_mutable",
    "operators",
    "registries",
    "storage_key",
    "tree_leaves",
]


# --------------------------------------------------------------------------------------------------------- operators


def operators(*names: str) -> frozenset[Any]:
    """Collect the ATen operators of these names that this release of torch has; others are left out.

    Names that start with an underscore are private: a release may drop them, and then no graph holds them either.

    >>> operators("relu.default", "relu.no_such_overload", "_no_such_operator.default")
    frozenset({<OpOverload(op='aten.relu', overload='default')>})
    """
    pairs = (name.split(".") for name in names)
    found = (getattr(getattr(torch.ops.aten, packet, None), overload, None) for packet, overload in pairs)
    return frozenset(operator for operator in found if operator is not None)


# A name that torch changes is missing here, and graphs with the new one are read as if they had no such operator: a
# softmax that is not seen hides an attention, a view that is not seen is not loosened, an assertion stays.
SOFTMAX = operators("_softmax.default")  # what a decomposition makes of softmax.int
SAFE_SOFTMAX = operators("_safe_softmax.default")  # the same with rows that are masked throughout
UNSAFE_VIEWS = operators("_unsafe_view.default")
COPYING_CASTS = operators("_to_copy.default")
RUN_TIME_ASSERTIONS = operators("_assert_tensor_metadata.default", "_assert_async.msg", "_assert_scalar.default")


def is_mutable(target: object) -> bool:
    """Whether a call of this target writes into its arguments; False for what is no operator of torch.

    Reads `OpOverload._schema`, which has no public name. Without it, calls that write could not be told apart.
    """
    return isinstance(target, OpOverload) and bool(target._schema.is_mutable)


def arguments(target: Any) -> Sequence[Any]:
    """List the arguments of an operator in order, each with its `name` and its `default_value`.

    Reads `OpOverload._schema`, which has no public name. Without it, options could be read by position only.
    """
    found: Sequence[Any] = target._schema.arguments
    return found


# ------------------------------------------------------------------------------------------------------------- sizes


def expression(size: Any) -> Any:
    """Return the sympy expression of a symbolic size, a number as it is.

    Reads `SymInt.node.expr`. Without it, two symbolic sizes cannot be compared without fixing them to their example.
    """
    return size.node.expr if isinstance(size, torch.SymInt) else size


def hint(size: Any) -> Any:
    """Return the number that a symbolic size was in the example that was traced, a number as it is.

    Reads `SymInt.node.hint`. Without it, no example of a traced value can be made.
    """
    return size.node.hint if isinstance(size, torch.SymInt) else size


def free_size(mode: FakeTensorMode, example: Any, name: str) -> Any:
    """Make a new symbolic size that stands for itself.

    Reads `StatelessSymbolicContext`, `DimDynamic` and `ConstantSource`: a size gets a symbol of its own only as that of
    a tensor with a dynamic axis. Without them, sizes stay written as how they were computed, and edits take longer.

    Args:
        mode: that the new size is to live in.
        example: its number in the example.
        name: where it is said to come from.
    """
    tensor = torch.empty(example, device="meta")
    dynamic: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
    return mode.from_tensor(tensor, symbolic_context=dynamic, source=ConstantSource(name)).shape[0]


# ----------------------------------------------------------------------------------------------------------- tensors


def fake_mode(value: object) -> FakeTensorMode | None:
    """Return the mode that a traced value lives in; None for what is no traced tensor.

    Reads `FakeTensor.fake_mode`. Without it, values derived after an edit would have no symbols in common with others.
    """
    return value.fake_mode if isinstance(value, FakeTensor) else None


def storage_key(tensor: torch.Tensor) -> int:
    """Return a number that tensors share if, and only if, they share memory; for tensors without elements too.

    Reads `UntypedStorage._cdata`: the public `data_ptr()` is 0 for all of those. Without it, views would count twice.
    """
    found: int = tensor.untyped_storage()._cdata
    return found


def registries(module: torch.nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return where a module itself keeps its parameters and its buffers, to be edited in place.

    Reads `Module._parameters` and `Module._buffers`: the public iterators leave out the names that hold None.
    """
    return module._parameters, module._buffers
