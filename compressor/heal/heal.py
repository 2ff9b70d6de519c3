"""Healing of a rewritten model: its weights are adapted to the outputs of the original; a worse result is discarded."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from compressor.choices import HEAL_METHODS
from compressor.data.splits import Split
from compressor.errors import CompressorError
from compressor.heal.closed_form import refit_closed_form
from compressor.heal.distill import JUDGING, RECIPE, Draft, NotStartedError, distil
from compressor.models import Model
from compressor.quality.output_divergence import OutputDivergence
from compressor.quality.validation_loss import ROUNDING, ValidationLoss
from passes.graph.graph import Graph, Site
from passes.graph.sites import find_sites

LEAST_GAIN = 0.01  # smallest relative decrease of the divergence that is kept; a smaller one is sampling noise
FEW = 8  # fewest validation samples on which drafts are judged
PATIENCE = 3  # consecutive drafts without improvement after which training stops


class HealError(CompressorError):
    """The healing method does not exist."""


@dataclass(frozen=True)
class Standing:
    """Validation loss in percent by the reported metric, and label-free divergence of a graph.

    The divergence is KL(original || graph) in nats for logits and 1 - cosine for features. Of a draft that is judged on
    few samples, the loss is that of the graph before healing until it is measured.
    """

    loss: float
    divergence: float


@dataclass(frozen=True)
class Healed:
    """Report of healing; `before` and `after` contain ``loss`` and ``divergence`` on validation data.

    `sample_steps` is the number of training steps (one batch each), or of linear maps tried in closed form. `judged` is
    the number of validation samples on which divergences were measured; losses are those on all of them. If `kept` is
    false, the graph is unchanged and `note` states the reason.
    """

    method: str
    kept: bool
    seconds: float
    sample_steps: int
    judged: int
    before: Mapping[str, float]
    after: Mapping[str, float]
    note: str


@dataclass
class DraftEvaluator:
    """Evaluator of graphs on validation data.

    Attributes:
        original: graph of the original.
        model: model that it was traced from.
        validation: measures losses.
        samples: validation samples on which divergences are measured. If they are all, the loss of each draft that
            improves the divergence is measured; if they are fewer, only that of the best draft.
        seconds: duration of the last measurement of a divergence.
    """

    original: Graph
    model: Model
    validation: ValidationLoss
    samples: Split
    seconds: float = 0.0
    _effects: OutputDivergence = field(init=False)

    def __post_init__(self) -> None:
        self._effects = OutputDivergence(self.original, self.model, self.samples, scaled=False)

    @classmethod
    def within(
        cls, original: Graph, model: Model, validation: ValidationLoss, graph: Graph, seconds: float
    ) -> DraftEvaluator:
        """Return an evaluator on as many validation samples as can judge all drafts in `JUDGING` of the seconds.

        The time is estimated from `FEW` samples, which are used at least.
        """
        split = validation.split
        if len(split) <= FEW:
            return cls(original, model, validation, split)
        probe = cls(original, model, validation, _spread(split, FEW))
        probe.divergence(graph)
        affordable = JUDGING * seconds / (RECIPE.checks * max(probe.seconds / FEW, 1e-9))  # passes of one sample
        if affordable >= 2 * len(split):  # one for the divergence, one for the loss
            return cls(original, model, validation, split)
        count = min(int(affordable), len(split) - 1)
        return probe if count <= FEW else cls(original, model, validation, _spread(split, count))

    @property
    def whole(self) -> bool:
        """Whether divergences are measured on all validation samples."""
        return len(self.samples) == len(self.validation.split)

    @property
    def where(self) -> str:
        """The samples on which divergences are measured, as words of a sentence."""
        return (
            "validation data"
            if self.whole
            else f"{len(self.samples)} of {len(self.validation.split)} validation samples"
        )

    def divergence(self, graph: Graph) -> float:
        """Measure the divergence of a graph."""
        start = time.perf_counter()
        divergence, _ = self._effects.measure(graph, {})
        self.seconds = time.perf_counter() - start
        return divergence

    def standing(self, graph: Graph, before: Standing, *, below: float) -> Standing | None:
        """Measure the divergence of a draft, and its loss if all samples are used.

        None if the divergence is not less than `below`.
        """
        divergence = self.divergence(graph)
        if not divergence < below:
            return None
        return Standing(self.validation.loss(graph).percent if self.whole else before.loss, divergence)


def _spread(split: Split, count: int) -> Split:
    """Return `count` samples at equal distances."""
    return dataclasses.replace(split, indices=split.indices[:: len(split) // count][:count])


def heal(
    method: str,
    graph: Graph,
    original: Graph,
    model: Model,
    calibration: Split,
    validation: ValidationLoss,
    *,
    changed: Sequence[Site],
    budget: float,
    seed: int,
    progress: Callable[..., None],
    stored: Callable[[Graph], Graph] = lambda graph: graph,
    unmerged: Graph | None = None,
) -> tuple[Graph, Healed]:
    """Adapt the weights of a rewritten graph to the outputs of the original, without labels.

    Among the drafts whose validation loss is at most that of `graph`, the one with the least validation divergence is
    kept if it decreases the divergence by more than `LEAST_GAIN`. Otherwise `graph` is returned unchanged.

    Args:
        method: one of `HEAL_METHODS`.
        graph: rewritten fork as it ships, with its tokens merged. It shares weights with `original`; neither is
            modified.
        original: traced graph of the model.
        model: model that both graphs were traced from.
        calibration: samples that weights are fitted to; labels are not used.
        validation: measures the loss of drafts.
        changed: sites that were rewritten.
        budget: time budget in seconds; one measurement may exceed it.
        seed: seed of all random draws. Results are reproducible unless the budget ends the work, or is too short to
            judge drafts on all validation samples.
        progress: called with steps done, total steps and a line of text.
        stored: rounds the weights of a draft to the types in which the result stores them, before it is measured.
        unmerged: the rewritten fork before tokens are merged; None if none are.

    Returns:
        The healed fork, with the same nodes and number of parameters, and the report.

    Raises:
        HealError: the method does not exist.
    """
    if method not in HEAL_METHODS:
        raise HealError(f"unknown healing method {method!r}; expected one of {', '.join(HEAL_METHODS)}.")
    start = time.perf_counter()
    judge = DraftEvaluator.within(original, model, validation, graph, budget)
    divergence, passed = judge.divergence(graph), time.perf_counter()
    before = Standing(validation.loss(graph).percent, divergence)
    one_pass = time.perf_counter() - passed
    check = judge.seconds + (one_pass if judge.whole else 0.0)
    left = budget - (time.perf_counter() - start) - (0.0 if judge.whole else one_pass)
    drafts = _drafts(method, graph, original, model, calibration, changed, left, check, seed, unmerged)
    best, after, steps, refused, reason = graph, before, 0, 0, ""
    try:
        for draft, standing in _judged(drafts, judge, before, progress, stored):
            steps = draft.step
            if standing is not None and _loses_no_more(standing, before):
                best, after = draft.graph, standing
            else:
                refused += standing is not None
    except NotStartedError as error:
        reason = str(error)
    if best is not graph and not judge.whole:
        after = dataclasses.replace(after, loss=validation.loss(best).percent)
        if not _loses_no_more(after, before):
            best, after, refused = graph, before, 1
    kept = after.divergence < before.divergence * (1 - LEAST_GAIN)
    note = f"not healed: {reason}" if reason else _note(method, kept, steps, refused, before, after, judge.where)
    final = after if kept else before
    spent, judged = time.perf_counter() - start, len(judge.samples)
    return best if kept else graph, Healed(
        method, kept, spent, steps, judged, dataclasses.asdict(before), dataclasses.asdict(final), note
    )


def _drafts(
    method: str,
    graph: Graph,
    original: Graph,
    model: Model,
    calibration: Split,
    changed: Sequence[Site],
    seconds: float,
    check: float,
    seed: int,
    unmerged: Graph | None,
) -> Iterator[Draft]:
    sites = find_sites(original) if method != "none" and changed else ()
    first = min((site.order for site in changed), default=0)
    if method == "closed-form":
        later = [site for site in sites if site.order >= first]
        return refit_closed_form(
            graph, original, model, calibration, sites=later, seconds=seconds - check, unmerged=unmerged
        )
    if method == "distill":
        blocks = sorted({site.block for site in sites if site.order >= first})
        return distil(graph, original, model, calibration, blocks=blocks, seconds=seconds, check=check, seed=seed)
    return iter(())


def _judged(
    drafts: Iterator[Draft],
    judge: DraftEvaluator,
    before: Standing,
    progress: Callable[..., None],
    stored: Callable[[Graph], Graph],
) -> Iterator[tuple[Draft, Standing | None]]:
    """Yield drafts with their standing, None if the divergence is no better; stop after `PATIENCE` of the latter."""
    least, fruitless = before.divergence, 0
    for unrounded in drafts:
        draft = dataclasses.replace(unrounded, graph=stored(unrounded.graph))
        standing = judge.standing(draft.graph, before, below=least)
        fruitless = fruitless + 1 if standing is None else 0
        if standing is not None and _loses_no_more(standing, before):
            least = standing.divergence
        progress(draft.step, draft.steps, f"divergence {least:.4g}, {before.divergence:.4g} before")
        yield draft, standing
        if fruitless == PATIENCE:
            return


def _loses_no_more(standing: Standing, before: Standing) -> bool:
    return standing.loss <= before.loss + ROUNDING


def _note(method: str, kept: bool, steps: int, refused: int, before: Standing, after: Standing, where: str) -> str:
    """Describe the outcome in a sentence."""
    if method == "none":
        return "not healed: the method is none"
    if kept:
        share = 1 - after.divergence / before.divergence
        return f"healed: the divergence on {where} decreased by {share:.0%}, and the loss did not increase"
    if not steps:
        return "not healed: no site was changed"
    if refused:
        return f"rolled back: the divergence on {where} decreased, but the loss increased"
    return f"rolled back: no draft decreased the divergence on {where} by more than {LEAST_GAIN:.0%}"
