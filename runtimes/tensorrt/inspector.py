"""What TensorRT's engine inspector says of an engine: its layers, their precisions, whether attention was fused.

Written from NVIDIA's documentation and from inspector output that users have posted, both of TensorRT 10; the fields of
11 are those of its migration guide. Never held against an engine of our own.

Names are read with care: a layer is called after the ONNX nodes that went into it, and those may say "mha" themselves.
A fused attention is a kernel whose own name says so, such as ``_gemm_mha_v2`` or ``fmha``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from runtimes.base.layer_counts import UNKNOWN, counted
from runtimes.base.protocols import Layers, RuntimesError, first_line

ATTENTION = re.compile(r"(^|_)(fmha|mha|fused_mha|flash_attention|attention)(_|\d|$)", re.IGNORECASE)
# Layers that stand for a whole region, about whose inside nothing is said.
OPAQUE = ("Myelin", "ForeignNode")
TYPE_KEYS = ("Format/Datatype", "DataType", "Datatype", "Format")


def summary(text: str) -> Layers:
    """Return the counts of the inspector's JSON for a whole engine.

    A layer counts by the narrowest type among its inputs, "unknown" where the engine was built with less than detailed
    profiling, or where its shapes were not set. Attention counts as fused where at least one kernel is for it, and as
    not fused where there is none and a softmax is a layer to be seen; else that is unknown.

    Raises:
        RuntimesError: This is not what an inspector says.
    """
    try:
        layers = json.loads(text)["Layers"]
        entries = [each if isinstance(each, dict) else {"Name": str(each)} for each in layers]
    except (ValueError, KeyError, TypeError) as error:
        raise RuntimesError(f"TensorRT's description of the engine cannot be read: {first_line(error)}.") from error
    rows = [(str(each.get("LayerType", UNKNOWN)), list(_read(each))) for each in entries]
    return counted(rows, fused_attention=_fused(entries))


def _read(layer: dict[str, Any]) -> Iterator[str]:
    """Yield a description of the type of each input; 10 has one field for format and type, 11 has two."""
    for tensor in layer.get("Inputs") or ():
        if isinstance(tensor, dict):
            yield next((str(tensor[key]) for key in TYPE_KEYS if key in tensor), "")


def _fused(layers: list[dict[str, Any]]) -> bool | None:
    if any(_is_attention(layer) for layer in layers):
        return True
    return False if any(_is_softmax(layer) for layer in layers) else None


def _is_attention(layer: dict[str, Any]) -> bool:
    name, own = str(layer.get("Name", "")), (str(layer.get(key, "")) for key in ("LayerType", "TacticName"))
    # A name that TensorRT made up starts with an underscore and holds no path.
    kernels = [*own, name] if name.startswith("_") and "/" not in name else [*own]
    return any(ATTENTION.search(kernel) for kernel in kernels)


def _is_softmax(layer: dict[str, Any]) -> bool:
    """Return whether a softmax is to be seen in a layer; one inside an opaque region may be part of a fused kernel."""
    texts = [str(layer.get(key, "")) for key in ("Name", "LayerType", "Metadata")]
    return not any(word in text for text in texts[:2] for word in OPAQUE) and any(
        "softmax" in text.lower() for text in texts
    )
