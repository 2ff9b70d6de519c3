"""Detection of saturation in ONNX Runtime's products of 8-bit integers on this processor.

On x86 without VNNI, the kernels for uint8 times int8 add pairs of products in 16 bits. These hold at most 32,767, but
two products may sum to 64,770 (documentation of ONNX Runtime, "Quantize ONNX models", on `reduce_range`).
"""

from __future__ import annotations

import functools

import numpy as np

DEPTH = 64


@functools.cache
def int8_saturates() -> bool:
    """Return whether a MatMulInteger of the largest uint8 and int8 values differs from the exact sum."""
    import onnxruntime
    from onnx import TensorProto, helper

    inputs = [helper.make_tensor_value_info("x", TensorProto.UINT8, [8, DEPTH])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.INT32, [8, 8])]
    weight = helper.make_tensor("w", TensorProto.INT8, [DEPTH, 8], np.full(DEPTH * 8, 127, np.int8))
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "w"], ["y"])], "products", inputs, outputs, [weight]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (product,) = session.run(None, {"x": np.full((8, DEPTH), 255, np.uint8)})
    return bool((np.asarray(product) != 255 * 127 * DEPTH).any())
