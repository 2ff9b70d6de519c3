"""Weight-only int4 quantization of an ONNX file, which speeds up memory-bound products such as those of decode."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx

from compressor.errors import CompressorError
from compressor.quantize.qdq_rewrite import (
    EXTERNAL_ABOVE,
    PREFIX,
    SMALLEST,
    Edit,
    candidates,
    load,
    paired,
    remove_unused,
    replace_nodes,
    save,
)
from runtimes.base.protocols import first_line

BLOCK = 32
"""Weights per scale: the smallest block size that ONNX Runtime's kernels accept, and the most accurate."""

ACCURACY_LEVEL = 4
"""``accuracy_level`` of ONNX Runtime's MatMulNBits: the kernel rounds blocks of the activation to int8 and multiplies
integers; 1 would multiply in float32."""


class Int4Error(CompressorError):
    """A model cannot be quantized to int4."""


def to_int4(source: Path, destination: Path) -> int:
    """Quantize the Linear weights of a float32 ONNX file to 4 bits, as MatMulNBits nodes of ONNX Runtime.

    Blocks of 32 weights along the input channels share a scale and a zero point; weights are rounded to nearest.
    Dettmers & Zettlemoyer (2023, arXiv:2212.09720) find small blocks best at 4 bits. ONNX Runtime's quantizer writes
    the nodes.

    Returns:
        The number of quantized nodes.

    Raises:
        Int4Error: ONNX Runtime's tools are not installed or fail, or the file has no node to quantize.
    """
    try:
        with _quiet():
            from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
    except ImportError as error:
        raise Int4Error(
            "Quantization to int4 needs ONNX Runtime, which is not installed: run pip install onnxruntime"
        ) from error
    model = load(source)
    linears, _ = candidates(model, convolutions=False)
    if not linears:
        raise Int4Error(
            f"{source.name} has no MatMul or Gemm with a constant float32 weight of at least {SMALLEST} x {SMALLEST}, "
            "so there is nothing to quantize to int4; choose another precision."
        )
    edit = Edit(model.graph)
    for node, linear in paired(model.graph, linears):
        if linear is None:
            edit.nodes.append(node)
        else:
            edit.product(linear, (linear.activation, edit.plain_weight(linear)), linear.output)
    replace_nodes(model.graph, edit.nodes)
    remove_unused(model.graph, {linear.weight for linear in linears})
    outputs = [linear.output for linear in linears]
    products = {*outputs, *(f"{PREFIX}{output}/product" for output in outputs)}
    others = [node.name for node in model.graph.node if node.op_type == "MatMul" and node.output[0] not in products]
    save(_in_four_bits(MatMulNBitsQuantizer, model, others, source.name), destination, EXTERNAL_ABOVE)
    return len(linears)


def _in_four_bits(quantizer: Any, model: onnx.ModelProto, others: list[str], name: str) -> onnx.ModelProto:
    """Quantize all products but those named in `others` with a quantizer of ONNX Runtime.

    Raises:
        Int4Error: it fails.
    """
    try:
        with _quiet():
            made = quantizer(model, bits=4, block_size=BLOCK, accuracy_level=ACCURACY_LEVEL, nodes_to_exclude=others)
            made.process()
    except Exception as error:  # the tools raise errors of NumPy, of onnx and their own
        reason = f"ONNX Runtime's tools cannot quantize {name} to int4: {first_line(error)}"
        raise Int4Error(f"{reason}; choose another precision.") from error
    quantized: onnx.ModelProto = made.model.model
    return quantized


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence logging and restore its configuration: the quantizer logs every node and configures the root logger."""
    root = logging.getLogger()
    before = root.level, list(root.handlers), logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        root.setLevel(before[0])
        root.handlers[:] = before[1]
        logging.disable(before[2])
