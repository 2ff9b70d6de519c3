"""Layer counts of an engine, and the mapping from each runtime's data type names to precisions."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator

from runtimes.base.protocols import LayerCounts

# Narrowest first. Each pattern covers the spellings of TensorRT, OpenVINO and ONNX, such as "Row major linear FP16".
TYPES = (
    ("int4", r"u?int4|[iu]4"),
    ("fp4", r"fp4|float4\w*|f4\w*"),
    ("fp8", r"fp8|float8\w*|f8\w*"),
    ("int8", r"u?int8|[iu]8"),
    ("fp16", r"half|fp16|float16|f16"),
    ("bf16", r"bf16|bfloat16|bfloat"),
    ("fp32", r"fp32|float32|float|f32"),
    ("other", r"double|f64|bool(ean)?|u?int(16|32|64)?|[iu](16|32|64)"),
)
UNKNOWN = "unknown"


def precision_of(texts: Iterable[str]) -> str:
    """Return the narrowest precision named in a layer's input descriptions; "other" for types such as indices.

    >>> precision_of(["Thirty-two wide channel vectorized row major Int8 format.", "Half"])
    'int8'
    >>> precision_of(["N/A due to dynamic shapes"])
    'unknown'
    """
    matches = {name for text in texts for name, words in TYPES if re.search(rf"\b({words})\b", text, re.IGNORECASE)}
    return next((name for name, _ in TYPES if name in matches), UNKNOWN)


def count_layers(layers: Iterable[tuple[str, Iterable[str]]], *, fused_attention: bool | None) -> LayerCounts:
    """Count layers, given as (kind, input descriptions) pairs, by kind and precision; most frequent first."""
    rows = [(kind, precision_of(texts)) for kind, texts in layers]
    kinds, precisions = (Counter(row[column] for row in rows) for column in (0, 1))
    return LayerCounts(len(rows), dict(_sorted(precisions)), dict(_sorted(kinds)), fused_attention)


def _sorted(counts: Counter[str]) -> Iterator[tuple[str, int]]:
    yield from sorted(counts.items(), key=lambda item: (-item[1], item[0]))
