"""What fusing operators gains on ONNX Runtime's CPU kernels: the optimisers there are, beside our own copy.

    python benchmarks/fusion.py [MODEL ...] [--threads 1] [--rounds 8]

Each model is exported as a user would, in float and in int8, with random weights: this is about speed alone. A folder
that `compressor export` wrote may stand in place of a model. Every optimiser rewrites the same portable file; all are
timed beside it in one interleaved run, and the profile is of a run of its own. Prints the tables and keeps the results;
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
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import tables_fusion
from tokens import operators

from compressor.environment import environment
from runtimes import onnxruntime, onnxruntime_fused
from runtimes.base import BuildOptions, Engine, Feeds
from runtimes.timing import interleave

RESULTS = tables_fusion.RESULTS
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
    "portable file": lambda source, out, options: source,
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


def measure(source: Path, out: Path, options: BuildOptions, rounds: int) -> dict[str, Any]:
    """Latency of every form of one file, how far its answers are from the portable file's, and where the time goes."""
    files = {name: make(source, out, options) for name, make in MAKERS.items()}
    openers = {name: partial(onnxruntime.load, file, options) for name, file in files.items()}
    with openers["portable file"]() as engine:
        feeds = _feeds(engine)
        expected = next(iter(engine.run(feeds).values()))
    latencies = interleave(openers, feeds, rounds=rounds, burst_seconds=0.3, warmup_seconds=0.1, min_runs=3)
    rows = {}
    for name, latency in latencies.items():
        with openers[name]() as engine:
            found = next(iter(engine.run(feeds).values()))
        rows[name] = {
            "median_ms": latency.median,
            "quietest_ms": latency.quietest,
            "speedup": latency.speedup_over(latencies["portable file"])._asdict(),
            "difference": float(np.linalg.norm(found - expected) / np.linalg.norm(expected)),
            "operators_ms": operators(files[name], feeds, threads=options.threads),
        }
    return rows


def _feeds(engine: Engine) -> Feeds:
    """One image of noise."""
    rng = np.random.default_rng(0)
    shapes = {name: [size or 1 for size in shape or ()] for name, shape in engine.input_shapes.items()}
    return {name: rng.normal(size=shape).astype(engine.input_dtypes[name]) for name, shape in shapes.items()}


@click.command()
@click.argument("models", nargs=-1)
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=8, show_default=True, help="Timed bursts of each form.")
@click.option("--output", type=click.Path(path_type=Path), default=RESULTS, help="File of the results.")
def main(models: tuple[str, ...], threads: int, rounds: int, output: Path) -> None:
    """Measure every model in float and in int8, print the tables and keep the results."""
    logging.disable(logging.WARNING)  # the optimisers tell what they do
    options, results = BuildOptions(threads=threads), {}
    for model in models or MODELS:
        for precision in ("",) if Path(model).is_dir() else PRECISIONS:
            with tempfile.TemporaryDirectory() as scratch:
                source = exported(model, precision, Path(scratch))
                case = f"{model}, {precision}" if precision else Path(model).name
                results[case] = measure(source, Path(scratch), options, rounds)
    found = {"threads": threads, "rounds": rounds, "environment": environment(), "cases": results}
    output.write_text(json.dumps(found, indent=1) + "\n")
    print(tables_fusion.fusion_table(found))


if __name__ == "__main__":
    main()
