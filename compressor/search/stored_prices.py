"""Timings of an earlier search, from its report.json or sweep.json, in place of timing the target again.

Two timings of one engine differ, and so may the plans that two runs of one command choose by them. With stored timings,
the costs of two searches are equal.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, NotRequired, cast

from pydantic import ConfigDict, Field, TypeAdapter, with_config
from typing_extensions import TypedDict

from compressor.errors import CompressorError
from compressor.measure.workload import Call
from compressor.settings import Settings
from compressor.workspace.environment import environment
from compressor.workspace.json_files import read_json

FILES = ("report.json", "sweep.json")  # of an export and of a sweep
UNIT = "ms"
REMEDY = "it is no report.json or sweep.json of this release, so leave out --prices"
# Settings that the time of an engine depends on.
COMPARED = (
    *("target", "precision", "device", "threads", "batch", "generate", "cache"),
    *("image_size", "sequence_length", "max_length"),
    "defer_build",  # ONNX Runtime on the CPU is timed in place of the target
)
# Packages whose release the time of an engine depends on.
TIMED_WITH = ("torch", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "tensorrt-rtx-cu12", "xllamacpp")
_KEPT = ConfigDict(extra="ignore")


class PricesError(CompressorError):
    """The file of ``--prices`` is missing, has no timings, or its timings are those of other engines."""


@with_config(_KEPT)
class _Call(TypedDict):
    times: Annotated[int, Field(ge=0)]
    shapes: dict[str, list[int]]
    timings: dict[str, Annotated[float, Field(gt=0.0, allow_inf_nan=False)]]


@with_config(_KEPT)
class _Prices(TypedDict):
    unit: str
    sites: str
    calls: dict[str, _Call]


@with_config(_KEPT)
class _Search(TypedDict):
    prices: NotRequired[_Prices]


@with_config(_KEPT)
class _Model(TypedDict):
    name: str


@with_config(_KEPT)
class _Environment(TypedDict):
    processor: str
    cores: int | None
    packages: dict[str, str]


@with_config(_KEPT)
class _Content(TypedDict):
    settings: dict[str, str | int | float | bool | None]
    model: _Model | str
    search: _Search
    environment: NotRequired[_Environment]


_SCHEMA: TypeAdapter[_Content] = TypeAdapter(_Content)


def stored_timings(
    path: Path, name: str, sites: str, settings: Settings, calls: Mapping[str, Call], designs: Mapping[str, object]
) -> dict[str, dict[str, float]]:
    """Return the milliseconds of each call of each design that an earlier search timed.

    Args:
        path: the folder of an export or a sweep, or its report.json or sweep.json.
        name: name of the model.
        sites: fingerprint of its sites; folders of one name can hold models of different sizes.
        settings: settings of this search.
        calls: the calls of this search by name.
        designs: the designs of this search by name.

    Raises:
        PricesError: there is no such file, it has no timings, or they are those of other engines.
        JsonFileError: it is no report of this release.
    """
    file, content, prices = _read(path)
    stored = prices["calls"]
    if _name(content) == name and prices["sites"] != sites:
        raise PricesError(
            f"the prices in {file} are those of another model named {name}, with other branches or widths; give a "
            "matching folder, or leave out --prices."
        )
    for what, found, expected in _differences(content, stored, name, settings, calls, designs):
        raise PricesError(
            f"the prices in {file} are those of {what} {found}, but this search needs {what} {expected}; give a "
            "matching folder, or leave out --prices."
        )
    return {
        design: {call: stored[call]["timings"][design] / max(calls[call].times, 1) for call in calls}
        for design in designs
    }


def check_prices(settings: Settings) -> None:
    """Check that the file of ``--prices`` has timings, before a model is loaded.

    Raises:
        PricesError, JsonFileError: see `stored_timings`.
    """
    if settings.prices is not None:
        _read(Path(settings.prices))


def price_notes(facts: Mapping[str, Any]) -> tuple[str, ...]:
    """Return a sentence if a search took its prices from another one, with what was timed elsewhere.

    Args:
        facts: the ``search`` part of a report.
    """
    source = facts.get("prices", {}).get("source")
    if source is None:
        return ()
    elsewhere = ", ".join(_differing_environment(Path(source)))
    more = f" They were timed on another machine or release: {elsewhere}." if elsewhere else ""
    return (f"The search took its prices from {source}; nothing was timed for them.{more}",)


def _differing_environment(path: Path) -> Iterator[str]:
    """Yield how the machine and the runtimes of stored timings differ from those of this process, if both are known."""
    try:
        there, here = _read(path)[1]["environment"], environment()
    except (CompressorError, KeyError):  # the folder was deleted during the search, or states none
        return
    packages = cast("dict[str, str]", here["packages"])
    pairs = [("processor", there["processor"], here["processor"]), ("cores", there["cores"], here["cores"])]
    pairs += [(name, there["packages"].get(name), packages.get(name)) for name in TIMED_WITH]
    for name, before, now in pairs:
        if None not in (before, now) and before != now:
            yield f"{name} {before} (here {now})"


def _read(path: Path) -> tuple[Path, _Content, _Prices]:
    """Return the file, its content, and the prices in it."""
    file = _file(path)
    content = read_json(file, _SCHEMA, remedy=REMEDY)
    prices = content["search"].get("prices")
    if prices is None or prices["unit"] != UNIT:
        raise PricesError(
            f"{file} has no timings of a search by latency; give an export of --drop auto without --cost macs, or "
            "leave out --prices."
        )
    return file, content, prices


def _file(path: Path) -> Path:
    """Return the file of a folder, or the file itself."""
    candidates = [path / name for name in FILES] if path.is_dir() else [path]
    for candidate in candidates:
        if candidate.exists():
            return candidate
    raise PricesError(
        f"--prices {path} is no folder with a {' or '.join(FILES)}, and no such file; give the folder of an earlier "
        "export or sweep."
    )


def _name(content: _Content) -> str:
    """Return the name of the model."""
    model = content["model"]
    return model if isinstance(model, str) else model["name"]


def _differences(
    content: _Content,
    stored: Mapping[str, _Call],
    name: str,
    settings: Settings,
    calls: Mapping[str, Call],
    designs: Mapping[str, object],
) -> Iterator[tuple[str, object, object]]:
    """Yield what differs between the engines that were timed and those of this search, as found and expected."""
    if _name(content) != name:
        yield "the model", _name(content), name
    own = settings.to_dict()
    for key in COMPARED:
        found = content["settings"].get(key)
        if found != own[key]:
            yield f"--{key.replace('_', '-')}", found, own[key]
    times = {call: part["times"] for call, part in stored.items()}
    expected = {call: part.times for call, part in calls.items()}
    if times != expected:
        yield "the calls", times, expected
    for call, part in stored.items():
        shapes = {key: list(shape) for key, shape in calls[call].shapes.items()}
        if part["shapes"] != shapes:
            yield f"the inputs of {call}", part["shapes"], shapes
        if missing := [design for design in designs if design not in part["timings"]]:
            yield f"the designs of {call}", ", ".join(part["timings"]), ", ".join(missing)
