"""What the target made of the model's layers: a fact of the report, asked for once the engine is built."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from runtimes.base.protocols import BuildOptions, Runtime, RuntimesError

KINDS = 8  # most kinds that a page lists


def described(target: Runtime, path: Path, options: BuildOptions) -> dict[str, Any] | None:
    """The layers of an engine as plain JSON values; None where the target does not tell.

    An engine that works is not given up because it cannot be described: then there is only the reason, as ``unknown``.
    """
    try:
        found = target.layers(path, options)
    except RuntimesError as error:
        return {"unknown": str(error)}
    return None if found is None else asdict(found)


def told(engine: Mapping[str, Any]) -> Iterator[str]:
    """What a report's ``engine`` part says of its layers, as a sentence.

    >>> list(told({"layers": {"count": 3, "precisions": {"int8": 2, "other": 1}, "fused_attention": None}}))
    ['The engine has 3 layers: 2 int8, 1 other; whether attention is fused cannot be told.']
    """
    found = engine.get("layers")
    if not found:
        return
    if "unknown" in found:
        yield f"The engine's layers are unknown: {found['unknown']}"
        return
    counts = ", ".join(f"{count} {name}" for name, count in found["precisions"].items())
    yield f"The engine has {found['count']} layers: {counts}; {_attention(found['fused_attention'])}."


def kinds(found: Mapping[str, Any]) -> list[list[str]]:
    """The most frequent kinds of layers and how many there are of each, the rest as one row."""
    rows = list(found["kinds"].items())
    rest = sum(count for _, count in rows[KINDS:])
    return [[name, str(count)] for name, count in [*rows[:KINDS], *([("all others", rest)] if rest else [])]]


def _attention(fused: bool | None) -> str:
    if fused is None:
        return "whether attention is fused cannot be told"
    return "attention is fused" if fused else "attention is not fused"
