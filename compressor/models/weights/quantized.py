"""Checkpoints of transformers with quantized weights: their float values are read, or the checkpoint is refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from compressor.limitations import Limitation
from compressor.models.base import ModelError
from compressor.models.weights.stored_dtypes import FLOATS

REMEDY = "pass the checkpoint that they were made from, which --precision quantizes"
FACTORS = ("scale", "scales", "scale_inv", "zero_point", "zeros", "absmax")  # how the names of their tensors end


def quantization_of(config: Any) -> str | None:
    """Return the method by which a config says that the weights of its checkpoint are quantized; None without one."""
    found = _stated(config)
    if found is None:
        return None
    method = found.get("quant_method") if isinstance(found, Mapping) else getattr(found, "quant_method", None)
    return str(getattr(method, "value", method))


def quantized(config: Any) -> str | None:
    """Return that a checkpoint is quantized, with the remedy, for a config that says so; None for others."""
    method = quantization_of(config)
    return None if method is None else f"its weights are quantized ({method}); {REMEDY}"


def check_method(config: Any, location: str, *, on_disk: bool = False) -> None:
    """Check that transformers reads the method of quantization that a config states; it ignores others.

    Raises:
        ModelError: it does not know the method, or the weights stay on disk, where they are no floats.
        ValueError: the config names no method.
    """
    from transformers.quantizers import AutoHfQuantizer

    found = _stated(config)
    if on_disk and found is not None:
        raise ModelError(f"--max-memory cannot read {location}: {quantized(config)}.")
    fields = found if found is None or isinstance(found, Mapping) else found.to_dict()
    if fields is not None and not AutoHfQuantizer.supports_quant_method(fields):
        raise ModelError(
            f"the config of {location} says that its weights are quantized ({quantization_of(config)}), a method that "
            f"this release of transformers does not know; {REMEDY}."
        )


def check_floats(module: Any, config: Any, left_out: Sequence[str], paths: Iterable[Path], location: str) -> None:
    """Check that the weights that transformers read are the float values of the checkpoint.

    Args:
        module: the model that was loaded.
        config: its config as it is in the checkpoint.
        left_out: names of the tensors of the checkpoint that the model does not use.
        paths: the files with the weights.
        location: name of the model in messages.

    Raises:
        ModelError: the model computes with quantized weights, or the factors of its weights were left out.
    """
    if getattr(module, "is_quantized", False):
        raise ModelError(f"{location} cannot be read as floats: {quantized(config) or REMEDY}.")
    factors = [name for name in left_out if name.rsplit(".", 1)[-1].endswith(FACTORS)]
    kinds = sorted(_narrow(paths)) if factors else []
    if kinds:
        raise ModelError(
            f"the files of {location} store weights as {', '.join(kinds)} with factors such as {factors[0]}, but its "
            f"config.json has no quantization_config that says how they are multiplied; {REMEDY}."
        )


def of_quantization(config: Any) -> tuple[Limitation, ...]:
    """Return the limitation of a checkpoint whose weights transformers dequantized; nothing for others."""
    method = quantization_of(config)
    if method is None:
        return ()
    reason = f"the checkpoint stores its weights quantized ({method}); they were dequantized to float32"
    return (Limitation("weight precision", f"{reason}, also in a checkpoint"),)


def _stated(config: Any) -> Any:
    return getattr(config, "quantization_config", None)


def _narrow(paths: Iterable[Path]) -> set[str]:
    """Return the types of a byte or less of the tensors in checkpoint files, by their names in torch or safetensors."""
    found: set[str] = set()
    for path in paths:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                kinds = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
            found |= {kind for kind in kinds - FLOATS.keys() if kind not in ("BOOL", "I16", "I32", "I64")}
            continue
        values = torch.load(path, map_location="meta", weights_only=True).values()
        dtypes = {value.dtype for value in values if isinstance(value, torch.Tensor)}
        found |= {str(dtype).removeprefix("torch.") for dtype in dtypes - {torch.bool} if dtype.itemsize == 1}
    return found
