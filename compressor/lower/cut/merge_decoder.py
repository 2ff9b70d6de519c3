"""Merge both files of a decoder into one whose weights are stored once, as Optimum and transformers.js open it.

``decoder_model_merged.onnx`` has the inputs of both files and ``use_cache_branch``, bool [1]. An If node runs the graph
of further tokens where it is true, else that of the first token. An If node has the same outputs in both branches, so
the first one also returns keys and values of cross-attentions: empty ones, [0, heads, 1, width], as Optimum writes
them. Whoever runs the file keeps those of the first call.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from compressor.lower.cut.part import order_of_input, save
from runtimes.base.encoder_decoder import DECODER, MERGED, PRESENT, WITH_PAST, is_cross

USE_CACHE = "use_cache_branch"

Values = dict[str, ir.Value]


def merge(folder: Path) -> Path:
    """Write the merged file of a decoder beside its two files in a folder, and return its path.

    Both files must be cut from one file, see `compressor.lower.cut.encoder_decoder`: weights of one name are the same.
    """
    first, further = (ir.load(folder / f"{stem}.onnx") for stem in (DECODER, WITH_PAST))
    outputs = list(first.graph.outputs)
    empty = _add_missing_outputs(further.graph, outputs)
    returned = [_returned(value, empty) for value in outputs]
    inputs, weights = _shared(first.graph, further.graph)
    use_cache = ir.Value(name=USE_CACHE, shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.BOOL))
    branches = [
        ir.AttrGraph("then_branch", _branch(further.graph, "with_past", inputs | weights)),
        ir.AttrGraph("else_branch", _branch(first.graph, "no_past", inputs | weights)),
    ]
    graph = ir.Graph(
        [*sorted(inputs.values(), key=order_of_input), use_cache],
        returned,
        nodes=[ir.Node("", "If", [use_cache], branches, outputs=returned, name="which call")],
        initializers=list(weights.values()),
        opset_imports=further.graph.opset_imports | first.graph.opset_imports,
        name="merged",
    )
    functions = {**further.functions, **first.functions}
    path = folder / f"{MERGED}.onnx"
    save(ir.Model(graph, ir_version=first.ir_version, functions=list(functions.values())), path)
    return path


def _add_missing_outputs(graph: ir.Graph, outputs: Sequence[ir.Value]) -> set[str]:
    """Give a graph the outputs that it lacks, as empty ones, in the order of the others; return their names."""
    own = {str(value.name): value for value in graph.outputs}
    missing = {str(value.name): _empty(graph, value) for value in outputs if value.name not in own}
    graph.outputs.clear()
    graph.outputs.extend((own | missing)[str(value.name)] for value in outputs)
    return set(missing)


def _empty(graph: ir.Graph, like: ir.Value) -> ir.Value:
    """Append a constant [0, heads, 1, width] of the type of keys or values."""
    assert like.shape is not None
    assert like.dtype is not None
    heads, width = like.shape[1], like.shape[3]
    assert isinstance(heads, int)
    assert isinstance(width, int)
    tensor = ir.tensor(np.zeros((0, heads, 1, width), like.dtype.numpy()), name=f"{like.name} of no row")
    node = ir.node("Constant", [], {"value": tensor})
    graph.append(node)
    node.outputs[0].name = like.name
    return node.outputs[0]


def _shared(*graphs: ir.Graph) -> tuple[Values, Values]:
    """Return the inputs and the initializers of several graphs as new values, one for each name."""
    inputs = {str(value.name): _copy(value) for graph in graphs for value in graph.inputs}
    for name, value in inputs.items():
        if is_cross(name) and value.shape is not None:  # the first call gets caches without tokens
            value.shape = ir.Shape([value.shape[0], value.shape[1], "cached_source", value.shape[3]])
    weights = {str(value.name): _copy(value) for graph in graphs for value in graph.initializers.values()}
    return inputs, weights


def _copy(value: ir.Value) -> ir.Value:
    return ir.Value(name=value.name, shape=value.shape, type=value.type, const_value=value.const_value)


def _branch(graph: ir.Graph, name: str, shared: Mapping[str, ir.Value]) -> ir.Graph:
    """Move the nodes of a graph into one without inputs and weights, which reads those of the graph around it."""
    for value in (*graph.inputs, *graph.initializers.values()):
        ir.convenience.replace_all_uses_with(value, shared[str(value.name)])
    outputs, nodes = list(graph.outputs), list(graph)
    graph.outputs.clear()
    graph.remove(nodes)
    for value in outputs:
        value.name = f"{name}.{value.name}"
    return ir.Graph([], outputs, nodes=nodes, name=name)


def _returned(value: ir.Value, empty: Collection[str]) -> ir.Value:
    """Return an output of the merged file; the two branches return caches of other lengths."""
    assert value.shape is not None
    sizes = list(value.shape)
    if str(value.name).startswith(PRESENT):
        sizes[2] = ir.SymbolicDim("source" if value.name in empty else "decoder_tokens")
    if value.name in empty:
        sizes[0] = ir.SymbolicDim("rows")
    return ir.Value(name=value.name, shape=ir.Shape(sizes), type=value.type)
