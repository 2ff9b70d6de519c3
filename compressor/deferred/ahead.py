"""Engines that an export builds ahead of time for GPUs that are not here."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from compressor.target.gpus import Gpus
from compressor.workspace.progress import Steps, Tick
from runtimes.base.ahead_of_time import Progress
from runtimes.base.protocols import BuildError, BuildOptions

FOLDER = "engines"


def build_ahead(folder: Path, gpus: Gpus, options: BuildOptions, steps: Steps) -> dict[str, Any]:
    """Build an engine of ``model.onnx`` for each GPU, in the subfolder ``engines``.

    Args:
        folder: output folder that contains ``model.onnx``.
        gpus: the GPUs and their builder.
        options: sizes of the dynamic axes.
        steps: shows the phases of the builder.

    Returns:
        The part ``ahead_of_time`` of the report's engine: the builder; file, size in bytes and seconds of each engine;
        the reason for each GPU that refused the model; and the layers of the parsed file.

    Raises:
        BuildError: a GPU that ``--gpu`` names refused the model, or every GPU did.
    """
    source, out = folder / "model.onnx", folder / FOLDER
    out.mkdir()
    engines: dict[str, dict[str, Any]] = {}
    refused: dict[str, str] = {}
    layers = gpus.target.network_layers(source)
    with steps.step("build ahead of time") as tick:
        for number, gpu in enumerate(gpus.names):
            start = time.perf_counter()
            try:
                path = gpus.target.build_for(source, out, options, gpu, _shown(tick, gpu, number, len(gpus.names)))
            except BuildError as error:
                if gpus.named or (not engines and number == len(gpus.names) - 1):
                    raise
                refused[gpu] = str(error)
                continue
            seconds = time.perf_counter() - start
            engines[gpu] = {"file": f"{FOLDER}/{path.name}", "bytes": path.stat().st_size, "seconds": seconds}
    return {
        "builder": gpus.target.builder_version(),
        "engines": engines,
        "refused": refused,
        "layers": asdict(layers),
    }


def _shown(tick: Tick, gpu: str, number: int, count: int) -> Progress:
    """Return a function that shows the phase of a build on the progress bar, which counts the engines."""

    def progress(phase: str, done: int, steps: int) -> None:
        tick(number, count, f"{gpu}: {phase.lower()} {done}/{steps}")

    return progress
