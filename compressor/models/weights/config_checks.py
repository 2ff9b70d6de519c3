"""Checks of the counts in a model's config before the model is built: a wrong count would fill memory or never end."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from compressor.models.base import ModelError, first_line
from compressor.workspace.json_files import OBJECT, read_json

# Counts of layers; the deepest published transformers have 1,000 layers (DeepNet, arXiv 2203.00555).
DEPTHS = ("num_hidden_layers", "num_layers", "encoder_layers", "decoder_layers", "depth", "depths")
MOST_LAYERS = 2_000
SIZES = (
    "hidden_size",
    "num_attention_heads",
    "vocab_size",
    "intermediate_size",
    "embed_dim",
    "num_heads",
    "patch_size",
)
LONGEST_SIDE = 16_384  # pixels of an image
SIDES = ("image_size", "img_size")
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
BITS = 8  # parameters that a byte of a file can hold; no format has less than one bit for each


def check_counts(config: Any, location: str) -> None:
    """Check that the counts of layers, sizes and image sides of a config are positive, and that a model can have them.

    Args:
        config: a config of transformers, with the configs of its parts, or a mapping by the same names.
        location: name of the model in messages.

    Raises:
        ModelError: a count is zero, negative or too large.
    """
    for part in _parts(config):
        for name in (*DEPTHS, *SIZES, *SIDES):
            for value in _integers(_stated(part, name)):
                most = MOST_LAYERS if name in DEPTHS else LONGEST_SIDE if name in SIDES else None
                if value < 1 or (most is not None and value > most):
                    expected = "at least 1" if most is None else f"1 to {most:,}"
                    raise ModelError(
                        f"the config of {location} sets {name} to {value:,}; expected {expected}, so it is damaged or "
                        "not the config of a model."
                    )


def damaged_labels(folder: Path) -> str | None:
    """Return why transformers cannot read the classes in the config of a folder; None if they are no reason.

    Other libraries write a list of names, at which transformers fails without naming the field.
    """
    path = folder / "config.json"
    content = read_json(path, OBJECT, remedy="copy the model again") if path.is_file() else {}
    value = content.get("id2label")
    if value is None or isinstance(value, Mapping):
        return None
    return (
        f"id2label of its config.json is a {type(value).__name__}; expected a mapping, such as "
        '{"0": "cat", "1": "dog"}'
    )


def damaged_weights(folder: Path) -> str | None:
    """Return which file of weights of a folder cannot be opened, and why; None if all can."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt"):
                pass
        except Exception as error:  # the errors of its Rust code
            return f"{path.name} is damaged or cut short ({first_line(error)}); copy it again"
    return None


def check_parameters(build: Callable[[], torch.nn.Module], location: str, *, random_weights: bool) -> None:
    """Build a model without memory, and check that its weights can be in its files, or in memory if they are random.

    Args:
        build: builds the model from its config.
        location: a folder or file with the weights, or the name of a model on the hub, whose files are not checked.
        random_weights: whether the files are not read.

    Raises:
        ModelError: the config implies more weights.
    """
    stored = None if random_weights else _stored_bytes(Path(location))
    memory = _memory() if random_weights else None
    if stored is None and memory is None:
        return
    try:
        with torch.device("meta"):
            module = build()
    except Exception:  # the library raises the same error, with its reason, when it builds the model in memory
        return
    count = sum(parameter.numel() for parameter in module.parameters())
    if stored is not None and count > stored * BITS:
        raise ModelError(
            f"the config of {location} implies {count:,} weights, but its weight files have only {stored:,} bytes; "
            "download them again, or pass a folder whose config belongs to its weights."
        )
    if memory is not None and count * torch.float32.itemsize > memory:
        raise ModelError(
            f"the config of {location} implies {count:,} random weights, which take {count * 4 / 2**30:,.0f} GiB, but "
            f"this machine has {memory / 2**30:,.0f} GiB of memory; use a smaller model or a larger machine."
        )


def _parts(config: Any) -> Iterator[Any]:
    """Yield a config and the configs of its parts, such as text and vision."""
    yield config
    values = config.values() if isinstance(config, Mapping) else vars(config).values()
    yield from (value for value in values if hasattr(value, "to_dict"))


def _stated(part: Any, name: str) -> Any:
    """Return a field of a config, or that of each layer if they differ; None if it has none."""
    if isinstance(part, Mapping):
        return part.get(name)
    try:
        return getattr(part, name, None)
    except Exception:  # transformers 5.24 raises an error of its own where layers differ
        return [getattr(layer, name, None) for layer in part.per_layer_config]


def _integers(value: Any) -> Iterator[int]:
    if type(value) is int:
        yield value
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _integers(entry)


def _stored_bytes(path: Path) -> int | None:
    """Return the bytes of the weight files of a folder, or of a file; None without any."""
    if path.is_file():
        return path.stat().st_size
    if not path.is_dir():
        return None
    files = [entry for entry in path.iterdir() if entry.suffix in WEIGHTS and entry.is_file()]
    return sum(entry.stat().st_size for entry in files) or None


def _memory() -> int | None:
    """Return the memory of this machine in bytes; None if the system does not report it (Windows)."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
