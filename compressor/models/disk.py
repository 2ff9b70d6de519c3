"""Checkpoints of transformers whose weights stay on disk: the module holds stand-ins that know where to read them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from compressor.models.base import ModelError
from passes.graph import Graph
from passes.offload import READ, is_offloaded, offloaded

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SHARD = "512MB"  # all of a shard is in memory while it is written


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file."""

    path: Path
    name: str
    dtype: torch.dtype

    def __call__(self) -> torch.Tensor:
        """Its values in float32."""
        return self.as_stored().float()

    def as_stored(self) -> torch.Tensor:
        """Its values in the type that the file has."""
        with safe_open(self.path, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(self.name)
        return tensor


def module_on_disk(kind: Any, config: Any, where: str, options: Mapping[str, Any]) -> torch.nn.Module:
    """A module of transformers that reads its weights when they are needed; buffers are in memory.

    Args:
        kind: an auto class.
        config: of the model.
        where: a folder or hub id with safetensors files.
        options: revision, trust_remote_code.

    Raises:
        ModelError: the weights are not in safetensors files, or under other names than the module has.
    """
    stored = _stored(where, options)
    with _without_memory():
        module: torch.nn.Module = kind.from_config(
            config, dtype=torch.float32, trust_remote_code=options["trust_remote_code"]
        )
    base = f"{getattr(module, 'base_model_prefix', '')}."
    stand_ins: dict[int, torch.nn.Parameter] = {}
    for path, weight in list(module.named_parameters(remove_duplicate=False)):
        if id(weight) not in stand_ins:
            stand_ins[id(weight)] = offloaded(weight, _found(stored, path, base, where))
        owner, _, leaf = path.rpartition(".")
        module.get_submodule(owner).register_parameter(leaf, stand_ins[id(weight)])
    return module


def _stored(where: str, options: Mapping[str, Any]) -> dict[str, Stored]:
    """Where each tensor of a checkpoint is; shards are downloaded first."""
    revision = options["revision"]
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_gated_repo": False}
    index = cached_file(where, SAFE_WEIGHTS_INDEX_NAME, revision=revision, **quiet)
    single = None if index is not None else cached_file(where, SAFE_WEIGHTS_NAME, revision=revision, **quiet)
    if index is None and single is None:
        raise ModelError(
            f"{where} has no {SAFE_WEIGHTS_NAME} and no {SAFE_WEIGHTS_INDEX_NAME}, which --max-memory reads weights "
            "from; save it with save_pretrained once, or leave --max-memory out."
        )
    paths = [single] if index is None else get_checkpoint_shard_files(where, index, revision=revision)[0]
    found: dict[str, Stored] = {}
    for path in map(Path, paths):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                found[name] = Stored(path, name, _dtype(file.get_slice(name).get_dtype(), where))
    return found


def _dtype(name: str, where: str) -> torch.dtype:
    if name not in DTYPES:
        raise ModelError(
            f"the files of {where} hold tensors of type {name}; --max-memory reads {', '.join(DTYPES)}: give a "
            "checkpoint that is not quantized."
        )
    return DTYPES[name]


def _found(stored: Mapping[str, Stored], path: str, base: str, where: str) -> Stored:
    """Where a parameter is; checkpoints of the bare model and of one with a head differ by a prefix."""
    for name in (path, path.removeprefix(base), f"{base}{path}"):
        if name in stored:
            return stored[name]
    raise ModelError(
        f"the files of {where} have no tensor {path}, which --max-memory needs under this very name; open and save the "
        "model with this version of transformers once, or leave --max-memory out."
    )


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
    weights = {id(weight): (name, weight) for name, weight in reversed(list(module.named_parameters()))}
    stored: dict[str, Stored] = {name: getattr(weight, READ) for name, weight in reversed(weights.values())}
    shapes = {
        name: torch.empty(weight.shape, dtype=stored[name].dtype, device="meta") for name, weight in weights.values()
    }
    split = split_torch_state_dict_into_shards(shapes, max_shard_size=SHARD)
    for file, names in split.filename_to_tensors.items():
        save_file({name: stored[name].as_stored() for name in names}, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
    module.config.architectures = [type(module).__name__]
    module.config.dtype = next(iter(shapes.values())).dtype
    module.config.save_pretrained(folder)


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
