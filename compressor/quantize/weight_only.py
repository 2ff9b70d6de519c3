"""Weight-only int8, int4 and int2 quantization of an ONNX file, for memory-bound products such as those of decode.

There are two forms. MatMulNBits is an operator of ONNX Runtime. DequantizeLinear with blocks is standard ONNX since
opset 21, and what TensorRT reads; it holds int4.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from compressor.errors import CompressorError
from compressor.quantize.qdq_rewrite import (
    EXTERNAL_ABOVE,
    PREFIX,
    TYPED_OPSET,
    Edit,
    Kept,
    Linear,
    NothingToQuantizeError,
    QuantizeError,
    candidates,
    in_opset,
    load,
    paired,
    remove_unused,
    replace_nodes,
    save,
)
from runtimes.base.protocols import first_line
from runtimes.onnxruntime.target import two_bits_missing

CONTRIBUTED = "com.microsoft"
"""Domain of ONNX Runtime's own operators."""

BLOCK = 32
"""Weights per scale: the smallest block size that ONNX Runtime's kernels accept, and the most accurate."""

SMALL_BLOCK = 16
"""Weights per scale where `BLOCK` does not divide the input channels, which TensorRT requires of a block."""

ACCURACY_LEVEL = 4
"""``accuracy_level`` of ONNX Runtime's MatMulNBits: the kernel rounds blocks of the activation to int8 and multiplies
integers; 1 would multiply in float32."""

LARGEST = 7
"""The largest step of a symmetric int4 weight."""

CLIPPING = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
"""Shares of the largest weight of a block that its largest step may stand for; larger weights are clipped."""


TWO_BITS = (-2, 1)
"""The smallest and the largest step of a symmetric 2-bit weight; the zero point is 2, that of MatMulNBits."""

TERNARY = (-1, 1)
"""The steps of a ternary weight (BitNet b1.58: Ma et al. 2024, arXiv:2402.17764)."""

SHARES = tuple(np.linspace(1.0, 0.35, 14))
"""Shares of the largest weight of a block that are tried as the scale of its 2-bit steps. For 32 normal weights, the
scale of least squared error lies at 0.45 (four steps) and 0.6 (ternary) of the largest one on average."""


class WeightOnlyError(CompressorError):
    """A model cannot be quantized to int8, int4 or int2 weights."""


@dataclass(frozen=True)
class WeightOnly:
    """Result of `to_int8`, `to_int4`, `to_int4_blocks` and `to_int2`.

    Args:
        nodes: number of quantized nodes.
        kept: matrices that stay in float, with the reason.
    """

    nodes: int
    kept: tuple[Kept, ...]


def to_int4(source: Path, destination: Path) -> WeightOnly:
    """Quantize the Linear weights of a float32 ONNX file to 4 bits, as MatMulNBits nodes of ONNX Runtime.

    Blocks of 32 weights along the input channels share a scale and a zero point; weights are rounded to nearest.
    Dettmers & Zettlemoyer (2023, arXiv:2212.09720) find small blocks best at 4 bits. ONNX Runtime's quantizer writes
    the nodes.

    Raises:
        WeightOnlyError: ONNX Runtime's tools are not installed or fail, or the file has no node to quantize.
    """
    return _in_bits(4, source, destination)


def to_int8(source: Path, destination: Path) -> WeightOnly:
    """Quantize the Linear weights of a float32 ONNX file to 8 bits, as MatMulNBits nodes of ONNX Runtime.

    As `to_int4`. Activations have no range in the file, so values that are far larger than all others, as in the
    trunk of language models (Sun et al. 2024, arXiv:2402.17762), do not coarsen the steps of a whole tensor: the
    kernel rounds each block of 32 values of a token with a scale of its own.

    Raises:
        WeightOnlyError: ONNX Runtime's tools are not installed or fail, or the file has no node to quantize.
    """
    return _in_bits(8, source, destination)


def _in_bits(bits: int, source: Path, destination: Path) -> WeightOnly:
    """Write the nodes of `to_int4` or `to_int8`. Raises their errors."""
    try:
        with _quiet():
            from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
    except ImportError as error:
        raise WeightOnlyError(
            f"Quantization to int{bits} needs ONNX Runtime, which is not installed: run pip install onnxruntime"
        ) from error
    model = load(source)
    linears, kept = _linears(model, source, f"int{bits}")
    _replace_products(
        model.graph,
        linears,
        lambda edit, linear: edit.product(linear, (linear.activation, edit.plain_weight(linear)), linear.output),
    )
    outputs = [linear.output for linear in linears]
    products = {*outputs, *(f"{PREFIX}{output}/product" for output in outputs)}
    others = [node.name for node in model.graph.node if node.op_type == "MatMul" and node.output[0] not in products]
    save(_by_onnxruntime(MatMulNBitsQuantizer, bits, model, others, source.name), destination, EXTERNAL_ABOVE)
    return WeightOnly(len(linears), kept)


def to_int4_blocks(source: Path, destination: Path) -> WeightOnly:
    """Quantize the Linear weights of a float32 ONNX file to 4 bits, each with a DequantizeLinear of opset 21.

    Blocks of 32 weights along the input channels share a scale, or of 16 where 32 does not divide these. Weights are
    symmetric, as TensorRT requires; the scale is the one of least squared error among those that clip up to a quarter
    of the largest weight.

    Raises:
        WeightOnlyError: The file has no node to quantize.
        QuantizeError: A weight has NaN or infinity.
    """
    model = in_opset(load(source), TYPED_OPSET)
    linears, kept = _linears(model, source, "int4", whole_blocks=True)
    _replace_products(
        model.graph,
        linears,
        lambda edit, linear: edit.product(linear, (linear.activation, _blocks(edit, linear)), linear.output),
    )
    save(model, destination, EXTERNAL_ABOVE)
    return WeightOnly(len(linears), kept)


def to_int2(source: Path, destination: Path, *, steps: tuple[int, int] = TWO_BITS) -> WeightOnly:
    """Quantize the Linear weights of a float32 ONNX file to 2 bits, as MatMulNBits nodes of ONNX Runtime.

    Blocks of 32 weights along the input channels share a scale; the zero point is 2. The scale is the one of least
    squared error among `SHARES` and both signs. Blocks of a ternary weight are reproduced. ONNX Runtime's own quantizer
    takes a half of the largest weight as the scale, which turns one of the signs of a ternary weight into a half.

    Args:
        source: the float32 file.
        destination: the file to write.
        steps: `TWO_BITS`, or `TERNARY` for weights of -1, 0 and 1 times the scale.

    Raises:
        WeightOnlyError: this release of ONNX Runtime cannot compute such products, or the file has no node to quantize.
        QuantizeError: a weight has NaN or infinity.
    """
    if (reason := two_bits_missing()) is not None:
        raise WeightOnlyError(reason)
    model = load(source)
    linears, kept = _linears(model, source, "int2")
    _replace_products(model.graph, linears, lambda edit, linear: _product_of_two_bits(edit, linear, steps))
    if all(each.domain != CONTRIBUTED for each in model.opset_import):
        model.opset_import.append(helper.make_opsetid(CONTRIBUTED, 1))
    save(model, destination, EXTERNAL_ABOVE)
    return WeightOnly(len(linears), kept)


def quantize_two_bits(
    weight: npt.NDArray[np.float32], block: int, steps: tuple[int, int] = TWO_BITS
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Round a weight [K, N] to the steps, with a scale for each block of `block` rows in a column; return both.

    A scale may be negative, so that the step without a counterpart, -2, stands for weights of either sign.

    >>> found, scale = quantize_two_bits(np.array([[0.5], [0.0], [-1.0], [0.5]], np.float32), block=4)
    >>> found.ravel().tolist(), scale.tolist()
    ([1, 0, -2, 1], [[0.5]])
    """
    blocks = weight.reshape(-1, block, weight.shape[1])
    largest = np.abs(blocks).max(axis=1, keepdims=True)
    best = np.full(largest.shape, np.inf, np.float32)
    found, scales = np.zeros(blocks.shape, np.int8), np.ones(largest.shape, np.float32)
    for share in (sign * share for share in SHARES for sign in (1, -1)):
        scale = np.where(largest > 0, largest * share, 1).astype(np.float32)
        rounded = np.clip(np.rint(blocks / scale), *steps)
        error = np.square(rounded * scale - blocks).sum(axis=1, keepdims=True)
        better = error < best
        best, scales = np.where(better, error, best), np.where(better, scale, scales)
        found = np.where(better, rounded, found).astype(np.int8)
    return found.reshape(weight.shape), scales[:, 0]


def pack_two_bits(steps: npt.NDArray[np.int8], block: int) -> npt.NDArray[np.uint8]:
    """Store steps [K, N] as MatMulNBits reads them, [N, blocks, bytes of a block]: four in a byte, the first lowest.

    >>> pack_two_bits(np.array([[-2], [-1], [0], [1]], np.int8), block=4).tolist()
    [[[228]]]
    """
    codes = (steps.T - TWO_BITS[0]).astype(np.uint8).reshape(steps.shape[1], -1, block // 4, 4)
    packed: npt.NDArray[np.uint8] = (codes << np.array([0, 2, 4, 6], np.uint8)).sum(axis=-1, dtype=np.uint8)
    return packed


def quantize_blocks(
    weight: npt.NDArray[np.float32], block: int
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Round a weight [K, N] to steps in [-7, 7] with a scale for each block of `block` rows in a column; return both.

    >>> steps, scale = quantize_blocks(np.array([[3.0], [-7.0]], np.float32), block=2)
    >>> steps.ravel().tolist(), scale.tolist()
    ([3, -7], [[1.0]])
    """
    blocks = weight.reshape(-1, block, weight.shape[1])
    largest = np.abs(blocks).max(axis=1, keepdims=True)
    best = np.full(largest.shape, np.inf, np.float32)
    steps, scales = np.zeros(blocks.shape, np.int8), np.ones(largest.shape, np.float32)
    for share in CLIPPING:
        scale = np.where(largest > 0, largest * (share / LARGEST), 1).astype(np.float32)
        rounded = np.clip(np.rint(blocks / scale), -LARGEST, LARGEST)
        error = np.square(rounded * scale - blocks).sum(axis=1, keepdims=True)
        better = error < best
        best, scales = np.where(better, error, best), np.where(better, scale, scales)
        steps = np.where(better, rounded, steps).astype(np.int8)
    return steps.reshape(weight.shape), scales[:, 0]


def _replace_products(
    graph: onnx.GraphProto, linears: Sequence[Linear], insert: Callable[[Edit, Linear], object]
) -> None:
    """Let `insert` add the nodes of each Linear in place of those that it has, and remove weights without a reader."""
    edit = Edit(graph)
    for node, linear in paired(graph, linears):
        if linear is None:
            edit.nodes.append(node)
        else:
            insert(edit, linear)
    replace_nodes(graph, edit.nodes)
    remove_unused(graph, {linear.weight for linear in linears})


def _linears(
    model: onnx.ModelProto, source: Path, precision: str, *, whole_blocks: bool = False
) -> tuple[list[Linear], tuple[Kept, ...]]:
    """Return the nodes to quantize, and those with a matrix that stay in float; `whole_blocks` takes no partial block.

    Raises:
        WeightOnlyError: There is no node to quantize.
    """
    linears, kept = candidates(model, convolutions=False)
    convolutions = {node.name for node in model.graph.node if node.op_type == "Conv"}
    kept = [each for each in kept if each.node not in convolutions]
    if whole_blocks:
        weights = Edit(model.graph).weights
        channels = {each.output: int(weights[each.weight][0].dims[1 if each.flip else 0]) for each in linears}
        partial = [each for each in linears if channels[each.output] % SMALL_BLOCK]
        reason = f"input channels, which blocks of {SMALL_BLOCK} do not divide"
        kept += [Kept(each.node, each.module, f"{channels[each.output]} {reason}") for each in partial]
        linears = [each for each in linears if each not in partial]
    if not linears:
        raise NothingToQuantizeError(source, precision)
    return linears, tuple(kept)


def _product_of_two_bits(edit: Edit, linear: Linear, steps: tuple[int, int]) -> None:
    """Add the product of an activation with a 2-bit weight, and Add for the bias."""
    base = f"{PREFIX}{linear.weight}{'/flipped' if linear.flip else ''}"
    dims = edit.weights[linear.weight][0].dims
    inputs, outputs = (dims[1], dims[0]) if linear.flip else (dims[0], dims[1])
    if base not in edit.made:
        weight = np.pad(_weight(edit, linear), ((0, -inputs % BLOCK), (0, 0)))
        found, scale = quantize_two_bits(weight, BLOCK, steps)
        edit.constant(base, pack_two_bits(found, BLOCK))
        edit.constant(f"{base}/scale", np.ascontiguousarray(scale.T))
    product = f"{PREFIX}{linear.output}/product" if linear.bias else linear.output
    sizes = {"K": inputs, "N": outputs, "bits": 2, "block_size": BLOCK, "accuracy_level": ACCURACY_LEVEL}
    edit.node("MatMulNBits", [linear.activation, base, f"{base}/scale"], [product], domain=CONTRIBUTED, **sizes)
    if linear.bias:
        edit.node("Add", [product, linear.bias], [linear.output])


def _weight(edit: Edit, linear: Linear) -> npt.NDArray[np.float32]:
    """Return the float weight [K, N].

    Raises:
        QuantizeError: it has NaN or infinity.
    """
    weight = numpy_helper.to_array(edit.weights[linear.weight][0])
    if not np.isfinite(weight).all():
        raise QuantizeError(f"Weight {linear.weight} of {linear.node} has NaN or infinity; check the model.")
    return weight.T if linear.flip else weight


def _blocks(edit: Edit, linear: Linear) -> str:
    """Add the int4 weight and its DequantizeLinear; return the name of the dequantized weight [K, N]."""
    base = f"{PREFIX}{linear.weight}{'/flipped' if linear.flip else ''}"
    names = (base, f"{base}/scale")
    weight = _weight(edit, linear)
    block = BLOCK if len(weight) % BLOCK == 0 else SMALL_BLOCK
    if base not in edit.made:
        steps, scale = quantize_blocks(weight, block)
        edit.constant(names[0], steps.astype(ml_dtypes.int4))
        edit.constant(names[1], scale)
    return edit.once("DequantizeLinear", names, f"{base}/float", axis=0, block_size=block)


def _by_onnxruntime(quantizer: Any, bits: int, model: onnx.ModelProto, others: list[str], name: str) -> onnx.ModelProto:
    """Quantize all products but those named in `others` with a quantizer of ONNX Runtime.

    Raises:
        WeightOnlyError: it fails.
    """
    try:
        with _quiet():
            made = quantizer(model, bits=bits, block_size=BLOCK, accuracy_level=ACCURACY_LEVEL, nodes_to_exclude=others)
            made.process()
    except Exception as error:  # the tools raise errors of NumPy, of onnx and their own
        reason = f"ONNX Runtime's tools cannot quantize {name} to int{bits}: {first_line(error)}"
        raise WeightOnlyError(f"{reason}; choose another precision.") from error
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
