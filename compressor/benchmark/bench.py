"""`bench`: exported folders, ONNX files and torch models measured again, side by side in one interleaved run."""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor import models
from compressor.benchmark.contenders import BenchError, Entry, Exported, Given, given
from compressor.benchmark.decode_results import Generated
from compressor.benchmark.decode_timing import contexts, measure
from compressor.benchmark.lm_eval_tasks import Asked, check_model
from compressor.benchmark.lm_eval_tasks import judge as asked_tasks
from compressor.benchmark.results import Comparison
from compressor.benchmark.runner import Condition, Stand
from compressor.errors import SettingsError
from compressor.lower.traced_model import Loaded, load_data
from compressor.measure.workload import timing_feeds
from compressor.models import Model
from compressor.settings import Settings
from compressor.workspace.environment import environment
from compressor.workspace.output_folder import check_writable, write_files
from compressor.workspace.progress import Steps

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class BenchSettings:
    """What `compressor bench` was asked for; each field is a flag of the same name.

    Attributes:
        what: exported folders, .onnx files and models (as for `export`), in the order of the tables.
        data: where samples come from; None takes what the first folder was exported with.
        model: whose preprocessing and names hold; None takes those of the first folder, or of the first model.
        against: the name that the others are compared with; None takes the first.
        batch: batch sizes to measure at.
        threads: numbers of threads to measure at; none leaves them to the runtimes.
        context: tokens that language models generate after, each timed; None takes a usual number, none times nothing.
        compile: measure torch models through torch.compile too.
        target: the runtime of ONNX files (default onnxruntime) and of folders (default: what they were exported for).
        max_length: tokens of a window of a language model's texts; None takes what the first folder was exported with.
        stride: tokens from the start of a window to that of the next; None takes likewise.
        tasks: tasks of lm-eval that every engine is asked; none asks nothing.
        num_fewshot: examples in front of each question; None leaves it to the task.
        limit: questions of each task: a number, or a share below 1; None takes all.
        include_path: a folder with tasks of one's own, as YAML files.
        cache: trace language models with their KV cache; False (``--no-cache``) without.
        output: the file to write.
    """

    what: tuple[str, ...]
    data: str | None = None
    model: str | None = None
    against: str | None = None
    batch: tuple[int, ...] = (1,)
    threads: tuple[int, ...] = ()
    context: tuple[int, ...] | None = None
    compile: bool = False
    target: str | None = None
    device: str | None = None
    task: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    random_weights: bool = False
    cache: bool = True
    samples: int | None = None
    max_length: int | None = None
    stride: int | None = None
    tasks: tuple[str, ...] = ()
    num_fewshot: int | None = None
    limit: float | None = None
    include_path: str | None = None
    rounds: int = 10
    seed: int = 0
    output: str | Path = "bench.json"

    def __post_init__(self) -> None:
        for name, values in (("batch", self.batch), ("threads", self.threads), ("context", self.context or ())):
            if any(value < 1 for value in values) or len(set(values)) < len(values):
                raise SettingsError(f"{name} is {_listed(values)}; expected different numbers of at least 1.")
        if not self.batch:
            raise SettingsError("batch is empty; expected numbers such as 1,8.")
        self.asked.check()

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """Every batch size with every number of threads."""
        return tuple(itertools.starmap(Condition, itertools.product(self.batch, self.threads or (None,))))

    @property
    def asked(self) -> Asked:
        """What the lm-evaluation-harness is asked for."""
        return Asked(self.tasks, self.num_fewshot, self.limit, self.include_path)

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain JSON values."""
        return dataclasses.asdict(self) | {"output": str(self.output)}


def bench(
    settings: BenchSettings, *, console: Console | None = None, command: str = "compressor.bench(...)"
) -> Comparison:
    """Measure everything again and write the JSON file.

    Args:
        settings: what was asked for.
        console: where progress is shown; None shows nothing.
        command: the command line, for the file.

    Raises:
        CompressorError, RuntimesError: one sentence that says what was found and what to do.
    """
    output = Path(settings.output)
    if output.is_dir():
        raise SettingsError(f"--output {output} is a folder; expected a file such as bench.json.")
    check_writable(output.parent)
    steps = Steps(console)
    things = given(settings.what)
    folders = {each.name: each.folder for each in things if each.folder is not None}
    stand = _set_up(settings, things, folders, steps)
    with tempfile.TemporaryDirectory() as scratch:
        engines = stand.built(Path(scratch), steps)
        parity = stand.parity(engines)
        evaluation = stand.quality(engines, steps)
        harness = asked_tasks(
            stand.quiet_openers(engines),
            stand.loaded.model,
            settings.asked,
            against=stand.reference,
            length=stand.settings.max_length,
            steps=steps,
        )
        measurements = stand.measurements(engines, settings.rounds, steps)
        generation = measure(stand, engines, settings.rounds, Path(scratch), steps)
    comparison = Comparison(
        command=command,
        settings=settings.to_dict(),
        against=stand.against,
        model=stand.loaded.model.name,
        data=stand.loaded.data.describe(),
        entries=stand.entries,
        evaluation=evaluation,
        reference=stand.reference,
        no_quality_because=stand.loaded.no_quality_because,
        measurements=measurements,
        generated=Generated(stand.loaded.model.name, stand.entries, stand.against, generation),
        parity=parity,
        harness=harness,
        environment=environment(),
        notes=tuple(_seen_before(stand, folders)),
    )
    write_files(output.parent, {output.name: comparison.to_json().encode()})
    return comparison


def _set_up(settings: BenchSettings, things: Sequence[Given], folders: Mapping[str, Exported], steps: Steps) -> Stand:
    """Load the models and the data."""
    _check_tasks(folders)
    with steps.step("load the models"):
        loaded = {each.name: _given_model(each, settings) for each in things if each.is_model}
        model = _model(settings, folders, loaded)
    check_model(model, settings.asked)
    entries = tuple(
        entry
        for each in things
        for entry in each.entries(loaded.get(each.name), settings.target, compiled=settings.compile)
    )
    against = _against(settings.against, entries)
    after = contexts(settings.context, model)
    usual = _usual(settings, folders)
    with steps.step("load the data") as tick:
        ground = Loaded(model, load_data(usual, model, tick))
    feeds = {batch: timing_feeds(ground.data.test, batch) for batch in settings.batch}
    return Stand(ground, usual, entries, against, settings.conditions, feeds, after)


def _given_model(thing: Given, settings: BenchSettings) -> Model:
    """A model that is to be measured; a checkpoint that was exported is loaded for the task it was exported for."""
    if thing.folder is None:
        return _load(thing.spec, settings)
    facts = thing.folder.report["model"]
    model = models.load(thing.spec, task=facts["task"], cache=thing.folder.cache)
    return dataclasses.replace(model, random_weights=facts["random_weights"])


def _load(spec: str, settings: BenchSettings) -> Model:
    return models.load(
        spec,
        task=settings.task,
        revision=settings.revision,
        random_weights=settings.random_weights,
        trust_remote_code=settings.trust_remote_code,
        cache=settings.cache,
    )


def _model(settings: BenchSettings, folders: Mapping[str, Exported], loaded: Mapping[str, Model]) -> Model:
    """The model whose preprocessing, task and names hold for everything; random if any weights are."""
    if settings.model is not None:
        model = _load(settings.model, settings)
    elif folders or loaded:
        first = next(iter(folders.values())).model() if folders else next(iter(loaded.values()))
        model = max(
            (first, *loaded.values()), key=lambda each: len(each.state)
        )  # a checkpoint lacks a part of the cache
    else:
        raise SettingsError("only ONNX files are given; name with --model whose preprocessing they take.")
    random = [folder.report["model"]["random_weights"] for folder in folders.values()]
    random += [each.random_weights for each in loaded.values()]
    return dataclasses.replace(model, random_weights=any(random) or (model.random_weights and not random))


def _check_tasks(folders: Mapping[str, Exported]) -> None:
    """Refuse models of different tasks: no data fits both."""
    tasks = {name: folder.report["model"]["task"] for name, folder in folders.items()}
    if len(set(tasks.values())) > 1:
        found = ", ".join(f"{name} ({task})" for name, task in tasks.items())
        raise BenchError(f"the folders are of different tasks: {found}; measure those of one task at a time.")


def _against(wanted: str | None, entries: Sequence[Entry]) -> str:
    """The name of the baseline; a folder's name stands for its first engine."""
    names = [entry.name for entry in entries]
    if wanted is None:
        return names[0]
    found = [name for name in names if name in (wanted, f"{wanted} (eager)") or name.startswith(f"{wanted}/")]
    if not found:
        raise SettingsError(f"--against {wanted} is none of what is measured; expected one of: {', '.join(names)}.")
    return found[0]


def _usual(settings: BenchSettings, folders: Mapping[str, Exported]) -> Settings:
    """The settings by which data is read and engines are sized, as an export has them."""
    first = next(iter(folders.values()), None)
    asked = {} if first is None else first.report["settings"]
    return Settings(
        model=asked.get("model") if first is not None else settings.model or settings.what[0],
        data=asked.get("data") if settings.data is None else settings.data,
        drop="none",
        target=settings.target or asked.get("target", "onnxruntime"),
        device=settings.device,
        batch=settings.batch[0],
        samples=settings.samples,
        max_length=asked.get("max_length") if settings.max_length is None else settings.max_length,
        stride=asked.get("stride") if (settings.max_length, settings.stride) == (None, None) else settings.stride,
        rounds=settings.rounds,
        seed=settings.seed,
    )


def _seen_before(stand: Stand, folders: Mapping[str, Exported]) -> Iterator[str]:
    """Warn of test samples on which a folder was calibrated or chosen, where it was made from the same data."""
    data = stand.loaded.data
    for name, folder in folders.items():
        made = folder.report["data"]
        seen = set(data.test.ids) - set(made["test_ids"])
        # An export of fewer samples used up fewer than half of these, in the same order: the rest it never saw.
        if not data.random and made["source"] == data.source and made["seed"] != data.seed:
            yield f"{name} was exported with another --seed, so it may have been calibrated on samples of this test."
        elif not data.random and made["source"] == data.source and seen and _fewer(data.describe(), made):
            yield (
                f"{len(seen)} of the {len(data.test)} test samples may have calibrated {name}, which was exported with "
                "more samples; give as many --samples as then."
            )


def _fewer(mine: Mapping[str, Any], then: Mapping[str, Any]) -> bool:
    return bool(sum(mine["sizes"].values()) < sum(then["sizes"].values()))


def _listed(values: Sequence[int]) -> str:
    return ",".join(map(str, values)) or "empty"
