"""Types of the weights in a GGUF file, and the rewriting of a float file in the types of a precision."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.base.protocols import BuildError

# Type of the matrices by precision. Vectors, such as the weights of norms, stay F32.
MATRICES = {"fp32": "F32", "fp16": "F16", "int8": "Q8_0", "int4": "Q4_0"}
FILE_TYPES = {"fp32": "ALL_F32", "fp16": "MOSTLY_F16", "int8": "MOSTLY_Q8_0", "int4": "MOSTLY_Q4_0"}
PRECISIONS = {"F32": "fp32", "F16": "fp16", "BF16": "bf16", "Q8_0": "int8", "Q4_0": "int4", "Q4_1": "int4"}
# The embedding and the head decide on most of the loss, so that int4 files keep them in 8 bits (llama.cpp's own
# quantizer takes Q6_K for them, which the package gguf cannot write).
OUTER = ("token_embd.weight", "output.weight")
# Q4_1 has an offset for each 32 values, and 5 bits a weight instead of 4.5. It is taken where its squared error is at
# most this share of that of Q4_0. Weights of a Q4_1 file are reproduced by it; for others both errors are about equal.
WITH_OFFSET, CLOSER = "Q4_1", 0.5
WRITTEN_ANEW = ("general.architecture", "general.file_type", "general.quantization_version")


def type_of(name: str, shape: tuple[int, ...], precision: str) -> str:
    """Return the type of a tensor in a file of a precision.

    Args:
        name: its name in the file.
        shape: its shape, the axis of the products last.
        precision: one of `MATRICES`. A row that is no multiple of the 32 values of a block is stored as F16.

    >>> type_of("blk.0.ffn_up.weight", (128, 64), "int4"), type_of("output.weight", (500, 64), "int4")
    ('Q4_0', 'Q8_0')
    >>> type_of("blk.0.ffn_up.weight", (128, 48), "int4"), type_of("blk.0.ffn_norm.weight", (64,), "fp16")
    ('F16', 'F32')
    """
    if len(shape) < 2:
        return "F32"
    kind = "Q8_0" if precision == "int4" and name in OUTER else MATRICES[precision]
    return "F16" if kind.startswith("Q") and shape[-1] % 32 else kind


def rewrite(source: Path, destination: Path, precision: str) -> None:
    """Write a float GGUF file with its matrices in the types of a precision, one tensor at a time.

    Args:
        source: a file whose tensors are F32.
        destination: output path.
        precision: one of `MATRICES`.

    Raises:
        BuildError: the file is no GGUF file, or a weight is too large for F16.
    """
    import gguf

    reader = _reader(source)
    architecture = reader.get_field("general.architecture").contents()
    with contextlib.closing(gguf.GGUFWriter(destination, architecture)) as writer:
        _write(reader, writer, precision)


def _write(reader: Any, writer: Any, precision: str) -> None:
    import gguf

    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[precision]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for field in reader.fields.values():
        if field.name not in WRITTEN_ANEW and not field.name.startswith("GGUF."):
            writer.add_key_value(field.name, field.contents(), field.types[0], _of_elements(field))
    kinds = [gguf.GGMLQuantizationType[_type_of_values(each, precision)] for each in reader.tensors]
    for tensor, kind in zip(reader.tensors, kinds, strict=True):
        shape = gguf.quant_shape_to_byte_shape(tensor.data.shape, kind)
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), int(np.prod(shape)), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor, kind in zip(reader.tensors, kinds, strict=True):
        writer.write_tensor_data(_converted(tensor, kind))


def _type_of_values(tensor: Any, precision: str) -> str:
    """Return the type of a tensor: that of its precision, or the one with an offset where it is far closer."""
    kind = type_of(tensor.name, tensor.data.shape, precision)
    if kind != "Q4_0":
        return kind
    plain, offset = (_squared_error(tensor.data, each) for each in (kind, WITH_OFFSET))
    return WITH_OFFSET if offset <= CLOSER * plain else kind


def _squared_error(values: Any, kind: str) -> float:
    from gguf import GGMLQuantizationType, quants

    stored = GGMLQuantizationType[kind]
    return float(np.square(quants.dequantize(quants.quantize(values, stored), stored) - values).sum())


def types(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the name and the type of each matrix in a file."""
    for tensor in _reader(path).tensors:
        if len(tensor.shape) > 1:
            yield tensor.name, tensor.tensor_type.name


def cached_values(path: Path) -> int:
    """Return the number of keys and values that each token adds to the KV cache of a file's model."""
    reader = _reader(path)
    prefix = reader.get_field("general.architecture").contents()

    def value(key: str) -> Any:
        return reader.get_field(f"{prefix}.{key}").contents()

    heads = value("attention.head_count_kv")
    heads = sum(heads) if isinstance(heads, list) else heads * value("block_count")
    return int(heads * (value("attention.key_length") + value("attention.value_length")))


def _reader(path: Path) -> Any:
    import gguf

    try:
        return gguf.GGUFReader(path)
    except (ValueError, IndexError, OSError) as error:
        raise BuildError(f"{path.name} cannot be read as a GGUF file ({error}); export the model again.") from error


def _of_elements(field: Any) -> Any:
    """Return the type of the elements of an array; None for other values."""
    return field.types[-1] if len(field.types) > 1 else None


def _converted(tensor: Any, kind: Any) -> Any:
    """Return the values of a tensor in a type, as the bytes that the file holds."""
    import gguf

    with np.errstate(over="ignore"):
        values = gguf.quants.quantize(tensor.data, kind)
    if kind.name == "F16" and not np.isfinite(values).all():
        raise BuildError(f"a value of {tensor.name} is too large for fp16; give --precision fp32 or int8.")
    return np.ascontiguousarray(values).view(np.uint8)
