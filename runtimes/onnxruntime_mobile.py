"""Target onnxruntime_mobile: ONNX Runtime's own .ort format for phones and boards, with the operators it needs.

ONNX Runtime can be built without its ONNX reader and with a few operators only (`build.sh --minimal_build
--include_ops_by_config required_operators.config`): a few megabytes that open model.ort and nothing else.

Two styles exist. "Fixed" writes the graph as optimised here; "Runtime" optimises little and stores the rest beside the
graph, which an accelerator like NNAPI or CoreML may then cut as it likes, but which is replayed only by an application
that asks for it (session.enable_saved_runtime_optimizations), and runs unfused and slow in every other. Here it is
Fixed, ONNX Runtime's advice for CPUs, without the one optimiser that ties a file to the processor at hand: NCHWc, whose
block size is that of the vector registers. What remains (BiasGelu, FusedMatMul, MatMulIntegerToFloat, ...) has kernels
on every CPU, so the file may be made on x86 and run on ARM.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from runtimes.base.protocols import BuildError, BuildOptions, Int8Style, first_line
from runtimes.base.registry import need
from runtimes.onnxruntime import target as onnxruntime

name = "onnxruntime_mobile"
description = "ONNX Runtime's .ort format for phones and boards; writes model.ort and required_operators.config"
devices = ("cpu",)
source: Literal[".onnx"] = ".onnx"
precisions = {"cpu": ("fp32", "int8", "int8-dynamic")}
own = ()
# ARM's kernels take the same uint8 activations with int8 weights as those of x86.
int8 = Int8Style(activations="uint8", convolutions=False)

FILE = "model.ort"
OPERATORS = "required_operators.config"


def missing() -> str | None:
    """Return None where ONNX Runtime can be used, else the reason and the command that changes it."""
    return onnxruntime.missing()


def build(source: Path, out: Path, options: BuildOptions) -> Path:
    """Write model.ort and required_operators.config into the folder `out` and return the path of model.ort.

    Raises:
        RuntimeUnavailable: ONNX Runtime or the device is not there.
        BuildError: ONNX Runtime refused the model.
    """
    need(name, missing(), devices, options)
    if not source.is_file():
        raise BuildError(f"There is no ONNX file {source}.")
    # Within `out`, so that the files only have to be renamed.
    with TemporaryDirectory(dir=out, prefix=".ort-") as scratch:
        _convert(source, Path(scratch))
        (operators,) = Path(scratch).glob("*.config")
        (model,) = Path(scratch).glob("*.ort")
        (out / OPERATORS).write_text(_portable(operators.read_text()))
        model.replace(out / FILE)
    return out / FILE


def load(path: Path, options: BuildOptions) -> onnxruntime.OnnxRuntimeEngine:
    """Open the .ort file that build() wrote, as it is: it was optimised while it was built.

    Raises:
        RuntimeUnavailable: ONNX Runtime or the device is not there.
        BuildError: ONNX Runtime refused the model.
    """
    need(name, missing(), devices, options)
    return onnxruntime.load(path, options)


def layers(path: Path, options: BuildOptions) -> None:
    """Return nothing: ONNX Runtime writes no graph of a model that it opened in this format."""


def _convert(onnx: Path, out: Path) -> None:
    """Have ONNX Runtime's own converter write the .ort file and the list of its operators."""
    with _silent():
        from onnxruntime.tools.convert_onnx_models_to_ort import OptimizationStyle, convert_onnx_models_to_ort

        try:
            # No target_platform: "amd64" is what lets the NCHWc optimiser in.
            convert_onnx_models_to_ort(onnx, output_dir=out, optimization_styles=[OptimizationStyle.Fixed])
        except Exception as error:  # the classes of ONNX Runtime's errors have no common base but Exception
            raise BuildError(f"ONNX Runtime cannot convert {onnx.name}: {first_line(error)}.") from error


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keep the converter to itself: it prints, leaves a file for the collector to close, and sets up logging."""
    root, held = logging.getLogger(), logging.NullHandler()
    root.addHandler(held)  # a root that has a handler is left alone by its logging.basicConfig
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore", ResourceWarning)
            yield
    finally:
        root.removeHandler(held)


def _portable(operators: str) -> str:
    """The list without the comments that name folders of this machine."""
    lines = [line for line in operators.splitlines() if not line.startswith("#")]
    return "\n".join([f"# Operators of {FILE}, for --include_ops_by_config of ONNX Runtime's build script", *lines, ""])
