"""The schema of report.json, and the functions that read it from a folder that is not trusted.

A report names files, sizes and options that other commands use. Names must be plain names, sizes must be plausible
before memory is taken, and the parts must fit each other. Keys that no command reads are kept and not used.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypeVar, cast

from pydantic import AfterValidator, ConfigDict, Field, JsonValue, TypeAdapter, with_config
from typing_extensions import TypedDict

from compressor.choices import MOST_PIXELS, MOST_ROUNDS, MOST_ROWS, MOST_THREADS, MOST_TOKENS, PROBLEM_TYPES, RANKINGS
from compressor.errors import FolderError
from compressor.quality.metrics import LABEL_FREE, METRICS
from compressor.report.report import REPORT
from compressor.workspace.json_files import read_json
from compressor.workspace.manifest import PlainName
from runtimes.base.protocols import DEVICES, PRECISIONS

T = TypeVar("T")

_NEWLINES = {"\n", "\t", "\r"}
_KEPT = ConfigDict(extra="allow")
_EXACT = ConfigDict(extra="forbid")


def _visible(text: str) -> str:
    """Return a text without control characters; raise ValueError if it has some, which could steer a terminal."""
    if any(ord(character) < 32 or 127 <= ord(character) < 160 for character in set(text) - _NEWLINES):
        raise ValueError("a text must not hold control characters")
    return text


def _one_of(*names: str) -> AfterValidator:
    def check(name: str) -> str:
        if name not in names:
            raise ValueError(f"expected {' or '.join(names)}")
        return name

    return AfterValidator(check)


Text = Annotated[str, AfterValidator(_visible)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, lt=2**63)]
Rows = Annotated[int, Field(ge=1, le=MOST_ROWS)]
TokenCount = Annotated[int, Field(ge=0, le=MOST_TOKENS)]
Threads = Annotated[int, Field(ge=1, le=MOST_THREADS)]
Shape = list[Count]
Side = Annotated[int, Field(ge=1, le=MOST_PIXELS)]
Milliseconds = Annotated[float, Field(gt=0, lt=1e12)]
Variant = Literal["original", "baseline", "result"]
Precision = Annotated[str, _one_of(*PRECISIONS)]
Metric = Annotated[str, _one_of(*METRICS)]


@with_config(_EXACT)
class Figure(TypedDict):  # noqa: D101
    value: float
    low: float
    high: float
    n: Count


@with_config(_EXACT)
class Speedup(TypedDict):  # noqa: D101
    ratio: Finite
    low: Finite
    high: Finite


@with_config(_KEPT)
class Latency(TypedDict):  # noqa: D101
    median: Milliseconds
    p90: Milliseconds
    p99: Milliseconds
    samples_ms: Annotated[list[Annotated[list[Milliseconds], Field(min_length=1)]], Field(min_length=1)]


@with_config(_KEPT)
class BenchSettings(TypedDict):
    """The options of an export that `bench` reads."""

    target: Text
    precision: Precision
    model: Text | None
    data: NotRequired[Text | None]
    cache: NotRequired[bool]
    image_tokens: NotRequired[Text]
    max_length: NotRequired[Annotated[int, Field(ge=2, le=MOST_TOKENS)] | None]
    stride: NotRequired[Annotated[int, Field(ge=1, le=MOST_TOKENS)] | None]
    sequence_length: NotRequired[Annotated[int, Field(ge=1, le=MOST_TOKENS)] | None]


@with_config(_KEPT)
class BenchModel(TypedDict):
    """The facts on a model that `bench` reads."""

    name: Text
    source: Literal["timm", "transformers", "gguf", "module"]
    task: Text
    problem_type: NotRequired[Annotated[str, _one_of(*PROBLEM_TYPES)] | None]
    probabilities: NotRequired[bool]
    image_size: NotRequired[tuple[Side, Side] | None]
    random_weights: bool


@with_config(_EXACT)
class SplitSizes(TypedDict):  # noqa: D101
    calibration: Count
    validation: Count
    decision: NotRequired[Count]
    test: Count


@with_config(_KEPT)
class Fractions(TypedDict):
    """Shares of the samples in the splits, as far as `bench` reads them."""

    decision: NotRequired[Annotated[float, Field(ge=0, lt=1)]]


@with_config(_EXACT)
class Prompts(TypedDict):
    """The classes of a model of images and texts, as texts."""

    template: Text
    class_names: list[Text]
    class_names_from: Text


@with_config(_KEPT)
class Data(TypedDict):
    """The data of an export."""

    prompts: NotRequired[Prompts | None]
    source: Text
    reading: Text
    random: bool
    seed: int
    sizes: SplitSizes
    fractions: NotRequired[Fractions]
    test_ids: list[str]


@with_config(_EXACT)
class Serving(TypedDict):
    """A checkpoint without single branches: for each serving engine, why it does not open it; None if it does."""

    form: Text
    engines: dict[Text, Text | None]


@with_config(_KEPT)
class BenchEngine(TypedDict):
    """The part of a report on the engine, as far as `bench` reads it."""

    file: NotRequired[PlainName]
    serving: NotRequired[Serving]


@with_config(_KEPT)
class BenchCell(TypedDict):
    """A cell of a factorial, as far as `bench` reads it."""

    file: PlainName


@with_config(_KEPT)
class BenchFactorial(TypedDict):
    """A factorial, as far as `bench` reads it."""

    cells: dict[Text, BenchCell]


@with_config(_KEPT)
class BenchReport(TypedDict):
    """A report, as far as `bench` reads it."""

    settings: BenchSettings
    model: BenchModel
    data: Data
    engine: BenchEngine
    factorial: NotRequired[BenchFactorial | None]


@with_config(_KEPT)
class Settings(BenchSettings):
    """The options of an export that the build on a device reads."""

    batch: Rows
    rounds: Annotated[int, Field(ge=1, le=MOST_ROUNDS)]
    threads: Threads | None
    device: Annotated[str, _one_of(*DEVICES)] | None
    speedup: Finite | None
    latency: Finite | None
    max_loss: Finite | None
    portable_engine: NotRequired[bool]


@with_config(_KEPT)
class Site(TypedDict):  # noqa: D101
    name: Text
    kind: Text
    block: Text


@with_config(_KEPT)
class Model(BenchModel):
    """The facts on a model."""

    hub_id: NotRequired[Text | None]
    inputs: Annotated[list[Text], Field(min_length=1)]
    outputs: Annotated[list[Text], Field(min_length=1)]
    text_length: NotRequired[Count | None]
    sites: list[Site]


@with_config(_KEPT)
class Plan(TypedDict):  # noqa: D101
    rule: Text
    metric: Text
    dropped: list[Text]
    changes: dict[Text, Text]
    reasons: dict[Text, Text]


@with_config(_EXACT)
class Size(TypedDict):  # noqa: D101
    parameters: Count
    multiply_adds: Count
    bytes: Count
    cache: NotRequired[Count]


Prediction = tuple[int, Annotated[float, Field(ge=0, le=1)]]


@with_config(_EXACT)
class Changed(TypedDict):  # noqa: D101
    place: Count
    id: Text
    label: int | None
    before: Prediction
    after: Prediction
    regret: Finite


@with_config(_EXACT)
class Quality(TypedDict):  # noqa: D101
    metric: Metric
    figures: dict[Variant, Figure]
    loss: dict[Variant, Figure]
    label_free: dict[Annotated[str, _one_of(*LABEL_FREE)], Figure]
    changed: list[Changed]
    further: NotRequired[dict[Metric, dict[Variant, Figure]]]
    precision_loss: NotRequired[Figure | None]
    expected: NotRequired[dict[Variant, Figure]]


@with_config(_KEPT)
class Cell(BenchCell):
    """A cell of a factorial."""

    latency: Latency
    speedup: Speedup | None
    figure: Figure | None
    loss: Figure | None


@with_config(_KEPT)
class Interaction(TypedDict):  # noqa: D101
    precision: Text
    cells: Annotated[list[Text], Field(min_length=4, max_length=4)]
    speedup: dict[Text, Speedup]


@with_config(_KEPT)
class Factorial(TypedDict):  # noqa: D101
    where: Text
    cells: dict[Text, Cell]
    interactions: Annotated[list[Interaction], Field(min_length=1)]
    conclusion: list[Text]


@with_config(_KEPT)
class Trial(TypedDict):  # noqa: D101
    precision: Text
    milliseconds: Finite | None
    speedup: Finite | None
    loss: float | None
    verdict: Text


@with_config(_KEPT)
class Tried(TypedDict):  # noqa: D101
    by: Text
    milliseconds: Finite | None
    loss: float | None


@with_config(_KEPT)
class Kept(TypedDict):  # noqa: D101
    node: Text
    module: Text | None
    sensitivity: float | None


@with_config(_KEPT)
class Calibrated(TypedDict):  # noqa: D101
    method: Text | None
    smoothed: bool
    loss: float | None


@with_config(_KEPT)
class Converted(TypedDict):
    """The conversion of a variant to a precision; the keys from `nodes` on are those of our int8."""

    precision: Text
    by: Text
    loss: float | None
    tried: list[Tried]
    nodes: NotRequired[Count]
    kept: NotRequired[list[Kept]]
    calibration: NotRequired[Text | None]
    smoothed: NotRequired[bool]
    calibrations: NotRequired[list[Calibrated]]
    rest: NotRequired[Text]
    float32: NotRequired[list[Kept]]
    unquantized: NotRequired[list[Kept]]
    refused: NotRequired[dict[Text, Text]]


@with_config(_KEPT)
class Prices(TypedDict):  # noqa: D101
    unit: Text


@with_config(_KEPT)
class Point(TypedDict):  # noqa: D101
    number: Count
    change: list[Text] | None
    predicted: Finite
    loss: Finite
    efficient: bool


@with_config(_KEPT)
class Search(TypedDict):  # noqa: D101
    front: NotRequired[list[Point]]
    chosen: NotRequired[Count]
    prices: NotRequired[Prices]


@with_config(_KEPT)
class SiteEvidence(TypedDict):  # noqa: D101
    effect: Finite | None
    cosine: NotRequired[Finite | None]


@with_config(_KEPT)
class Evidence(TypedDict):  # noqa: D101
    samples: NotRequired[Count]
    states: NotRequired[list[Text]]
    similarity: NotRequired[list[list[Finite | None]]]
    sites: NotRequired[dict[Text, SiteEvidence]]
    tokens: NotRequired[dict[Text, Count]]
    zeros: NotRequired[dict[Text, Count]]


@with_config(_EXACT)
class Exact(TypedDict):
    """The unchanged model after exact rewrites."""

    multiply_adds: Count


@with_config(_KEPT)
class Healed(TypedDict):  # noqa: D101
    method: Text
    note: Text


@with_config(_KEPT)
class Environment(TypedDict):  # noqa: D101
    platform: Text
    processor: Text
    cores: Count | None
    gpus: list[Text]
    packages: dict[Text, Text]


@with_config(_KEPT)
class Calls(TypedDict):  # noqa: D101
    image: NotRequired[Latency]
    prompt: Latency
    token: NotRequired[Latency]


@with_config(_KEPT)
class Generation(TypedDict):  # noqa: D101
    prompt: Count
    new: Count
    behind: Count
    source: NotRequired[Literal["tokens", "frames", "samples", "patches", "pixels"] | None]
    images: NotRequired[Count]
    calls: dict[Variant, Calls]


@with_config(_EXACT)
class Limitation(TypedDict):  # noqa: D101
    feature: Text
    reason: Text


@with_config(_EXACT)
class UnknownLayers(TypedDict):  # noqa: D101
    unknown: Text


@with_config(_EXACT)
class Layers(TypedDict):  # noqa: D101
    count: Count
    precisions: dict[Text, Count]
    kinds: dict[Text, Count]
    fused_attention: bool | None


@with_config(_EXACT)
class AheadEngine(TypedDict):
    """An engine that was built for a GPU of another machine."""

    file: PlainName
    bytes: Count
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]


@with_config(_EXACT)
class AheadOfTime(TypedDict):
    """The engines for GPUs of other machines, by compute capability, and the reasons of those that refused."""

    builder: Text
    engines: dict[Text, AheadEngine]
    refused: dict[Text, Text]
    layers: Layers


@with_config(_EXACT)
class Parser(TypedDict):
    """The parser that took the files of a deferred build, and their layers by variant."""

    builder: Text
    files: dict[Variant, Layers]


@with_config(_EXACT)
class Options(TypedDict):
    """The options with which the device builds engines."""

    device: Annotated[str, _one_of(*DEVICES)]
    threads: Threads | None
    spinning: NotRequired[bool]
    batches: tuple[Rows, Rows, Rows]
    lengths: tuple[TokenCount, TokenCount, TokenCount]
    precision: NotRequired[Precision]
    portable: NotRequired[bool]


@with_config(_KEPT)
class Measured(TypedDict):
    """The difference of an engine from torch, and its agreement with torch, on the stored rows."""

    parity: Annotated[float, Field(ge=0)]
    agreement: NotRequired[Figure]
    similarity: NotRequired[Figure]


@with_config(_KEPT)
class StandIn(TypedDict):
    """The runtime that replaced the target on the exporting machine."""

    measured: dict[Variant, Measured]


@with_config(_KEPT)
class DeferredEngine(BenchEngine):
    """The part of a report on an engine that is built on a device."""

    state: Literal["deferred", "built"]
    target: Text
    options: Options
    precisions: dict[Variant, Precision]
    files: dict[Variant, PlainName]
    answer: Text
    metric: Metric | None
    allowed: dict[Variant, Annotated[float, Field(ge=0, allow_inf_nan=False)]]
    stand_in: StandIn
    inputs: NotRequired[list[Text]]
    outputs: NotRequired[list[Text]]
    streamed: NotRequired[bool]
    environment: NotRequired[Environment]
    measured: NotRequired[dict[Variant, Measured]]
    layers: NotRequired[Layers | UnknownLayers | None]
    ahead_of_time: NotRequired[AheadOfTime]
    parser: NotRequired[Parser | UnknownLayers]


class _ImageStage(TypedDict):
    block: Count
    share: Annotated[float, Field(ge=0, le=1)]
    tokens: TokenCount


class _CacheBytes(TypedDict):
    prompt: TokenCount
    baseline: Count
    result: Count


@with_config(_EXACT)
class _TriedSchedule(TypedDict):
    stages: Text
    validation: float | None
    fresh: float | None


@with_config(_EXACT)
class ImageTokens(TypedDict):
    """The stages at which image tokens are dropped, and the bytes of the cache behind the prompt."""

    method: Annotated[str, _one_of(*RANKINGS)]
    tokens: TokenCount
    stages: list[_ImageStage]
    cache: _CacheBytes
    tried: NotRequired[list[_TriedSchedule]]  # by --image-tokens auto


@with_config(_KEPT)
class DeferredReport(BenchReport):
    """A report of an export whose engine is built on a device."""

    version: int
    command: Text
    settings: Settings  # type: ignore[misc]
    model: Model  # type: ignore[misc]
    plan: Plan
    sizes: dict[Variant, Size]
    quality: Quality | None
    no_quality_because: Text | None
    latency: dict[Variant, Latency]
    speedup: dict[Variant, Speedup]
    timed_inputs: dict[Text, Shape]
    parity: dict[Text, JsonValue]
    precision: dict[Text, Converted]
    search: Search
    healed: Healed | None
    environment: Environment
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    notes: list[Text]
    engine: DeferredEngine  # type: ignore[misc]
    trials: list[Trial]
    factorial: Factorial | None  # type: ignore[misc]
    evidence: Evidence
    generation: Generation | None
    limitations: NotRequired[list[Limitation]]
    exact: NotRequired[Exact | None]
    image_tokens: NotRequired[ImageTokens | None]


def _fitting(report: DeferredReport) -> DeferredReport:
    """Check that the parts of a report fit each other; raise ValueError otherwise."""
    wrong = [part for part, fits in (*_figures_fit(report), *_evidence_fits(report), *_engine_fits(report)) if not fits]
    if wrong:
        raise ValueError(f"{wrong[0]} does not fit the other parts")
    return report


def _figures_fit(report: DeferredReport) -> Iterator[tuple[str, bool]]:
    """Yield for each part with figures whether it has them for every variant."""
    variants, quality, generation = set(report["sizes"]), report["quality"], report["generation"]
    yield "sizes", {"baseline", "result"} <= variants
    yield "latency", set(report["latency"]) in (set(), variants)
    yield "speedup", set(report["speedup"]) == set(report["latency"]) - {"result"}
    if quality is not None:
        yield "quality", set(quality["figures"]) == variants == {*quality["loss"], "result"}
    if generation is not None:
        calls = generation["calls"]
        yield "generation", set(calls) == variants
        yield "generation.calls", not generation["new"] or all("token" in each for each in calls.values())
    if report["factorial"] is not None:
        yield "factorial", _has_effects(report["factorial"], judged=quality is not None)


def _evidence_fits(report: DeferredReport) -> Iterator[tuple[str, bool]]:
    """Yield for plan, search and evidence whether they fit the sites of the model and have what a page shows."""
    plan, search, evidence = report["plan"], report["search"], report["evidence"]
    states, similarity = evidence.get("states", []), evidence.get("similarity", [])
    yield "plan", set(plan["changes"]) >= set(plan["dropped"])
    yield "evidence.sites", set(evidence.get("sites", {})) <= {site["name"] for site in report["model"]["sites"]}
    yield "evidence.similarity", [len(row) for row in similarity] == [len(states)] * len(states)
    yield "evidence.samples", not states or "samples" in evidence
    if search.get("front"):
        yield "search", {"chosen", "prices"} <= set(search)
        yield "search.front", report["quality"] is None or bool(report["speedup"])


def _engine_fits(report: DeferredReport) -> Iterator[tuple[str, bool]]:
    """Yield for the options of the build whether they fit the variants, the target and the timed inputs."""
    engine, shapes = report["engine"], report["timed_inputs"]
    caches = [name for name in engine.get("inputs", ()) if name.startswith("past_key_values.")]
    built = engine["state"] == "built"
    yield "engine", set(engine["files"]) == set(engine["allowed"]) == set(engine["precisions"]) == set(report["sizes"])
    yield "engine.target", engine["target"] == report["settings"]["target"]
    yield "engine.inputs", all(len(shapes.get(name, ())) == 4 for name in caches)  # [rows, heads, tokens, width]
    yield "engine.measured", ("environment" in engine) == built == ("measured" in engine)
    int8 = [facts for facts in report["precision"].values() if "nodes" in facts]
    yield "precision", all({"kept", "calibration", "smoothed"} <= set(facts) for facts in int8)


def _has_effects(factorial: Factorial, *, judged: bool) -> bool:
    """Return whether every interaction of a factorial has its effects, and every cell its quality if it is judged."""
    named = all({"change", one["precision"]} <= set(one["speedup"]) for one in factorial["interactions"])
    cells = factorial["cells"].values()
    compared = any(cell["speedup"] for cell in cells) and (not judged or any(cell["loss"] for cell in cells))
    return named and compared and all(cell["figure"] is not None for cell in cells if judged)


_BENCH: TypeAdapter[BenchReport] = TypeAdapter(BenchReport)
_DEFERRED: TypeAdapter[DeferredReport] = TypeAdapter(Annotated[DeferredReport, AfterValidator(_fitting)])


def read_report(folder: Path) -> dict[str, Any]:
    """Return the report.json of an exported folder; the parts that `bench` reads are checked.

    Raises:
        FolderError, JsonFileError: there is no report, or it does not fit the schema.
    """
    return _read(folder, _BENCH)


def read_deferred_report(folder: Path) -> dict[str, Any]:
    """Return the report.json of a folder whose engine is built on a device; all parts that a page shows are checked.

    Raises:
        FolderError, JsonFileError: there is no report, or it does not fit the schema.
    """
    return _read(folder, _DEFERRED)


def _read(folder: Path, schema: TypeAdapter[T]) -> dict[str, Any]:
    remedy = "it is no report that `compressor export` of this release wrote, so export the model again"
    try:
        return cast("dict[str, Any]", read_json(folder / REPORT, schema, remedy=remedy))
    except FileNotFoundError as error:
        raise FolderError(f"{folder} holds no {REPORT}; give a folder that `compressor export` wrote.") from error
