"""Checks that this machine can run an export on its target, made before any work."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from compressor.choices import AUTO
from compressor.errors import CompressorError
from compressor.lower.write_onnx import OPSET
from compressor.quantize.precision import check_precision
from compressor.settings import Settings
from compressor.target.registry import target_named
from compressor.target.stand_in import STAND_IN, substitute_for
from runtimes.base import registry
from runtimes.base.ahead_of_time import ahead_of_time
from runtimes.base.protocols import BuildOptions, Runtime
from runtimes.base.registry import check_available, check_device


class AvailabilityError(CompressorError):
    """A combination of options that the target does not support."""


def check_target(settings: Settings) -> tuple[Runtime, BuildOptions]:
    """Check the target before the search, which is expensive.

    Returns:
        The target and the options of its engines. With ``--defer-build`` these are ONNX Runtime in place of the target,
        and the CPU.

    Raises:
        CompressorError: the target has no such precision, or the engine cannot be built later.
        RuntimesError: the target or the device cannot be used here.
    """
    target = target_named(settings.target, task=settings.task, cache=settings.cache)
    device = target.devices[0] if settings.device is None else settings.device
    options = BuildOptions(device=device, threads=settings.threads, portable=settings.portable_engine)
    check_precision(target, settings.precision, device)
    if settings.defer_build:
        check_device(target.name, target.devices, options)
        _check_deferrable(target, settings.precision)
        target, options = substitute_for(target), replace(options, device="cpu", portable=False)
    check_available(target.name, _or_defer(target), target.devices, options)
    if options.device != target.devices[0] and target.source == ".onnx":
        _probe(target, options)
    return target, options


def _check_deferrable(target: Runtime, precision: str) -> None:
    """Refuse to defer a precision that only the target can make or choose, and targets that build with torch.

    The device need not have torch, and a precision of the target's own cannot be measured here.
    """
    if precision in (*target.own, AUTO):
        raise AvailabilityError(
            f"--precision {precision} can only be measured where {target.name} runs; leave out --defer-build, or give "
            f"one of: {', '.join(name for name in target.precisions[target.devices[0]] if name not in target.own)}."
        )
    if target.source != ".onnx":
        raise AvailabilityError(
            f"target {target.name} needs the torch model, so its engines are built on this machine; leave out "
            "--defer-build."
        )


def _or_defer(target: Runtime) -> str | None:
    """Return the reason why a target cannot be used here, with the advice to defer the build where that is possible."""
    reason = target.missing()
    if reason is None or target.name == STAND_IN or target.source != ".onnx":
        return reason
    return f"{reason}, or export with --defer-build here and run `compressor build` on the device{_or_ahead(target)}"


def _or_ahead(target: Runtime) -> str:
    """Return the advice to build ahead of time, for a target that needs a GPU; nothing for others."""
    if target.devices != ("cuda",) or ahead_of_time(target) is not None:
        return ""
    for name in registry.targets():
        builder = ahead_of_time(registry.runtime(name))
        if builder is not None:
            first = builder.missing_builder()
            needed = "" if first is None else f" ({first})"
            return f", or give --target {name}, which builds engines here without a GPU{needed}"
    return ""


def _probe(target: Runtime, options: BuildOptions) -> None:
    """Build a model of one Identity node, so that a missing device is reported before the search."""
    from onnx import TensorProto, helper, save

    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "probe", ends[:1], ends[1:])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "probe.onnx")
        save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10), path)
        target.build(path, Path(folder), options)
