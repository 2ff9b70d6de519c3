"""Target onnxruntime_mobile: ONNX Runtime's .ort format for phones and boards, with the list of its operators.

A minimal build of ONNX Runtime has no ONNX parser and only the listed operators (`build.sh --minimal_build
--include_ops_by_config required_operators.config`). It takes a few megabytes and opens only model.ort.

The converter has two optimisation styles. "Fixed" saves the optimised graph. "Runtime" applies few optimisations and
saves the others beside the graph, so that an accelerator such as NNAPI or CoreML can partition the graph first; an
application that does not set session.enable_saved_runtime_optimizations runs it unfused and slowly. This target uses
Fixed, as ONNX Runtime recommends for CPUs, without the NCHWc optimiser, whose block size depends on the vector
registers of the processor. The other fused operators (BiasGelu, FusedMatMul, MatMulIntegerToFloat, ...) have kernels on
every CPU, so a file built on x86 runs on ARM.
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
from runtimes.base.registry import check_available
from runtimes.onnxruntime import target as onnxruntime

name = "onnxruntime_mobile"
description = "ONNX Runtime's .ort format for phones and boards; writes model.ort and required_operators.config"
devices = ("cpu",)
source: Literal[".onnx"] = ".onnx"
precisions = {"cpu": ("fp32", "int8", "int8-dynamic")}
own = ()
# The ARM kernels support the same uint8 activations with int8 weights as the x86 kernels.
int8 = Int8Style(activations="uint8", convolutions=False)

FILE = "model.ort"
OPERATORS = "required_operators.config"


def missing() -> str | None:
    """Return None if ONNX Runtime can be used, else the reason and the command that fixes it."""
    return onnxruntime.missing()


def build(source: Path, out: Path, options: BuildOptions) -> Path:
    """Write model.ort and required_operators.config into the folder `out` and return the path of model.ort.

    Raises:
        RuntimeUnavailable: ONNX Runtime or the device is not available.
        BuildError: ONNX Runtime refused the model.
    """
    check_available(name, missing(), devices, options)
    if not source.is_file():
        raise BuildError(f"There is no ONNX file {source}.")
    # Inside `out`, so that the files can be renamed into place.
    with TemporaryDirectory(dir=out, prefix=".ort-") as scratch:
        _convert(source, Path(scratch))
        (operators,) = Path(scratch).glob("*.config")
        (model,) = Path(scratch).glob("*.ort")
        (out / OPERATORS).write_text(_portable(operators.read_text()))
        model.replace(out / FILE)
    return out / FILE


def load(path: Path, options: BuildOptions) -> onnxruntime.OnnxRuntimeEngine:
    """Open the .ort file that build() wrote, which is already optimised.

    Raises:
        RuntimeUnavailable: ONNX Runtime or the device is not available.
        BuildError: ONNX Runtime refused the model.
    """
    check_available(name, missing(), devices, options)
    return onnxruntime.load_file(path, options)


def layers(path: Path, options: BuildOptions) -> None:
    """Return None: ONNX Runtime cannot write the graph of a model in this format."""


def _convert(onnx: Path, out: Path) -> None:
    """Write the .ort file and the list of its operators with ONNX Runtime's converter."""
    with _silent():
        from onnxruntime.tools.convert_onnx_models_to_ort import OptimizationStyle, convert_onnx_models_to_ort

        try:
            # No target_platform: "amd64" would enable the NCHWc optimiser.
            convert_onnx_models_to_ort(onnx, output_dir=out, optimization_styles=[OptimizationStyle.Fixed])
        except Exception as error:  # the classes of ONNX Runtime's errors have no common base but Exception
            raise BuildError(f"ONNX Runtime cannot convert {onnx.name}: {first_line(error)}.") from error


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Suppress the converter's side effects: printing, an unclosed file and logging.basicConfig()."""
    root, handler = logging.getLogger(), logging.NullHandler()
    root.addHandler(handler)  # logging.basicConfig() does nothing if the root logger has a handler
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore", ResourceWarning)
            yield
    finally:
        root.removeHandler(handler)


def _portable(operators: str) -> str:
    """Return the operator list without the comments, which name folders of this machine."""
    lines = [line for line in operators.splitlines() if not line.startswith("#")]
    return "\n".join([f"# Operators of {FILE}, for --include_ops_by_config of ONNX Runtime's build script", *lines, ""])
