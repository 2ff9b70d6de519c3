"""Conversion of an ONNX file to fp16; operators that exceed its range stay in float32."""

from __future__ import annotations

import warnings
from pathlib import Path

import onnx

from compressor.errors import CompressorError
from compressor.quantize.qdq_rewrite import EXTERNAL_ABOVE, load, save

KEPT = ("LayerNormalization", "RMSNormalization", "Softmax", "ReduceMean", "ReduceSum", "Pow", "Sqrt", "Exp")
"""Operators that stay in float32: norms and softmax, whose sums and squares exceed the range of fp16 (65,504)."""

SCALES_SINCE = 19
"""The first opset in which the scale of QuantizeLinear may be fp16."""


class HalfError(CompressorError):
    """A model cannot be converted to fp16."""


def to_fp16(source: Path, destination: Path) -> int:
    """Convert a float32 ONNX file to fp16; inputs and outputs stay float32.

    The converter of ONNX Runtime's transformer tools clips weights to the range of fp16. In a file with int8 products
    the scales, and with them the outputs of the products, become fp16; a scale too small for fp16 becomes its smallest
    positive number, 6e-8. Integer tensors stay unchanged.

    Args:
        source: float32 ONNX file, with or without int8 products.
        destination: output path; may equal `source`.

    Returns:
        The number of nodes that compute in fp16.

    Raises:
        HalfError: ONNX Runtime's tools are not installed, no node would compute in fp16, or the opset of the file does
            not support fp16 scales.
    """
    try:
        from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16
    except ImportError as error:
        raise HalfError(
            "Conversion to fp16 needs ONNX Runtime, which is not installed: run pip install onnxruntime"
        ) from error
    float_model = load(source)
    _check_scales(float_model, source)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the converter warns about clipped values
        model = convert_float_to_float16(
            float_model, keep_io_types=True, op_block_list=[*DEFAULT_OP_BLOCK_LIST, *KEPT], disable_shape_infer=False
        )
    halves = {tensor.name for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT16}
    count = sum(bool(halves & set(node.input)) for node in model.graph.node)
    if not count:
        raise HalfError(
            f"{source.name} has no float32 weight, so there is nothing to convert to fp16; choose another precision."
        )
    save(model, destination, EXTERNAL_ABOVE)
    return count


def _check_scales(model: onnx.ModelProto, source: Path) -> None:
    """Raise HalfError for int8 products in an opset whose QuantizeLinear does not support fp16 scales."""
    version = next(opset.version for opset in model.opset_import if opset.domain in {"", "ai.onnx"})
    if version < SCALES_SINCE and any(node.op_type == "QuantizeLinear" for node in model.graph.node):
        raise HalfError(
            f"{source.name} has int8 products and opset {version}, but fp16 scales need opset {SCALES_SINCE} or newer; "
            "export the model again."
        )
