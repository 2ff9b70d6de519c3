"""Intermediate values of an ONNX model on calibration data, from a copy of the file with these values as outputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt
import onnx
from onnx import helper

from compressor.quantize.qdq_rewrite import EXTERNAL_ABOVE, Edit, QuantizeError, save

Batch = Mapping[str, npt.NDArray[Any]]


def save_with_outputs(model: onnx.ModelProto, edit: Edit, outputs: Sequence[str], path: Path) -> None:
    """Save the model with `outputs` as its only outputs, so that the runtime skips all other nodes."""
    model.graph.node.extend(edit.nodes)
    del model.graph.output[:]
    model.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in outputs)
    save(model, path, EXTERNAL_ABOVE)


def stream(path: Path, feeds: Iterable[Batch], outputs: Sequence[str]) -> Iterator[tuple[int, list[npt.NDArray[Any]]]]:
    """Run each batch and yield its number of samples and its outputs.

    A batch is released before the next is requested, so that only one is in memory.

    Raises:
        QuantizeError: a batch lacks an input of the model or does not run through it, or ONNX Runtime is not installed.
    """
    session = _session(path)
    names = [value.name for value in session.get_inputs()]
    for batch in feeds:
        missing = [name for name in names if name not in batch]
        if missing:
            raise QuantizeError(
                f"The calibration batch has the inputs {sorted(batch)}, but {missing} is missing; provide every input."
            )
        size = len(batch[names[0]])
        try:
            values = session.run(list(outputs), {name: batch[name] for name in names})
        except Exception as error:  # ONNX Runtime's errors have no common base class
            shapes = {name: batch[name].shape for name in names}
            raise QuantizeError(f"The calibration batch {shapes} does not run through the model: {error}") from error
        del batch
        yield size, values


def _session(path: Path) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise QuantizeError(
            "Calibration of int8 needs ONNX Runtime, which is not installed: run pip install onnxruntime"
        ) from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only: other output would break the progress display
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
