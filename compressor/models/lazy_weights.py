"""Checkpoints of transformers whose weights stay on disk: the module holds stand-ins that know where to read them."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
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
from passes.execute.offloaded_weights import READ, is_offloaded, offloaded
from passes.graph.graph import Graph

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Buffers may be of these too.
NAMES = {dtype: name for name, dtype in DTYPES.items()} | {torch.int64: "I64", torch.int32: "I32", torch.bool: "BOOL"}
SHARD = "5GB"


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file; `kind` is its type as the file names it, such as BF16."""

    path: Path
    name: str
    kind: str
    shape: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        """Its type in the file."""
        return DTYPES[self.kind]

    def __call__(self) -> torch.Tensor:
        """Its values in float32."""
        return self.as_stored().float()

    def as_stored(self) -> torch.Tensor:
        """Its values in the type that the file has."""
        with safe_open(self.path, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(self.name)
        return tensor


def module_on_disk(kind: Any, config: Any, where: str, options: Mapping[str, Any]) -> torch.nn.Module:
    """A module of transformers that reads its weights when they are needed; buffers are in memory, small as they are.

    Args:
        kind: an auto class.
        config: of the model.
        where: a folder or hub id with safetensors files.
        options: revision, trust_remote_code.

    Raises:
        ModelError: the weights are not in safetensors files, under other names or in other shapes than the module has
            them, or quantized.
    """
    with _without_memory():
        module: torch.nn.Module = kind.from_config(
            config, dtype=torch.float32, trust_remote_code=options["trust_remote_code"]
        )
    stored = as_modules_name_them(_stored(where, options), module)
    base = f"{getattr(module, 'base_model_prefix', '')}."
    for weight, paths in _tied(module):
        found = next((each for path in paths if (each := _found(stored, path, base)) is not None), None)
        stand_in = offloaded(weight, _checked(found, paths[0], weight.shape, where))
        for owner, _, leaf in (path.rpartition(".") for path in paths):
            module.get_submodule(owner).register_parameter(leaf, stand_in)
    for path, buffer in _kept_buffers(module).items():
        found = _found(stored, path, base)
        if found is not None:
            buffer.copy_(found.as_stored())
    with contextlib.suppress(OSError):  # not every folder has one; the module has made one of its config
        module.generation_config = GenerationConfig.from_pretrained(where, revision=options["revision"])
    return module


def _tied(module: torch.nn.Module) -> list[tuple[torch.nn.Parameter, list[str]]]:
    """Every parameter with the paths that it has; tied ones have several."""
    paths: dict[int, list[str]] = {}
    for path, weight in module.named_parameters(remove_duplicate=False):
        paths.setdefault(id(weight), []).append(path)
    return [(weight, paths[id(weight)]) for weight in module.parameters()]


def _kept_buffers(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Buffers that checkpoints hold: learned values that are no parameters, such as the scale of a layer."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    return {path: value for path, value in module.state_dict(keep_vars=True).items() if path not in parameters}


def _stored(where: str, options: Mapping[str, Any]) -> dict[str, Stored]:
    """Where each tensor of a checkpoint is; shards are downloaded first."""
    revision = options["revision"]
    index = cached(where, SAFE_WEIGHTS_INDEX_NAME, revision)
    if index is not None:
        paths = shards(where, index, revision)
    elif (single := cached(where, SAFE_WEIGHTS_NAME, revision)) is not None:
        paths = [single]
    else:
        raise ModelError(
            f"{where} has no {SAFE_WEIGHTS_NAME} and no {SAFE_WEIGHTS_INDEX_NAME}, which --max-memory reads weights "
            "from; save it with save_pretrained once, or leave --max-memory out."
        )
    found: dict[str, Stored] = {}
    for path in paths:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                found[name] = Stored(path, name, part.get_dtype(), tuple(part.get_shape()))
    return found


def _found(stored: Mapping[str, Stored], path: str, base: str) -> Stored | None:
    """Where a tensor is; checkpoints of the bare model and of one with a head differ by a prefix."""
    names = (path, path.removeprefix(base), f"{base}{path}")
    return next((stored[name] for name in names if name in stored), None)


def _checked(found: Stored | None, path: str, shape: torch.Size, where: str) -> Stored:
    """A tensor that can be taken for the one of this path."""
    if found is None:
        raise ModelError(
            f"the files of {where} have no tensor {path}, or one that is converted when it is loaded; --max-memory "
            "reads weights as they are: leave it out."
        )
    if found.kind not in DTYPES:
        raise ModelError(
            f"{path} in the files of {where} is of type {found.kind}; --max-memory reads {', '.join(DTYPES)}: give a "
            "checkpoint that is not quantized."
        )
    if found.shape != tuple(shape):
        raise ModelError(
            f"{path} in the files of {where} has the shape {list(found.shape)}, but the config makes it {list(shape)}; "
            "give a folder whose config.json belongs to its weights."
        )
    return found


def stored_bytes(graph: Graph) -> int:
    """Bytes that the weights of a graph have in their files, those it shares counted once."""
    stored = {getattr(each, READ): each.numel() for each in graph.module.parameters() if is_offloaded(each)}
    return sum(count * place.dtype.itemsize for place, count in stored.items())


def write_from_disk(module: Any, folder: Path) -> None:
    """Write a model of transformers whose weights are read from disk, as `save_pretrained` would, shard by shard.

    Weights keep the type that they are stored in; tied ones are written once.

    Args:
        module: every parameter as `module_on_disk` makes them.
        folder: exists.
    """
    first = {id(weight): name for name, weight in reversed(list(module.named_parameters()))}
    weights = {name: getattr(weight, READ) for name, weight in module.named_parameters() if first[id(weight)] == name}
    tensors = _as_checkpoints_name_them(module, weights | _kept_buffers(module))
    shapes = {name: torch.empty(each.shape, dtype=each.dtype, device="meta") for name, each in tensors.items()}
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
    """Write a safetensors file of which one tensor at a time is in memory; `save_file` wants all of them at once.

    The format (github.com/huggingface/safetensors, "Format"): bytes of the header as a little-endian 64-bit number, the
    header as JSON, padded with spaces to a multiple of 8, then the tensors, each at the offsets that the header gives.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    # The widest types first, as `save_file` has them: so each tensor lies at a multiple of its elements.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    for name, each in ordered:
        start, end = end, end + math.prod(each.shape) * each.dtype.itemsize
        header[name] = {"dtype": NAMES[each.dtype], "shape": list(each.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, each in ordered:
            values = each.as_stored() if isinstance(each, Stored) else each
            file.write(values.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)


@contextlib.contextmanager
def _without_memory() -> Iterator[None]:
    """Modules made here have parameters without values, while buffers are computed as usual."""

    def move(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter) -> torch.nn.Parameter | None:
        if parameter.is_meta:
            return None
        return torch.nn.Parameter(parameter.to("meta"), requires_grad=False)  # unwritten memory costs nothing yet

    hook = register_module_parameter_registration_hook(move)  # type: ignore[arg-type]  # its answer is taken
    try:
        yield
    finally:
        hook.remove()
