"""Conversion of a float ONNX file to a lower precision."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from importlib import util
from pathlib import Path
from typing import Literal

from compressor.choices import AUTO, Calibration
from compressor.quantize.half_precision import to_bf16, to_fp16
from compressor.quantize.int8_search import quantize
from compressor.quantize.intermediate_values import absolute_maxima
from compressor.quantize.nncf import to_int8 as nncf_to_int8
from compressor.quantize.output_error import SQUARED, Judge
from compressor.quantize.precision import Converted, Source
from compressor.quantize.qdq_rewrite import Kept
from compressor.quantize.weight_only import to_int2, to_int4, to_int4_blocks, to_int8
from runtimes.base.protocols import Feeds, Int8Style

OURS = "compressor"


def usable_quantizers(
    precision: str, style: Int8Style, calibration: Calibration | Literal["auto"] = "auto"
) -> tuple[str, ...]:
    """Return the quantizers of a precision; for int8 this includes installed packages that the target's style lists.

    Those packages choose the ranges themselves, so a given calibration leaves this package alone.
    """
    if precision != "int8" or calibration != AUTO:
        return (OURS,)
    return tuple(name for name in style.quantizers if name == OURS or util.find_spec(name) is not None)


def convert(
    source: Path,
    destination: Path,
    precision: str,
    style: Int8Style,
    feeds: Callable[[], Iterable[Feeds]],
    *,
    quantizer: str = OURS,
    calibration: Calibration | Literal["auto"] = "auto",
    loss: Callable[[Path], float] | None = None,
    max_loss: float = 0.5,
    progress: Callable[[str], None] | None = None,
    judge: Judge = SQUARED,
) -> Converted:
    """Write an ONNX file in a precision below fp32.

    Args:
        source: float32 ONNX file.
        destination: output path.
        precision: one of `runtimes.base.PRECISIONS`.
        style: form of int8 that the target expects.
        feeds: returns a new iterator over the calibration batches.
        quantizer: package that writes int8.
        calibration: calibration method of this package's static int8.
        loss: returns the loss of a written file against the float file in percent.
        max_loss: largest allowed loss in percent. int8 and fp8 keep layers in float to meet it; others ignore it.
        progress: called with a short message at each step.
        judge: compares outputs in int8 with those of the float model.

    Raises:
        CompressorError: the file cannot be written in this precision.
    """
    if precision in ("int8", "int8-dynamic", "fp8") and quantizer == OURS:
        dynamic, fp8 = precision == "int8-dynamic", precision == "fp8"
        halved = style.rest == "fp16" and not dynamic
        maxima = _maxima(source, destination, feeds, progress) if halved else {}
        quantized = quantize(
            source,
            destination,
            feeds,
            mode="dynamic" if dynamic else "static",
            activations="fp8" if fp8 else "uint8" if dynamic else style.activations,
            calibration="minmax" if fp8 else calibration,  # the precision of a float hardly depends on its scale
            convolutions=style.convolutions and precision == "int8",
            loss=partial(_loss_in_fp16, loss, maxima) if halved and loss is not None else loss,
            max_loss=max_loss,
            progress=progress,
            judge=judge,
        )
        float32 = to_fp16(destination, destination, maxima).kept if halved else ()
        rest = "fp16" if halved else "fp32"
        return Converted(precision, OURS, quantized.loss, quantized, rest=rest, float32=float32)
    facts = Converted(precision, quantizer, None)
    if precision == "fp16":
        facts = replace(facts, float32=_in_fp16(source, destination, feeds, progress))
    elif precision == "bf16":
        to_bf16(source, destination)
    elif precision == "int4" and style.int4 == "DequantizeLinear":
        facts = replace(facts, unquantized=to_int4_blocks(source, destination).kept, rest=style.rest)
        if style.rest == "fp16":
            facts = replace(facts, float32=_in_fp16(destination, destination, feeds, progress))
    elif precision in ("int8-weight-only", "int4"):  # the tools of ONNX Runtime write both
        write = to_int4 if precision == "int4" else to_int8
        facts = replace(facts, by="onnxruntime", unquantized=write(source, destination).kept)
    elif precision == "int2":
        facts = replace(facts, unquantized=to_int2(source, destination).kept)
    else:
        nncf_to_int8(source, destination, feeds)
    return facts if loss is None else replace(facts, loss=float(loss(destination)))


def _in_fp16(
    source: Path, destination: Path, feeds: Callable[[], Iterable[Feeds]], progress: Callable[[str], None] | None
) -> tuple[Kept, ...]:
    """Convert a float file, or the nodes around int4 weights, to fp16; return the layers that stay in float32."""
    return to_fp16(source, destination, _maxima(source, destination, feeds, progress)).kept


def _maxima(
    source: Path,
    destination: Path,
    feeds: Callable[[], Iterable[Feeds]],
    progress: Callable[[str], None] | None,
) -> dict[str, float]:
    """Measure the largest magnitude of each value of a float file, with a temporary model next to the result."""
    with tempfile.TemporaryDirectory(prefix=".fp16-", dir=destination.parent) as folder:
        work = Path(folder, "measure.onnx")
        return absolute_maxima(source, work, feeds, progress if progress is not None else lambda _: None)


def _loss_in_fp16(loss: Callable[[Path], float], maxima: Mapping[str, float], path: Path) -> float:
    """Return the loss of an int8 file after conversion of its other nodes to fp16, the form that is deployed."""
    with tempfile.TemporaryDirectory(prefix=".fp16-", dir=path.parent) as folder:
        halved = Path(folder, path.name)
        to_fp16(path, halved, maxima)
        return loss(halved)


def choose_conversion(
    made: Mapping[Source, Converted], milliseconds: Mapping[Source, float], max_loss: float
) -> tuple[Source, Converted]:
    """Return the fastest file whose loss is at most `max_loss`, or the file of least loss if there is none."""

    def lost(source: Source) -> float:
        return made[source].loss or 0.0

    fitting = [source for source in made if lost(source) <= max_loss]
    chosen = min(fitting, key=milliseconds.__getitem__) if fitting else min(made, key=lost)
    tried = tuple(
        {"by": facts.by, "loss": facts.loss, "milliseconds": milliseconds[source]} for source, facts in made.items()
    )
    return chosen, replace(made[chosen], tried=tried)
