"""ONNX initializers for weights that stay on disk: each is read when the file is written, one at a time."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
import torch

from passes.execute.offloaded_weights import in_memory, is_offloaded


def stream_offloaded_initializers(model: ir.Model) -> bool:
    """Replace the placeholders of offloaded weights by tensors that are read from disk when the model is written.

    A weight whose only consumer is a Transpose node is stored transposed, and the node is removed.

    Args:
        model: as torch.onnx exports it, before optimisation, which would compute with the placeholders.

    Returns:
        Whether the model has offloaded weights.
    """
    any_offloaded = False
    for value in list(model.graph.initializers.values()):
        placeholder = getattr(value.const_value, "raw", None)
        if not isinstance(placeholder, torch.Tensor) or not is_offloaded(placeholder):
            continue
        any_offloaded = True
        value.const_value = _read_later(placeholder, range(placeholder.ndim), value)
        consumers = value.consumers()
        if (
            len(consumers) == 1 and consumers[0].op_type == "Transpose"
        ):  # other consumers of a tied weight need it as is
            _store_transposed(model.graph, value, consumers[0], placeholder)
    return any_offloaded


def _store_transposed(graph: ir.Graph, value: ir.Value, node: ir.Node, placeholder: torch.Tensor) -> None:
    """Replace a weight and its Transpose node by the transposed weight."""
    transposed = node.outputs[0]
    weight = ir.Value(name=f"{value.name}_transposed", shape=transposed.shape, type=transposed.type)
    weight.const_value = _read_later(placeholder, node.attributes["perm"].as_ints(), weight)
    graph.register_initializer(weight)
    transposed.replace_all_uses_with(weight)
    graph.remove(node, safe=True)
    del graph.initializers[value.name or ""]


def _read_later(placeholder: torch.Tensor, order: Sequence[int], value: ir.Value) -> ir.LazyTensor:
    """Return a lazy tensor that reads an offloaded weight from disk at each access and permutes its axes to `order`."""

    def read() -> ir.TensorProtocol:
        return ir.tensor(in_memory(placeholder).permute(*order).contiguous().numpy(), name=value.name)

    shape = ir.Shape([placeholder.shape[axis] for axis in order])
    return ir.LazyTensor(read, dtype=ir.DataType.FLOAT, shape=shape, name=value.name)
