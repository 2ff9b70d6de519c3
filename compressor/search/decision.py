"""The decision between the plans of a search, on samples that the search never saw.

A search takes the best of many candidates on the samples that steer it, so the losses it measures there are too small
(the winner's curse). The plans along its path are therefore judged again on the decision split. The engine that ships
is judged on the same samples; its precision and its healing are part of the budget.

By default the plans are judged from the strongest to the mildest, and the first whose loss is within the budget is
taken, if the loss to expect of new samples is within it too. That is the mean over the decision and the validation
samples and one further sample that is lost in full (conformal risk control; Angelopoulos et al., 2022). The validation
samples are not fresh, so their part is too small by what the search gained from choosing; benchmarks/budget.py measures
whether the mean loss of the plans keeps to the budget all the same.

With a confidence, a plan is taken only if an upper confidence bound of its loss is within the budget. Graphs in float32
are tested from the mildest to the strongest until one fails, which keeps the confidence for all of them (fixed-sequence
testing; Angelopoulos et al., Learn then test, 2021). Engines in another precision or after healing are tested from the
strongest to the mildest, at most `ATTEMPTS` of them, each with an equal share of the error (Bonferroni).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from compressor.choices import AUTO, NO_STAGES
from compressor.lower.traced_model import TracedModel
from compressor.quality.budget import samples_needed, upper_bound
from compressor.quality.evaluate import Evaluation
from compressor.quality.intervals import Array
from compressor.quality.validation_loss import ROUNDING, Loss, ValidationLoss
from compressor.search.planner import Choice
from compressor.settings import Settings
from compressor.workspace.progress import Steps

LOST = 1.0  # further samples that are taken to be lost in full
SHARE = 0.25  # of the samples; an export without a budget has no decision split, and its test split is larger
ERRORS = 1.0  # standard errors by which a loss that is no mean over samples is raised
ATTEMPTS = 4  # engines that are judged before the export goes on without changes


@dataclass(frozen=True)
class Trial:
    """A plan judged on the decision split.

    Attributes:
        changes: number of changes of the search, from the first.
        judged: ``graph``, in torch in float32, or ``engine``, as it ships.
        loss: loss in percent; a lower bound if `samples` is smaller than the split.
        samples: samples that were evaluated.
        expected: loss to expect of new samples in percent; None where the loss is no mean over samples, or a limit was
            exceeded before.
        bound: upper confidence bound of the loss in percent; None without a confidence.
        raised: loss and `ERRORS` of its standard errors in percent; None with a confidence, for a mean over samples and
            where a limit was exceeded before.
    """

    changes: int
    judged: str
    loss: float
    samples: int
    expected: float | None = None
    bound: float | None = None
    raised: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the trial as plain JSON values; the loss is None where an output was NaN or infinite."""
        return asdict(self) | {"loss": _finite(self.loss), "raised": _finite(self.raised)}


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def share_of(settings: Settings) -> float:
    """Return the share of the samples in the decision split: 0 without a search that has to keep to a budget."""
    chosen = AUTO in (settings.drop, settings.image_tokens)
    return SHARE if chosen and math.isfinite(settings.loss_limit) else 0.0


@dataclass
class Decision:
    """Judges the plans of one search on the decision split.

    Attributes:
        losses: measures the loss of graphs on the decision split.
        limit: largest loss of the engine against the original, in percent.
        confidence: confidence of the bound that is held to the limit, between 0 and 1; None takes the loss itself.
        spent: part of the limit that the precision of the engine takes, in percent.
        trials: the plans judged so far.
        needed: about how many samples would make the last bound, or the last loss with its standard error, meet the
            limit; None if it does, or none would.
    """

    losses: ValidationLoss
    limit: float
    confidence: float | None = None
    spent: float = 0.0
    trials: list[Trial] = field(default_factory=list)
    needed: int | None = None

    @staticmethod
    def of(subject: TracedModel, settings: Settings, steps: Steps) -> Decision | None:
        """Return the decision of an export; None without a budget or a decision split."""
        if not share_of(settings):
            return None
        confidence = None if settings.confidence is None else settings.confidence / 100.0
        if subject.data.decision is None:
            return None
        with steps.step("run the original on fresh samples"):
            losses = ValidationLoss(
                subject.graph, subject.model, subject.data.decision, subject.metric, settings.budget, subject.executor
            )
        return Decision(losses, settings.loss_limit, confidence)

    def strongest(self, choice: Choice, steps: Steps) -> Choice:
        """Return the choice with the most changes, of at most those of `choice`, whose graph is within the limit.

        All plans that save more than the milder ones are judged. With a confidence it is only those that are efficient
        by their validation losses, as the first that fails ends the test.
        """
        numbers = _efficient(choice) if self.confidence is not None else _faster(choice)
        numbers = [number for number in numbers if number <= choice.count]
        with steps.step("decide on fresh samples") as tick:
            if self.confidence is not None:
                return self._certified(choice, numbers[::-1], tick)
            for done, number in enumerate(numbers):
                tick(done, len(numbers), f"{number} changes")
                if self._graph_holds(choice.at(number)):
                    return choice.at(number)
        return choice.at(0)

    def holds(self, choice: Choice, evaluation: Evaluation | None, reference: str, *, certify: bool) -> bool:
        """Record the loss of the engine of a choice, and return whether it is within the limit.

        Args:
            choice: the plan.
            evaluation: columns of ``result`` and of the original on the decision split; None for NaN or infinity.
            reference: name of the original.
            certify: whether the confidence is that of the engine, not of its graph.
        """
        loss, bound, expected, raised, samples = math.inf, None, None, None, len(self.losses.split)
        if evaluation is not None:
            columns = evaluation.columns["result"]
            loss = self.losses.bounded.loss(evaluation.columns[reference], columns)
            expected = self._expected(loss, self._validated(choice, loss))
            raised = self._raised(loss, self.losses.bounded.standard_error(evaluation.columns[reference], columns))
            if certify and self.confidence is not None:
                bound = self._bound(
                    self.losses.bounded.sample_losses(columns), 1.0 - (1.0 - self.confidence) / ATTEMPTS
                )
        self.trials.append(Trial(choice.count, "engine", loss, samples, expected, bound, raised))
        held = max(loss, *(each for each in (expected, bound, raised) if each is not None), 0.0)
        return held <= self.limit + ROUNDING or not choice.count

    def milder(self, choice: Choice, steps: Steps) -> Choice:
        """Return a choice with fewer changes after the engine of `choice` exceeded the limit.

        The engine loses more than its graph; the same difference is expected of the next engine. With a confidence,
        half of the changes are left, a number that does not depend on the decision split. After `ATTEMPTS` engines
        nothing is changed.
        """
        engine = self.trials[-1]
        if sum(trial.judged == "engine" for trial in self.trials) >= ATTEMPTS or not math.isfinite(engine.loss):
            return choice.at(0)
        graphs = [trial.loss for trial in self.trials if (trial.changes, trial.judged) == (choice.count, "graph")]
        if self.confidence is None and graphs:
            self.spent = max(self.spent, engine.loss - graphs[-1])
        return self.fewer(choice, steps)

    def fewer(self, choice: Choice, steps: Steps) -> Choice:
        """Return a choice with fewer changes, because no engine of `choice` can be shipped."""
        if self.confidence is not None:
            return choice.at(choice.count // 2)
        return self.strongest(choice.at(choice.count - 1), steps)

    def facts(self, choice: Choice) -> dict[str, Any]:
        """Return the decision as plain JSON values."""
        last = self.trials[-1]
        bounds = [trial.bound for trial in self.trials if trial.changes == last.changes and trial.bound is not None]
        return {
            "samples": len(self.losses.split),
            "judged": self.losses.bounded.judged,
            "limit": self.limit,
            "loss": last.loss,
            "expected": last.expected,
            "raised": _finite(last.raised),
            "least": self._least(),
            "confidence": self.confidence,
            "bound": bounds[-1] if bounds else None,
            "needed": self.needed,
            "changes": last.changes,
            "found": choice.found,
            "trials": [trial.to_dict() for trial in self.trials],
        }

    def _certified(self, choice: Choice, numbers: Sequence[int], tick: Any) -> Choice:
        """Test the graphs from the mildest to the strongest, and return the last before the first that fails."""
        assert self.confidence is not None
        best = 0
        for done, number in enumerate(numbers):
            tick(done, len(numbers), f"{number} changes")
            losses = self.losses.sample_losses(choice.at(number).reduced())
            bound = self._bound(losses, self.confidence)
            assert losses is not None
            self.trials.append(Trial(number, "graph", float(losses.mean()) * 100.0, len(losses), bound=bound))
            if bound > self.limit - self.spent + ROUNDING:
                break
            best = number
        return choice.at(best)

    def _bound(self, losses: Array | None, confidence: float) -> float:
        """Return the upper bound of the mean loss in percent, and note how many samples it would take."""
        assert losses is not None
        bound = upper_bound(losses, confidence) * 100.0
        within = bound <= self.limit + ROUNDING
        self.needed = None if within else samples_needed(losses, self.limit / 100.0, confidence)
        return bound

    def _graph_holds(self, choice: Choice) -> bool:
        """Record the loss of the graph of a choice, and return whether it is within what the precision leaves."""
        limit, validated = self.limit - self.spent, choice.validation_loss()
        allowed = min(limit, self._largest(validated, limit))
        if allowed < 0.0:
            return False  # without a pass over the samples
        lost = self.losses.loss(choice.reduced(), limit=allowed, with_error=self.confidence is None)
        whole = lost.samples == len(self.losses.split)
        expected = self._expected(lost.percent, validated) if whole else None
        raised = self._raised(lost.percent, lost.error) if whole else None
        self.trials.append(Trial(choice.count, "graph", lost.percent, lost.samples, expected, raised=raised))
        if lost.percent < allowed < lost.percent + ERRORS * lost.error:
            self.needed = math.ceil(lost.samples * (ERRORS * lost.error / (allowed - lost.percent)) ** 2)
        return max(lost.percent, raised or 0.0) <= allowed + ROUNDING

    def _raised(self, loss: float, error: float) -> float | None:
        """Return a loss and `ERRORS` of its standard errors; None with a confidence, and for a mean over samples.

        Such a loss has no bound that holds on average, as `expected_loss` is one for means, and a plan is the strongest
        of many, so that the one whose loss is the luckiest would be taken.
        """
        if self.confidence is not None or self.losses.averages:
            return None
        raised = loss + ERRORS * error
        return math.inf if math.isnan(raised) else raised

    def _expected(self, loss: float, validated: Loss) -> float | None:
        """Return the loss to expect of new samples, see `expected_loss`.

        None with a confidence, which is stricter, and for a loss that is no mean over samples.
        """
        if self.confidence is not None or not self.losses.averages:
            return None
        return expected_loss(Loss(loss, len(self.losses.split)), validated)

    def _largest(self, validated: Loss, limit: float) -> float:
        """Return the largest loss on the decision split at which the loss to expect of new samples is `limit`."""
        if not self.losses.averages:
            return limit
        fresh = len(self.losses.split)
        rest = expected_loss(Loss(0.0, fresh), validated)
        return (limit - rest) * (fresh + validated.samples + LOST) / fresh

    def _validated(self, choice: Choice, loss: float) -> Loss:
        """Return the loss on the validation split of an engine that loses `loss` on the decision split.

        It is that of the graph and what the engine loses more on the decision split. After healing, whose graph is not
        judged before, it is that of no samples.
        """
        graphs = [trial.loss for trial in self.trials if (trial.changes, trial.judged) == (choice.count, "graph")]
        if not graphs:
            return Loss(0.0, 0)
        validated = choice.validation_loss()
        return Loss(validated.percent + max(loss - graphs[-1], 0.0), validated.samples)

    def _least(self) -> int | None:
        """Return the number of samples of the data from which a plan without any loss would be within the limit.

        The decision and the validation split each have `SHARE` of them, rounded down.
        """
        if self.confidence is not None or not self.losses.averages or not self.limit:
            return None
        return math.ceil(math.ceil(LOST * (100.0 / self.limit - 1.0) / 2.0) / SHARE)


def expected_loss(fresh: Loss, validated: Loss) -> float:
    """Return the loss to expect of new samples, in percent.

    It is the mean over samples that the search did not see, over its validation samples and `LOST` further samples that
    are lost in full. The mean over fresh samples and one lost sample bounds the expected loss of a plan chosen by it if
    losses grow along the path (conformal risk control; Angelopoulos et al., 2022, theorem 1).
    """
    total = fresh.samples * fresh.percent + validated.samples * validated.percent + LOST * 100.0
    return total / (fresh.samples + validated.samples + LOST)


def loss_to_hold(losses: ValidationLoss, fresh: Loss, validated: Loss) -> float:
    """Return the loss in percent that has to be within a limit, for a change judged on both splits.

    It is the loss on fresh samples or, if that is larger, the loss to expect of new ones (see `expected_loss`); for a
    loss that is no mean over samples the one raised by `ERRORS` of its standard errors.

    Args:
        losses: what measured `fresh`.
        fresh: loss on samples that the search did not see, with its standard error.
        validated: loss on the validation samples.
    """
    if fresh.samples < len(losses.split):  # a lower bound beyond the limit
        return fresh.percent
    likely = expected_loss(fresh, validated) if losses.averages else fresh.percent + ERRORS * fresh.error
    return math.inf if math.isnan(likely) else max(fresh.percent, likely)


def _efficient(choice: Choice) -> list[int]:
    """Return the numbers of changes of the Pareto-efficient plans, the strongest first; 0 is none of them."""
    points = choice.facts["front"]
    return [point["number"] for point in reversed(points) if point["efficient"] and point["number"]]


def _faster(choice: Choice) -> list[int]:
    """Return the numbers of changes of the plans that are predicted faster than all milder ones, the strongest first.

    A validation loss is too noisy to leave out a plan because a stronger one lost no more there.
    """
    first, *points = choice.facts["front"]
    best, found = first["predicted"], []
    for point in points:
        if point["predicted"] > best:
            best = point["predicted"]
            found.append(point["number"])
    return found[::-1]


def sentence(facts: dict[str, Any], tokens: str = AUTO, image_tokens: str = NO_STAGES) -> str:
    """Return the outcome of a decision as a sentence.

    Args:
        facts: those of `Decision.facts`.
        tokens: the value of ``--tokens``.
        image_tokens: the value of ``--image-tokens``.
    """
    made, found, samples = facts["changes"], facts["found"], facts["samples"]
    if facts["loss"] > facts["limit"]:
        merged = tokens not in (AUTO, "none")
        change = f"change but --tokens {tokens}" if merged else "change"
        advice = f"; merge fewer tokens, or give --tokens {AUTO}" if merged else ""
        if image_tokens != NO_STAGES:
            change += f"{' and' if merged else ' but'} --image-tokens {image_tokens}"
            advice += "; keep more image tokens"
        return (
            f"On {samples} samples that the search did not see, the engine loses {facts['loss']:.2f} % without any "
            f"{change}, more than the limit of {facts['limit']:g} %{advice}."
        )
    kept = f"all {found}" if made == found else f"{made} of the {found}"
    expected = "" if facts["expected"] is None or not made else f"; {facts['expected']:.2f} % expected of new samples"
    if facts["raised"] is not None and made:
        expected = f"; {facts['raised']:.2f} % with its standard error"
    decided = (
        f"Decided on {samples} samples that the search did not see: {kept} changes of the search stay, with a loss of "
        f"{facts['loss']:.2f} % (limit {facts['limit']:g} %{expected})"
    )
    return f"{decided}{_certificate(facts)}{_too_few(facts)}."


def _too_few(facts: dict[str, Any]) -> str:
    """Return how many samples it would take to keep any change, as the end of a sentence, if these are too few."""
    least = facts["least"]
    if least is None or not facts["found"] or facts["changes"] or facts["samples"] >= least * SHARE:
        return ""
    return f"; this limit takes at least {least} samples, also for a plan without any loss"


def _certificate(facts: dict[str, Any]) -> str:
    """Return what held of the confidence, and how many samples the next plan would take, as the end of a sentence."""
    more = "" if facts["needed"] is None else f"; the next plan would need about {facts['needed']} samples"
    if facts["confidence"] is None:
        return more
    confidence = f"{facts['confidence'] * 100.0:g}"
    if facts["bound"] is None or facts["bound"] > facts["limit"]:
        return f"; nothing can be certified at {confidence} % on so few samples{more}"
    return f", certified at {confidence} % to be at most {facts['bound']:.2f} %{more}"
