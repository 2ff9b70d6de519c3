"""The report of one export: its JSON, and the terminal table and summary derived from the same values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from compressor.choices import AGREEMENT, DIVERGENCE
from compressor.limitations import Limitation, format_limitations
from compressor.quality.disagreements import Disagreement
from compressor.quality.intervals import Figure
from compressor.quality.metrics import EXPECTED_LOSS, LABEL_FREE, METRICS
from compressor.report import engine_layers, exact_rewrites
from compressor.report.engine_text import describe_measurements
from compressor.report.precision_notes import exceeds_limit
from compressor.workspace.json_files import json_text
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
# Rows of the calls of a generation, by their names in the report.
CALLS = {"image": "  image, ms", "prompt": "  prompt, ms", "token": "  each new token, ms"}


@dataclass(frozen=True)
class Size:
    """Parameters, multiply-adds per sample, bytes of the ONNX file and bytes of KV cache per token."""

    parameters: int
    multiply_adds: int
    bytes: int
    cache: int = 0


@dataclass(frozen=True)
class Quality:
    """The quality of each variant on test data, and the loss of the result against each other variant.

    Attributes:
        metric: the name of the metric.
        figures: the metric, by variant.
        loss: the loss of the result, by the variant it is compared with.
        label_free: ``agreement`` and ``decisions`` (%) and ``divergence`` (nats; of features: 1 - cosine) of the result
            with the float model before any change, where they apply.
        further: metrics beside `metric`, each by variant, such as the Spearman correlation beside the mean absolute
            error.
        changed: samples for which the classifier predicts another class than before, largest regret first.
        precision_loss: the loss of the precision alone, of the baseline against the original; None without an original.
        expected: without labels, the loss that the head expects against the float model before any change, by variant.
    """

    metric: str
    figures: dict[str, Figure]
    loss: dict[str, Figure]
    label_free: dict[str, Figure]
    changed: tuple[Disagreement, ...] = ()
    further: dict[str, dict[str, Figure]] = field(default_factory=dict)
    precision_loss: Figure | None = None
    expected: dict[str, Figure] = field(default_factory=dict)

    @staticmethod
    def of(evaluation: Evaluation, names: Sequence[str]) -> Quality:
        """Return the figures and paired losses of the variants `names`, of which one is ``result``."""
        losses = {name: evaluation.loss(name, "result") for name in names if name != "result"}
        figures = {name: evaluation.figure(name) for name in names}
        changed = tuple(evaluation.changed.get("result", ()))
        further: dict[str, dict[str, Figure]] = {}
        for name in names:
            for metric, figure in evaluation.further(name).items():
                further.setdefault(metric, {})[name] = figure
        of_precision = evaluation.loss("original", "baseline") if "original" in names else None
        free = evaluation.label_free("result")
        of_each = {name: evaluation.expected_loss_figure(name) for name in names[1:]}
        expected = {name: each for name, each in of_each.items() if each is not None}
        return Quality(evaluation.metric, figures, losses, free, changed, further, of_precision, expected)

    @property
    def lost(self) -> Figure:
        """Return the loss of the result as ``--budget accuracy`` means it: expected without labels, else measured."""
        return self.expected.get("result", self.loss["baseline"])

    def bounded_loss(self, budget: str) -> float:
        """Return the loss of the result that a ``--budget`` bounds, in percent."""
        if budget == AGREEMENT and "agreement" in self.label_free:
            return 100.0 - self.label_free["agreement"].value
        if budget == DIVERGENCE and "divergence" in self.label_free:
            return 100.0 * self.label_free["divergence"].value
        return self.lost.value

    @property
    def lost_by_precision(self) -> Figure | None:
        """Return the loss of the precision alone, in the same terms."""
        return None if self.precision_loss is None else self.expected.get("baseline", self.precision_loss)


@dataclass(frozen=True)
class Report:
    """The measurements of one export, and everything needed to repeat it.

    The variants are ``original`` (unpruned in fp32, only if the result has another precision), ``baseline`` (unpruned,
    with the target and precision of the result) and ``result``.

    Attributes:
        quality: the quality of each variant; None if no quality may be stated, with the reason in
            `no_quality_because`.
        latency: the latency of each variant; empty if the model was never in memory as a whole.
        precision: how each variant was converted to a precision below fp32.
        engine: whether the engine is built. If it was built later on the device: its options, its environment and the
            measurements on the device.
        trials: the result of each precision that ``--precision auto`` tried.
        evidence: the scores and effects that the plan is based on (see `compressor.search.site_evidence`), and the
            numbers of remaining tokens if the plan merges tokens.
        generation: of a language model with a KV cache, the numbers of `prompt` tokens and `new` tokens that `latency`
            covers, and the latency of each call: ``prompt`` (prefill) and ``token`` (decode with a cache of `behind`
            tokens).
        image_tokens: the stages of ``--image-tokens``, the tokens that remain and the bytes of the cache; None without
            any.
        exact: the ``multiply_adds`` of the unchanged model after exact rewrites (folding, removal of tokens that no
            output depends on), which the baseline lacks; None if they are not known.
        limitations: the features that this export lacks, and the assumptions that were made.
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
    exact: dict[str, int] | None = None
    image_tokens: dict[str, Any] | None = None

    def __repr__(self) -> str:
        """Return one line: all fields are thousands, which a notebook would print."""
        facts = [f"model={self.model['name']!r}", f"target={self.settings['target']!r}"]
        facts += [f"precision={self.settings['precision']!r}", f"changes={len(self.plan.changes)}"]
        facts += [f"speedup={self.speedup().ratio:.3g}"] if self.latency else []
        facts += [] if self.quality is None else [f"{self.quality.metric}={self.quality.figures['result'].value:.4g}"]
        return f"Report({', '.join(facts)})"

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON values; latencies hold every raw sample, in milliseconds."""
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
            "latency": {name: latency_to_dict(latency) for name, latency in self.latency.items()},
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
        """Return the report as indented JSON."""
        return json_text(self.to_dict())

    def speedup(self, over: str = "baseline") -> Any:
        """Return the speed-up of the result over another variant, with its 95 % interval."""
        return self._speedups[over]

    @cached_property
    def _speedups(self) -> dict[str, Any]:
        """The speed-up of the result over each other variant; cached, as the bootstrap can take seconds."""
        result = self.latency["result"]
        return {name: result.speedup_over(self.latency[name]) for name in self.latency if name != "result"}

    def table(self) -> Table:
        """Return the headline figures as a table that fits 80 columns, with the 95 % intervals below the figures.

        Each column holds the figures of one variant. Losses and speed-ups are those of the result, one row for each
        variant it is compared with; the cell of that variant reads ``reference``.
        """
        from rich.box import SIMPLE_HEAD
        from rich.markup import escape
        from rich.table import Table

        late = self.engine.get("state") == "deferred" and bool(self.latency)
        target = f"ONNX Runtime (target: {self.settings['target']})" if late else self.settings["target"]
        title = f"{escape(self.model['name'])} on {target}, batch {self.settings['batch']}"
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
            yield from self._quality_rows(self.quality, variants)
        if self.latency:
            yield from self._latency_rows(variants)
        yield "parameters, M", *(f"{self.sizes[name].parameters / 1e6:.2f}" for name in variants)
        yield "multiply-adds, G", *(f"{self.sizes[name].multiply_adds / 1e9:.3f}" for name in variants)
        alone = exact_rewrites.cells(self._content_of_sizes, variants)
        if alone is not None:
            yield exact_rewrites.LABEL, *alone
        yield "engine, MB", *(f"{self.sizes[name].bytes / 1e6:.2f}" for name in variants)
        if any(size.cache for size in self.sizes.values()):
            yield "cache, bytes per token", *(f"{self.sizes[name].cache}" for name in variants)

    @property
    def _content_of_sizes(self) -> dict[str, Any]:
        return {"sizes": {name: asdict(size) for name, size in self.sizes.items()}, "exact": self.exact}

    def _quality_rows(self, quality: Quality, variants: Sequence[str]) -> Iterator[tuple[str, ...]]:
        metric = METRICS[quality.metric]
        label, unit = metric.label, metric.unit
        figures = [quality.figures[name] for name in variants]
        yield f"{label}{_unit(unit)}", *(f"{figure.value:.2f}" for figure in figures)
        yield "", *(dim(f"{figure.low:.2f}–{figure.high:.2f}") for figure in figures)
        for name in variants:
            if name in quality.loss:
                loss, percent = quality.loss[name], metric.loss_unit
                yield f"  loss vs {name}{_unit(percent)}", *against(variants, name, f"{loss.value:+.2f}")
                yield "", *_of_result(variants, dim(f"{loss.low:+.2f} to {loss.high:+.2f}"))
        if "result" in quality.expected:
            figure = quality.expected["result"]
            yield f"  {EXPECTED_LOSS}", *_of_result(variants, f"{figure.value:+.2f}")
            yield "", *_of_result(variants, dim(f"{figure.low:+.2f} to {figure.high:+.2f}"))
        for other, by_variant in quality.further.items():
            yield METRICS[other].label, *(f"{by_variant[name].value:.2f}" for name in variants)
        if exceeds_limit(self):
            limit = f"{self.settings['max_precision_loss']:g}, exceeded"
            yield f"  limit of {self.settings['precision']}, %", *_of_result(variants, limit)
        for name, figure in quality.label_free.items():
            if not (name == "agreement" and metric.compares):
                yield LABEL_FREE[name][0], *_of_result(variants, f"{figure.value:.4g}")

    def _latency_rows(self, variants: Sequence[str]) -> Iterator[tuple[str, ...]]:
        yield "latency, ms", *(f"{self.latency[name].median:.2f}" for name in variants)
        for name in variants:
            if name != "result":
                speedup = self.speedup(name)
                yield f"  speed-up vs {name}", *against(variants, name, f"{speedup.ratio:.2f}x")
                yield "", *_of_result(variants, dim(f"{speedup.low:.2f}–{speedup.high:.2f}"))
        yield from self._calls(variants)

    def _calls(self, variants: Sequence[str]) -> Iterator[tuple[str, ...]]:
        """Yield the latency of each call of a generation, if there are several."""
        if self.generation is None or len(self.generation["calls"]["result"]) == 1:
            return
        for call in self.generation["calls"]["result"]:
            medians = (self.generation["calls"][name][call]["median"] for name in variants)
            yield CALLS[call], *(f"{median:.2f}" for median in medians)

    def summary(self) -> str:
        """Return the changes, the conditions of the measurements, the notes and the limitations, one per line."""
        changes = [name if action == "drop" else f"{name} ({action})" for name, action in self.plan.changes.items()]
        done = "Dropped" if len(self.plan.dropped) == len(changes) else "Changed"
        sites = f"{done} {len(changes)} of {len(self.plan.decisions)} sites: {', '.join(changes) or 'none'}."
        quality = [] if self.no_quality_because is None else [f"No quality stated: {self.no_quality_because}."]
        metric = [] if self.quality is None else [f"Quality: {METRICS[self.quality.metric].title}, {self._judged()}."]
        factorial = () if self.factorial is None else self.factorial.conclusion
        timed = () if self.generation is None else (f"Latency: {describe_calls(self.generation)}.",)
        engine = (*describe_measurements(self.engine), *engine_layers.describe_layers(self.engine))
        return "\n".join(
            [sites, *metric, *quality, *timed, *factorial, *self.notes, *engine, *format_limitations(self.limitations)]
        )

    def missed(self) -> tuple[str, ...]:
        """Return a sentence for each of ``--speedup`` and ``--latency`` that the measured result does not reach."""
        if not self.latency:
            return ()
        wanted, latency = self.settings["speedup"], self.settings["latency"]
        reached, median = self.speedup().ratio, self.latency["result"].median
        advice = "." if self.settings["max_loss"] is None else "; allow a larger --max-loss."
        sentences = []
        if wanted is not None and reached < wanted:
            sentences.append(f"The result is {reached:.4g}x faster, not {wanted:g}x as asked for{advice}")
        if latency is not None and median > latency:
            sentences.append(f"The result takes {median:.4g} ms, not {latency:g} ms as asked for{advice}")
        return tuple(sentences)

    def slower(self) -> tuple[str, ...]:
        """Return a sentence if the result is slower than another variant: the interval of the speed-up is below 1."""
        measured = [
            f"{ratio.ratio:.3g}x the speed of the {name} ({ratio.low:.3g} to {ratio.high:.3g})"
            for name, ratio in (self._speedups.items() if self.latency else ())
            if ratio.high < 1.0
        ]
        return (f"The result is slower here: {', '.join(measured)}.",) if measured else ()

    def exceeded(self) -> tuple[str, ...]:
        """Return what a wish for speed cost, where it is met: by how much it was exceeded, and the loss."""
        wanted, latency = self.settings["speedup"], self.settings["latency"]
        if not self.latency or (wanted is None and latency is None) or self.missed():
            return ()
        median = self.latency["result"].median
        asked = (
            []
            if wanted is None
            else [(f"{self.speedup().ratio:.4g}x faster", f"{wanted:g}x", self.speedup().ratio / wanted)]
        )
        asked += [] if latency is None else [(f"at {median:.4g} ms", f"{latency:g} ms", latency / median)]
        met = " and ".join(
            f"{reached} ({wish} asked for, exceeded by {ratio - 1.0:.0%})" for reached, wish, ratio in asked
        )
        if self.quality is None:
            return (f"The result is {met}; its loss is not known, because {self.no_quality_because}.",)
        lost = self.quality.lost
        return (f"The result is {met} and loses {lost.value:.2f} % on test data ({lost.low:.2f} to {lost.high:.2f}).",)

    def _judged(self) -> str:
        count = self.quality.figures["result"].n if self.quality is not None else 0
        return f"on {count} test samples; ranges are 95 % intervals"


def latency_to_dict(latency: Latency) -> dict[str, Any]:
    """Return a latency as plain JSON values: percentiles and every raw sample, in milliseconds."""
    return {
        "median": latency.median,
        "p90": latency.p90,
        "p99": latency.p99,
        "n": latency.n,
        "samples_ms": [list(burst) for burst in latency.samples_ms],
    }


def against(variants: Sequence[str], reference: str, value: Any) -> list[Any]:
    """Return the cells of a row that compares the result with another variant.

    >>> against(("original", "baseline", "result"), "baseline", "+0.50")
    ['', 'reference', '+0.50']
    """
    cells = {"result": value, reference: "reference"}
    return [cells.get(name, "") for name in variants]


def describe_calls(generation: Mapping[str, Any]) -> str:
    """Describe the calls that the latency of a language model covers.

    >>> describe_calls({"prompt": 512, "new": 0, "behind": 512})
    'a prompt of 512 tokens'
    """
    prompt, new, behind = (generation[name] for name in ("prompt", "new", "behind"))
    unit, images = generation.get("source"), generation.get("images", 0)
    start = f"a prompt of {prompt} tokens" if unit is None else f"a source of {prompt} {unit}"
    start = f"an image and {start}, {images} of them of the image," if images else start
    if not new:
        return start.rstrip(",")
    return f"{start} and {new} new tokens, each with a cache of {behind} tokens"


def shares_of_time(generation: Mapping[str, Any]) -> Iterator[str]:
    """Yield the share of the latency that each part of a vision-language model takes; nothing for other models."""
    if not generation.get("images"):
        return
    times = {"image": 1, "prompt": 1, "token": generation["new"]}
    parts = {"image": "the vision encoder", "prompt": "the language model's prompt", "token": "its new tokens"}
    texts = {}
    for variant in ("result", "baseline"):
        spent = {name: times[name] * call["median"] for name, call in generation["calls"][variant].items()}
        total = sum(spent.values())
        texts[variant] = {name: f"{100 * each / total:.0f} %" for name, each in spent.items()}
    shares = ", ".join(f"{parts[name]} {share} ({texts['baseline'][name]})" for name, share in texts["result"].items())
    yield f"Shares of the latency, of the result and in brackets of the baseline: {shares}."


def _unit(unit: str) -> str:
    return f", {unit}" if unit else ""


def _of_result(variants: Sequence[str], value: str) -> list[str]:
    """Return the cells of a row that has a value for the result only."""
    return [value if name == "result" else "" for name in variants]


def dim(text: str) -> str:
    """Wrap a text in rich's dim style."""
    return f"[dim]{text}[/dim]"
