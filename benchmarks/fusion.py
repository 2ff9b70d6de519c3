"""What fusing operators gains on ONNX Runtime's CPU kernels: the optimisers there are, beside our own copy.

    python benchmarks/fusion.py [MODEL ...] [--runs 40]

Each model is exported as a user would, in float and in int8, with random weights: this is about speed alone. A folder
that `compressor export` wrote may stand in place of a model. Every optimiser rewrites the same portable file. The forms
run in turns (A B C C B A ...), each with one thread, and what is compared is the processor time of the calling thread:
other work on the machine takes the processor away for a while but is not counted. Sessions of one thread have no others
that spin, so all may be open together. The profile is of runs of its own. Prints the tables and keeps the results;
`python benchmarks/tables.py` puts them into the page.
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
    """The optimiser that ONNX Runtime ships; its kind of model is "vit"."""
    from onnxruntime.transformers.optimizer import optimize_model

    made = optimize_model(str(source), model_type="vit", num_heads=0, hidden_size=0, opt_level=0)
    made.save_model_to_file(str(out / "transformers.onnx"))
    return out / "transformers.onnx"


def by_onnxscript(source: Path, out: Path, _: BuildOptions) -> Path:
    """The fusions for ONNX Runtime that onnxscript ships for graphs of torch's exporter."""
    import onnx_ir
    from onnxscript.rewriter.ort_fusions import optimize_for_ort

    made, _counts = optimize_for_ort(onnx_ir.load(source))
    onnx_ir.save(made, out / "onnxscript.onnx")
    return out / "onnxscript.onnx"


MAKERS: dict[str, Callable[[Path, Path, BuildOptions], Path]] = {
    PORTABLE: lambda source, out, options: source,
    "onnxruntime.transformers": by_transformers_optimizer,
    "onnxscript": by_onnxscript,
    "onnxruntime_fused": onnxruntime_fused.build,
}


def exported(model: str, precision: str, scratch: Path) -> Path:
    """The portable file of a folder, copied because the profile is written beside it, or of a model exported now."""
    if Path(model).is_dir():
        return Path(shutil.copy(Path(model) / "model.onnx", scratch))
    folder = scratch / f"{model}-{precision}"
    data = ("--random-weights", "--data", "random", "--samples", "6", "--drop", "none", "--rounds", "1")
    command = (sys.executable, "-m", "compressor", "export", model, *data, *PRECISIONS[precision], "--output", folder)
    subprocess.run([*map(str, command)], check=True, stdout=subprocess.DEVNULL)
    return folder / "model.onnx"


def measure(source: Path, out: Path, runs: int) -> dict[str, Any]:
    """Time of every form of one file, how far its answers are from the portable file's, and where the time goes."""
    files = {name: make(source, out, ONE) for name, make in MAKERS.items()}
    engines = {name: onnxruntime.load(file, ONE) for name, file in files.items()}
    feeds = _feeds(engines[PORTABLE])
    answers = {name: next(iter(engine.run(feeds).values())) for name, engine in engines.items()}
    steps = {name: engine.bind(feeds) for name, engine in engines.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(runs + WARMUP):
        for name in list(steps) if number % 2 == 0 else reversed(steps):
            start = thread_time_ns()
            steps[name]()
            times[name].append((thread_time_ns() - start) / 1e6)
    expected = answers[PORTABLE]
    return {
        name: {
            "median_ms": float(np.median(times[name][WARMUP:])),
            "speedup": _ratio(np.array(times[PORTABLE][WARMUP:]), np.array(times[name][WARMUP:])),
            "difference": float(np.linalg.norm(answers[name] - expected) / np.linalg.norm(expected)),
            "operators_ms": operators(files[name], feeds, threads=1),
        }
        for name in files
    }


def _ratio(before: npt.NDArray[np.float64], after: npt.NDArray[np.float64]) -> dict[str, float]:
    """The median ratio of runs that are neighbours in time, with a bootstrap 95 % interval."""
    ratios = before / after
    drawn = np.random.default_rng(0).choice(ratios, (2000, ratios.size))
    low, high = np.percentile(np.median(drawn, axis=1), [2.5, 97.5])
    return {"ratio": float(np.median(ratios)), "low": float(low), "high": float(high)}


def _feeds(engine: Engine) -> Feeds:
    """One image of noise."""
    rng = np.random.default_rng(0)
    shapes = {name: [size or 1 for size in shape or ()] for name, shape in engine.input_shapes.items()}
    return {name: rng.normal(size=shape).astype(engine.input_dtypes[name]) for name, shape in shapes.items()}


@click.command()
@click.argument("models", nargs=-1)
@click.option("--runs", type=click.IntRange(min=1), default=40, show_default=True, help="Timed runs of each form.")
@click.option("--output", type=click.Path(path_type=Path), default=RESULTS, help="File of the results.")
def main(models: tuple[str, ...], runs: int, output: Path) -> None:
    """Measure every model in float and in int8, print the tables and keep the results."""
    logging.disable(logging.WARNING)  # the optimisers tell what they do
    results: dict[str, Any] = {}
    found = {"runs": runs, "environment": environment(), "cases": results}
    for model in models or MODELS:
        for precision in ("",) if Path(model).is_dir() else PRECISIONS:
            with tempfile.TemporaryDirectory() as scratch:
                source = exported(model, precision, Path(scratch))
                case = f"{model}, {precision}" if precision else Path(model).name
                results[case] = measure(source, Path(scratch), runs)
            output.write_text(json.dumps(found, indent=1) + "\n")
    print(tables_fusion.fusion_table(found))


if __name__ == "__main__":
    main()
