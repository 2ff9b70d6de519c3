"""Results of `bench`: the content of bench.json, and the terminal tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from compressor.benchmark.contenders import EngineEntry, cells_by_folder
from compressor.benchmark.decode_results import GenerationResults
from compressor.benchmark.lm_eval_tasks import TaskResults
from compressor.benchmark.runner import Condition, Measurement
from compressor.quality.evaluate import Evaluation
from compressor.quality.intervals import Figure
from compressor.quality.metrics import METRICS
from compressor.report.factorial import Factorial, compute_factorial, conditions
from compressor.report.report import dim, latency_to_dict
from compressor.workspace.json_files import json_text
from runtimes.base.timing import Latency, Speedup, speedups_over

if TYPE_CHECKING:
    from rich.table import Table

VERSION = 1
NO_MEMORY = {
    "torch": "the process of a torch model also holds torch and the model's builder, which an engine does not need",
    "device": "memory is that of the process, which covers engines on the CPU only",
}


@dataclass(frozen=True)
class Comparison:
    """All measurements of one `bench`, and the options needed to repeat it.

    Speed-ups are over `against` under the same condition, losses against `reference`. `parity` is the largest
    difference of each compiled torch model from its eager model, whose quality counts for both, relative to the scale
    of the channel. `generated` is empty for models without a KV cache, `harness` is None without --tasks.
    """

    command: str
    settings: dict[str, Any]
    against: str
    model: str
    data: dict[str, Any]
    entries: tuple[EngineEntry, ...]
    evaluation: Evaluation | None
    reference: str
    no_quality_because: str | None
    measurements: tuple[Measurement, ...]
    generated: GenerationResults
    parity: dict[str, float]
    environment: dict[str, object]
    notes: tuple[str, ...]
    harness: TaskResults | None = None

    def __repr__(self) -> str:
        """Return one line; the measurements have all timings."""
        engines = [entry.name for entry in self.entries]
        return f"Comparison(model={self.model!r}, engines={engines!r}, against={self.against!r})"

    @cached_property
    def conditions(self) -> tuple[Condition, ...]:
        """All combinations of batch size and thread count."""
        return tuple(dict.fromkeys(each.condition for each in self.measurements))

    def latencies(self, condition: Condition) -> dict[str, Latency]:
        """Return the latencies under one condition, by engine."""
        return {each.name: each.latency for each in self.measurements if each.condition == condition}

    @cached_property
    def speedups(self) -> dict[tuple[str, Condition], Speedup]:
        """Speed-up of each engine over the baseline; the bootstrap draws the same rounds for all."""
        return {
            (name, condition): speed
            for condition in self.conditions
            for name, speed in speedups_over(self.against, self.latencies(condition)).items()
        }

    @cached_property
    def quality(self) -> dict[str, tuple[Figure, Figure]]:
        """Quality of each evaluated engine, and its loss against the reference."""
        if self.evaluation is None:
            return {}
        names = self.evaluation.columns
        return {name: (self.evaluation.figure(name), self.evaluation.loss(self.reference, name)) for name in names}

    @cached_property
    def factorials(self) -> tuple[tuple[str, Factorial], ...]:
        """Factorials of every folder with cells, under every condition."""
        return tuple(
            (folder, self._factorial(own, condition))
            for folder, own in cells_by_folder(self.entries).items()
            for condition in self.conditions
        )

    def _factorial(self, own: Mapping[str, EngineEntry], condition: Condition) -> Factorial:
        latency = self.latencies(condition)
        evaluation = None
        if self.evaluation is not None:
            columns = {cell: self.evaluation.columns[entry.name] for cell, entry in own.items()}
            evaluation = Evaluation(self.evaluation.metric, columns)
        target = next(iter(own.values())).target
        return compute_factorial(
            {cell: latency[entry.name] for cell, entry in own.items()},
            evaluation,
            {cell: str(entry.file) for cell, entry in own.items()},
            conditions(target, condition.batch, condition.threads),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as plain JSON values; latencies hold every sample, in milliseconds."""
        plain = ("command", "settings", "against", "model", "data", "no_quality_because", "environment")
        return {
            "version": VERSION,
            **{name: getattr(self, name) for name in plain},
            "metric": None if self.evaluation is None else self.evaluation.metric,
            "reference": self.reference,
            "engines": {entry.name: self._engine(entry) for entry in self.entries},
            "measurements": [self._measured(each) for each in self.measurements],
            "factorials": [{"folder": folder, **each.to_dict()} for folder, each in self.factorials],
            "generation": self.generated.to_dict() if self.generated.runs else None,
            "tasks": None if self.harness is None else self.harness.to_dict(),
            "notes": list(self.notes),
        }

    def to_json(self) -> str:
        """Return the comparison as indented JSON."""
        return json_text(self.to_dict())

    def _engine(self, entry: EngineEntry) -> dict[str, Any]:
        figure, loss = self.quality.get(entry.name, (None, None))
        free = {} if figure is None or self.evaluation is None else self.evaluation.label_free(entry.name)
        return {
            "target": entry.target,
            "file": None if entry.file is None else str(entry.file),
            "bytes": entry.bytes,
            "figure": None if figure is None else asdict(figure),
            "loss": None if loss is None else asdict(loss),
            "label_free": {name: asdict(each) for name, each in free.items()},
            "difference_from_eager": self.parity.get(entry.name),
        }

    def _measured(self, each: Measurement) -> dict[str, Any]:
        missing = "torch" if any(entry.name == each.name and entry.module for entry in self.entries) else "device"
        return {
            "engine": each.name,
            **each.condition._asdict(),
            "latency": latency_to_dict(each.latency),
            "speedup": self.speedups[each.name, each.condition]._asdict(),
            "rows_per_second": each.throughput,
            "memory": None if each.memory is None else asdict(each.memory),
            "no_memory_because": NO_MEMORY[missing] if each.memory is None else None,
        }

    # -------------------------------------------------------------------------------------------------- terminal

    def tables(self) -> Iterator[Table]:
        """Yield tables of speed, generation, quality, tasks and factorials, 80 columns wide if names are short."""
        for condition in self.conditions:
            yield self._speed(condition)
        yield from self.generated.tables()
        if self.evaluation is not None:
            yield self._quality(self.evaluation)
        if self.harness is not None:
            yield self.harness.table()
        for _, each in self.factorials:
            yield each.table()

    def _speed(self, condition: Condition) -> Table:
        from rich.markup import escape

        headings = ("ms", "p90", "p99", "speed-up", "rows/s", "peak MB", "file MB")
        table = _table(f"{self.model}, {condition}; speed-up over {self.against}", headings)
        sizes = {entry.name: entry.bytes for entry in self.entries}
        for each in self.measurements:
            if each.condition == condition:
                speed = self.speedups[each.name, condition]
                table.add_row(
                    escape(each.name),
                    *(f"{value:.2f}" for value in (each.latency.median, each.latency.p90, each.latency.p99)),
                    f"{speed.ratio:.2f}x",
                    f"{each.throughput:.1f}",
                    _megabytes(None if each.memory is None else each.memory.peak),
                    _megabytes(sizes[each.name]),
                )
                table.add_row("", "", "", "", dim(f"{speed.low:.2f}–{speed.high:.2f}"))
        return table

    def _quality(self, evaluation: Evaluation) -> Table:
        from rich.markup import escape

        label = METRICS[evaluation.metric].label
        table = _table(f"Quality, loss against {self.reference}", (label, "", "loss, %", ""))
        for name, (figure, loss) in self.quality.items():
            ranges = (f"{figure.low:.2f}–{figure.high:.2f}", f"{loss.low:+.2f} to {loss.high:+.2f}")
            table.add_row(escape(name), f"{figure.value:.2f}", dim(ranges[0]), f"{loss.value:+.2f}", dim(ranges[1]))
        return table

    def summary(self) -> str:
        """Return conclusions and caveats as lines of text."""
        lines = [sentence for folder, each in self.factorials for sentence in _conclusion(folder, each)]
        lines += self.generated.summary()
        if self.evaluation is not None:
            count = self.data["sizes"]["test"]
            lines.append(
                f"Quality: {METRICS[self.evaluation.metric].title}, on {count} test samples, the same for all engines."
            )
        if self.harness is not None:
            lines.append(self.harness.summary())
        if self.no_quality_because is not None:
            lines.append(f"No quality stated: {self.no_quality_because}.")
        lines += [
            f"{name} differs from the eager model by at most {difference:.1e} of the scale of a channel; its "
            "quality was not measured separately."
            for name, difference in self.parity.items()
        ]
        return "\n".join([*lines, *self.notes])


def _conclusion(folder: str, each: Factorial) -> Iterator[str]:
    return (f"{folder}: {sentence}" for sentence in each.conclusion)


def _table(title: str, headings: tuple[str, ...]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(title), title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("", overflow="fold")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _megabytes(count: int | None) -> str:
    return "–" if count is None else f"{count / 1e6:.1f}"
