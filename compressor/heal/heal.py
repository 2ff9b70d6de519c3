"""Heal a rewritten model: adapt what is left of it to the original's answers, and never hand back a worse one."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from compressor.choices import HEAL_METHODS
from compressor.data.splits import Split
from compressor.errors import CompressorError
from compressor.heal.closed_form import refitted
from compressor.heal.distill import Draft, distil
from compressor.models import Model
from compressor.quality.output_divergence import Effects
from compressor.quality.validation_loss import ROUNDING, Validation
from passes.graph.graph import Graph, Site
from passes.graph.sites import find_sites

LEAST_GAIN = 0.01  # share of the divergence that must go: less is noise of the samples it is measured on
PATIENCE = 3  # drafts in a row that are no better, after which training ends


class HealError(CompressorError):
    """Healing was asked for in a way that there is not."""


@dataclass(frozen=True)
class Standing:
    """Where a graph stands on validation data: loss in percent by the promised metric, and divergence without labels.

    The divergence is KL(original || graph) in nats, for features 1 - cosine.
    """

    loss: float
    divergence: float


@dataclass(frozen=True)
class Healed:
    """What healing did, as it is reported: `before` and `after` hold ``loss`` and ``divergence`` on validation data.

    `sample_steps` counts steps: of training (one batch each), or maps looked at in closed form. Where `kept` is
    false, the graph is as it was, and `note` says why.
    """

    method: str
    kept: bool
    seconds: float
    sample_steps: int
    before: Mapping[str, float]
    after: Mapping[str, float]
    note: str


@dataclass
class Judge:
    """Measures graphs on validation data. A loss is measured only of those that diverge less than the best so far."""

    original: Graph
    model: Model
    validation: Validation
    seconds: float = 0.0  # what the last full measurement took
    _effects: Effects = field(init=False)

    def __post_init__(self) -> None:
        self._effects = Effects(self.original, self.model, self.validation.split)
        self._effects.scales = (1.0,)  # as it is reported

    def standing(self, graph: Graph, *, below: float | None = None) -> Standing | None:
        """Loss and divergence; None where the divergence is not below `below`."""
        start = time.perf_counter()
        divergence, _ = self._effects.measure(graph, {})
        if below is not None and not divergence < below:
            return None
        found = Standing(self.validation.loss(graph).percent, divergence)
        self.seconds = time.perf_counter() - start
        return found


def heal(
    method: str,
    graph: Graph,
    original: Graph,
    model: Model,
    calibration: Split,
    validation: Validation,
    *,
    changed: Sequence[Site],
    budget: float,
    seed: int,
    progress: Callable[..., None],
) -> tuple[Graph, Healed]:
    """Adapt the weights of a rewritten graph to the original's answers, without labels.

    Of all drafts that lose no more than the graph does now, the one with the least divergence is kept, both on
    validation data, if it takes away at least `LEAST_GAIN` of the divergence. Otherwise the graph comes back as it was.

    Args:
        method: one of `HEAL_METHODS`.
        graph: the rewritten fork, which shares weights with `original`. Both stay as they are, bit for bit.
        original: the traced model.
        model: what both were traced from.
        calibration: samples that weights are fitted to; labels are not read.
        validation: judges drafts.
        changed: the sites that were rewritten.
        budget: seconds for all of it; measuring once may exceed it.
        seed: of whatever is drawn at random. Results repeat where the budget does not end the work.
        progress: called with steps done, steps in total and a line of text.

    Returns:
        The healed fork, with the same nodes and number of parameters, and the report.

    Raises:
        HealError: there is no such method.
    """
    if method not in HEAL_METHODS:
        raise HealError(f"found the healing method {method!r}, expected one of {', '.join(HEAL_METHODS)}.")
    start = time.perf_counter()
    judge = Judge(original, model, validation)
    before = judge.standing(graph)
    assert before is not None
    left = budget - (time.perf_counter() - start)
    drafts = _drafts(method, graph, original, model, calibration, changed, left, judge.seconds, seed)
    best, after, steps, refused = graph, before, 0, 0
    for draft, standing in _judged(drafts, judge, before, progress):
        steps = draft.step
        if standing is not None and _loses_no_more(standing, before):
            best, after = draft.graph, standing
        else:
            refused += standing is not None
    kept = after.divergence < before.divergence * (1 - LEAST_GAIN)
    note = _note(method, kept, steps, refused, before, after)
    final = after if kept else before
    spent = time.perf_counter() - start
    return best if kept else graph, Healed(
        method, kept, spent, steps, dataclasses.asdict(before), dataclasses.asdict(final), note
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
) -> Iterator[Draft]:
    sites = find_sites(original) if method != "none" and changed else ()
    first = min((site.order for site in changed), default=0)
    if method == "closed-form":
        names = {site.name for site in changed}
        kept = [site for site in sites if site.name not in names and site.order > first]
        return refitted(graph, original, model, calibration, sites=kept, seconds=seconds - check)
    if method == "distill":
        blocks = sorted({site.block for site in sites if site.order >= first})
        return distil(graph, original, model, calibration, blocks=blocks, seconds=seconds, check=check, seed=seed)
    return iter(())


def _judged(
    drafts: Iterator[Draft], judge: Judge, before: Standing, progress: Callable[..., None]
) -> Iterator[tuple[Draft, Standing | None]]:
    """Drafts with where they stand (None: diverging no less than the best), until they get no better for a while."""
    least, fruitless = before.divergence, 0
    for draft in drafts:
        standing = judge.standing(draft.graph, below=least)
        fruitless = fruitless + 1 if standing is None else 0
        if standing is not None and _loses_no_more(standing, before):
            least = standing.divergence
        progress(draft.step, draft.steps, f"divergence {least:.4g}, {before.divergence:.4g} before")
        yield draft, standing
        if fruitless == PATIENCE:
            return


def _loses_no_more(standing: Standing, before: Standing) -> bool:
    return standing.loss <= before.loss + ROUNDING


def _note(method: str, kept: bool, steps: int, refused: int, before: Standing, after: Standing) -> str:
    """The outcome in words."""
    if method == "none":
        return "not healed, as asked"
    if kept:
        share = 1 - after.divergence / before.divergence
        return f"healed: {share:.0%} of the divergence on validation data is gone, and no more is lost"
    if not steps:
        return "not healed: the time was too short to begin, or nothing behind the changes can be adapted"
    if refused:
        return "rolled back: it answered closer to the original, but lost more on validation data"
    return "rolled back: it came no closer to the original on validation data"
