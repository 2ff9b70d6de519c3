"""Producers and consumers of the tensors of an ONNX graph, and small patterns shared by several rewrites."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

if TYPE_CHECKING:
    import onnx

DOMAIN = "com.microsoft"


def fixed(value: onnx.ValueInfoProto) -> list[int]:
    """Return the axis sizes of a tensor, with 0 for a dynamic axis."""
    return [axis.dim_value for axis in value.type.tensor_type.shape.dim]


class Index:
    """Producers, consumers, constants and shapes of a graph's tensors; a snapshot that later edits do not update."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.makers = {value: node for node in graph.node for value in node.output}
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        self.shapes = {value.name: fixed(value) for value in (*graph.value_info, *graph.input)}
        self._readers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for value in node.input:
                self._readers.setdefault(value, []).append(node)
        self._outputs = {output.name for output in graph.output}

    def maker(self, value: str, kind: str) -> onnx.NodeProto | None:
        """Return the producer of tensor `value` if its operator is `kind` of the default ONNX domain, else None."""
        node = self.makers.get(value)
        return node if node is not None and node.op_type == kind and node.domain == "" else None

    def reader(self, value: str, kind: str) -> onnx.NodeProto | None:
        """Return the sole consumer of tensor `value` if its operator is `kind`, else None."""
        readers = self._readers.get(value, [])
        single = len(readers) == 1 and value not in self._outputs and readers[0].op_type == kind
        return readers[0] if single else None

    def constant(self, value: str) -> npt.NDArray[Any] | None:
        """Return the array of the initializer called `value`; None if there is no such initializer."""
        from onnx import numpy_helper

        return numpy_helper.to_array(self.constants[value]) if value in self.constants else None


def replace(graph: onnx.GraphProto, replaced: Mapping[str, list[onnx.NodeProto]]) -> None:
    """Replace the producers of the given tensors by other nodes, then remove unused nodes and initializers."""
    nodes = [new for node in graph.node for new in replaced.get(node.output[0], [node])]
    read, kept = {output.name for output in graph.output}, []
    for node in reversed(nodes):
        if read & set(node.output):
            kept.append(node)
            read.update(node.input)
    del graph.node[:]
    graph.node.extend(kept[::-1])
    # Delete one by one: protobuf copies messages on insertion, and frees deleted ones only with the whole graph.
    for i in reversed(range(len(graph.initializer))):
        if graph.initializer[i].name not in read:
            del graph.initializer[i]


def scaled(index: Index, value: str) -> tuple[str, float]:
    """Return (x, factor) for a tensor computed as Mul(x, constant factor), else (value, 1.0)."""
    node = index.maker(value, "Mul")
    factor = scalar_constant(index, node.input[1]) if node is not None else None
    return (node.input[0], factor) if node is not None and factor is not None else (value, 1.0)


def transposed(index: Index, value: str) -> str:
    """Return the tensor whose last two axes are transposed to give `value`; "" if there is none.

    torch.onnx transposes either all four axes, or three axes between two Reshape nodes.
    """
    around = index.maker(value, "Reshape")
    node = index.maker(value if around is None else around.input[0], "Transpose")
    inner = index.maker(node.input[0], "Reshape") if node is not None and around is not None else None
    if node is not None and inner is not None and attribute(node, "perm") == [0, 2, 1]:
        return str(inner.input[0])
    return str(node.input[0]) if node is not None and around is None and attribute(node, "perm") == [0, 1, 3, 2] else ""


def scalar_constant(index: Index, value: str) -> float | None:
    """Return the value of a constant with one element, else None."""
    constant = index.constant(value)
    return float(constant.item()) if constant is not None and constant.size == 1 else None


def attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    """Return the value of a node's attribute, or `default` if the node has no attribute called `name`."""
    from onnx import helper

    return next((helper.get_attribute_value(entry) for entry in node.attribute if entry.name == name), default)
