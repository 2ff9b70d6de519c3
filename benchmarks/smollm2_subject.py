"""The model of benchmarks/smollm2.py: its designs, its results file, and what all rows share."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
from llama_cpp import greedy

from compressor.data.splits import Split
from compressor.lower.traced_model import TracedModel
from compressor.measure.workload import token_ids
from compressor.quality.evaluate import BATCH, Runner, figure, graph_runner, join, loss_figure, sample_columns
from compressor.quality.intervals import Columns, bootstrap, by_text
from compressor.quality.metrics import weighted_mean
from compressor.search.planner import output_divergence, score
from compressor.search.rewriter import Rewriter
from compressor.settings import Settings
from compressor.workspace.progress import Steps
from passes.analysis.counted_cost import Costs
from passes.analysis.redundancy import Scores
from passes.execute.interpreter import Program
from passes.graph.cache_state import bytes_per_token
from passes.graph.graph import Graph, Site
from passes.plan.plan import with_action
from passes.plan.selection import choose, parse

ORIGINAL = "original"
SAMPLES, LENGTH = 180, 512  # paragraphs in all, a quarter of them to calibrate with, and tokens of a window
TESTED = 60  # test paragraphs
EFFECT_SAMPLES = 12  # calibration texts on which the effect of each branch on the output is measured
PROMPTS, PROMPT, NEW = 20, 32, 64

Row = dict[str, Any]
Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Design:
    """A way to choose layers: the kind of layer, the share that is changed, the metric, and what is done to them.

    `kind` is a kind of `passes.plan.selection.parse`, or ``joint``: attentions and MLPs ranked together.
    """

    kind: str
    percent: int
    metric: str = "cosine"
    action: str = "drop"

    @property
    def name(self) -> str:
        """Name of the row and of the files."""
        further = "" if self.metric == "cosine" else f", {self.metric}"
        return f"{self.kind} {self.percent}%{further}{'' if self.action == 'drop' else f', {self.action}'}"


DENSE = Design("attention", 0)
DESIGNS = (
    *(Design(kind, percent) for kind in ("attention", "mlp", "block", "joint") for percent in (10, 25, 50)),
    *(Design("block", percent, metric, "replaceme") for metric in ("angular", "span") for percent in (10, 25)),
    *(Design(kind, percent, "output") for kind in ("attention", "joint") for percent in (25, 50)),
)


@dataclass(frozen=True)
class Results:
    """The results file, which is written again after each row."""

    path: Path

    def read(self) -> Row:
        """Return all results; empty before the first run."""
        return json.loads(self.path.read_text()) if self.path.exists() else {}

    def rows(self, part: str, wanted: Mapping[str, Callable[[], Row]]) -> None:
        """Measure and write the rows of a part that are missing."""
        for name, measure in wanted.items():
            if name in self.read().get(part, {}):
                continue
            start = time.perf_counter()
            row = measure()
            row["seconds"] = round(time.perf_counter() - start, 1)
            self.write(part, self.read().get(part, {}) | {name: row})
            click.echo(f"{part}: {name}, {row['seconds']:.0f} s", err=True)

    def write(self, part: str, value: Any) -> None:
        """Replace a part of the results."""
        self.path.write_text(json.dumps(self.read() | {part: value}, indent=1) + "\n")


@dataclass(frozen=True)
class Subject:
    """The traced model, and what all rows share."""

    traced: TracedModel
    settings: Settings
    work: Path

    @cached_property
    def test(self) -> Split:
        """The test texts."""
        return self.traced.data.test.head(TESTED)

    @cached_property
    def rewriter(self) -> Rewriter:
        """The rewriter, which fits maps on the calibration texts."""
        return Rewriter(self.traced.graph, self.traced.sites, self.traced.data.calibration)

    @cached_property
    def scores(self) -> Scores:
        """The cosine scores of all layers on the calibration texts."""
        return score(self.traced, Steps())

    @cached_property
    def effects(self) -> dict[str, float]:
        """The effect of each branch on the output, kept in the work folder."""
        path, sites = self.work / "effects.json", self.traced.sites
        if not path.exists():
            few = self.traced.data.calibration.head(EFFECT_SAMPLES)
            values = output_divergence(self.traced, few, Steps()).of_units([[site] for site in sites])
            path.write_text(json.dumps(dict(zip([site.name for site in sites], values, strict=True))))
        found: dict[str, float] = json.loads(path.read_text())
        return found

    @cached_property
    def prompts(self) -> Ids:
        """The prompts of the greedy texts [rows, tokens]: the first tokens of windows of the test texts."""
        return token_ids(self.test, PROMPTS, 4 * PROMPT)[:, :PROMPT]

    @cached_property
    def greedy(self) -> Ids:
        """The tokens that the original generates behind the prompts."""
        return greedy(self.traced.graph, self.traced.model, self.prompts, NEW).argmax(-1)

    def changes(self, design: Design) -> dict[str, str]:
        """Return the changes of a design."""
        selection = parse(f"{design.percent}%" if design.kind == "joint" else f"{design.kind}:{design.percent}%")
        plan = choose(
            selection,
            self.traced.sites,
            design.metric,
            model=self.traced.model.name,
            scores=self.scores if design.metric != "output" else None,
            effect=self._effect if design.metric == "output" else None,
        )
        return with_action(plan, design.action).changes

    def graph(self, design: Design) -> Graph:
        """Return the graph of a design."""
        return self.rewriter.rewritten(self.changes(design)) if design.percent else self.traced.graph

    def _effect(self, units: Sequence[Sequence[Site]]) -> list[float]:
        return [self.effects[unit[0].name] for unit in units]

    def original(self) -> Runner:
        """Return a runner of the original that keeps its outputs in the work folder, so that rows share them."""
        run = graph_runner(self.traced.model, Program(self.traced.graph).run)

        def answer(feeds: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[Any]:
            path = self.work / f"logits-{hashlib.sha256(feeds['input_ids'].tobytes()).hexdigest()[:16]}.npy"
            if not path.exists():
                np.save(path, run(feeds))
            return np.load(path, mmap_mode="c")

        return answer

    def columns(self, runner: Runner) -> Columns:
        """Return the negative log-likelihood, number of tokens and agreement with the original of each test text."""
        head, metric, original = self.traced.head, self.traced.metric, self.original()
        parts: list[Columns] = []
        owners: list[str] = []
        for batch in self.test.whole(BATCH):
            answer = runner(batch.feeds)
            parts.append(sample_columns(head, metric, batch, answer, original(batch.feeds), diverging=False))
            owners += batch.ids
        return by_text(join(parts), owners)

    @cached_property
    def before(self) -> Columns:
        """The columns of the original, kept in the work folder."""
        path = self.work / f"original-{len(self.test)}.npz"
        if not path.exists():
            np.savez(path, **self.columns(self.original()))
        return dict(np.load(path))

    def figures(self, found: Columns) -> Row:
        """Return perplexity, paired loss in % and agreement with the original, of the columns of the test texts."""
        metric = self.traced.metric
        agreement = bootstrap(lambda part: weighted_mean(part, "agreement") * 100.0, found)
        loss = loss_figure(metric, self.before, found)
        return {"perplexity": asdict(figure(metric, found)), "loss": asdict(loss), "agreement": asdict(agreement)}

    def continuation(self, graph: Graph) -> Row:
        """Compare the greedy texts of a graph with those of the original."""
        found = greedy(graph, self.traced.model, self.prompts, NEW).argmax(-1)
        same = np.cumprod(found == self.greedy, axis=1).sum(1).astype(np.float64)
        leading = bootstrap(lambda part: part["same"].mean(-1), {"same": same})
        return {"equal_texts": int((same == NEW).sum()), "leading": asdict(leading)}

    def whole_row(self, graph: Graph, changes: Mapping[str, str]) -> Row:
        """Return everything that is measured of a graph; the outputs of the unchanged one are known."""
        costs = Costs(graph, self.traced.costs.example).total
        cache = bytes_per_token(graph)
        facts = {"parameters": costs.parameters, "cache_bytes_per_token": cache, "changes": dict(changes)}
        runner = graph_runner(self.traced.model, Program(graph).run) if changes else self.original()
        return facts | self.figures(self.columns(runner)) | self.continuation(graph)
