"""Values as bytes and arrays for the object store of Ray, in which the processes of a machine share memory.

The memory of tensors is kept apart from the rest of a value, and all workers of a machine read it in place. Strides and
offsets stay as they are, because another layout can change the rounding of a matrix product. Placeholders of weights on
disk are sent as such.
"""

from __future__ import annotations

import importlib
import io
import pickle
import types
import uuid
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.dlpack import from_dlpack

from passes.execute.offloaded_weights import is_offloaded

Bytes = npt.NDArray[np.uint8]
Address = tuple[int, int]  # of the memory of a tensor, and its number of bytes


@dataclass(frozen=True, eq=False)
class Packed:
    """A pickled value and where the memory of its tensors is.

    Two are equal if they were packed by the same call.

    Attributes:
        pickled: the value, in which tensors are numbered.
        handles: handles of lists of arrays.
        places: for the memory of each tensor, the position of its handle, and its position in that list.
        shared: whether many calls read the value.
    """

    pickled: bytes
    handles: tuple[Any, ...]
    places: Sequence[tuple[int, int]]
    shared: bool = False
    key: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Packed) and self.key == other.key

    def value(self, arrays_of: Callable[[Any], Sequence[Bytes]]) -> Any:
        """Return the value; `arrays_of` returns the arrays of a handle."""
        lists = [arrays_of(handle) for handle in self.handles]
        return _Unpickler(self.pickled, [lists[number][position] for number, position in self.places]).load()


def packed(value: Any) -> Packed:
    """Pack a value together with its tensors; the only handle is the list of arrays itself."""
    pickler = _Pickler()
    pickled = pickler.dumps(value)
    arrays = [_bytes_of(tensor) for tensor in pickler.tensors.values()]
    return Packed(pickled, (arrays,), [(0, position) for position in range(len(arrays))])


@dataclass
class SharedTensors:
    """Packs values apart from their tensors, which are put into a store once for as long as they exist.

    Attributes:
        put: puts a list of arrays into the store and returns its handle.
    """

    put: Callable[[list[Bytes]], Any]
    _known: dict[Address, _Stored] = field(default_factory=dict)

    def packed(self, value: Any) -> Packed:
        """Pack a value; put those of its tensors into the store that are not there yet."""
        pickler = _Pickler()
        pickled = pickler.dumps(value)
        self._known = {address: stored for address, stored in self._known.items() if stored.tensor() is not None}
        new = {address: tensor for address, tensor in pickler.tensors.items() if address not in self._known}
        if new:
            handle = self.put([_bytes_of(tensor) for tensor in new.values()])
            for position, (address, tensor) in enumerate(new.items()):
                self._known[address] = _Stored(weakref.ref(tensor), handle, position)
        stored = [self._known[address] for address in pickler.tensors]
        handles = list(dict.fromkeys(each.handle for each in stored))
        places = [(handles.index(each.handle), each.position) for each in stored]
        return Packed(pickled, tuple(handles), places, shared=True)


@dataclass(frozen=True)
class _Stored:
    """A tensor, the handle of the arrays that hold its memory, and its position among them."""

    tensor: weakref.ref[torch.Tensor]
    handle: Any
    position: int


class _Pickler(pickle.Pickler):
    """Pickles a value with a number for the memory of each tensor, and modules by name.

    Attributes:
        tensors: a tensor by the address of its memory, in the order of their numbers.
    """

    def __init__(self) -> None:
        self.file = io.BytesIO()
        super().__init__(self.file, protocol=5)
        self.tensors: dict[Address, torch.Tensor] = {}
        self.numbers: dict[Address, int] = {}

    def dumps(self, value: Any) -> bytes:
        self.dump(value)
        return self.file.getvalue()

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or is_offloaded(value):
            return None
        storage = value.untyped_storage()
        address = storage.data_ptr(), storage.nbytes()
        self.tensors.setdefault(address, value)
        number = self.numbers.setdefault(address, len(self.numbers))
        return number, value.dtype, value.storage_offset(), tuple(value.shape), value.stride()

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, types.ModuleType):
            return importlib.import_module, (value.__name__,)
        return NotImplemented


class _Unpickler(pickle.Unpickler):
    def __init__(self, pickled: bytes, arrays: Sequence[Bytes]) -> None:
        super().__init__(io.BytesIO(pickled))
        self.arrays = arrays

    def persistent_load(self, description: Any) -> torch.Tensor:
        number, dtype, offset, shape, stride = description
        array = self.arrays[number]
        if not array.size:
            return torch.empty(shape, dtype=dtype)
        # NumPy hands out read-only memory by DLPack, unlike torch.from_numpy without a warning. Programs only read it.
        storage = from_dlpack(array).untyped_storage()
        return torch.empty(0, dtype=dtype).set_(storage, offset, shape, stride)


def _bytes_of(tensor: torch.Tensor) -> Bytes:
    """Return the memory of a tensor, whole, without a copy."""
    array: Bytes = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy()
    return array
