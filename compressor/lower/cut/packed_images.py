"""Inputs and outputs of files for images as grids of patches, in the shapes that transformers.js gives and expects.

The graph has a row for each image, padded behind: patches ``[images, patches, values]`` and features ``[images, image
tokens, width]``. The file has those of all images behind each other: ``[all patches, values]`` and ``[all image tokens,
width]``. Positions are ``[rows, tokens, 3]`` in the graph and ``[3, rows, tokens]`` in the file.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from runtimes.base.grid_positions import AXES
from runtimes.base.vision_language import FEATURES, GRID, PIXELS, POSITIONS


class _Nodes:
    """Nodes that are inserted into a graph before one of its nodes, or at its end."""

    def __init__(self, graph: ir.Graph, before: ir.Node | None) -> None:
        self._graph, self._before = graph, before

    def __call__(self, operator: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        """Insert a node and return its only output."""
        node = ir.node(operator, inputs, attributes)
        if self._before is None:
            self._graph.append(node)
        else:
            self._graph.insert_before(self._before, node)
        return node.outputs[0]

    def numbers(self, *values: int) -> ir.Value:
        """Insert a constant with one axis."""
        return self("Constant", value_ints=list(values))

    def number(self, value: int) -> ir.Value:
        """Insert a constant without an axis."""
        return self("Constant", value_int=value)

    def starts(self, counts: ir.Value) -> ir.Value:
        """Insert the sums of the counts before each, of parts that stand behind each other."""
        return self("Sub", self("CumSum", counts, self.number(0)), counts)


def pack_images(model: ir.Model, merge: int, grid: str) -> None:
    """Let a vision encoder read and return the patches and features of all images behind each other.

    Args:
        model: its file, which is edited.
        merge: side of the square of patches of a feature.
        grid: name of the input of the grids in the file.
    """
    graph = model.graph
    inputs = {str(value.name): value for value in graph.inputs}
    pixels, grids = inputs[PIXELS], inputs[GRID]
    first = graph[0]
    assert pixels.shape is not None
    packed = ir.Value(name=PIXELS, shape=ir.Shape(["patches", *pixels.shape[2:]]), type=pixels.type)
    pixels.name, grids.name, grids.shape = f"rows of {PIXELS}", grid, ir.Shape(["images", AXES])
    graph.inputs[graph.inputs.index(pixels)] = packed
    ir.convenience.replace_all_uses_with(pixels, _rows(_Nodes(graph, first), packed, grids))
    (features,) = graph.outputs
    flat = _flat(_Nodes(graph, None), features, packed, grids, merge)
    assert features.shape is not None
    features.name, flat.name, flat.type = f"rows of {FEATURES}", FEATURES, features.type
    flat.shape = ir.Shape(["image_tokens", features.shape[2]])
    graph.outputs[0] = flat


def _rows(nodes: _Nodes, packed: ir.Value, grids: ir.Value) -> ir.Value:
    """Return patches in a row for each image; a smaller image is followed by patches of the next."""
    counts = nodes("ReduceProd", grids, nodes.numbers(1), keepdims=0)
    longest = nodes("ReduceMax", counts, nodes.numbers(0), keepdims=0)
    places = nodes("Range", nodes.number(0), longest, nodes.number(1))
    starts = nodes("Unsqueeze", nodes.starts(counts), nodes.numbers(1))
    last = nodes("Sub", nodes("Shape", packed, start=0, end=1), nodes.numbers(1))
    return nodes("Gather", packed, nodes("Min", nodes("Add", starts, places), last), axis=0)


def _flat(nodes: _Nodes, features: ir.Value, packed: ir.Value, grids: ir.Value, merge: int) -> ir.Value:
    """Return the features of all images behind each other, without those of padding."""
    area = nodes.number(merge**2)
    counts = nodes("Div", nodes("ReduceProd", grids, nodes.numbers(1), keepdims=0), area)
    starts = nodes.starts(counts)
    every = nodes("Squeeze", nodes("Div", nodes("Shape", packed, start=0, end=1), area), nodes.numbers(0))
    number = nodes("Unsqueeze", nodes("Range", nodes.number(0), every, nodes.number(1)), nodes.numbers(1))
    behind = nodes("Cast", nodes("GreaterOrEqual", number, starts), to=ir.DataType.INT64)
    image = nodes("Sub", nodes("ReduceSum", behind, nodes.numbers(1), keepdims=0), nodes.number(1))
    inside = nodes("Sub", nodes("Squeeze", number, nodes.numbers(1)), nodes("Gather", starts, image, axis=0))
    places = nodes("Concat", *(nodes("Unsqueeze", each, nodes.numbers(1)) for each in (image, inside)), axis=1)
    return nodes("GatherND", features, places)


def put_axes_first(model: ir.Model) -> None:
    """Let a decoder read positions as ``[3, rows, tokens]``, if it reads positions on three axes.

    A decoder whose first step is to put the axes first reads the new input instead of that step's result: two steps
    that cancel out would leave the input with a second name in OpenVINO.
    """
    graph = model.graph
    for value in [each for each in graph.inputs if each.name == POSITIONS]:
        assert value.shape is not None
        if len(value.shape) < AXES:
            continue
        first = ir.Value(name=POSITIONS, shape=ir.Shape([AXES, *value.shape[:2]]), type=value.type)
        value.name = f"rows of {POSITIONS}"
        graph.inputs[graph.inputs.index(value)] = first
        for node in [use.node for use in value.uses() if _puts_axes_first(use.node)]:
            ir.convenience.replace_all_uses_with(node.outputs[0], first)
            graph.remove(node, safe=True)
        if value.uses():
            ir.convenience.replace_all_uses_with(value, _Nodes(graph, graph[0])("Transpose", first, perm=[1, 2, 0]))


def _puts_axes_first(node: ir.Node) -> bool:
    return node.op_type == "Transpose" and list(node.attributes.get_ints("perm", ())) == [2, 0, 1]
