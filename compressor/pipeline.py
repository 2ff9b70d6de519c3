"""The pipeline: `export` from settings to report, `inspect` from settings to scores, each as one straight line."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from compressor import data as data_module
from compressor import models
from compressor.data import Data, Shares, Split
from compressor.environment import environment
from compressor.errors import CompressorError
from compressor.evaluate import BATCH, Evaluation, Runner, evaluate, metric_for, tensor_batches
from compressor.folder import onnx_bytes, output_folder, scratch_folder
from compressor.inspection import Inspection
from compressor.lower import OPSET, Parity, check_parity, lower
from compressor.models import Model
from compressor.models.base import first_line
from compressor.quantize import Quantized, quantize
from compressor.report import Quality, Report, Size
from compressor.search import Effects, Validation, search
from compressor.settings import Settings
from compressor.steps import Steps, Tick
from compressor.trace import trace
from passes.base import apply
from passes.cost import Costs
from passes.drop import Drop
from passes.graph import Graph, Site
from passes.plan import Plan, choose, parse
from passes.run import run
from passes.score import Score, Scores
from passes.sites import find_sites
from runtimes.base import BuildOptions, Engine, Runtime, RuntimeUnavailable, runtime
from runtimes.timing import Latency, interleave

if TYPE_CHECKING:
    from rich.console import Console

PARITY_ROWS = 8


class PipelineError(CompressorError):
    """Model, data and options do not go together."""


@dataclasses.dataclass(frozen=True)
class _Subject:
    """The model under work: loaded, traced, its sites found, with its data."""

    model: Model
    data: Data
    graph: Graph
    sites: tuple[Site, ...]
    costs: Costs

    @property
    def metric(self) -> str:
        return metric_for(self.model.task, self.data.label_kind)


def export(settings: Settings, *, console: Console | None = None, command: str = "compressor.export(...)") -> Report:
    """Compress a model: trace, score, choose, rewrite, lower, build, measure; write the output folder.

    Args:
        settings: everything that was asked for.
        console: where progress is shown; None shows nothing.
        command: the command line, for the report.

    Raises:
        CompressorError, PassError, RuntimesError: one sentence that says what was found and what to do. Nothing is
            left behind then.
    """
    target, options = _usable(settings)
    steps = Steps(console)
    output = Path(settings.output)
    with output_folder(output, force=settings.force) as folder, scratch_folder(output) as scratch:
        subject = _load(settings, steps)
        subject.model.save(folder)
        options = _sized(options, subject, settings)
        with _accepting_data(subject):
            plan, search_facts = _decide(subject, settings, steps)
        (folder / "plan.json").write_text(plan.to_json())
        with steps.step("rewrite"):
            rewritten = subject.graph.fork()
            apply(Drop(plan.dropped), rewritten)
        with steps.step("lower to ONNX, check against torch"):
            dense = lower(subject.graph, subject.model, scratch / "dense.onnx")
            result = lower(rewritten, subject.model, scratch / "model.onnx") if plan.dropped else dense
            parity = {
                "baseline": _parity(dense, subject.graph, subject, target, options),
                "result": _parity(result, rewritten, subject, target, options),
            }
        files, int8 = {"baseline": dense, "result": result}, dict[str, Quantized]()
        if settings.int8 is not None:
            files, int8 = _quantized(files, subject, settings, target, options, scratch, steps)
        _ship(files["result"], folder / "model.onnx")
        files["result"] = folder / "model.onnx"
        with steps.step(f"build for {target.name}"):
            engines = {name: target.build(path, path.parent, options) for name, path in files.items()}
        quality = _quality(engines, subject, target, options, steps)
        latency = _latency(engines, subject, settings, target, options, steps)
        report = Report(
            command=command,
            settings=settings.to_dict(),
            model=_describe(subject),
            data=subject.data.describe(),
            plan=plan,
            sizes={name: _size(name, files[name], subject, plan) for name in files},
            quality=quality,
            no_quality_because=_no_quality(subject),
            latency=latency,
            parity={name: value.difference for name, value in parity.items()},
            int8={name: dataclasses.asdict(value) for name, value in int8.items()},
            search=search_facts,
            steps=tuple(steps.done),
            environment=environment(),
            notes=_notes(plan, quality, settings, subject, int8),
        )
        (folder / "report.json").write_text(report.to_json())
    return report


def inspect(settings: Settings, *, console: Console | None = None) -> Inspection:
    """Score every site of a model on its calibration data; changes and exports nothing.

    Args:
        settings: model, data and metric; with the metric ``output`` each site's effect on the output is measured too.
        console: where progress is shown; None shows nothing.

    Raises:
        CompressorError, PassError: one sentence that says what was found and what to do.
    """
    steps = Steps(console)
    subject = _load(settings, steps)
    with _accepting_data(subject):
        scores = _score(subject, steps)
        effects = _effects(subject, settings, steps) if settings.metric == "output" else None
        measured = None if effects is None else effects.of_units([[site] for site in subject.sites])
    return Inspection(subject.model.name, subject.sites, scores, subject.costs, subject.data.describe(), measured)


# --------------------------------------------------------------------------------------------------------- the steps


def _usable(settings: Settings) -> tuple[Runtime, BuildOptions]:
    """The target, if it can be used here: asked first, so that nobody waits for a search to learn that it cannot."""
    target = runtime(settings.target)
    if settings.int8 == "dynamic" and not target.int8.dynamic:
        raise PipelineError(
            f"target {settings.target} has no dynamic int8, it needs the ranges in the file; use --int8 static."
        )
    reason = target.missing()
    if reason is not None:
        raise RuntimeUnavailable(f"target {settings.target} cannot be used here: {reason}.")
    device = target.devices[0] if settings.device is None else settings.device
    options = BuildOptions(device=device, threads=settings.threads)
    if options.device != target.devices[0]:
        _probe(target, options)
    return target, options


def _sized(options: BuildOptions, subject: _Subject, settings: Settings) -> BuildOptions:
    """The options with the sizes that an engine will meet: from one row up to the batches of the evaluation."""
    parts = (subject.data.calibration, subject.data.validation, subject.data.test)
    rows = max(settings.batch, PARITY_ROWS, BATCH * parts[0].samples.rows_per_sample)
    options = dataclasses.replace(options, batches=(1, settings.batch, rows))
    axes = [(name, axis) for name, free in subject.model.dynamic_axes.items() for axis in free if axis != 0]
    if not axes:
        return options
    usual = _timing_feeds(subject.data.test, settings.batch)
    feeds = (batch.feeds for part in parts for batch in part.batches(BATCH))
    longest = max(found[name].shape[axis] for found in feeds for name, axis in axes)
    return dataclasses.replace(options, lengths=(1, max(usual[name].shape[axis] for name, axis in axes), longest))


def _probe(target: Runtime, options: BuildOptions) -> None:
    """Build the smallest model there is: whether the device is there should not be learnt after a search."""
    from onnx import TensorProto, helper, save

    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "probe", ends[:1], ends[1:])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "probe.onnx")
        save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10), path)
        target.build(path, Path(folder), options)


def _load(settings: Settings, steps: Steps) -> _Subject:
    with steps.step("load the model"):
        model = models.load(
            settings.model,
            task=settings.task,
            revision=settings.revision,
            random_weights=settings.random_weights,
            trust_remote_code=settings.trust_remote_code,
            example_inputs=settings.example_inputs,
        )
    with steps.step("load the data") as tick:
        data = _data(settings, model, tick)
    with steps.step("trace, find the sites"):
        graph = trace(model)
        _check_trained(graph, model)
        sites = find_sites(graph)
        if not sites:
            raise PipelineError(f"{model.name} has no residual branch (y = x + f(x)), so there is nothing to drop.")
        return _Subject(model, data, graph, sites, Costs(graph, model.example))


def _data(settings: Settings, model: Model, tick: Tick) -> Data:
    source = settings.data
    data = data_module.load(
        str(source or models.SAMPLE / "digits.npz"),
        model.preprocess,
        task=model.task,
        seed=settings.seed,
        shares=Shares(total=settings.samples),
        revision=settings.revision,
        progress=tick,
    )
    classes = model.classes()
    if data.label_kind == "class" and classes is not None:
        parts = (data.calibration, data.validation, data.test)
        largest = max(int(part.labels.max()) for part in parts if part.labels is not None)
        if largest >= classes:
            raise PipelineError(
                f"{data.source} has labels up to {largest}, but {model.name} knows only {classes} classes (0 to "
                f"{classes - 1}); for an image folder the sorted subfolders must be the model's classes, in order."
            )
    if model.task == "text-generation" and not data.random and data.label_kind != "tokens":
        raise PipelineError(f"{data.source} holds no texts or token ids, which a language model needs.")
    return data


def _check_trained(graph: Graph, model: Model) -> None:
    """Refuse a checkpoint that lacks weights the outputs depend on: they would be random."""
    used = {str(node.target).removeprefix(graph.prefix) for node in graph.nodes() if node.op == "get_attr"}
    absent = [name for name in model.untrained if name in used]
    if absent:
        raise PipelineError(
            f"the checkpoint of {model.name} lacks {len(absent)} weights that {model.task} needs, the first is "
            f"{absent[0]}; choose a fine-tuned checkpoint, or another --task."
        )


@contextlib.contextmanager
def _accepting_data(subject: _Subject) -> Iterator[None]:
    """Torch's refusal of an input (a token id beyond the vocabulary, too long a row) is the data's fault; say so."""
    try:
        yield
    except (IndexError, RuntimeError) as error:
        raise PipelineError(
            f"{subject.model.name} fails on samples of {subject.data.source} ({first_line(error)}); check that they "
            "fit it, such as token ids below the vocabulary's size and rows no longer than its positions."
        ) from error


def _score(subject: _Subject, steps: Steps) -> Scores:
    with steps.step("score the sites") as tick:
        batches = _ticking(tensor_batches(subject.data.calibration), len(subject.data.calibration), tick)
        return apply(Score(), subject.graph, batches)


def _ticking(batches: Iterator[dict[str, Any]], total: int, tick: Tick) -> Iterator[dict[str, Any]]:
    done = 0
    for feeds in batches:
        yield feeds
        done += len(next(iter(feeds.values())))
        tick(min(done, total), total)


def _decide(subject: _Subject, settings: Settings, steps: Steps) -> tuple[Plan, dict[str, Any]]:
    """The plan, and what it took to find it."""
    if settings.drop == "none":
        return choose(parse("0"), subject.sites, "reverse", model=subject.model.name), {}
    if settings.drop == "auto":
        return _search(subject, settings, steps)
    if settings.drop.endswith(".json"):
        return _replay(Path(settings.drop), subject.sites), {}
    selection = parse(settings.drop)
    needs_scores = not selection.names and settings.metric in ("cosine", "influence", "angular")
    scores = _score(subject, steps) if needs_scores else None
    effects = _effects(subject, settings, steps) if settings.metric == "output" and not selection.names else None
    with steps.step("choose"):
        plan = choose(
            selection,
            subject.sites,
            settings.metric,
            model=subject.model.name,
            scores=scores,
            effect=None if effects is None else effects.of_units,
            seed=settings.seed,
        )
    return plan, {} if effects is None else {"sweeps": effects.sweeps, "samples": len(effects.split)}


def _search(subject: _Subject, settings: Settings, steps: Steps) -> tuple[Plan, dict[str, Any]]:
    effects = _effects(subject, settings, steps)
    with steps.step("search") as tick:
        validation = Validation(subject.graph, subject.model, subject.data.validation, subject.metric)
        plan = search(
            subject.graph,
            subject.model,
            subject.sites,
            subject.costs,
            effects,
            validation,
            max_loss=settings.max_loss,
            progress=lambda text: tick(text=text),
        )
    return plan, {
        "samples": len(effects.split),
        "sweeps": round(effects.sweeps, 2),
        "validation_samples": len(subject.data.validation),
        "validation_sweeps": validation.evaluations,
    }


def _effects(subject: _Subject, settings: Settings, steps: Steps) -> Effects:
    with steps.step("run the original"):
        return Effects(subject.graph, subject.model, subject.data.calibration.head(settings.search_samples))


def _replay(path: Path, sites: Sequence[Site]) -> Plan:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise PipelineError(f"the plan file {path} cannot be read ({error.strerror}); check the path.") from error
    except UnicodeDecodeError as error:
        raise PipelineError(f"{path} is not a plan.json that Compressor wrote: it is not text.") from error
    plan = Plan.from_json(text)
    plan.check(sites)
    return plan


def _parity(path: Path, graph: Graph, subject: _Subject, target: Runtime, options: BuildOptions) -> Parity:
    """Hold an ONNX file against torch on real samples, as a batch and one by one (a baked-in batch size shows)."""
    batch = next(subject.data.calibration.batches(PARITY_ROWS)).feeds
    worst = Parity("", 0.0, 0)
    with target.load(target.build(path, path.parent, options), options) as engine:
        for feeds in (batch, {name: value[:1] for name, value in batch.items()}):
            with _accepting_data(subject):
                outputs = run(graph, {name: _tensor(value) for name, value in feeds.items()})
            expected = dict(zip(graph.outputs, (value.numpy() for value in outputs), strict=True))
            found = check_parity(expected, partial(engine.run, feeds), name=path.name)
            worst = max(worst, found, key=lambda parity: parity.difference)
    return worst


def _quantized(
    files: Mapping[str, Path],
    subject: _Subject,
    settings: Settings,
    target: Runtime,
    options: BuildOptions,
    scratch: Path,
    steps: Steps,
) -> tuple[dict[str, Path], dict[str, Quantized]]:
    """Int8 versions of baseline and result, each from its own float file; the float baseline becomes ``original``."""
    made: dict[str, Path] = {"original": files["baseline"]}
    facts: dict[str, Quantized] = {}
    mode: Literal["static", "dynamic"] = "dynamic" if settings.int8 == "dynamic" else "static"
    for name, source in files.items():
        if name == "result" and source == files["baseline"]:
            made[name], facts[name] = made["baseline"], facts["baseline"]
            continue
        with steps.step(f"quantize the {name}") as tick:
            made[name] = scratch / f"{name}.int8.onnx"
            facts[name] = quantize(
                source,
                made[name],
                lambda: (batch.feeds for batch in subject.data.calibration.batches(BATCH)),
                mode=mode,
                activations="uint8" if mode == "dynamic" else target.int8.activations,
                convolutions=mode == "static" and target.int8.convolutions,
                loss=_int8_loss(source, subject, target, options),
                max_loss=settings.max_int8_loss,
                progress=lambda text, tick=tick: tick(text=text),  # type: ignore[misc]
            )
    return made, facts


def _int8_loss(
    source: Path, subject: _Subject, target: Runtime, options: BuildOptions
) -> Callable[[Path], float] | None:
    """What measures how much an int8 file lost against its float file on validation data, in percent; None: nothing."""
    if _no_quality(subject) is not None:
        return None
    floating = target.build(source, source.parent, options)

    def loss(quantized: Path) -> float:
        engines = {"float": floating, "int8": target.build(quantized, quantized.parent, options)}
        evaluation = _run_all(engines, subject, subject.data.validation, "float", target, options, lambda *_: None)
        return evaluation.loss_value("float", "int8")

    return loss


def _run_all(
    engines: Mapping[str, Path],
    subject: _Subject,
    split: Split,
    reference: str,
    target: Runtime,
    options: BuildOptions,
    tick: Tick,
) -> Evaluation:
    """Run several engines side by side over a split."""
    # Waiting threads that spin would take the cores from the other open engines.
    shared = dataclasses.replace(options, spinning=False)
    opened: dict[str, Engine] = {}
    try:
        for name, path in engines.items():
            opened[name] = target.load(path, shared)
        runners = {name: _runner(engine, subject.model.answer) for name, engine in opened.items()}
        return evaluate(split, runners, metric=subject.metric, reference=reference, progress=tick)
    finally:
        for engine in opened.values():
            engine.close()


def _runner(engine: Engine, answer: str) -> Runner:
    return lambda feeds: engine.run(feeds)[answer]


def _quality(
    engines: Mapping[str, Path], subject: _Subject, target: Runtime, options: BuildOptions, steps: Steps
) -> Quality | None:
    """Quality on test data, which neither calibration nor search has seen."""
    if _no_quality(subject):
        return None
    reference = "original" if "original" in engines else "baseline"
    with steps.step("measure the quality") as tick:
        return Quality.of(_run_all(engines, subject, subject.data.test, reference, target, options, tick))


def _no_quality(subject: _Subject) -> str | None:
    """Why no quality may be stated; None where it may."""
    if subject.data.random:
        return "the data is random"
    if subject.model.random_weights:
        return "the weights are random"
    return None


def _latency(
    engines: Mapping[str, Path],
    subject: _Subject,
    settings: Settings,
    target: Runtime,
    options: BuildOptions,
    steps: Steps,
) -> dict[str, Latency]:
    feeds = _timing_feeds(subject.data.test, settings.batch)
    openers = {name: partial(target.load, path, options) for name, path in engines.items()}
    with steps.step("measure the latency") as tick:
        return interleave(
            openers,
            feeds,
            rounds=settings.rounds,
            progress=lambda name, done, total: tick(done, total, name),
        )


def _timing_feeds(split: Split, batch: int) -> dict[str, npt.NDArray[Any]]:
    """Exactly `batch` rows of real inputs, repeated where the split is smaller."""
    feeds = next(split.batches(batch)).feeds
    rows = len(next(iter(feeds.values())))
    return {name: np.concatenate([value] * (-(-batch // rows)))[:batch] for name, value in feeds.items()}


# -------------------------------------------------------------------------------------------------------- the facts


def _tensor(value: npt.NDArray[Any]) -> Any:
    import torch

    return torch.from_numpy(value)


def _ship(source: Path, destination: Path) -> None:
    """Copy an ONNX file under its final name, with its external data, whose name is written inside it."""
    external = source.with_name(source.name + ".data")
    if not external.exists():
        shutil.copyfile(source, destination)
        return
    import onnx

    model = onnx.load(str(source))
    onnx.save_model(model, str(destination), save_as_external_data=True, location=destination.name + ".data")


def _describe(subject: _Subject) -> dict[str, Any]:
    model = subject.model
    return {
        "name": model.name,
        "source": model.source,
        "task": model.task,
        "revision": model.revision,
        "random_weights": model.random_weights,
        "inputs": list(model.inputs),
        "outputs": list(model.outputs),
        "sites": [dataclasses.asdict(site) for site in subject.sites],
    }


def _size(name: str, path: Path, subject: _Subject, plan: Plan) -> Size:
    gone = [site for site in subject.sites if site.name in plan.dropped] if name == "result" else []
    cost = subject.costs.under(gone)
    return Size(cost.parameters, cost.multiply_adds, onnx_bytes(path))


def _notes(
    plan: Plan, quality: Quality | None, settings: Settings, subject: _Subject, int8: Mapping[str, Quantized]
) -> tuple[str, ...]:
    notes = []
    if settings.drop == "auto" and not plan.dropped:
        notes.append(f"No site could be dropped within {settings.max_loss:g} % loss on validation data.")
    if quality is not None and settings.drop == "auto" and quality.loss["baseline"].value > settings.max_loss:
        lost = quality.loss["baseline"].value
        notes.append(
            f"The loss on test data, {lost:.2f} %, exceeds the {settings.max_loss:g} % that held on "
            f"{len(subject.data.validation)} validation samples; more samples make the choice more reliable."
        )
    for name, facts in int8.items():
        if facts.loss is not None and facts.loss > settings.max_int8_loss:
            notes.append(
                f"int8 of the {name} lost {facts.loss:.2f} % on validation data even with layers kept in float."
            )
    if subject.data.skipped:
        notes.append(f"{len(subject.data.skipped)} unreadable samples were skipped: {_named(subject.data)}.")
    return tuple(notes)


def _named(data: Data) -> str:
    names = [skipped.id for skipped in data.skipped[:5]]
    return ", ".join(names) + (", ..." if len(data.skipped) > len(names) else "")
