"""Sentences on the machine and the runtime that the figures of a report were measured with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

MEGABYTE = 1e6


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
    elif "ahead_of_time" in engine:
        yield from _ahead_of_time(engine)
    elif engine.get("state") == "deferred":
        yield (
            f"No engine was built. Run `compressor build` with this folder on the device. All figures, including those "
            f"that the search used, were measured with ONNX Runtime on the CPU of this machine, not with "
            f"{engine['target']} on the device."
        )
    yield from _parser(engine.get("parser"))
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


def _ahead_of_time(engine: Mapping[str, Any]) -> Iterator[str]:
    """Yield sentences on the engines that were built for other GPUs."""
    ahead = engine["ahead_of_time"]
    sizes = ", ".join(f"{gpu} {facts['bytes'] / MEGABYTE:.1f} MB" for gpu, facts in ahead["engines"].items())
    yield f"{ahead['builder']} built {len(ahead['engines'])} engines ahead of time: {sizes}. They were not run."
    if engine["state"] == "deferred":
        yield (
            "All figures, including those that the search used, were measured with ONNX Runtime on the CPU of this "
            f"machine. Run `compressor build` with this folder on a machine with one of these GPUs to measure "
            f"{engine['target']} there."
        )
    layers = ahead["layers"]
    counts = ", ".join(f"{count} {name}" for name, count in layers["precisions"].items())
    yield f"The parsed network has {layers['count']} layers before fusion: {counts}."


def _parser(parser: Mapping[str, Any] | None) -> Iterator[str]:
    """Yield a sentence on the parser that took the files of a deferred build."""
    if parser is not None and "builder" in parser:
        yield f"The parser of {parser['builder']} takes the ONNX files of this folder ({', '.join(parser['files'])})."
