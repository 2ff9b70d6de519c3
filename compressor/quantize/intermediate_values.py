"""Values inside an ONNX model on calibration data: a copy of the file with those as outputs, run batch by batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt
import onnx
from onnx import helper

from compressor.quantize.qdq_rewrite import EXTERNAL_ABOVE, Edit, QuantizeError, save

Batch = Mapping[str, npt.NDArray[Any]]


def write_measuring(model: onnx.ModelProto, edit: Edit, outputs: Sequence[str], path: Path) -> None:
    """Save a model that has the given values as its only outputs; what they do not need is not computed."""
    model.graph.node.extend(edit.nodes)
    del model.graph.output[:]
    model.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in outputs)
    save(model, path, EXTERNAL_ABOVE)


def stream(path: Path, feeds: Iterable[Batch], outputs: Sequence[str]) -> Iterator[tuple[int, list[npt.NDArray[Any]]]]:
    """Run each batch, yielding its number of samples and the outputs; it is released before the next is asked for.

    Raises:
        QuantizeError: a batch lacks an input, or does not run.
    """
    session = _session(path)
    names = [value.name for value in session.get_inputs()]
    for batch in feeds:
        missing = [name for name in names if name not in batch]
        if missing:
            raise QuantizeError(
                f"The calibration batch has inputs {sorted(batch)}, and {missing} is missing; give every input."
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
            "Int8 is calibrated with ONNX Runtime, which is missing: pip install onnxruntime"
        ) from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only: nothing may be written between the lines of a progress display
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
