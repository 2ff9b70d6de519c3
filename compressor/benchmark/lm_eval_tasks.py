"""`bench --tasks`: evaluate every engine on tasks of EleutherAI's lm-evaluation-harness."""

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
LONGEST = 2048  # tokens of a call for models without a known limit, the default of the harness


@dataclass(frozen=True)
class TaskOptions:
    """Tasks and options of the harness.

    Attributes:
        tasks: names of tasks, groups or tags of the harness, or YAML files of tasks.
        shots: few-shot examples of each question; None uses the task's own number.
        limit: questions of each task: a number, or a share below 1; None uses all.
        include_path: a folder with further tasks.
    """

    tasks: tuple[str, ...]
    shots: int | None = None
    limit: float | None = None
    include_path: str | None = None

    def check(self) -> None:
        """Check the options before any work.

        Raises:
            SettingsError: options of --tasks are set without it, the harness is not installed, or a value is invalid.
        """
        options = {"--num-fewshot": self.shots, "--limit": self.limit, "--include-path": self.include_path}
        given = [name for name, value in options.items() if value is not None]
        if not self.tasks:
            if given:
                raise SettingsError(f"{given[0]} needs --tasks; name tasks of lm-eval, or leave it out.")
            return
        if any(not task.strip() for task in self.tasks):
            raise SettingsError(
                "--tasks holds an empty name; expected names separated by commas, such as arc_easy,wikitext."
            )
        if self.limit is not None and not (0 < self.limit < 1 or (self.limit >= 1 and self.limit == int(self.limit))):
            raise SettingsError(f"--limit is {self.limit:g}; expected a whole number, or a share between 0 and 1.")
        if find_spec("lm_eval") is None:
            raise SettingsError(f"--tasks needs the lm-evaluation-harness, which is not installed; run {INSTALL}")


@dataclass(frozen=True)
class Result:
    """One metric of one engine on one task; `error` is the standard error, None if the harness states none."""

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
        """Task, metric and filter: the key that the results of all engines share."""
        return self.task, self.metric, self.filter

    @property
    def title(self) -> str:
        """Task, number of shots, and metric with an arrow towards the better values."""
        shots = "" if self.shots is None else f"{self.shots}-shot, "
        kind = "" if self.filter == "none" else f" ({self.filter})"
        better = {True: " ↑", False: " ↓", None: ""}[self.higher_is_better]
        return f"{self.task}, {shots}{self.metric}{kind}{better}"


@dataclass(frozen=True)
class TaskResults:
    """All results of the harness, engine by engine, and the release of lm-eval."""

    asked: TaskOptions
    release: str
    against: str
    results: tuple[Result, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the results as plain JSON values."""
        options = {"tasks": list(self.asked.tasks), "num_fewshot": self.asked.shots, "limit": self.asked.limit}
        rows = [
            {name: getattr(each, name) for name in Result.__dataclass_fields__}
            | {"value": _finite(each.value), "difference": _finite(self.difference(each))}
            for each in self.results
        ]
        return {"lm_eval": self.release, **options, "against": self.against, "results": rows}

    def difference(self, each: Result) -> float:
        """Return a result minus that of the reference on the same task and metric; NaN if there is none."""
        reference = (one.value for one in self.results if (one.engine, one.place) == (self.against, each.place))
        return each.value - next(reference, math.nan)

    def table(self) -> Table:
        """Return a table with a line for each metric and engine, 80 columns wide if names are short."""
        from rich.box import SIMPLE_HEAD
        from rich.markup import escape
        from rich.table import Table

        limit = "" if self.asked.limit is None else f", limit {self.asked.limit:g}"
        title = f"lm-eval {self.release}{limit}; difference from {self.against}"
        table = Table(title=escape(title), title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column("", overflow="fold")
        for heading in ("value", "std. error", "difference"):
            table.add_column(heading, justify="right", no_wrap=True)
        places = dict.fromkeys(each.place for each in self.results)
        for place in places:
            same = [each for each in self.results if each.place == place]
            table.add_row(escape(same[0].title))
            for each in same:
                error = "" if each.error is None else f"± {each.error:.4f}"
                difference = "" if each.engine == self.against else f"{self.difference(each):+.4f}"
                table.add_row(f"  {escape(each.engine)}", f"{each.value:.4f}", error, difference)
        return table

    def summary(self) -> str:
        """Return a sentence on how to read the results."""
        part = "" if self.asked.limit is None else f" of the first {self.asked.limit:g} questions of each task"
        return (
            f"Tasks: results of lm-eval {self.release}{part}, on the same questions for all engines. A standard error "
            "is that of the result, not of the difference between engines."
        )


def check_model(model: Model, asked: TaskOptions) -> None:
    """Check, before engines are built, that the model can be evaluated and that the tasks can be loaded.

    Raises:
        SettingsError: the model is not a language model, or has no tokenizer or no trained weights.
        CompressorError: a task is unknown, or its data cannot be loaded.
    """
    if not asked.tasks:
        return
    if model.task != "text-generation":
        raise SettingsError(f"--tasks needs a language model; {model.name} does {model.task}. Leave --tasks out.")
    if model.tokenizer is None or model.tokenizer.eos_token_id is None:
        raise SettingsError(
            f"--tasks needs a tokenizer with an end-of-text token; {model.name} has none. Leave --tasks out."
        )
    if model.random_weights:
        raise SettingsError(f"--tasks measures quality, but the weights of {model.name} are random; leave --tasks out.")
    with _loading(asked):
        manager, names = _tasks(asked)
        manager.load(names)


def evaluate_tasks(
    openers: Mapping[str, Callable[[], Engine]],
    model: Model,
    asked: TaskOptions,
    *,
    against: str,
    length: int | None,
    steps: Steps,
) -> TaskResults | None:
    """Evaluate every engine on all tasks, one engine after the other; return None without tasks.

    Args:
        openers: functions that open the engines, by name.
        model: the model around the engines, with its tokenizer.
        asked: tasks and options.
        against: name of the reference engine.
        length: maximum number of tokens of a call; None uses the model's own limit.
        steps: recorder of the progress.

    Raises:
        HarnessError: a task needs sampling, beam search, or more tokens than the model accepts.
        CompressorError: the harness fails.
    """
    if not asked.tasks:
        return None
    from compressor.benchmark.lm_eval_model import EngineLM

    with _loading(asked):
        manager, names = _tasks(asked)
    limit = LONGEST if model.preprocess.longest is None else model.preprocess.longest
    all_results: list[Result] = []
    for name, opener in openers.items():
        with steps.step(f"evaluate {', '.join(asked.tasks)}: {name}") as tick, opener() as engine:
            lm = EngineLM(engine, model, limit if length is None else length, progress=tick)
            all_results += results(name, _evaluate(lm, manager, names, asked))
    return TaskResults(asked, importlib.metadata.version("lm_eval"), against, tuple(all_results))


def results(engine: str, output: Mapping[str, Any]) -> Iterator[Result]:
    """Yield the results in the output of the harness's `simple_evaluate`, of groups as well as of their tasks."""
    for task, metrics in output["results"].items():
        for key, value in metrics.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = metrics.get(f"{metric}_stderr,{kind}")
            better = output.get("higher_is_better", {}).get(task, {}).get(metric)
            version = output.get("versions", {}).get(task)
            yield Result(
                engine=engine,
                task=task,
                metric=metric,
                filter=kind,
                value=float(value),
                error=float(error) if isinstance(error, int | float) else None,
                shots=output.get("n-shot", {}).get(task),
                samples=output.get("n-samples", {}).get(task, {}).get("effective"),
                version=None if version is None else str(version),
                higher_is_better=better,
            )


def _tasks(asked: TaskOptions) -> tuple[Any, list[str]]:
    """Return the harness's task manager, which reads thousands of files, and the task names that the patterns match."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=asked.include_path)
    return manager, [name for task in asked.tasks for name in (manager.match_tasks([task]) or [task])]


def _evaluate(lm: Any, manager: Any, names: list[str], asked: TaskOptions) -> Mapping[str, Any]:
    from lm_eval import simple_evaluate

    limit = None if asked.limit is None else int(asked.limit) if asked.limit >= 1 else asked.limit
    with _loading(asked):
        output: Mapping[str, Any] = simple_evaluate(
            model=lm, tasks=names, task_manager=manager, num_fewshot=asked.shots, limit=limit, log_samples=False
        )
    return output


@contextlib.contextmanager
def _loading(asked: TaskOptions) -> Iterator[None]:
    """Turn exceptions of the harness and its datasets into a CompressorError; hide its log below errors."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    except CompressorError:
        raise
    except Exception as error:  # the harness, the data library and the hub client raise many types
        raise CompressorError(
            f"lm-eval failed on {', '.join(asked.tasks)} ({first_line(error)}); check the task names, --include-path "
            "and the network connection."
        ) from error
    finally:
        logger.setLevel(level)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
