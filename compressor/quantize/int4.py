"""Weights of 4 bits in an ONNX file: what makes memory-bound products faster, above all those of generation."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

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

BLOCK = 32
"""Weights that share a scale: the smallest that ONNX Runtime's kernels take, and the most accurate."""

ACCURACY_LEVEL = 4
"""Activations are rounded to int8 in blocks inside the kernel, so that products run on integers (ONNX Runtime's
``accuracy_level`` of MatMulNBits; 1 would multiply in float32)."""


class Int4Error(CompressorError):
    """A model cannot be written with 4-bit weights."""


def to_int4(source: Path, destination: Path) -> int:
    """Write the version of a float32 ONNX file whose Linear weights have 4 bits, as MatMulNBits of ONNX Runtime.

    Blocks of 32 weights along the input channels share a scale and a zero point, rounded to nearest (Dettmers &
    Zettlemoyer 2023, arXiv:2212.09720, find small blocks best at 4 bits); ONNX Runtime's own quantizer writes them.

    Returns:
        The number of quantized nodes.

    Raises:
        Int4Error: ONNX Runtime's tools are missing, or there is nothing to quantize.
    """
    try:
        with _quiet():
            from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
    except ImportError as error:
        raise Int4Error(
            "int4 is written with ONNX Runtime's tools, which are missing: pip install onnxruntime"
        ) from error
    model = load(source)
    linears, _ = candidates(model, convolutions=False)
    if not linears:
        raise Int4Error(
            f"{source.name} has no MatMul or Gemm with a constant float32 weight of at least {SMALLEST} x {SMALLEST}: "
            "int4 has nothing to work on, leave it out for this model."
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
    with _quiet():
        quantizer = MatMulNBitsQuantizer(
            model, bits=4, block_size=BLOCK, accuracy_level=ACCURACY_LEVEL, nodes_to_exclude=others
        )
        quantizer.process()
    save(quantizer.model.model, destination, EXTERNAL_ABOVE)
    return len(linears)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The quantizer logs every node, and configures logging for the whole program when it is imported."""
    root = logging.getLogger()
    before = root.level, list(root.handlers), logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        root.setLevel(before[0])
        root.handlers[:] = before[1]
        logging.disable(before[2])
