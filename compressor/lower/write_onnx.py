"""Writing of graphs as the files that targets build from.

No other module calls torch.onnx.export and torch.export.save.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch

from compressor.errors import CompressorError
from compressor.internals.onnxscript import exact_constants, rules_by_operator
from compressor.internals.torch_onnx import decomposed_by, one_registry
from compressor.lower.checkpoint import CONFIG, write
from compressor.lower.disk_initializers import stream_offloaded_initializers
from compressor.lower.exported_program import exported_program
from compressor.lower.gguf import writer
from compressor.lower.translations import attention, recurrence, running, whole_sums
from compressor.lower.translations.decompose_nodes import decompose_nodes
from compressor.models.base import first_line
from compressor.models.text.recurrence import OPERATOR
from passes.base import apply
from passes.graph.edit import copy_repeated_outputs, repeated_outputs
from passes.image_tokens.image_tokens import stage_of_state
from passes.rewrite.flatten_attention import FlattenAttention, can_flatten
from passes.rewrite.fold_constants import FoldConstants, foldable
from passes.torch_internals import generate_code, is_mutable, without_stack_traces

if TYPE_CHECKING:
    from compressor.models import Model
    from passes.graph.graph import Graph

OPSET = 20
NAMES = "compressor.json"  # file in the .pt2 archive with the names of the inputs and outputs


# Names of axes of models with a cache, as in Optimum's files: transformers.js gives an empty cache as many rows as the
# axis batch_size tells.
OPTIMUM_AXES = {
    "batch": "batch_size",
    "sequence": "sequence_length",
    "past_sequence": "past_sequence_length",
    "total_sequence": "total_sequence_length",
    "decoder_sequence": "decoder_sequence_length",
    "past_decoder_sequence": "past_decoder_sequence_length",
}


class LowerError(CompressorError):
    """A graph that could not be written as ONNX, or exported by torch."""


def lower(graph: Graph, model: Model, path: Path) -> Path:
    """Write a graph in the format that the name of the file selects.

    ``.onnx`` selects ONNX, ``.pt2`` an exported program, ``.gguf`` a file for llama.cpp, and ``config.json`` a
    checkpoint in the folder of that file.

    Returns:
        `path`.

    Raises:
        CompressorError: the graph cannot be written in this format.
        OSError: the file cannot be written.
    """
    if path.name == CONFIG[1:]:
        return write(graph, model, path)
    if path.suffix == ".gguf":
        return writer.write(graph, model, path)
    return _to_program(graph, model, path) if path.suffix == ".pt2" else _to_onnx(graph, model, path)


def _to_program(graph: Graph, model: Model, path: Path) -> Path:
    """Write an ExportedProgram with its dynamic axes, and the names of its inputs and outputs."""
    if any(node.target == OPERATOR for node in graph.nodes()):
        raise LowerError(
            f"{model.name} has layers that read one token after another, which only ONNX files hold as a loop; choose "
            "another --target, such as onnxruntime or openvino."
        )
    example = tuple(model.example[name] for name in graph.inputs)
    automatic = torch.export.Dim.AUTO
    shapes = tuple(dict.fromkeys(model.dynamic_axes.get(name, {}), automatic) for name in graph.inputs)
    try:
        with _quiet(), torch.no_grad(), without_stack_traces():  # they are paths of this machine
            program = torch.export.export(generate_code(graph.module), example, dynamic_shapes=shapes, strict=False)
    except Exception as error:  # torch.export's errors have no common base
        raise LowerError(f"{model.name} cannot be exported by torch: {first_line(_cause(error))}.") from error
    names = json.dumps({"inputs": list(graph.inputs), "outputs": list(graph.outputs)})
    written = io.BytesIO()  # a writer of files ends the whole process if the disk is full (std::terminate)
    with _quiet():
        torch.export.save(program, written, extra_files={NAMES: names})
    path.write_bytes(written.getbuffer())
    return path


def _to_onnx(graph: Graph, model: Model, path: Path) -> Path:
    """Write a graph as ONNX, opset 20, with named inputs and outputs and the dynamic axes of the model.

    Weights go into a second file, named as the ONNX file plus ``.data``, if they exceed 2 GB or were read from disk one
    by one.
    """
    graph = _prepared(graph)
    try:
        with _quiet(), torch.no_grad(), one_registry(), rules_by_operator(), exact_constants():
            program = _translated(graph, model)
            _check_dynamic_axes(program.model, model)
            streamed = stream_offloaded_initializers(program.model)
            program.optimize()
    except OSError:
        raise
    except Exception as error:  # the exporter's errors have no common base
        raise LowerError(f"{model.name} cannot be written as ONNX: {first_line(_cause(error))}.") from error
    _tidy(program.model, {*graph.inputs, *graph.outputs})
    with _quiet():  # a single file with its weights would be assembled in memory
        program.save(str(path), external_data=streamed)
    return path


def _translated(graph: Graph, model: Model) -> torch.onnx.ONNXProgram:
    """Translate a graph to ONNX; if a value has other strides than were recorded, it is traced again for that."""
    try:
        with decomposed_by(decompose_nodes):
            return _exported(graph, model)
    except Exception:  # the exporter's errors have no common base; the second attempt raises those that remain
        return _exported(graph, model)


def _exported(graph: Graph, model: Model) -> torch.onnx.ONNXProgram:
    program = torch.onnx.export(
        *_source(graph, model),
        dynamo=True,
        opset_version=OPSET,
        dynamic_shapes=_names_of_axes(graph, model),
        input_names=list(graph.inputs),
        output_names=list(graph.outputs),
        verbose=False,
        optimize=False,  # weights that stay on disk are replaced first
        custom_translation_table=attention.TRANSLATIONS
        | recurrence.TRANSLATIONS
        | running.TRANSLATIONS
        | whole_sums.TRANSLATIONS,
    )
    assert program is not None
    return program


def _names_of_axes(graph: Graph, model: Model) -> tuple[dict[int, str], ...]:
    """Return the names of the dynamic axes of each input; a cache behind a stage has a length of its own."""
    stages = stage_of_state(graph)
    own = OPTIMUM_AXES if model.state else {}
    axes = {
        name: {axis: own.get(each, each) for axis, each in model.dynamic_axes.get(name, {}).items()}
        for name in graph.inputs
    }
    for name, depth in stages.items():
        axes[name] = {axis: each if axis == 0 else f"{each}_{depth}" for axis, each in axes[name].items()}
    return tuple(axes.values())


def _prepared(graph: Graph) -> Graph:
    """Return the graph, or a fork that torch.onnx can write.

    In it, each weight is stored, each attention has the four axes of torch.onnx, and each output has a value of its
    own, because an ONNX file has one name for a value.
    """
    computed, other = bool(foldable(graph)), any(can_flatten(node) for node in graph.nodes())
    repeated = bool(repeated_outputs(graph))
    if not (computed or other or repeated):
        return graph
    fork = graph.fork()
    if repeated:
        copy_repeated_outputs(fork)
    if computed:
        apply(FoldConstants(), fork)
    if other:
        apply(FlattenAttention(), fork)
    return fork


def _source(graph: Graph, model: Model) -> tuple[Any, tuple[torch.Tensor, ...]]:
    """Return what the exporter converts, and its arguments; a graph that writes into a buffer is traced again."""
    if any(is_mutable(node.target) for node in graph.nodes()):
        return generate_code(graph.module), tuple(model.example[name] for name in graph.inputs)
    return exported_program(graph), ()


def _check_dynamic_axes(exported: ir.Model, model: Model) -> None:
    """Raise `LowerError` if an operator of the graph fixed a size that is dynamic in the model."""
    for value in exported.graph.inputs:
        for axis, name in model.dynamic_axes.get(value.name or "", {}).items():
            if value.shape is not None and isinstance(value.shape[axis], int):
                raise LowerError(f"{value.name} has the fixed size {value.shape[axis]}; expected a dynamic {name}")


def _tidy(model: ir.Model, interface: set[str]) -> None:
    """Remove redundant metadata, and rename inner values that have the name of a graph input or output.

    Stack traces contain paths of this machine. The shape and type noted beside a weight contradict its tensor once a
    tool transposes it; the dynamic quantization of ONNX Runtime failed on that.
    """
    for weight in model.graph.initializers.values():
        weight.shape = weight.type = None  # the tensor has both
        weight.metadata_props.clear()
    outer = {*model.graph.inputs, *model.graph.outputs}
    for node in model.graph.all_nodes():
        for key in [key for key in node.metadata_props if key.endswith("stack_trace")]:
            del node.metadata_props[key]
        for value in node.outputs:
            if value.name in interface and value not in outer:
                value.name = f"{value.name}_inner"


def _cause(error: BaseException) -> BaseException:
    """Return the first error of a chain; the exporter's own errors do not state the reason."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the progress and the warnings of the exporter, but not its errors."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
