"""Traced (fake) values of operators, computed once for each operator and kind of inputs.

A search edits thousands of forks of one graph, and most edits call an operator on shapes that it was called on before.
torch takes milliseconds to derive a value with symbolic sizes, also if its own cache knows the result.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch

from passes.torch_internals import enable_python_dispatcher, expression, has_elements, is_mutable, uncached

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Mapping, Sequence

    from passes.torch_internals import FakeTensorMode

# Each call of such an operator returns symbols of its own.
DATA_DEPENDENT = frozenset({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape})


class FakeValues:
    """Values by operator and by the shapes, strides, types and devices of its inputs; the forks of a graph share them.

    A value is returned to several nodes, so it must not be edited.
    """

    def __init__(self) -> None:
        self._known: dict[Hashable, Any] = {}

    def of(
        self, target: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], mode: FakeTensorMode | None
    ) -> Any:
        """Return the value of a call of an operator on traced values.

        Args:
            target: the operator.
            args: positional arguments, fake tensors and symbolic sizes among them.
            kwargs: keyword arguments.
            mode: fake tensor mode of the arguments, or None if none of them has one.
        """
        key = _key_of_call(target, args, kwargs)
        if key is None or key not in self._known:
            entered = contextlib.nullcontext() if mode is None else uncached(mode)
            with enable_python_dispatcher(), entered:  # arange needs a mode, addcmul both
                value = target(*args, **kwargs)
            if key is None:
                return value
            self._known[key] = value
        return self._known[key]

    def symbol(self, size: torch.SymInt, create: Callable[[], Any]) -> Any:
        """Return the symbol that stands for the expression of a size; `create` makes it if there is none."""
        key = ("symbol", expression(size))
        if key not in self._known:
            self._known[key] = create()
        return self._known[key]


def _key_of_call(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Hashable | None:
    """Return what the value of a call depends on; None where it depends on more than that."""
    if is_mutable(target) or DATA_DEPENDENT.intersection(getattr(target, "tags", ())):
        return None
    try:
        return target, _key(args), tuple((name, _key(value)) for name, value in kwargs.items())
    except TypeError:
        return None


def _key(value: Any) -> Hashable:
    """Return the key of an argument.

    Raises:
        TypeError: an argument of this type has no key.
    """
    if isinstance(value, torch.Tensor):
        if has_elements(value):
            raise TypeError("the value may depend on the elements of a tensor")
        sizes = tuple(map(expression, (*value.shape, *value.stride(), value.storage_offset())))
        return "tensor", sizes, value.dtype, value.device, value.layout, value.requires_grad
    if isinstance(value, torch.SymInt):
        return "size", expression(value)
    if isinstance(value, list | tuple):
        return tuple(map(_key, value))
    hash(value)
    return type(value), value  # True and 1 are equal
