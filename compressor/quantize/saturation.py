"""Whether ONNX Runtime's products of 8-bit integers saturate on this processor.

Without VNNI its x86 kernels for uint8 times int8 add pairs of products in 16 bits, which hold 32,767 at most, while two
products may come to 64,770 (documentation of ONNX Runtime, "Quantize ONNX models", on `reduce_range`).
"""

from __future__ import annotations

import functools

import numpy as np

DEPTH = 64


@functools.cache
def int8_saturates() -> bool:
    """Multiply the largest values that uint8 and int8 hold, and compare the sum with the exact one."""
    import onnxruntime
    from onnx import TensorProto, helper

    ends = [helper.make_tensor_value_info("x", TensorProto.UINT8, [8, DEPTH])]
    answers = [helper.make_tensor_value_info("y", TensorProto.INT32, [8, 8])]
    weight = helper.make_tensor("w", TensorProto.INT8, [DEPTH, 8], np.full(DEPTH * 8, 127, np.int8))
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "w"], ["y"])], "products", ends, answers, [weight]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": np.full((8, DEPTH), 255, np.uint8)})
    return bool((np.asarray(found) != 255 * 127 * DEPTH).any())
