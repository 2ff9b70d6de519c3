"""The Python API: one function per command, for a model name, a folder or a module.

The arguments of the functions are the fields of the settings classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from compressor.benchmark.bench import bench as run_bench
from compressor.benchmark.bench_settings import BenchSettings
from compressor.commands import INSPECT, SUBJECT, SWEEP, InspectSettings, SweepSettings
from compressor.options import takes_fields
from compressor.pipeline.export import export as run_export
from compressor.pipeline.inspect import inspect as run_inspect
from compressor.pipeline.sweep import sweep as run_sweep
from compressor.settings import API_ONLY, Settings
from compressor.target.registry import target_named
from compressor.target.registry import targets as names

if TYPE_CHECKING:
    from compressor.benchmark.results import Comparison
    from compressor.report.inspection import Inspection
    from compressor.report.pareto_report import ParetoFront
    from compressor.report.report import Report

# `bench` takes `what` as positional arguments, so its types are not those of the class.
_bench_settings: Callable[..., BenchSettings] = BenchSettings


@takes_fields(Settings)
def export(settings: Settings) -> Report:
    """Compress a model and write the output folder, like ``compressor export``.

    The arguments are the fields of `compressor.Settings`. A module also needs `example_inputs` (a tensor, a tuple or a
    dict of tensors).

    Raises:
        CompressorError, PassError, RuntimesError: the message says what was found and what to do.
    """
    return run_export(settings)


@takes_fields(SweepSettings, (*SUBJECT, *SWEEP, *API_ONLY))
def sweep(settings: SweepSettings) -> ParetoFront:
    """Search the Pareto front of speed and quality and write its folder, like ``compressor sweep``.

    The arguments are fields of `compressor.commands.SweepSettings`; `points` is the number of plans to build, time and
    test.

    Raises:
        CompressorError, PassError, RuntimesError: the message says what was found and what to do.
    """
    return run_sweep(settings)


@takes_fields(_bench_settings)
def bench(settings: BenchSettings) -> Comparison:
    """Measure folders, ONNX files and models side by side and write a JSON file, like ``compressor bench``.

    The arguments are the fields of `compressor.benchmark.bench_settings.BenchSettings`.

    Raises:
        CompressorError, RuntimesError: the message says what was found and what to do.
    """
    return run_bench(settings)


def targets() -> dict[str, str | None]:
    """Return, for every target, None if it can be used here, or the missing requirement and how to install it."""
    return {name: target_named(name).missing() for name in names()}


@takes_fields(InspectSettings, {*SUBJECT, *INSPECT, *API_ONLY} - {"output"})
def inspect(settings: InspectSettings) -> Inspection:
    """Score every site of a model, like ``compressor inspect``, without writing files.

    The arguments are fields of `compressor.commands.InspectSettings`.

    Raises:
        CompressorError, PassError: the message says what was found and what to do.
    """
    return run_inspect(settings)
