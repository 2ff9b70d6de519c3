"""Weights in files that are mapped into memory, whose pages are read when they are needed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from passes.execute.offloaded_weights import is_offloaded

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

LARGE = 2**20  # bytes of the weights that are moved; smaller ones are not worth a file


def weight_bytes(modules: Iterable[torch.nn.Module]) -> int:
    """Return the bytes of the weights of modules that `map_weights` would move, shared ones counted once."""
    return sum(storage.nbytes() for storage, _ in _storages(modules))


def map_weights(modules: Iterable[torch.nn.Module], folder: Path) -> None:
    """Move weights into files that are mapped into memory; the modules compute the same with them.

    The pages take memory once they are read, and the system can take it back. What is written to a weight stays in this
    process. Weights that share memory still do. A tensor that is held elsewhere keeps its memory.

    Args:
        modules: modules whose parameters and buffers are moved in place, those of at least `LARGE` bytes.
        folder: an existing folder for the files, one for each weight. They may be removed while they are mapped.

    Raises:
        OSError: a file cannot be written. The weights that were not moved stay in memory.
    """
    for number, (storage, tensors) in enumerate(_storages(modules)):
        path = folder / f"weight-{number}.bin"
        torch.empty(0, dtype=torch.uint8).set_(storage).numpy().tofile(path)
        mapped = torch.from_file(str(path), shared=False, size=storage.nbytes(), dtype=torch.uint8).untyped_storage()
        for tensor in tensors:
            place = tensor.storage_offset(), tensor.shape, tensor.stride()
            tensor.data = torch.empty(0, dtype=tensor.dtype).set_(mapped, *place)


def _storages(modules: Iterable[torch.nn.Module]) -> Iterator[tuple[torch.UntypedStorage, list[torch.Tensor]]]:
    """Yield the memory of each large weight with the tensors that are in it."""
    found: dict[int, list[torch.Tensor]] = {}
    for tensor in {id(each): each for module in modules for each in _tensors(module)}.values():
        found.setdefault(tensor.untyped_storage().data_ptr(), []).append(tensor)
    for tensors in found.values():
        storage = tensors[0].untyped_storage()
        if storage.nbytes() >= LARGE:
            yield storage, tensors


def _tensors(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Yield the parameters and buffers of a module that are plain tensors with values in the memory of this machine."""
    for tensor in (*module.parameters(), *module.buffers()):
        plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
        if plain and tensor.device.type == "cpu" and not is_offloaded(tensor) and not tensor.is_inference():
            yield tensor
