"""Sentences on the machine and the runtime that the figures of a report were measured with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def describe_measurements(engine: Mapping[str, Any]) -> Iterator[str]:
    """Yield sentences on where the figures of a report were measured, from its ``engine`` part."""
    if engine.get("streamed") and "environment" not in engine:
        yield (
            "The model was read block by block and was never in memory as a whole. Quality was measured with torch; "
            "latency was not measured."
        )
        if engine["state"] == "deferred":
            yield (
                f"Run `compressor build` with this folder on a machine with {engine['target']} and enough memory for "
                "the model."
            )
    elif engine.get("state") == "deferred":
        yield (
            f"No engine was built. Run `compressor build` with this folder on the device. All figures, including those "
            f"that the search used, were measured with ONNX Runtime on the CPU of this machine, not with "
            f"{engine['target']} on the device."
        )
    if "environment" in engine:
        judge = "torch" if engine.get("streamed") else "ONNX Runtime"
        yield (
            f"Latency was measured with {engine['target']} on this device. Quality was measured with {judge} on the "
            "machine that compressed the model."
        )
        for name, measured in engine["measured"].items():
            if "agreement" in measured:
                figure = measured["agreement"]
                yield f"The {name} agrees with torch on {figure['value']:.2f} % of {figure['n']} stored rows."
            elif "similarity" in measured:
                figure = measured["similarity"]
                yield (
                    f"The cosine similarity of the {name} to torch is {figure['value']:.2f} % on {figure['n']} stored "
                    "rows."
                )
