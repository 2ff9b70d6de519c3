"""An ONNX file's floats in 16 bits, with what needs the range of 32 left there."""

from __future__ import annotations

import warnings
from pathlib import Path

import onnx

from compressor.errors import CompressorError
from compressor.quantize.qdq_rewrite import EXTERNAL_ABOVE, load, save

KEPT = ("LayerNormalization", "RMSNormalization", "Softmax", "ReduceMean", "ReduceSum", "Pow", "Sqrt", "Exp")
"""Operators that stay in float32: norms and softmax, whose sums and squares leave the range of fp16 (65,504)."""

SCALES_SINCE = 19
"""The first opset in which the scale of QuantizeLinear may be fp16."""


class HalfError(CompressorError):
    """A model cannot be written in 16 bits."""


def to_fp16(source: Path, destination: Path) -> int:
    """Write the fp16 version of a float32 ONNX file; inputs and outputs stay float32.

    Weights beyond the range of fp16 are clipped to it by the converter, that of ONNX Runtime's transformer tools. In a
    file with int8 products the scales become fp16, and with them what those products return; a scale too small for
    fp16 becomes its smallest positive number, 6e-8. The integers stay.

    Args:
        source: the float32 file, int8 products in it or not.
        destination: what to write; may be the source.

    Returns:
        The number of nodes that compute in fp16.

    Raises:
        HalfError: ONNX Runtime's tools are missing, no operator would compute in 16 bits, or the file's opset has no
            scales in fp16.
    """
    try:
        from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16
    except ImportError as error:
        raise HalfError(
            "fp16 is written with ONNX Runtime's tools, which are missing: pip install onnxruntime"
        ) from error
    float_model = load(source)
    _check_scales(float_model, source)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # values that it clips
        model = convert_float_to_float16(
            float_model, keep_io_types=True, op_block_list=[*DEFAULT_OP_BLOCK_LIST, *KEPT], disable_shape_infer=False
        )
    halves = {tensor.name for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT16}
    count = sum(bool(halves & set(node.input)) for node in model.graph.node)
    if not count:
        raise HalfError(f"{source.name} holds no float32 weight; fp16 has nothing to work on, leave it out.")
    save(model, destination, EXTERNAL_ABOVE)
    return count


def _check_scales(model: onnx.ModelProto, source: Path) -> None:
    """Refuse int8 products in an opset whose QuantizeLinear has no scales in fp16."""
    version = next(each.version for each in model.opset_import if each.domain in {"", "ai.onnx"})
    if version < SCALES_SINCE and any(node.op_type == "QuantizeLinear" for node in model.graph.node):
        raise HalfError(
            f"{source.name} has int8 products and opset {version}; scales in fp16 need opset {SCALES_SINCE} or newer, "
            "export it again."
        )
