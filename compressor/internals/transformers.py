"""Private and unstable APIs of transformers for files and weights that `compressor` uses.

They were checked with transformers 5.24.0. tests/test_internals.py tests each name with the installed release.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import itertools
import logging
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar
from unittest import mock

import transformers
from transformers import masking_utils
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key, revert_weight_conversion
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME
from transformers.utils.hub import get_checkpoint_shard_files
from transformers.vision_utils import _interpolation_axis_taps_weights as interpolation_taps

Value = TypeVar("Value")

# The recurrences of RecurrentGemma and MiniMax; without them, a loop in Python is traced for one number of tokens.
GRIFFIN = "RecurrentGemmaRglru._rnn_scan"
LIGHTNING = "MiniMaxLightningAttention.forward"

__all__ = [
    "GRIFFIN",
    "LIGHTNING",
    "SAFE_WEIGHTS_INDEX_NAME",
    "SAFE_WEIGHTS_NAME",
    "WEIGHTS_INDEX_NAME",
    "WEIGHTS_NAME",
    "MaskAsked",
    "as_checkpoints_name_them",
    "as_modules_name_them",
    "cached",
    "files_of",
    "interpolation_taps",
    "keep_stages",
    "made_by",
    "quiet",
    "shards",
    "unpadded_masks",
    "with_names",
    "with_random_weights",
    "without_bar",
]


# ------------------------------------------------------------------------------------------------------------- files


def cached(where: str, name: str, revision: str | None) -> Path | None:
    """Return the path of a file of a folder or of a hub repository, downloaded if necessary; None if it is missing.

    Uses three keywords of `cached_file` that start with an underscore. Without them, transformers raises an error for a
    file that does not exist or is not cached while offline.
    """
    path = transformers.utils.cached_file(
        where,
        name,
        revision=revision,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,  # while offline, only cached files exist
    )
    return None if path is None else Path(path)


def shards(where: str, index: Path, revision: str | None) -> list[Path]:
    """Return the paths of the shards that a checkpoint's index names, downloaded if necessary.

    Uses `get_checkpoint_shard_files` of `transformers.utils.hub`, which is not documented.
    """
    return list(map(Path, get_checkpoint_shard_files(where, str(index), revision=revision)[0]))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress progress bars and warnings about generation while weights are loaded or saved.

    Uses the name of the root logger of transformers and three functions of `transformers.utils.logging`.
    """
    logger = logging.getLogger("transformers")
    level = logger.level
    bars = transformers.utils.logging.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            transformers.utils.logging.enable_progress_bar()


# ----------------------------------------------------------------------------------------------------------- weights


def as_modules_name_them(stored: Mapping[str, Value], module: Any) -> dict[str, Value]:
    """Rename the tensors of a checkpoint to the names in the module, if the two differ.

    Tensors that transformers would convert, by merging several or by reordering values, are left out.

    Uses `get_model_conversion_mapping`, `WeightRenaming` and `rename_source_key`, which are not documented. Without
    them, weights whose names changed between releases are missing in older checkpoints.

    Args:
        stored: tensors or placeholders by their names in the checkpoint.
        module: a model of transformers.
    """
    conversions = get_model_conversion_mapping(module)
    renamings = [rule for rule in conversions if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in conversions if not isinstance(rule, WeightRenaming)]
    renamed: dict[str, Value] = {}
    for name, tensor in stored.items():
        path, converted = rename_source_key(name, renamings, converters)
        if converted is None:
            renamed[path] = tensor
    return renamed


def as_checkpoints_name_them(tensors: Mapping[str, Any], module: Any) -> dict[str, Any]:
    """Rename the tensors of a module to the names that `save_pretrained` writes.

    Uses `revert_weight_conversion`, which is not documented. Without it, other releases cannot load the weights.

    Args:
        tensors: tensors by their names in the module.
        module: a model of transformers.
    """
    renamed: dict[str, Any] = revert_weight_conversion(module, dict(tensors))
    return renamed


# ----------------------------------------------------------------------------------------------------------- modules


def with_random_weights(kind: Any, config: Any) -> Any:
    """Create a model with random weights from a model class or an auto class of transformers.

    Uses `PreTrainedModel._from_config`; only auto classes have a public `from_config`.
    """
    return kind._from_config(config) if hasattr(kind, "_from_config") else kind.from_config(config)


def made_by(automatic: Any, config: Any) -> tuple[Any, ...]:
    """Return the model classes that an automatic class makes from a config; empty if it does not know the config.

    It lists Evolla, but finds another name for its config, and then makes no model of it.

    Uses the attribute `_model_mapping` of automatic classes.
    """
    mapping = automatic._model_mapping
    found = mapping.get(type(config), ()) if type(config) in mapping else ()
    return tuple(found) if isinstance(found, tuple | list) else (found,)


def keep_stages(config: Any, count: int, kept: int) -> None:
    """Truncate the stages in the config of a backbone, which has one stage per block after the stem.

    Other configs stay unchanged. Uses `stage_names` of backbones, which is not documented. Without it, the config of a
    backbone names stages that the checkpoint does not have.

    Args:
        config: config of a model, modified in place.
        count: number of blocks before the truncation.
        kept: number of blocks after the truncation.
    """
    stages = getattr(config, "stage_names", None)
    if stages is not None and len(stages) == count + 1:
        config.stage_names = stages[: kept + 1]
        config.out_features = config.stage_names[-1:]  # also sets out_indices


def files_of(module: Any) -> set[ModuleType]:
    """Return the files of transformers that hold the classes of a module and of its parts."""
    files = {sys.modules[type(part).__module__] for part in module.modules()}
    return {file for file in files if file.__name__.startswith("transformers.")}


@contextlib.contextmanager
def with_names(module: Any, names: Mapping[str, Any]) -> Iterator[None]:
    """Replace names in the files that define the classes of a module and of its parts.

    They are not documented. A file that does not have a name stays as it is; built-in functions are in all.

    Args:
        module: a model.
        names: the value of each name. A method is named with its class.
    """
    files = {sys.modules.get(type(each).__module__) for each in module.modules()} - {None}
    with contextlib.ExitStack() as stack:
        for file, (name, value) in itertools.product(files, names.items()):
            owner, _, attribute = name.rpartition(".")
            holder = getattr(file, owner, None) if owner else file
            if holder is not None and (hasattr(holder, attribute) or hasattr(builtins, attribute)):
                stack.enter_context(mock.patch.object(holder, attribute, value, create=True))
        yield


@contextlib.contextmanager
def without_bar() -> Iterator[None]:
    """Suppress the progress bar over the tensors of a GGUF file.

    Replaces the name `tqdm` in `transformers.modeling_gguf_pytorch_utils`, which ignores the logging settings of
    transformers.
    """
    from transformers import modeling_gguf_pytorch_utils as reader

    bar = getattr(reader, "tqdm", None)
    if bar is None:
        yield
        return
    reader.tqdm = functools.partial(bar, disable=True)
    try:
        yield
    finally:
        reader.tqdm = bar


# ------------------------------------------------------------------------------------------------------------- masks


@dataclass
class MaskAsked:
    """Whether a module has asked, since, if the mask of an attention to both sides can be left out without padding."""

    asked: bool = False


@contextlib.contextmanager
def unpadded_masks(*, leave_out: bool) -> Iterator[MaskAsked]:
    """Note whether attentions to both sides are masked without padding, and leave out their masks if `leave_out`.

    Replaces `masking_utils._ignore_bidirectional_mask_sdpa`, which leaves them out where a module is called, but not
    where it is exported. Of Informer, whose layers halve the tokens, the mask then has the size of another layer.
    """
    own, found = masking_utils._ignore_bidirectional_mask_sdpa, MaskAsked()

    def ignored(padding_mask: Any, kv_length: Any, local_attention_size: int | None = None) -> bool:
        if padding_mask is not None:
            return bool(own(padding_mask, kv_length, local_attention_size))
        found.asked = True
        if leave_out:
            return local_attention_size is None or bool(kv_length < local_attention_size)
        return bool(own(padding_mask, kv_length, local_attention_size))

    with mock.patch.object(masking_utils, "_ignore_bidirectional_mask_sdpa", ignored):
        yield found
