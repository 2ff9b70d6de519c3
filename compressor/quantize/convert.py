"""From a float ONNX file to one in a lower precision, by whatever writes that precision."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from importlib import util
from pathlib import Path
from typing import Literal

from compressor.choices import Calibration
from compressor.quantize.fp16 import to_fp16
from compressor.quantize.int4 import to_int4
from compressor.quantize.int8_search import quantize
from compressor.quantize.nncf import to_int8 as nncf_to_int8
from compressor.quantize.precision import Converted, Source
from runtimes.base.protocols import Feeds, Int8Style

OURS = "compressor"


def usable_quantizers(precision: str, style: Int8Style) -> tuple[str, ...]:
    """What can write a precision for a target: for int8 also other packages' quantizers, where they are installed."""
    if precision != "int8":
        return (OURS,)
    return tuple(name for name in style.quantizers if name == OURS or util.find_spec(name) is not None)


def convert(
    source: Path,
    destination: Path,
    precision: str,
    style: Int8Style,
    feeds: Callable[[], Iterator[Feeds]],
    *,
    quantizer: str = OURS,
    calibration: Calibration | Literal["auto"] = "auto",
    loss: Callable[[Path], float] | None = None,
    max_loss: float = 0.5,
    progress: Callable[[str], None] | None = None,
) -> Converted:
    """Write an ONNX file in a precision below fp32.

    Args:
        source: the float32 file.
        destination: what to write.
        precision: of `runtimes.base.PRECISIONS`.
        style: how the target wants int8.
        feeds: gives a fresh stream of calibration batches.
        quantizer: what writes int8.
        calibration: how this package finds the ranges of static int8.
        loss: measures a written file against the float one, in percent.
        max_loss: most that may be lost; int8 returns layers to float until it holds, the others are as they are.
        progress: told in a few words about each step.

    Raises:
        CompressorError: it cannot be written.
    """
    if precision in ("int8", "int8-dynamic") and quantizer == OURS:
        dynamic = precision == "int8-dynamic"
        halved = style.rest == "fp16" and not dynamic
        quantized = quantize(
            source,
            destination,
            feeds,
            mode="dynamic" if dynamic else "static",
            activations="uint8" if dynamic else style.activations,
            calibration=calibration,
            convolutions=style.convolutions and not dynamic,
            loss=partial(_loss_in_fp16, loss) if halved and loss is not None else loss,
            max_loss=max_loss,
            progress=progress,
        )
        if halved:
            to_fp16(destination, destination)
        return Converted(precision, OURS, quantized.loss, quantized, rest="fp16" if halved else "fp32")
    if precision == "int8":
        nncf_to_int8(source, destination, feeds)
    else:
        {"fp16": to_fp16, "int4": to_int4}[precision](source, destination)
    by = quantizer if quantizer != OURS else "onnxruntime"  # whose tools write fp16 and int4
    return Converted(precision, by, None if loss is None else float(loss(destination)))


def _loss_in_fp16(loss: Callable[[Path], float], path: Path) -> float:
    """What a quantized file loses once its rest is fp16: that is what decides which layers stay in float."""
    with tempfile.TemporaryDirectory(prefix=".fp16-", dir=path.parent) as folder:
        halved = Path(folder, path.name)
        to_fp16(path, halved)
        return loss(halved)


def best_of(
    made: Mapping[Source, Converted], milliseconds: Mapping[Source, float], max_loss: float
) -> tuple[Source, Converted]:
    """The quickest of several quantizers' files that loses no more than allowed, or else what loses least."""

    def lost(source: Source) -> float:
        return made[source].loss or 0.0

    fitting = [source for source in made if lost(source) <= max_loss]
    chosen = min(fitting, key=milliseconds.__getitem__) if fitting else min(made, key=lost)
    tried = tuple(
        {"by": facts.by, "loss": facts.loss, "milliseconds": milliseconds[source]} for source, facts in made.items()
    )
    return chosen, replace(made[chosen], tried=tried)
