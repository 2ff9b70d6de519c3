"""The report: JSON is the truth, the terminal table is derived from it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from compressor.limitations import Limitation, listed
from compressor.quality.disagreements import Changed
from compressor.quality.intervals import METRICS, Figure
from compressor.report import engine_layers
from compressor.report.engine_text import told
from compressor.workspace.progress import Step
from runtimes.base.timing import Latency

if TYPE_CHECKING:
    from rich.table import Table

    from compressor.quality.evaluate import Evaluation
    from compressor.report.factorial import Factorial
    from passes.graph.graph import Applied
    from passes.plan.plan import Plan

VERSION = 1
REPORT = "report.json"
# A metric's name short enough for a column, and its unit.
LABELS = {
    "accuracy": ("top-1 accuracy", "%"),
    "agreement": ("top-1 agreement", "%"),
    "perplexity": ("perplexity", ""),
    "spearman": ("Spearman x 100", ""),
    "fidelity": ("feature cosine", "%"),
}
# Short for the same reason: three variants fit 80 columns.
LABEL_FREE = {"agreement": "same answers, %", "divergence": "divergence"}


@dataclass(frozen=True)
class Size:
    """Parameters, multiply-adds for one sample, bytes of the ONNX file, and of the cache for each token of a text."""

    parameters: int
    multiply_adds: int
    bytes: int
    cache: int = 0


@dataclass(frozen=True)
class Quality:
    """Metric, each variant's figure on test data, and what the result lost against baseline and original.

    `label_free` compares the result's answers with those of the float model before any change, where that makes sense:
    ``agreement`` in %, ``divergence`` in nats (of features: 1 - cosine). `changed` are samples that a classifier
    answers differently now, those that the original was surest of first.
    """

    metric: str
    figures: dict[str, Figure]
    loss: dict[str, Figure]
    label_free: dict[str, Figure]
    changed: tuple[Changed, ...] = ()

    @staticmethod
    def of(evaluation: Evaluation, names: Sequence[str]) -> Quality:
        """Figures and paired losses of the variants `names`: ``result`` and what it is compared with."""
        losses = {name: evaluation.loss(name, "result") for name in names if name != "result"}
        figures = {name: evaluation.figure(name) for name in names}
        changed = tuple(evaluation.changed.get("result", ()))
        return Quality(evaluation.metric, figures, losses, evaluation.label_free("result"), changed)


@dataclass(frozen=True)
class Report:
    """Everything measured in one export, and everything needed to repeat it.

    The variants are ``original`` (unpruned in fp32, only where the result is in another precision), ``baseline``
    (unpruned, same target and precision as the result) and ``result``. `quality` is None, with the reason, where none
    may be stated. `engine` says whether the engine is built; where it was left to the device, with what, and what was
    measured there. `evidence` is what the plan was based on (see evidence.py), with the tokens left where some are
    merged. `latency` is empty where the model was never in memory as a whole. `precision` says how each variant got
    below fp32, `trials` what ``--precision auto`` found of each.
    `limitations` are what the model could have had and this export does not give it, and what was assumed.
    `generation`, of a language model with a cache, has tokens of the `prompt` and `new` ones that `latency` is the time
    of, and the latency of each kind of call (``prompt``; ``token``, behind a cache of `behind` tokens).
    """

    command: str
    settings: dict[str, Any]
    model: dict[str, Any]
    data: dict[str, Any]
    plan: Plan
    sizes: dict[str, Size]
    quality: Quality | None
    no_quality_because: str | None
    latency: dict[str, Latency]
    timed_inputs: dict[str, list[int]]
    parity: dict[str, float]
    precision: dict[str, Any]
    search: dict[str, Any]
    healed: dict[str, Any] | None
    steps: tuple[Step, ...]
    passes: tuple[Applied, ...]
    environment: dict[str, object]
    notes: tuple[str, ...] = ()
    engine: dict[str, Any] = field(default_factory=dict)
    trials: tuple[dict[str, Any], ...] = ()
    factorial: Factorial | None = None
    evidence: dict[str, Any] = field(default_factory=dict)
    generation: dict[str, Any] | None = None
    limitations: tuple[Limitation, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON values; latencies with every raw sample, in milliseconds."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return plain | {
            "version": VERSION,
            "plan": {
                "rule": self.plan.rule,
                "metric": self.plan.metric,
                "dropped": list(self.plan.dropped),
                "changes": self.plan.changes,
                "reasons": {decision.site: decision.reason for decision in self.plan.decisions},
            },
            "sizes": {name: asdict(size) for name, size in self.sizes.items()},
            "quality": None if self.quality is None else asdict(self.quality),
            "latency": {name: brief(latency) for name, latency in self.latency.items()},
            "speedup": {name: self.speedup(name)._asdict() for name in self.latency if name != "result"},
            "steps": [asdict(step) for step in self.steps],
            "passes": [asdict(applied) for applied in self.passes],
            "seconds": sum(step.seconds for step in self.steps),
            "notes": list(self.notes),
            "limitations": [asdict(limitation) for limitation in self.limitations],
            "trials": list(self.trials),
            "factorial": None if self.factorial is None else self.factorial.to_dict(),
        }

    def to_json(self) -> str:
        """The report as indented JSON."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def speedup(self, over: str = "baseline") -> Any:
        """How many times faster the result is than another variant, with a 95 % interval."""
        return self._speedups[over]

    @cached_property
    def _speedups(self) -> dict[str, Any]:
        """Computed once: a bootstrap over many thousand raw samples of a small model takes seconds."""
        result = self.latency["result"]
        return {name: result.speedup_over(self.latency[name]) for name in self.latency if name != "result"}

    def table(self) -> Table:
        """The headline figures for a terminal, 80 columns wide; below a figure stands its 95 % interval."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        late = self.engine.get("state") == "deferred" and bool(self.latency)
        target = f"ONNX Runtime, for {self.settings['target']}" if late else self.settings["target"]
        title = f"{self.model['name']} on {target}, batch {self.settings['batch']}"
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column("", no_wrap=True)
        for name in self.sizes:
            table.add_column(name, justify="right", no_wrap=True)
        for row in self._rows():
            table.add_row(*row)
        return table

    def _rows(self) -> Iterator[tuple[str, ...]]:
        variants = list(self.sizes)
        if self.quality is not None:
            label, unit = LABELS[self.quality.metric]
            figures = [self.quality.figures[name] for name in variants]
            lost = [self.quality.loss.get(name) for name in variants]
            percent = "%" if self.quality.metric == "perplexity" else unit
            yield f"{label}{_unit(unit)}", *(f"{figure.value:.2f}" for figure in figures)
            yield "", *(dim(f"{figure.low:.2f}–{figure.high:.2f}") for figure in figures)
            yield f"  result's loss{_unit(percent)}", *(f"{each.value:+.2f}" if each else "" for each in lost)
            yield "", *(dim(f"{each.low:+.2f} to {each.high:+.2f}") if each else "" for each in lost)
            for name, each in self.quality.label_free.items():
                if name != self.quality.metric:
                    yield LABEL_FREE[name], *([""] * (len(variants) - 1)), f"{each.value:.4g}"
        if self.latency:
            speedups = [None if name == "result" else self.speedup(name) for name in variants]
            yield "latency, ms", *(f"{self.latency[name].median:.2f}" for name in variants)
            yield "  result's speed-up", *(f"{each.ratio:.2f}x" if each else "" for each in speedups)
            yield "", *(dim(f"{each.low:.2f}–{each.high:.2f}") if each else "" for each in speedups)
            yield from self._calls(variants)
        yield "parameters, M", *(f"{self.sizes[name].parameters / 1e6:.2f}" for name in variants)
        yield "multiply-adds, G", *(f"{self.sizes[name].multiply_adds / 1e9:.3f}" for name in variants)
        yield "engine, MB", *(f"{self.sizes[name].bytes / 1e6:.2f}" for name in variants)
        if any(size.cache for size in self.sizes.values()):
            yield "cache, bytes a token", *(f"{self.sizes[name].cache}" for name in variants)

    def _calls(self, variants: Sequence[str]) -> Iterator[tuple[str, ...]]:
        """What the calls take that generation is made of."""
        if self.generation is not None and self.generation["new"]:
            for call, label in (("prompt", "  the prompt, ms"), ("token", "  each new token, ms")):
                medians = (self.generation["calls"][name][call]["median"] for name in variants)
                yield label, *(f"{median:.2f}" for median in medians)

    def summary(self) -> str:
        """What was dropped and what to read with care, as lines of text."""
        changes = [name if action == "drop" else f"{name} ({action})" for name, action in self.plan.changes.items()]
        done = "Dropped" if len(self.plan.dropped) == len(changes) else "Changed"
        sites = f"{done} {len(changes)} of {len(self.plan.decisions)} sites: {', '.join(changes) or 'none'}."
        quality = [] if self.no_quality_because is None else [f"No quality stated: {self.no_quality_because}."]
        meaning = [] if self.quality is None else [f"Quality: {METRICS[self.quality.metric]}, {self._judged()}."]
        factorial = () if self.factorial is None else self.factorial.conclusion
        timed = () if self.generation is None else (f"Latency: {what_is_timed(self.generation)}.",)
        engine = (*told(self.engine), *engine_layers.told(self.engine))
        return "\n".join(
            [sites, *meaning, *quality, *timed, *factorial, *self.notes, *engine, *listed(self.limitations)]
        )

    def missed(self) -> tuple[str, ...]:
        """Wishes for speed that the measured result does not fulfil, one sentence each."""
        if not self.latency:
            return ()
        wanted, latency = self.settings["speedup"], self.settings["latency"]
        reached, median = self.speedup().ratio, self.latency["result"].median
        more = "." if self.settings["max_loss"] is None else "; allow a larger --max-loss."
        found = []
        if wanted is not None and reached < wanted:
            found.append(f"The result is {reached:.4g}x faster, not {wanted:g}x as asked for{more}")
        if latency is not None and median > latency:
            found.append(f"The result takes {median:.4g} ms, not {latency:g} ms as asked for{more}")
        return tuple(found)

    def _judged(self) -> str:
        count = self.quality.figures["result"].n if self.quality is not None else 0
        return f"on {count} test samples; ranges are 95 % intervals"


def brief(latency: Latency) -> dict[str, Any]:
    """A latency as plain JSON values: percentiles in ms, and every raw sample."""
    return {
        "median": latency.median,
        "p90": latency.p90,
        "p99": latency.p99,
        "n": latency.n,
        "samples_ms": [list(burst) for burst in latency.samples_ms],
    }


def what_is_timed(generation: Mapping[str, Any]) -> str:
    """What the latency of a language model is the time of, in words.

    >>> what_is_timed({"prompt": 512, "new": 0, "behind": 512})
    'a prompt of 512 tokens'
    """
    prompt, new, behind = (generation[name] for name in ("prompt", "new", "behind"))
    if not new:
        return f"a prompt of {prompt} tokens"
    return f"a prompt of {prompt} tokens and {new} new ones, each timed behind a cache of {behind}"


def _unit(unit: str) -> str:
    return f", {unit}" if unit else ""


def dim(text: str) -> str:
    """Text that stands back, where there is any."""
    return f"[dim]{text}[/dim]"
