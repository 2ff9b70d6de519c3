"""From a graph to an ONNX file: the only caller of torch.onnx.export, and the check that the file computes the same."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from compressor.errors import CompressorError
from compressor.models.base import first_line

if TYPE_CHECKING:
    from compressor.models import Model
    from passes.graph import Graph

OPSET = 20
# Largest difference allowed, relative to the largest value of the output: float32 sums in another order differ by about
# 1e-6 a layer; a wrong operator is off by 1e-2 or more.
TOLERANCE = 1e-4


class LowerError(CompressorError):
    """A graph could not be written as ONNX, or the file computes something else."""


@dataclass(frozen=True)
class Parity:
    """Largest difference of an ONNX file's outputs from torch's, relative to the largest output value."""

    output: str
    difference: float
    rows: int


def lower(graph: Graph, model: Model, path: Path) -> Path:
    """Write a graph as ONNX, opset 20, with named inputs and outputs and a dynamic batch (and sequence) axis.

    Weights beyond 2 GB go into a file beside it, named as the ONNX file plus ``.data``.

    Raises:
        LowerError: an operator has no ONNX form.
        OSError: the file cannot be written.
    """
    example = tuple(model.example[name] for name in graph.inputs)
    shapes = tuple(dict(model.dynamic_axes.get(name, {})) for name in graph.inputs)
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                graph.module,
                example,
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=shapes,
                input_names=list(graph.inputs),
                output_names=list(graph.outputs),
                verbose=False,
            )
    except OSError:
        raise
    except Exception as error:  # the exporter's errors have no common base
        raise LowerError(f"{model.name} cannot be written as ONNX: {first_line(_cause(error))}.") from error
    assert program is not None
    _tidy(program.model, {*graph.inputs, *graph.outputs})
    with _quiet():
        program.save(str(path))
    return path


def _tidy(model: ir.Model, interface: set[str]) -> None:
    """Drop stack traces (they hold paths of this machine), and keep inner values off the names of the interface."""
    outer = {*model.graph.inputs, *model.graph.outputs}
    for node in model.graph.all_nodes():
        for key in [key for key in node.metadata_props if key.endswith("stack_trace")]:
            del node.metadata_props[key]
        for value in node.outputs:
            if value.name in interface and value not in outer:
                value.name = f"{value.name}_inner"


def _cause(error: BaseException) -> BaseException:
    """The first error of a chain: the exporter's own only say that there was one."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints steps and warns about its own internals; its errors still come through."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def check_parity(
    expected: Mapping[str, npt.NDArray[Any]],
    run: Callable[[], Mapping[str, npt.NDArray[Any]]],
    *,
    name: str,
) -> Parity:
    """Compare an engine's outputs on real inputs with torch's.

    Args:
        expected: output name to torch's value.
        run: runs the engine on the same inputs.
        name: for the error message.

    Raises:
        LowerError: an output differs by more than `TOLERANCE` of its largest value, or in shape, or torch's own is
            not finite.
    """
    found = run()
    worst = max((_difference(key, value, found[key], name) for key, value in expected.items()), key=_by_difference)
    if not worst.difference <= TOLERANCE:
        raise LowerError(
            f"{name}: output {worst.output} differs from torch by {worst.difference:.2e} of its largest value, "
            f"allowed is {TOLERANCE:g}; this is a fault of the export, not of your model: please report it."
        )
    return worst


def _by_difference(parity: Parity) -> float:
    return np.inf if np.isnan(parity.difference) else parity.difference


def _difference(output: str, expected: npt.NDArray[Any], found: npt.NDArray[Any], name: str) -> Parity:
    if expected.shape != found.shape:
        raise LowerError(f"{name}: output {output} has shape {found.shape}, torch gives {expected.shape}.")
    if not np.isfinite(expected).all():
        raise LowerError(
            f"{name}: in torch already, output {output} is NaN or infinite on samples of the data; check the weights "
            "and the preprocessing."
        )
    scale = float(np.abs(expected).max(initial=1e-12))
    return Parity(output, float(np.abs(found - expected).max(initial=0.0)) / scale, len(expected))
