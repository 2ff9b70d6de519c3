"""The Python API: one function per command, for a model name, a folder or a module."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from compressor.benchmark.bench import BenchSettings
from compressor.benchmark.bench import bench as measure
from compressor.pipeline.export import export as run_export
from compressor.pipeline.inspect import inspect as run_inspect
from compressor.pipeline.sweep import sweep as run_sweep
from compressor.settings import Settings
from compressor.target.registry import target_named
from compressor.target.registry import targets as names

if TYPE_CHECKING:
    import torch

    from compressor.benchmark.results import Comparison
    from compressor.choices import Calibration
    from compressor.report.inspection import Inspection
    from compressor.report.pareto_report import ParetoFront
    from compressor.report.report import Report


def export(
    model: str | Path | torch.nn.Module | None = None,
    *,
    data: str | Path | None = None,
    drop: str = "auto",
    metric: str = "cosine",
    actions: str | None = None,
    tokens: str = "auto",
    max_loss: float | None = None,
    speedup: float | None = None,
    latency: float | None = None,
    generate: str | None = None,
    cost: str = "latency",
    heal: str = "none",
    heal_budget: float = 300.0,
    target: str = "onnxruntime",
    precision: str = "fp32",
    int8: str | None = None,
    calibration: Calibration | Literal["auto"] = "auto",
    factorial: bool = False,
    max_precision_loss: float = 0.5,
    defer_build: bool = False,
    portable_engine: bool = False,
    output: str | Path = "compressed",
    force: bool = False,
    task: str | None = None,
    problem_type: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    random_weights: bool = False,
    cache: bool = True,
    device: str | None = None,
    threads: int | None = None,
    batch: int = 1,
    samples: int | None = None,
    max_memory: int | None = None,
    search_samples: int = 64,
    max_length: int | None = None,
    stride: int | None = None,
    image_size: str | int | None = None,
    rounds: int = 10,
    seed: int = 0,
    example_inputs: Any = None,
) -> Report:
    """Compress a model and write the output folder, like ``compressor export``.

    The arguments are the fields of `compressor.Settings`. A module also needs `example_inputs` (a tensor, a tuple or a
    dict of tensors).

    Raises:
        CompressorError, PassError, RuntimesError: the message says what was found and what to do.
    """
    return run_export(Settings(**locals()))


def sweep(
    model: str | Path | torch.nn.Module | None = None,
    *,
    data: str | Path | None = None,
    actions: str | None = None,
    tokens: str = "auto",
    max_loss: float = 20.0,
    points: int = 8,
    generate: str | None = None,
    cost: str = "latency",
    target: str = "onnxruntime",
    precision: str = "fp32",
    int8: str | None = None,
    output: str | Path = "front",
    force: bool = False,
    task: str | None = None,
    problem_type: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    cache: bool = True,
    device: str | None = None,
    threads: int | None = None,
    batch: int = 1,
    samples: int | None = None,
    search_samples: int = 64,
    max_length: int | None = None,
    stride: int | None = None,
    image_size: str | int | None = None,
    rounds: int = 10,
    seed: int = 0,
    example_inputs: Any = None,
) -> ParetoFront:
    """Search the Pareto front of speed and quality and write its folder, like ``compressor sweep``.

    The arguments are fields of `compressor.Settings`, and `points`: the number of plans to build, time and test.

    Raises:
        CompressorError, PassError, RuntimesError: the message says what was found and what to do.
    """
    options = {name: value for name, value in locals().items() if name != "points"}
    return run_sweep(Settings(**options), points=points)


def bench(
    *what: str | Path,
    data: str | Path | None = None,
    model: str | None = None,
    against: str | None = None,
    batch: Sequence[int] = (1,),
    threads: Sequence[int] = (),
    context: Sequence[int] | None = None,
    compile: bool = False,
    target: str | None = None,
    device: str | None = None,
    task: str | None = None,
    problem_type: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    random_weights: bool = False,
    cache: bool = True,
    samples: int | None = None,
    max_length: int | None = None,
    stride: int | None = None,
    image_size: str | int | None = None,
    tasks: Sequence[str] = (),
    num_fewshot: int | None = None,
    limit: float | None = None,
    include_path: str | Path | None = None,
    rounds: int = 10,
    seed: int = 0,
    output: str | Path = "bench.json",
) -> Comparison:
    """Measure folders, ONNX files and models side by side and write a JSON file, like ``compressor bench``.

    The arguments are the fields of `compressor.benchmark.bench.BenchSettings`.

    Raises:
        CompressorError, RuntimesError: the message says what was found and what to do.
    """
    options = dict(locals()) | {
        "what": tuple(map(str, what)),
        "data": None if data is None else str(data),
        "batch": tuple(batch),
        "threads": tuple(threads),
        "tasks": tuple(tasks),
        "include_path": None if include_path is None else str(include_path),
        "context": None if context is None else tuple(context),
    }
    return measure(BenchSettings(**options))


def targets() -> dict[str, str | None]:
    """Return, for every target, None if it can be used here, or the missing requirement and how to install it."""
    return {name: target_named(name).missing() for name in names()}


def inspect(
    model: str | Path | torch.nn.Module | None = None,
    *,
    data: str | Path | None = None,
    metric: str = "cosine",
    study: bool = False,
    against_data: Sequence[str | Path] = (),
    task: str | None = None,
    problem_type: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    random_weights: bool = False,
    cache: bool = True,
    samples: int | None = None,
    max_memory: int | None = None,
    search_samples: int = 64,
    max_length: int | None = None,
    stride: int | None = None,
    image_size: str | int | None = None,
    seed: int = 0,
    example_inputs: Any = None,
) -> Inspection:
    """Score every site of a model, like ``compressor inspect``, without writing files.

    The arguments are fields of `compressor.Settings`, and `study` and `against_data` of
    `compressor.pipeline.inspect.inspect`.

    Raises:
        CompressorError, PassError: the message says what was found and what to do.
    """
    options = dict(locals())
    options.pop("study")
    options.pop("against_data")
    others = tuple(map(str, against_data))
    return run_inspect(Settings(**options, drop="none"), study=study, against_data=others)
