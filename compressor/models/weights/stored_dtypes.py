"""The types of the weights in a checkpoint's files. Models are loaded as float32, and checkpoints keep these types."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open

Dtypes = Mapping[str, torch.dtype]

# The float types of safetensors files that torch computes with.
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def weight_files(location: str, revision: str | None) -> list[Path]:
    """Return the files with the weights of a folder or hub repository, in the order in which transformers looks.

    Return an empty list if the weights are in files of another name.
    """
    from compressor.internals.transformers import (
        SAFE_WEIGHTS_INDEX_NAME,
        SAFE_WEIGHTS_NAME,
        WEIGHTS_INDEX_NAME,
        WEIGHTS_NAME,
        cached,
        shards,
    )

    for single, index in ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)):
        path = cached(location, single, revision)
        if path is not None:
            return [path]
        path = cached(location, index, revision)
        if path is not None:
            return shards(location, path, revision)
    return []


def dtypes_in(paths: Iterable[Path]) -> dict[str, torch.dtype]:
    """Return the types of the float tensors in checkpoint files, by their names there; no values are read."""
    return {name: dtype for path in paths for name, dtype in _of_file(path)}


def _of_file(path: Path) -> Iterator[tuple[str, torch.dtype]]:
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                kind = file.get_slice(name).get_dtype()
                if kind in FLOATS:
                    yield name, FLOATS[kind]
        return
    for name, value in torch.load(path, map_location="meta", weights_only=True).items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            yield name, value.dtype


def dtypes_by_path(stored: Dtypes, module: torch.nn.Module) -> dict[str, torch.dtype]:
    """Return the stored type of every float parameter and persistent buffer of a transformers module, by its path.

    A tied weight has one type under all of its paths. A weight that transformers merges from several tensors has the
    widest type of the checkpoint, which loses nothing.

    Args:
        stored: types by the names in the files.
        module: the module that was loaded from them.
    """
    from compressor.internals.transformers import as_modules_name_them

    if not stored:
        return {}
    widest = max(set(stored.values()), key=lambda dtype: (dtype.itemsize, torch.finfo(dtype).bits, str(dtype)))
    base = f"{getattr(module, 'base_model_prefix', '')}."
    renamed = as_modules_name_them(stored, module)
    state = {name: value for name, value in module.state_dict(keep_vars=True).items() if value.is_floating_point()}
    found: dict[int, torch.dtype] = {}
    for name, value in state.items():
        names = (name, name.removeprefix(base), f"{base}{name}")
        dtype = next((renamed[each] for each in names if each in renamed), None)
        if dtype is not None:
            found.setdefault(id(value), dtype)
    return {name: found.get(id(value), widest) for name, value in state.items()}


def exact_dtypes(module: torch.nn.Module, narrower: Sequence[torch.dtype]) -> dict[str, torch.dtype]:
    """Return for every matrix of a module the first of the narrower types that holds its values exactly, by path.

    Matrices that none of them holds, and vectors, are left out. GGUF files store vectors as float32.
    """
    exact: dict[str, torch.dtype] = {}
    for name, value in module.named_parameters(remove_duplicate=False):
        fitting = (
            dtype for dtype in narrower if value.ndim > 1 and torch.equal(value.to(dtype).to(value.dtype), value)
        )
        dtype = next(fitting, None)
        if dtype is not None:
            exact[name] = dtype
    return exact


def describe_dtypes(dtypes: Iterable[torch.dtype]) -> str:
    """Format types with the number of tensors of each: ``bfloat16 (290 tensors), float32 (2)``.

    >>> describe_dtypes([torch.bfloat16, torch.float32, torch.bfloat16])
    'bfloat16 (2 tensors), float32 (1)'
    """
    counts = [(str(dtype).removeprefix("torch."), count) for dtype, count in Counter(dtypes).most_common()]
    return ", ".join(
        f"{name} ({count}{' tensors' if number == 0 else ''})" for number, (name, count) in enumerate(counts)
    )


def as_stored(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """Return a tensor in its stored type; None and types wider than float32, which was read, leave it unchanged."""
    return tensor if dtype is None or dtype.itemsize > tensor.dtype.itemsize else tensor.to(dtype)
