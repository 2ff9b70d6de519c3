"""Checkpoints of transformers with weights on disk: the module holds placeholders that are read when needed."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import GenerationConfig

from compressor.internals.transformers import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    as_checkpoints_name_them,
    as_modules_name_them,
    cached,
    shards,
)
from compressor.models.base import ModelError
from compressor.models.weights.stored_tensor import DTYPES, Stored
from passes.execute.offloaded_weights import READ, is_offloaded, offloaded
from passes.graph.graph import Graph

# Buffers may also have the integer and bool types.
NAMES = {dtype: name for name, dtype in DTYPES.items()} | {torch.int64: "I64", torch.int32: "I32", torch.bool: "BOOL"}
SHARD = "5GB"


def module_on_disk(kind: Any, config: Any, location: str, options: Mapping[str, Any]) -> torch.nn.Module:
    """Create a module of transformers that reads its weights from disk when needed; its small buffers are in memory.

    Args:
        kind: an auto class.
        config: config of the model.
        location: a folder or hub id with safetensors files.
        options: revision, trust_remote_code.

    Raises:
        ModelError: the weights are not in safetensors files, are quantized, or differ from the module in name or shape.
    """
    with _without_memory():
        module: torch.nn.Module = kind.from_config(
            config, dtype=torch.float32, trust_remote_code=options["trust_remote_code"]
        )
    stored = as_modules_name_them(_stored(location, options), module)
    base = f"{getattr(module, 'base_model_prefix', '')}."
    for weight, paths in _tied(module):
        entry = next((tensor for path in paths if (tensor := _lookup(stored, path, base)) is not None), None)
        placeholder = offloaded(weight, _checked(entry, paths[0], weight.shape, location))
        for owner, _, leaf in (path.rpartition(".") for path in paths):
            module.get_submodule(owner).register_parameter(leaf, placeholder)
    for path, buffer in _kept_buffers(module).items():
        entry = _lookup(stored, path, base)
        if entry is not None:
            buffer.copy_(entry.as_stored())
    with contextlib.suppress(OSError):  # optional file; the module derives a default from its config
        module.generation_config = GenerationConfig.from_pretrained(location, revision=options["revision"])
    return module


def _tied(module: torch.nn.Module) -> list[tuple[torch.nn.Parameter, list[str]]]:
    """Return every parameter with its paths; a tied parameter has several."""
    paths: dict[int, list[str]] = {}
    for path, weight in module.named_parameters(remove_duplicate=False):
        paths.setdefault(id(weight), []).append(path)
    return [(weight, paths[id(weight)]) for weight in module.parameters()]


def _kept_buffers(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the persistent buffers, such as a learned scale of a layer, by path."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    return {path: value for path, value in module.state_dict(keep_vars=True).items() if path not in parameters}


def _stored(location: str, options: Mapping[str, Any]) -> dict[str, Stored]:
    """Return the tensors of a checkpoint by name; download missing shards first."""
    revision = options["revision"]
    # A single file has precedence in transformers.
    if (single := cached(location, SAFE_WEIGHTS_NAME, revision)) is not None:
        paths = [single]
    elif (index := cached(location, SAFE_WEIGHTS_INDEX_NAME, revision)) is not None:
        paths = shards(location, index, revision)
    else:
        raise ModelError(
            f"{location} has no {SAFE_WEIGHTS_NAME} and no {SAFE_WEIGHTS_INDEX_NAME}, but --max-memory reads weights "
            "from these files; save the model with save_pretrained once, or leave --max-memory out."
        )
    tensors: dict[str, Stored] = {}
    for path in paths:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                tensors[name] = Stored(Path(path).absolute(), name, part.get_dtype(), tuple(part.get_shape()))
    return tensors


def _lookup(stored: Mapping[str, Stored], path: str, base: str) -> Stored | None:
    """Return a tensor by its path; checkpoints of models with and without a head differ by the prefix `base`."""
    names = (path, path.removeprefix(base), f"{base}{path}")
    return next((stored[name] for name in names if name in stored), None)


def _checked(entry: Stored | None, path: str, shape: torch.Size, location: str) -> Stored:
    """Return the tensor of a path, after checking its presence, dtype and shape."""
    if entry is None:
        raise ModelError(
            f"the files of {location} have no tensor {path}, or transformers converts it on loading, but --max-memory "
            "reads weights as they are; leave --max-memory out."
        )
    if entry.kind not in DTYPES:
        raise ModelError(
            f"{path} in the files of {location} is of type {entry.kind}, but --max-memory reads {', '.join(DTYPES)}; "
            "pass a checkpoint that is not quantized."
        )
    if entry.shape != tuple(shape):
        raise ModelError(
            f"{path} in the files of {location} has the shape {list(entry.shape)}, but the config implies "
            f"{list(shape)}; pass a folder whose config.json belongs to its weights."
        )
    return entry


def stored_bytes(graph: Graph) -> int:
    """Return the bytes of a graph's weights in their files; shared weights are counted once."""
    stored = {getattr(weight, READ): weight.numel() for weight in graph.module.parameters() if is_offloaded(weight)}
    return sum(count * entry.dtype.itemsize for entry, count in stored.items())


def write_from_disk(module: Any, folder: Path) -> None:
    """Write a model of transformers with weights on disk shard by shard, in the format of `save_pretrained`.

    Weights keep their stored dtype. Tied weights are written once.

    Args:
        module: a module as returned by `module_on_disk`.
        folder: an existing folder.
    """
    first = {id(weight): name for name, weight in reversed(list(module.named_parameters()))}
    weights = {name: getattr(weight, READ) for name, weight in module.named_parameters() if first[id(weight)] == name}
    tensors = _as_checkpoints_name_them(module, weights | _kept_buffers(module))
    shapes = {name: torch.empty(value.shape, dtype=value.dtype, device="meta") for name, value in tensors.items()}
    split = split_torch_state_dict_into_shards(shapes, max_shard_size=SHARD)
    for file, names in split.filename_to_tensors.items():
        _write_shard(folder / file, {name: tensors[name] for name in names})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
    module.config.architectures = [type(module).__name__]
    module.config.dtype = next(iter(weights.values())).dtype
    module.config.save_pretrained(folder)


def _as_checkpoints_name_them(
    module: Any, tensors: Mapping[str, Stored | torch.Tensor]
) -> dict[str, Stored | torch.Tensor]:
    marked = {name: torch.empty((), device="meta") for name in tensors}
    by_mark = {id(mark): tensors[name] for name, mark in marked.items()}
    return {name: by_mark[id(mark)] for name, mark in as_checkpoints_name_them(marked, module).items()}


def _write_shard(path: Path, tensors: Mapping[str, Stored | torch.Tensor]) -> None:
    """Write a safetensors file with one tensor in memory at a time; `save_file` needs all tensors at once.

    The format (github.com/huggingface/safetensors, "Format"): the size of the header in bytes as a little-endian 64-bit
    number, the header as JSON, padded with spaces to a multiple of 8, then the tensors at the offsets in the header.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    # The widest dtypes first, as in `save_file`, so that every tensor is aligned to its element size.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    for name, value in ordered:
        start, end = end, end + math.prod(value.shape) * value.dtype.itemsize
        header[name] = {"dtype": NAMES[value.dtype], "shape": list(value.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, value in ordered:
            array = value.as_stored() if isinstance(value, Stored) else value
            file.write(array.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)


@contextlib.contextmanager
def _without_memory() -> Iterator[None]:
    """Create parameters of new modules on the meta device; buffers are computed as usual."""

    # The return value of the hook replaces the parameter.
    def move(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter) -> torch.nn.Parameter | None:
        if parameter.is_meta:
            return None
        # Memory that the parameter has allocated but not written to has not been committed yet.
        return torch.nn.Parameter(parameter.to("meta"), requires_grad=False)

    hook = register_module_parameter_registration_hook(move)  # type: ignore[arg-type]
    try:
        yield
    finally:
        hook.remove()
