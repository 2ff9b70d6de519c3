"""Collect the limitations of an export: of its model, data, precision and engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from compressor.limitations import Limitation

if TYPE_CHECKING:
    from compressor.lower.traced_model import Loaded
    from compressor.quantize.precision import Converted, Trial

if TYPE_CHECKING:
    from compressor.lower.traced_model import Loaded
    from compressor.quantize.precision import Converted, Trial


def limitations_of(
    subject: Loaded,
    precision: str,
    converted: Mapping[str, Converted],
    trials: Sequence[Trial],
    engine: Mapping[str, Any],
) -> Iterator[Limitation]:
    """List the limitations of one export: of its model, its data, its precision and its engine.

    Args:
        subject: the model with its data.
        precision: what the result computes in.
        converted: how each variant got that precision.
        trials: what ``--precision auto`` tried.
        engine: the ``engine`` part of the report.
    """
    yield from subject.model.limitations
    yield from subject.data.limitations
    yield from _of_labels(subject)
    yield from _of_precision(precision, converted, trials)
    yield from _unused(precision, engine)
    yield from _saturating(precision, engine)
    yield from of_engine(engine)


def of_engine(engine: Mapping[str, Any]) -> Iterator[Limitation]:
    """List the limitations of a built engine, by the ``engine`` part of a report."""
    if engine.get("state") != "built":
        return
    found = engine.get("layers")
    if found is None or "unknown" in found:
        reason = "" if found is None else f" ({found['unknown'].rstrip('.')})"
        yield Limitation("layers of the engine", f"not told{reason}, so their precision and fusion are unchecked")
    elif found["fused_attention"] is False:
        yield Limitation("fused attention", "the engine computes attention as separate operators")


NAMED = 5  # most names that a sentence lists


def _of_labels(subject: Loaded) -> Iterator[Limitation]:
    """Labels that are in the data and are not what the task is judged by."""
    kind, metric = subject.data.label_kind, subject.metric
    used = {"class": ("accuracy",), "score": ("spearman",)}
    if kind in used and metric not in used[kind]:
        yield Limitation(
            "labels", f"the data has {kind} labels, which {subject.model.task} is not judged by; quality is {metric}"
        )


def _of_precision(precision: str, converted: Mapping[str, Converted], trials: Sequence[Trial]) -> Iterator[Limitation]:
    """What stayed in float, what was not tried, and what was chosen without a measured loss."""
    others = [trial for trial in trials if trial.precision != "fp32"]
    if others and precision == "fp32":
        tried = "; ".join(f"{trial.precision}: {trial.verdict}" for trial in others)
        yield Limitation("precision", f"fp32, as none of the others was taken ({tried})")
    if others and all(trial.loss is None for trial in others):
        yield Limitation("loss of the precisions", "not measured, so the fastest was taken by speed alone")
    quantized = converted["result"].quantized if "result" in converted else None
    if quantized is not None and quantized.kept:
        yield Limitation(
            f"{precision} of all layers",
            f"{len(quantized.kept)} layers compute in float, because of their accuracy or their form: "
            f"{_some([each.module or each.node for each in quantized.kept])}",
        )


def _saturating(precision: str, engine: Mapping[str, Any]) -> Iterator[Limitation]:
    """Products of 8 bits that are not exact on the processor that measured them."""
    measured_here = engine.get("state") == "deferred" or str(engine.get("target")).startswith("onnxruntime")
    if not (precision.startswith("int8") and measured_here):
        return
    from compressor.quantize.saturation import int8_saturates

    if int8_saturates():
        yield Limitation(
            "exact int8 products",
            "sums of products saturate at 16 bits in ONNX Runtime on this processor, which has no VNNI; the loss was "
            "measured so, and a processor with VNNI can answer otherwise",
        )


def _unused(precision: str, engine: Mapping[str, Any]) -> Iterator[Limitation]:
    """A precision that no layer of the engine computes in, as where the processor lacks it."""
    name = precision.removesuffix("-dynamic")
    counts = (engine.get("layers") or {}).get("precisions")
    if counts and name in ("fp16", "bf16", "int8") and not counts.get(name) and not counts.get("unknown"):
        found = ", ".join(f"{count} {each}" for each, count in counts.items())
        yield Limitation(
            precision, f"no layer of the engine computes in it ({found}); it is what weights are stored in"
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
