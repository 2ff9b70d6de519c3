"""`bench --tasks`: tasks of EleutherAI's lm-evaluation-harness, judged with every engine side by side."""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from compressor.errors import CompressorError, SettingsError
from compressor.models import Model
from compressor.models.base import first_line
from compressor.workspace.progress import Steps
from runtimes.base.protocols import Engine

if TYPE_CHECKING:
    from rich.table import Table

INSTALL = 'pip install "lm-eval>=0.4.13"'
LONGEST = 2048  # tokens where nothing says what a model takes, as the harness has it


@dataclass(frozen=True)
class Asked:
    """What the harness is asked for.

    Attributes:
        tasks: names of tasks, groups or tags of the harness, or YAML files of tasks.
        shots: examples in front of each question; None leaves it to the task.
        limit: questions of each task: a number, or a share below 1; None takes all.
        include_path: a folder of own tasks.
    """

    tasks: tuple[str, ...]
    shots: int | None = None
    limit: float | None = None
    include_path: str | None = None

    def check(self) -> None:
        """Refuse what cannot work before anything else is done.

        Raises:
            SettingsError: no tasks but options of theirs, the harness is not installed, or a number is out of range.
        """
        options = {"--num-fewshot": self.shots, "--limit": self.limit, "--include-path": self.include_path}
        lonely = [name for name, value in options.items() if value is not None]
        if not self.tasks:
            if lonely:
                raise SettingsError(f"{lonely[0]} is an option of --tasks; name tasks of lm-eval, or leave it out.")
            return
        if any(not task.strip() for task in self.tasks):
            raise SettingsError("--tasks holds an empty name; expected names with commas, such as arc_easy,wikitext.")
        if self.limit is not None and not (0 < self.limit < 1 or (self.limit >= 1 and self.limit == int(self.limit))):
            raise SettingsError(f"--limit is {self.limit:g}; expected a whole number, or a share between 0 and 1.")
        if find_spec("lm_eval") is None:
            raise SettingsError(f"--tasks needs the lm-evaluation-harness, which is not installed: {INSTALL}")


@dataclass(frozen=True)
class Result:
    """One figure of one engine, as the harness states it; `error` is its standard error where it has one."""

    engine: str
    task: str
    metric: str
    filter: str
    value: float
    error: float | None
    shots: int | None
    samples: int | None
    version: str | None
    higher_is_better: bool | None

    @property
    def place(self) -> tuple[str, str, str]:
        """What the figures of all engines have in common."""
        return self.task, self.metric, self.filter

    @property
    def title(self) -> str:
        """Task, examples before each question, and metric with the direction that is better."""
        shots = "" if self.shots is None else f"{self.shots}-shot, "
        kind = "" if self.filter == "none" else f" ({self.filter})"
        better = {True: " ↑", False: " ↓", None: ""}[self.higher_is_better]
        return f"{self.task}, {shots}{self.metric}{kind}{better}"


@dataclass(frozen=True)
class Harness:
    """All figures of the harness, engine by engine, and with which release of it they were taken."""

    asked: Asked
    release: str
    against: str
    results: tuple[Result, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        asked = {"tasks": list(self.asked.tasks), "num_fewshot": self.asked.shots, "limit": self.asked.limit}
        rows = [
            {name: getattr(each, name) for name in Result.__dataclass_fields__}
            | {"value": _finite(each.value), "difference": _finite(self.difference(each))}
            for each in self.results
        ]
        return {"lm_eval": self.release, **asked, "against": self.against, "results": rows}

    def difference(self, each: Result) -> float:
        """How far a figure is above that of the reference in the same place; NaN where there is none."""
        same = (one.value for one in self.results if (one.engine, one.place) == (self.against, each.place))
        return each.value - next(same, math.nan)

    def table(self) -> Table:
        """A line for each figure and engine, 80 columns wide where names are short."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        limit = "" if self.asked.limit is None else f", limit {self.asked.limit:g}"
        title = f"lm-eval {self.release}{limit}; difference from {self.against}"
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column("", overflow="fold")
        for heading in ("value", "std. error", "difference"):
            table.add_column(heading, justify="right", no_wrap=True)
        places = dict.fromkeys(each.place for each in self.results)
        for place in places:
            same = [each for each in self.results if each.place == place]
            table.add_row(same[0].title)
            for each in same:
                error = "" if each.error is None else f"± {each.error:.4f}"
                difference = "" if each.engine == self.against else f"{self.difference(each):+.4f}"
                table.add_row(f"  {each.engine}", f"{each.value:.4f}", error, difference)
        return table

    def summary(self) -> str:
        """What to read with care, as a sentence."""
        part = "" if self.asked.limit is None else f" of the first {self.asked.limit:g} questions of each task"
        return (
            f"Tasks: figures of lm-eval {self.release}{part}, each with its standard error, which is that of the "
            "figure and not of the difference between engines; the questions are the same for all."
        )


def check_model(model: Model, asked: Asked) -> None:
    """Refuse a model that the harness cannot ask, and tasks that cannot be loaded, before engines are built.

    Raises:
        SettingsError: it is no language model, or has no tokenizer or no trained weights.
        HarnessError: a task is unknown, or its data cannot be loaded.
    """
    if not asked.tasks:
        return
    if model.task != "text-generation":
        raise SettingsError(f"--tasks are for language models; {model.name} does {model.task}.")
    if model.tokenizer is None or model.tokenizer.eos_token_id is None:
        raise SettingsError(f"--tasks need a tokenizer that knows the end of a text; {model.name} comes without one.")
    if model.random_weights:
        raise SettingsError(f"--tasks judge quality, and the weights of {model.name} are random; leave them out.")
    with _loading(asked):
        manager, names = _tasks(asked)
        manager.load(names)


def judge(
    openers: Mapping[str, Callable[[], Engine]],
    model: Model,
    asked: Asked,
    *,
    against: str,
    length: int | None,
    steps: Steps,
) -> Harness | None:
    """Ask every engine all tasks, one engine after the other; None where no tasks are asked for.

    Args:
        openers: what opens each engine, by name.
        model: the model around them, with its tokenizer.
        asked: tasks and options.
        against: the engine that the others are compared with.
        length: most tokens of a call; None takes what the model takes.
        steps: where progress is shown.

    Raises:
        HarnessError: a task asks for something that engines do not do here.
    """
    if not asked.tasks:
        return None
    from compressor.benchmark.lm_eval_model import EngineLM

    with _loading(asked):
        manager, names = _tasks(asked)
    most = LONGEST if model.preprocess.longest is None else model.preprocess.longest
    found: list[Result] = []
    for name, opener in openers.items():
        with steps.step(f"ask {', '.join(asked.tasks)}: {name}") as tick, opener() as engine:
            lm = EngineLM(engine, model, most if length is None else length, told=tick)
            found += results(name, _evaluated(lm, manager, names, asked))
    return Harness(asked, importlib.metadata.version("lm_eval"), against, tuple(found))


def results(engine: str, said: Mapping[str, Any]) -> Iterator[Result]:
    """The figures in what the harness's `simple_evaluate` returns; groups are in it beside their tasks."""
    for task, figures in said["results"].items():
        for key, value in figures.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = figures.get(f"{metric}_stderr,{kind}")
            better = said.get("higher_is_better", {}).get(task, {}).get(metric)
            version = said.get("versions", {}).get(task)
            yield Result(
                engine=engine,
                task=task,
                metric=metric,
                filter=kind,
                value=float(value),
                error=float(error) if isinstance(error, int | float) else None,
                shots=said.get("n-shot", {}).get(task),
                samples=said.get("n-samples", {}).get(task, {}).get("effective"),
                version=None if version is None else str(version),
                higher_is_better=better,
            )


def _tasks(asked: Asked) -> tuple[Any, list[str]]:
    """The harness's task manager, which reads thousands of files, and the names that the patterns mean."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=asked.include_path)
    return manager, [name for task in asked.tasks for name in (manager.match_tasks([task]) or [task])]


def _evaluated(lm: Any, manager: Any, names: list[str], asked: Asked) -> Mapping[str, Any]:
    from lm_eval import simple_evaluate

    limit = None if asked.limit is None else int(asked.limit) if asked.limit >= 1 else asked.limit
    with _loading(asked):
        said: Mapping[str, Any] = simple_evaluate(
            model=lm, tasks=names, task_manager=manager, num_fewshot=asked.shots, limit=limit, log_samples=False
        )
    return said


@contextlib.contextmanager
def _loading(asked: Asked) -> Iterator[None]:
    """What the harness and its data sets raise, in one sentence; and nothing logged below an error."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    except CompressorError:
        raise
    except Exception as error:  # the harness, the data library and the hub client let through whatever happens
        raise CompressorError(
            f"lm-eval cannot ask {', '.join(asked.tasks)} ({first_line(error)}); check the names, --include-path and "
            "the network that its data comes from."
        ) from error
    finally:
        logger.setLevel(level)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
