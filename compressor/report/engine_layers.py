"""The layers of a built engine, as the runtime reports them: their number, precisions, kinds and fused attention."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from runtimes.base.encoder_decoder import WITH_PAST
from runtimes.base.part_files import part_files
from runtimes.base.protocols import BuildOptions, LayerCounts, Runtime, RuntimesError

KINDS = 8  # maximum number of kinds listed on a page


def layers_of(target: Runtime, path: Path, options: BuildOptions) -> dict[str, Any] | None:
    """Return the layers of an engine as plain JSON values; None if the runtime does not report them.

    Those of a model of several files are added up; of an encoder-decoder, without those of the later calls.

    An error of the runtime does not stop the export, as the engine works without the description: the result then
    holds only the message, under ``unknown``.
    """
    try:
        layers = _added([target.layers(part, options) for part in part_files(path) if WITH_PAST not in part.stem])
    except RuntimesError as error:
        return {"unknown": str(error)}
    return None if layers is None else asdict(layers)


def _added(layers: Sequence[LayerCounts | None]) -> LayerCounts | None:
    """Return the layers of the files of an engine together."""
    known = [each for each in layers if each is not None]
    if len(known) < 2:
        return known[0] if known else None
    precisions, kinds = Counter[str](), Counter[str]()
    for each in known:
        precisions.update(each.precisions)
        kinds.update(each.kinds)
    fused = [each.fused_attention for each in known]
    return LayerCounts(
        sum(each.count for each in known),
        dict(precisions.most_common()),
        dict(kinds.most_common()),
        None if None in fused else all(fused),
    )


def describe_layers(engine: Mapping[str, Any]) -> Iterator[str]:
    """Describe the layers in a report's ``engine`` part in one sentence; yield nothing if they are not reported.

    >>> list(describe_layers({"layers": {"count": 3, "precisions": {"int8": 2, "other": 1}, "fused_attention": None}}))
    ['The engine has 3 layers: 2 int8, 1 other; fusion of attention is unknown.']
    """
    layers = engine.get("layers")
    if not layers:
        return
    if "unknown" in layers:
        yield f"The engine's layers are unknown: {layers['unknown']}"
        return
    counts = ", ".join(f"{count} {name}" for name, count in layers["precisions"].items())
    yield f"The engine has {layers['count']} layers: {counts}; {_attention(layers['fused_attention'])}."


def kinds(layers: Mapping[str, Any]) -> list[list[str]]:
    """Return a row for each of the `KINDS` most frequent kinds of layers with its count, and one for all others."""
    rows = list(layers["kinds"].items())
    rest = sum(count for _, count in rows[KINDS:])
    return [[name, str(count)] for name, count in [*rows[:KINDS], *([("all others", rest)] if rest else [])]]


def _attention(fused: bool | None) -> str:
    if fused is None:
        return "fusion of attention is unknown"
    return "attention is fused" if fused else "attention is not fused"
