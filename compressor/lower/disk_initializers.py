"""ONNX files of models whose weights stay on disk: each weight is read when the file is written, one at a time."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
import torch

from passes.execute.offloaded_weights import in_memory, is_offloaded


def leave_on_disk(model: ir.Model) -> bool:
    """Let an exported model read its weights from disk as they are written, those in front of a transpose transposed.

    Args:
        model: as torch.onnx exports it, not optimised yet: that would compute with the stand-ins.

    Returns:
        Whether there were any such weights.
    """
    found = False
    for value in list(model.graph.initializers.values()):
        stand_in = getattr(value.const_value, "raw", None)
        if not isinstance(stand_in, torch.Tensor) or not is_offloaded(stand_in):
            continue
        found = True
        value.const_value = _read_later(stand_in, range(stand_in.ndim), value)
        readers = value.consumers()
        if len(readers) == 1 and readers[0].op_type == "Transpose":  # a tied weight is left to its readers
            _transpose(model.graph, value, readers[0], stand_in)
    return found


def _transpose(graph: ir.Graph, value: ir.Value, node: ir.Node, stand_in: torch.Tensor) -> None:
    """Put the transposed weight in the place of a weight and the node that transposes it."""
    turned = node.outputs[0]
    weight = ir.Value(name=f"{value.name}_transposed", shape=turned.shape, type=turned.type)
    weight.const_value = _read_later(stand_in, node.attributes["perm"].as_ints(), weight)
    graph.register_initializer(weight)
    turned.replace_all_uses_with(weight)
    graph.remove(node, safe=True)
    del graph.initializers[value.name or ""]


def _read_later(stand_in: torch.Tensor, order: Sequence[int], value: ir.Value) -> ir.LazyTensor:
    """The weight behind a stand-in with its axes in an order, read anew whenever it is asked for."""

    def read() -> ir.TensorProtocol:
        return ir.tensor(in_memory(stand_in).permute(*order).contiguous().numpy(), name=value.name)

    shape = ir.Shape([stand_in.shape[axis] for axis in order])
    return ir.LazyTensor(read, dtype=ir.DataType.FLOAT, shape=shape, name=value.name)
