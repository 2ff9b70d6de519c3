"""Intermediate values of an ONNX model on calibration data, from a copy of the file with these values as outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx import helper
from onnx_ir.passes import common
from onnxscript import version_converter

from compressor.executor.base import Batches, InProcess
from compressor.quantize.qdq_rewrite import EXTERNAL_ABOVE, PREFIX, Edit, QuantizeError, load, save
from compressor.workspace.output_folder import engine_files

Batch = Mapping[str, npt.NDArray[Any]]


def save_with_outputs(model: onnx.ModelProto, edit: Edit, outputs: Sequence[str], path: Path) -> None:
    """Save the model with `outputs` as its only outputs, so that the runtime skips all other nodes."""
    model.graph.node.extend(edit.nodes)
    del model.graph.output[:]
    model.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in outputs)
    save(model, path, EXTERNAL_ABOVE)


def all_values(values: list[npt.NDArray[Any]]) -> Any:
    """Return the outputs of a batch as they are."""
    return values


def stream(
    path: Path, feeds: Iterable[Batch], outputs: Sequence[str], reduce: Callable[..., Any] = all_values
) -> Iterator[tuple[int, Any]]:
    """Run each batch and yield its number of samples and its outputs, reduced.

    A batch is released before the next is requested, so that only one is in memory. `Batches` run on their executor.

    Args:
        path: ONNX file.
        feeds: the batches.
        outputs: names of the outputs.
        reduce: takes the outputs of a batch; its result is sent back from workers.

    Raises:
        QuantizeError: a batch lacks an input of the model or does not run through it, or ONNX Runtime is not installed.
    """
    batches = feeds if isinstance(feeds, Batches) else Batches(InProcess(), lambda: feeds)
    executor = batches.executor
    files = executor.share_files(engine_files(path))
    run = executor.share((path, tuple(outputs), reduce, executor.threads))
    calls = ((run, files, group) for group in executor.divide(batches, batches.count))
    return chain.from_iterable(executor.run(_streamed, calls))


def beside(feeds: Iterable[Batch], batches: Iterable[Batch], count: int) -> Iterable[Batch]:
    """Return further batches, at least `count`, that run where those of `feeds` do."""
    return Batches(feeds.executor, lambda: batches, count) if isinstance(feeds, Batches) else batches


def _streamed(
    run: tuple[Path, tuple[str, ...], Callable[..., Any], int | None],
    files: Mapping[Path, Path],
    feeds: Iterable[Batch],
) -> Iterator[tuple[int, Any]]:
    """Open a file where it lies, and run the batches; see `stream`."""
    path, outputs, reduce, threads = run
    session = _session(files[path], threads)
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
        yield size, reduce(values)


def load_typed(path: Path, *, opset: int | None = None) -> ir.Model:
    """Load a model with its constants as initializers and with the inferred type of every value.

    Args:
        path: an ONNX file.
        opset: the lowest opset of the result; an older file is converted to it.

    Raises:
        QuantizeError: the file cannot be read, or a type cannot be inferred.
    """
    model = ir.from_proto(load(path))
    if opset is not None and model.opset_imports.get("", opset) < opset:
        version_converter.convert_version(model, opset)
    common.LiftConstantsToInitializersPass(size_limit=0)(model)
    common.ShapeInferencePass(check_type=False, strict_mode=False)(model)
    for weight in model.graph.initializers.values():
        if weight.const_value is not None:
            weight.dtype = weight.const_value.dtype
    unknown = [value.name for node in model.graph for value in node.outputs if value.name and value.type is None]
    if unknown:
        raise QuantizeError(
            f"The type of value {unknown[0]} in {path.name} cannot be inferred; export the model again."
        )
    return model


def absolute_maxima(
    source: Path,
    work: Path,
    feeds: Callable[[], Iterable[Batch]],
    progress: Callable[[str], None],
) -> dict[str, float]:
    """Measure the largest magnitude of every float32 value in one pass, with ONNX Runtime in float32.

    Nodes added to the graph reduce each value to one number, so the outputs are small. Values inside the bodies of If,
    Loop and Scan are not measured.

    Args:
        source: float ONNX file.
        work: path for the temporary model that outputs the maxima.
        feeds: returns a new iterator over the calibration batches.
        progress: called with a short message after each batch.

    Returns:
        The maximum of |x| by value name; infinity for a value with infinities, such as an attention mask.

    Raises:
        QuantizeError: there is no batch, or a batch does not fit the model.
    """
    typed = load_typed(source)
    values = (value for node in typed.graph for value in node.outputs if value.dtype == ir.DataType.FLOAT)
    names = [value.name for value in values if value.name]
    model = load(source)
    edit = Edit(model.graph)
    sizes = [edit.node("Abs", [name], [f"{PREFIX}{name}/size"]) for name in names]
    outputs = [edit.node("ReduceMax", [size], [f"{size}/largest"], keepdims=0) for size in sizes]
    save_with_outputs(model, edit, outputs, work)
    maxima, samples = np.zeros(len(names)), 0
    for batch, largest in stream(work, feeds(), outputs):
        maxima = np.fmax(maxima, [float(value) for value in largest])  # an empty value has the maximum -infinity
        samples += batch
        progress(f"fp16: ranges on {samples} calibration samples")
    if samples == 0:
        raise QuantizeError(
            "There is no calibration data; fp16 needs at least one batch to check the ranges of values."
        )
    return dict(zip(names, maxima.tolist(), strict=True))


def _session(path: Path, threads: int | None) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise QuantizeError(
            "Calibration needs ONNX Runtime, which is not installed: run pip install onnxruntime"
        ) from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only: other output would break the progress display
    if threads is not None:
        options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
