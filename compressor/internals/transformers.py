"""What `compressor` reads of the private and unstable parts of transformers, files and weights only.

All of it was seen in transformers 5.24.0; of whichever is installed, tests/test_internals.py goes through it name by
name.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import transformers
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key, revert_weight_conversion
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import get_checkpoint_shard_files

Value = TypeVar("Value")

__all__ = [
    "SAFE_WEIGHTS_INDEX_NAME",
    "SAFE_WEIGHTS_NAME",
    "as_checkpoints_name_them",
    "as_modules_name_them",
    "cached",
    "keep_stages",
    "quiet",
    "shards",
    "with_random_weights",
    "without_bar",
]


# ------------------------------------------------------------------------------------------------------------- files


def cached(where: str, name: str, revision: str | None) -> Path | None:
    """Return the path of a file of a folder or of a hub repository, downloaded if need be; None where there is none.

    Reads three keywords of `cached_file` that start with an underscore. Without them, a file that is not there, or that
    cannot be had offline, is an error of transformers.
    """
    found = transformers.utils.cached_file(
        where,
        name,
        revision=revision,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,  # offline, what was downloaded before is what there is
    )
    return None if found is None else Path(found)


def shards(where: str, index: Path, revision: str | None) -> list[Path]:
    """List the files of a checkpoint that its index names, downloaded if need be.

    Reads `get_checkpoint_shard_files` of `transformers.utils.hub`, which is not documented.
    """
    return list(map(Path, get_checkpoint_shard_files(where, str(index), revision=revision)[0]))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Show no bars and no advice on generation while weights are loaded or saved.

    Reads the name of the logger that all of transformers logs to, and three functions of `transformers.utils.logging`.
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
    """Rename the tensors of a checkpoint as the module names them, where checkpoints of its kind have other names.

    Those that transformers would convert are left out: several that become one, or values in another order.

    Reads `get_model_conversion_mapping`, `WeightRenaming` and `rename_source_key`, which are not documented. Without
    them, weights whose names changed between releases are not found in older checkpoints.

    Args:
        stored: tensors, or what stands for them, by their names in the checkpoint.
        module: a model of transformers.
    """
    conversions = get_model_conversion_mapping(module)
    renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
    converters = [each for each in conversions if not isinstance(each, WeightRenaming)]
    found: dict[str, Value] = {}
    for name, each in stored.items():
        path, converted = rename_source_key(name, renamings, converters)
        if converted is None:
            found[path] = each
    return found


def as_checkpoints_name_them(tensors: Mapping[str, Any], module: Any) -> dict[str, Any]:
    """Rename the tensors of a module as `save_pretrained` names them.

    Reads `revert_weight_conversion`, which is not documented. Without it, other releases do not find the weights.

    Args:
        tensors: by their names in the module.
        module: a model of transformers.
    """
    found: dict[str, Any] = revert_weight_conversion(module, dict(tensors))
    return found


# ----------------------------------------------------------------------------------------------------------- modules


def with_random_weights(kind: Any, config: Any) -> Any:
    """Make a model with random weights of a class of transformers, or of an auto class.

    Reads `PreTrainedModel._from_config`; only auto classes have a public `from_config`.
    """
    return kind._from_config(config) if hasattr(kind, "_from_config") else kind.from_config(config)


def keep_stages(config: Any, count: int, kept: int) -> None:
    """Let the config of a backbone name fewer stages, one for each block behind the stem; other configs stay.

    Reads `stage_names` of backbones, which is not documented. Without it, the config of a backbone names stages that
    the checkpoint does not have.

    Args:
        config: of a model, changed in place.
        count: blocks that there were.
        kept: blocks that stay.
    """
    stages = getattr(config, "stage_names", None)
    if stages is not None and len(stages) == count + 1:
        config.stage_names = stages[: kept + 1]
        config.out_features = config.stage_names[-1:]  # takes out_indices with it


@contextlib.contextmanager
def without_bar() -> Iterator[None]:
    """Show no bar over the tensors of a GGUF file.

    Replaces the name `tqdm` in `transformers.modeling_gguf_pytorch_utils`, which the settings of transformers do not
    reach. Without it, a bar is shown.
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
