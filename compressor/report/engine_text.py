"""Where the figures of a report come from, as sentences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass


def told(engine: Mapping[str, Any]) -> Iterator[str]:
    """What a report's ``engine`` part says to the reader about where its figures come from, as sentences."""
    if engine.get("streamed") and "environment" not in engine:
        yield (
            "The model was read block by block and never in memory as a whole: quality was measured in torch, nothing "
            "was timed."
        )
        if engine["state"] == "deferred":
            yield f"Run `compressor build` with this folder on a machine that holds it, with {engine['target']}."
    elif engine.get("state") == "deferred":
        yield (
            f"No engine was built: run `compressor build` with this folder on the device. Every figure, and what the "
            f"search went by, was measured with ONNX Runtime on the CPU here, not with {engine['target']} there."
        )
    if "environment" in engine:
        judge = "torch" if engine.get("streamed") else "ONNX Runtime"
        yield (
            f"Latency was measured with {engine['target']} on this device; quality with {judge} where the model was "
            "compressed."
        )
        for name, found in engine["measured"].items():
            if "agreement" in found:
                same = found["agreement"]
                yield f"On {same['n']} stored rows the {name} gives torch's answer in {same['value']:.2f} %."
            elif "similarity" in found:
                same = found["similarity"]
                yield f"On {same['n']} stored rows the {name} is similar to torch by {same['value']:.2f} % (cosine)."
