"""Collect the limitations of an export: of its model, data, precision and engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from compressor.choices import GGUF, TRANSFORMERS
from compressor.limitations import Limitation
from compressor.quality.metrics import METRICS

if TYPE_CHECKING:
    from compressor.lower.traced_model import ModelAndData
    from compressor.models import Model
    from compressor.quality.parity import Parity
    from compressor.quantize.precision import Converted, Trial


def limitations_of(
    subject: ModelAndData,
    precision: str,
    converted: Mapping[str, Converted],
    trials: Sequence[Trial],
    engine: Mapping[str, Any],
    parities: Sequence[Parity] = (),
) -> Iterator[Limitation]:
    """List the limitations of one export: of its model, its data, its precision and its engine.

    Args:
        subject: the model with its data.
        precision: the precision of the result.
        converted: the conversion of each variant to that precision.
        trials: the precisions that ``--precision auto`` tried.
        engine: the ``engine`` part of the report.
        parities: comparisons of the variants with torch.
    """
    yield from of_subject(subject)
    yield from of_weight_types(subject.model, f"the engine is {precision}", str(engine.get("target")))
    yield from _of_conversion(precision, converted, trials)
    yield from _unused(precision, engine)
    yield from _emulated(precision, converted, engine)
    yield from _saturating(precision, converted, engine)
    yield from _of_shared_scales(precision, str(engine.get("target")))
    yield from of_engine(engine)
    if engine.get("target") == GGUF:
        yield from of_llama_cpp(subject.model)
    yield from _ahead_of_time(engine)
    yield from _of_serving(engine)
    notes = [*(note for each in parities for note in each.notes), *engine.get("stand_in", {}).get("notes", ())]
    yield from (Limitation("comparison with torch", note) for note in dict.fromkeys(notes))


def of_subject(subject: ModelAndData) -> Iterator[Limitation]:
    """List the limitations of a model and its data, which hold for every command."""
    yield from subject.model.limitations
    yield from subject.data.limitations
    yield from _of_labels(subject)


def of_sweep(
    subject: ModelAndData,
    precision: str,
    target: str,
    conversions: Mapping[str, Converted],
    left_out: Sequence[str] = (),
) -> Iterator[Limitation]:
    """List the limitations of a sweep: those of an export that are known before its engine is inspected.

    Args:
        subject: the model with its data.
        precision: the precision of all points.
        target: name of the target.
        conversions: the conversions to that precision, by number of the point; limitations that not all points share
            name theirs.
        left_out: numbers of the points that leave no layer for the precision, which were not built.
    """
    yield from of_subject(subject)
    yield from of_weight_types(subject.model, f"the engines are {precision}", target)
    if target == GGUF:
        yield from of_llama_cpp(subject.model)
    points: dict[Limitation, list[str]] = {}
    for number, facts in conversions.items():
        for limitation in _of_conversion(precision, {"result": facts}, ()):
            points.setdefault(limitation, []).append(number)
    for limitation, numbers in points.items():
        noun = "point" if len(numbers) == 1 else "points"
        where = "" if len(numbers) == len(conversions) else f" at {noun} {', '.join(numbers)}"
        yield Limitation(f"{limitation.feature}{where}", limitation.reason)
    if left_out:
        noun = "point" if len(left_out) == 1 else "points"
        yield Limitation(
            f"{precision} at {noun} {', '.join(left_out)}",
            "not built, because no layer that can be quantized is left there; --precision fp32 builds all points",
        )
    yield from _saturating(precision, {}, {"state": "built", "target": target})
    yield from _of_shared_scales(precision, target)


def of_timings(unsteady: Sequence[float]) -> Iterator[Limitation]:
    """Yield a limitation if the timings that a plan or a precision was chosen by were taken under load.

    Args:
        unsteady: relative differences of two timings of one engine, of timings that were no steadier after repetition.
    """
    if unsteady:
        yield Limitation(
            "steady timings",
            f"the same engine took {max(unsteady):.0%} longer when it was timed again, also after repetition, because "
            "the machine is under load; the choices by these timings may differ on a quiet machine",
        )


def of_engine(engine: Mapping[str, Any]) -> Iterator[Limitation]:
    """List the limitations of a built engine, by the ``engine`` part of a report."""
    if engine.get("state") != "built":
        return
    layers = engine.get("layers")
    if layers is None or "unknown" in layers:
        reason = "" if layers is None else f" ({layers['unknown'].rstrip('.')})"
        yield Limitation(
            "layers of the engine",
            f"the runtime does not report them{reason}, so their precision and fusion are not checked",
        )
    elif layers["fused_attention"] is False:
        yield Limitation("fused attention", "the engine computes attention as separate operators")


def of_llama_cpp(model: Model) -> Iterator[Limitation]:
    """List what the figures of a GGUF file mean, and what the file leaves out."""
    from compressor.lower.gguf.writer import context_length

    yield Limitation(
        "measurements",
        "quality and latency are those of the file in llama.cpp (xllamacpp), with keys and values as F16; a timed "
        "prompt computes the logits of its last token alone, as in generation; Ollama and LM Studio carry other builds",
    )
    config: Any = model.module.config
    if context_length(config) < config.max_position_embeddings:
        yield Limitation(
            "sliding window",
            f"llama.cpp attends to all earlier tokens of this model, so the file states {context_length(config)} "
            "tokens as its longest text, for which that is the same",
        )


def _of_serving(engine: Mapping[str, Any]) -> Iterator[Limitation]:
    """Yield what is not known of a checkpoint without single branches, and which engines do not open it."""
    serving = engine.get("serving")
    if serving is None:
        return
    yield Limitation(
        "transformers",
        f"it has no class for {serving['form']}, so it does not open the checkpoint; Compressor and serving engines do",
    )
    opens = [name for name, reason in serving["engines"].items() if reason is None]
    if opens:
        yield Limitation(
            "serving engines",
            f"the checkpoint meets the rules in the source code of {_listed(opens)}, none of which was run",
        )
    for name, reason in serving["engines"].items():
        if reason is not None:
            yield Limitation(name, f"the checkpoint breaks its rules: {reason}")


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0]


def _ahead_of_time(engine: Mapping[str, Any]) -> Iterator[Limitation]:
    """Yield what is not known of engines for other GPUs, and of the parser on the device."""
    ahead, parser = engine.get("ahead_of_time"), engine.get("parser")
    if ahead is not None:
        yield Limitation(
            "engines built ahead of time",
            "they were built without their GPUs, so none was opened or run; layers are counted before fusion",
        )
        for gpu, reason in ahead["refused"].items():
            yield Limitation(f"engine for {gpu}", reason.rstrip("."))
    if parser is not None and "unknown" in parser:
        yield Limitation(
            "NVIDIA's parser",
            f"the ONNX files were held to the rules of quantization alone ({parser['unknown'].rstrip('.')})",
        )
    elif parser is not None and engine["target"] == "tensorrt":
        yield Limitation(
            "parser on the device",
            f"the files were parsed by {parser['builder']}; TensorRT on the device has a parser of its own release",
        )


NAMED = 5  # maximum number of names in a sentence


def _of_labels(subject: ModelAndData) -> Iterator[Limitation]:
    """Yield a limitation if the data has labels that the metric does not use."""
    kind, metric = subject.data.label_kind, subject.metric
    if kind not in (None, "tokens") and METRICS[metric].compares:
        yield Limitation(
            "labels",
            f"the data has {kind} labels, but {subject.model.task} is evaluated by {metric}, which does not use them",
        )


def of_weight_types(model: Model, computed: str, target: str = "") -> Iterator[Limitation]:
    """Yield a limitation if the checkpoint stores weights in another type than they are computed with.

    Args:
        model: the model with the types of its weights.
        computed: a clause on what computes with the float32 weights.
        target: the target; a checkpoint of transformers keeps the types.
    """
    if not {str(dtype) for dtype in model.dtypes.values()} - {"torch.float32"}:
        return
    from compressor.models.weights.stored_dtypes import describe_dtypes

    types = f"the original checkpoint stores its weights as {describe_dtypes(model.dtypes.values())}"
    if target == TRANSFORMERS:
        wide = ", float64 as float32" if "torch.float64" in map(str, model.dtypes.values()) else ""
        written = (
            f"they are written in these types{wide}; quality and latency are those of the written weights in float32"
        )
        yield Limitation("weight types", f"{types}, and {written} (from_pretrained with dtype=torch.float32)")
    else:
        yield Limitation("weight types", f"{types}; they were converted to float32, and {computed}")


def _of_conversion(precision: str, converted: Mapping[str, Converted], trials: Sequence[Trial]) -> Iterator[Limitation]:
    yield from _of_precision(precision, converted, trials)
    yield from _float32_layers(precision, converted)
    yield from _unquantized_layers(precision, converted)
    yield from _refused_quantizers(precision, converted)


def _of_precision(precision: str, converted: Mapping[str, Converted], trials: Sequence[Trial]) -> Iterator[Limitation]:
    """Yield the limitations of the precision: a fallback to fp32, an unmeasured loss, layers in float."""
    others = [trial for trial in trials if trial.precision != "fp32"]
    if others and precision == "fp32":
        tried = "; ".join(f"{trial.precision}: {trial.verdict}" for trial in others)
        yield Limitation("precision", f"fp32, because no other precision was accepted ({tried})")
    if others and all(trial.loss is None for trial in others):
        yield Limitation("loss of the precisions", "not measured, so the precision was chosen by latency alone")
    result = converted.get("result")
    if result is not None and result.loss is None and not others:
        yield Limitation(
            "loss of the precision", f"not measured, so the limit on the loss of {precision} was not checked"
        )
    quantized = None if result is None else result.quantized
    if quantized is not None and quantized.kept:
        count = len(quantized.kept)
        names = [f"{kept.module or kept.node} ({kept.reason})" for kept in quantized.kept]
        noun = "layer computes" if count == 1 else "layers compute"
        yield Limitation(f"{precision} of all layers", f"{count} {noun} in float: {_some(names)}")


def _float32_layers(precision: str, converted: Mapping[str, Converted]) -> Iterator[Limitation]:
    """Yield a limitation if layers of an fp16 file stay in float32 because of their values."""
    layers = converted["result"].float32 if "result" in converted else ()
    if layers:
        noun = "layer stays" if len(layers) == 1 else "layers stay"
        names = [f"{kept.module or kept.node} ({kept.reason})" for kept in layers]
        yield Limitation(
            "fp16 of all layers" if precision == "fp16" else f"fp16 around the {precision} products",
            f"{len(layers)} {noun} in float32, because fp16 ends at 65,504 and calibration data come within a factor "
            f"of 2 of it, or below its normal range of 6e-5: {_some(names)}",
        )


def _unquantized_layers(precision: str, converted: Mapping[str, Converted]) -> Iterator[Limitation]:
    """Yield a limitation if matrices of an int4 file stay in float because of their shape."""
    layers = converted["result"].unquantized if "result" in converted else ()
    if layers:
        names = [f"{kept.module or kept.node} ({kept.reason})" for kept in layers]
        yield Limitation(f"{precision} of all matrices", f"{len(layers)} of them stay in float: {_some(names)}")


def _refused_quantizers(precision: str, converted: Mapping[str, Converted]) -> Iterator[Limitation]:
    """Yield a limitation for each package that is installed and failed to quantize the result."""
    facts = converted.get("result")
    for quantizer, reason in () if facts is None else facts.refused.items():
        yield Limitation(f"{precision} by {quantizer}", f"not compared with Compressor's ({reason.rstrip('.')})")


def _half_type(precision: str, converted: Mapping[str, Converted]) -> str | None:
    """Return the 16-bit type that the result computes in, alone or around quantized products; None if there is none."""
    if precision in ("fp16", "bf16"):
        return precision
    return "fp16" if "result" in converted and converted["result"].rest == "fp16" else None


def _emulated(precision: str, converted: Mapping[str, Converted], engine: Mapping[str, Any]) -> Iterator[Limitation]:
    """Yield a limitation if the quality of an fp16 or bf16 file was measured without the target."""
    half = _half_type(precision, converted)
    if engine.get("state") == "deferred" and half is not None:
        yield Limitation(
            f"{precision} on the device",
            f"quality was measured with {half} arithmetic on the CPU (the output of each operator is rounded to "
            f"{half}, sums of products are float32 or exact integers); kernels of the device may round elsewhere. "
            f"Latency is that of ONNX Runtime, which computes {half} in float32 there",
        )


def _saturating(precision: str, converted: Mapping[str, Converted], engine: Mapping[str, Any]) -> Iterator[Limitation]:
    """Yield a limitation if int8 products were measured on a processor that saturates them.

    Files with fp16 scales are measured with exact products (see `compressor.target.half_arithmetic`).
    """
    deferred = engine.get("state") == "deferred"
    measured_here = deferred or str(engine.get("target")).startswith("onnxruntime")
    exact = deferred and _half_type(precision, converted) is not None
    if not (precision in ("int8", "int8-dynamic") and measured_here) or exact:
        return
    from compressor.target.saturation import int8_saturates

    if int8_saturates():
        yield Limitation(
            "exact int8 products",
            "ONNX Runtime saturates sums of int8 products at 16 bits on this processor, which has no VNNI; the "
            "measured loss includes this error, and predictions can differ on a processor with VNNI",
        )


def _of_shared_scales(precision: str, target: str) -> Iterator[Limitation]:
    """Yield a limitation if the rows of a batch share the scales of their activations, as in DynamicQuantizeLinear."""
    if precision == "int8-dynamic" and target.startswith("onnxruntime"):
        yield Limitation(
            "outputs of a row alone",
            "ONNX Runtime computes one scale for the activations of a whole batch, so an output depends on the other "
            "rows of its batch; quality was measured in batches, and latency at batch 1 unless --batch says another",
        )


def _unused(precision: str, engine: Mapping[str, Any]) -> Iterator[Limitation]:
    """Yield a limitation if no layer of the engine computes in the precision, as on a processor without it."""
    if is_unused(precision, engine):
        layers = ", ".join(f"{count} {computed}" for computed, count in engine["layers"]["precisions"].items())
        yield Limitation(
            precision, f"no layer of the engine computes in this precision ({layers}); only weights are stored in it"
        )


def is_unused(precision: str, engine: Mapping[str, Any]) -> bool:
    """Return whether the runtime reports that no layer of the engine computes in the precision."""
    name = precision.removesuffix("-dynamic")
    counts = (engine.get("layers") or {}).get("precisions") or {}
    known = bool(counts) and name in ("fp16", "bf16", "fp8", "int8")
    return known and not counts.get(name) and not counts.get("unknown")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
