"""Measure the gain of operator fusion on ONNX Runtime's CPU kernels, for several optimizers and our fused target.

    python benchmarks/fusion.py [MODEL ...] [--runs 40]

Each model is exported on the command line, in float and in int8, with random weights: only speed is measured. MODEL may
also be a folder that `compressor export` wrote. Every optimizer rewrites the same portable file. The forms run in turns
(A B C C B A ...) with one thread each. The measure is the processor time of the calling thread, which does not include
other work on the machine. All sessions are open at once: with one thread, none has spinning worker threads. Profiles
come from separate runs. The script prints the tables and writes the results; `python benchmarks/tables.py` writes them
into README.md.
"""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import thread_time_ns
from typing import Any

import click
import numpy as np
import numpy.typing as npt
import tables_fusion
from tokens import operators

from compressor.workspace.environment import environment
from runtimes.base.protocols import BuildOptions, Engine, Feeds
from runtimes.onnxruntime import target as onnxruntime
from runtimes.onnxruntime_fused import target as onnxruntime_fused

RESULTS, PORTABLE = tables_fusion.RESULTS, tables_fusion.PORTABLE
ONE = BuildOptions(threads=1)
WARMUP = 3
MODELS = ("deit_tiny_patch16_224", "vit_base_patch16_224", "vit_small_patch14_dinov2")
PRECISIONS = {"fp32": (), "int8": ("--int8", "static")}


def by_transformers_optimizer(source: Path, out: Path, _: BuildOptions) -> Path:
    """Apply ONNX Runtime's transformer optimizer with model_type "vit"."""
    from onnxruntime.transformers.optimizer import optimize_model

    optimized = optimize_model(str(source), model_type="vit", num_heads=0, hidden_size=0, opt_level=0)
    optimized.save_model_to_file(str(out / "transformers.onnx"))
    return out / "transformers.onnx"


def by_onnxscript(source: Path, out: Path, _: BuildOptions) -> Path:
    """Apply onnxscript's fusions for ONNX Runtime, which expect graphs of torch's exporter."""
    import onnx_ir
    from onnxscript.rewriter.ort_fusions import optimize_for_ort

    optimized, _counts = optimize_for_ort(onnx_ir.load(source))
    onnx_ir.save(optimized, out / "onnxscript.onnx")
    return out / "onnxscript.onnx"


MAKERS: dict[str, Callable[[Path, Path, BuildOptions], Path]] = {
    PORTABLE: lambda source, out, options: source,
    "onnxruntime.transformers": by_transformers_optimizer,
    "onnxscript": by_onnxscript,
    "onnxruntime_fused": onnxruntime_fused.build,
}


def exported(model: str, precision: str, scratch: Path) -> Path:
    """Export a model and return its portable file; copy that of a folder, since profiles are written next to it."""
    if Path(model).is_dir():
        return Path(shutil.copy(Path(model) / "model.onnx", scratch))
    folder = scratch / f"{model}-{precision}"
    data = ("--random-weights", "--data", "random", "--samples", "6", "--drop", "none", "--rounds", "1")
    command = (sys.executable, "-m", "compressor", "export", model, *data, *PRECISIONS[precision], "--output", folder)
    subprocess.run([*map(str, command)], check=True, stdout=subprocess.DEVNULL)
    return folder / "model.onnx"


def measure(source: Path, out: Path, runs: int) -> dict[str, Any]:
    """Measure time, relative output difference from the portable file, and operator profile of every form of a file."""
    files = {name: make(source, out, ONE) for name, make in MAKERS.items()}
    engines = {name: onnxruntime.load(file, ONE) for name, file in files.items()}
    feeds = _feeds(engines[PORTABLE])
    outputs = {name: next(iter(engine.run(feeds).values())) for name, engine in engines.items()}
    steps = {name: engine.bind(feeds) for name, engine in engines.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(runs + WARMUP):
        for name in list(steps) if number % 2 == 0 else reversed(steps):
            start = thread_time_ns()
            steps[name]()
            times[name].append((thread_time_ns() - start) / 1e6)
    expected = outputs[PORTABLE]
    return {
        name: {
            "median_ms": float(np.median(times[name][WARMUP:])),
            "speedup": _ratio(np.array(times[PORTABLE][WARMUP:]), np.array(times[name][WARMUP:])),
            "difference": float(np.linalg.norm(outputs[name] - expected) / np.linalg.norm(expected)),
            "operators_ms": operators(files[name], feeds, threads=1),
        }
        for name in files
    }


def _ratio(before: npt.NDArray[np.float64], after: npt.NDArray[np.float64]) -> dict[str, float]:
    """Return the median ratio of consecutive runs, with a bootstrap 95 % interval."""
    ratios = before / after
    drawn = np.random.default_rng(0).choice(ratios, (2000, ratios.size))
    low, high = np.percentile(np.median(drawn, axis=1), [2.5, 97.5])
    return {"ratio": float(np.median(ratios)), "low": float(low), "high": float(high)}


def _feeds(engine: Engine) -> Feeds:
    """Return one image of Gaussian noise."""
    rng = np.random.default_rng(0)
    shapes = {name: [size or 1 for size in shape or ()] for name, shape in engine.input_shapes.items()}
    return {name: rng.normal(size=shape).astype(engine.input_dtypes[name]) for name, shape in shapes.items()}


@click.command()
@click.argument("models", nargs=-1)
@click.option("--runs", type=click.IntRange(min=1), default=40, show_default=True, help="Timed runs per form.")
@click.option("--output", type=click.Path(path_type=Path), default=RESULTS, help="Results file.")
def main(models: tuple[str, ...], runs: int, output: Path) -> None:
    """Measure every model in float and in int8, print the tables and write results/fusion.json."""
    logging.disable(logging.WARNING)  # the optimizers log every fusion
    cases: dict[str, Any] = {}
    results = {"runs": runs, "environment": environment(), "cases": cases}
    for model in models or MODELS:
        for precision in ("",) if Path(model).is_dir() else PRECISIONS:
            with tempfile.TemporaryDirectory() as scratch:
                source = exported(model, precision, Path(scratch))
                case = f"{model}, {precision}" if precision else Path(model).name
                cases[case] = measure(source, Path(scratch), runs)
            output.write_text(json.dumps(results, indent=1) + "\n")
    print(tables_fusion.fusion_table(results))


if __name__ == "__main__":
    main()
