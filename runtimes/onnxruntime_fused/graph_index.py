"""Who makes and who reads each value of an ONNX graph, and the small patterns that several rewrites look for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

if TYPE_CHECKING:
    import onnx

DOMAIN = "com.microsoft"


def fixed(value: onnx.ValueInfoProto) -> list[int]:
    """The axes of a value, 0 where they are free."""
    return [each.dim_value for each in value.type.tensor_type.shape.dim]


class Index:
    """Who makes and who reads each value of a graph, and the constants; as it was when the index was made."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.makers = {value: node for node in graph.node for value in node.output}
        self.constants = {each.name: each for each in graph.initializer}
        self.shapes = {each.name: fixed(each) for each in (*graph.value_info, *graph.input)}
        self._readers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for value in node.input:
                self._readers.setdefault(value, []).append(node)
        self._outputs = {each.name for each in graph.output}

    def maker(self, value: str, kind: str) -> onnx.NodeProto | None:
        """The node of that kind that makes a value."""
        node = self.makers.get(value)
        return node if node is not None and node.op_type == kind and node.domain == "" else None

    def reader(self, value: str, kind: str) -> onnx.NodeProto | None:
        """The node of that kind that is all that reads a value."""
        readers = self._readers.get(value, [])
        single = len(readers) == 1 and value not in self._outputs and readers[0].op_type == kind
        return readers[0] if single else None

    def constant(self, value: str) -> npt.NDArray[Any] | None:
        """The value of a constant."""
        from onnx import numpy_helper

        return numpy_helper.to_array(self.constants[value]) if value in self.constants else None


def replace(graph: onnx.GraphProto, replaced: Mapping[str, list[onnx.NodeProto]]) -> None:
    """Put other nodes where these values were made, and drop what nothing reads any more."""
    nodes = [new for node in graph.node for new in replaced.get(node.output[0], [node])]
    read, kept = {each.name for each in graph.output}, []
    for node in reversed(nodes):
        if read & set(node.output):
            kept.append(node)
            read.update(node.input)
    del graph.node[:]
    graph.node.extend(kept[::-1])
    # One by one: what is put into a graph is copied, and the memory of what is taken out is only given back at its end.
    for place in reversed(range(len(graph.initializer))):
        if graph.initializer[place].name not in read:
            del graph.initializer[place]


def scaled(index: Index, value: str) -> tuple[str, float]:
    """What a value is a multiple of, and the factor."""
    node = index.maker(value, "Mul")
    factor = number(index, node.input[1]) if node is not None else None
    return (node.input[0], factor) if node is not None and factor is not None else (value, 1.0)


def transposed(index: Index, value: str) -> str:
    """What a value is the transpose of in its last two axes; torch.onnx does it in three axes or in all four."""
    around = index.maker(value, "Reshape")
    node = index.maker(value if around is None else around.input[0], "Transpose")
    inner = index.maker(node.input[0], "Reshape") if node is not None and around is not None else None
    if node is not None and inner is not None and attribute(node, "perm") == [0, 2, 1]:
        return str(inner.input[0])
    return str(node.input[0]) if node is not None and around is None and attribute(node, "perm") == [0, 1, 3, 2] else ""


def number(index: Index, value: str) -> float | None:
    """The only element of a constant."""
    constant = index.constant(value)
    return float(constant.item()) if constant is not None and constant.size == 1 else None


def attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    """The value of a node's attribute; the default where it has none of that name."""
    from onnx import helper

    return next((helper.get_attribute_value(each) for each in node.attribute if each.name == name), default)
