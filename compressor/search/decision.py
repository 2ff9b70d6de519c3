"""The decision between the plans of a search, on samples that the search never saw.

A search takes the best of many candidates on the samples that steer it, so the losses it measures there are too small
(the winner's curse). The plans along its path are therefore judged again on the decision split. The engine that ships
is judged on the same samples; its precision and its healing are part of the budget.

By default the plans are judged from the strongest to the mildest, and the first whose loss is within the budget is
taken. With a confidence, a plan is taken only if an upper confidence bound of its loss is within the budget. Graphs in
float32 are tested from the mildest to the strongest until one fails, which keeps the confidence for all of them
(fixed-sequence testing; Angelopoulos et al., Learn then test, 2021). Engines in another precision or after healing are
tested from the strongest to the mildest, at most `ATTEMPTS` of them, each with an equal share of the error
(Bonferroni).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from compressor.errors import CompressorError
from compressor.lower.traced_model import TracedModel
from compressor.quality.budget import samples_needed, upper_bound
from compressor.quality.evaluate import Evaluation
from compressor.quality.intervals import Array
from compressor.quality.metrics import METRICS
from compressor.quality.validation_loss import ROUNDING, ValidationLoss
from compressor.search.planner import Choice
from compressor.settings import Settings
from compressor.workspace.progress import Steps

SHARE = 0.25  # of the samples; an export without a budget has no decision split, and its test split is larger
ATTEMPTS = 4  # engines that are judged before the export goes on without changes


class DecisionError(CompressorError):
    """The loss has no confidence bound."""


@dataclass(frozen=True)
class Trial:
    """A plan judged on the decision split.

    Attributes:
        changes: number of changes of the search, from the first.
        judged: ``graph``, in torch in float32, or ``engine``, as it ships.
        loss: loss in percent; a lower bound if `samples` is smaller than the split.
        samples: samples that were evaluated.
        bound: upper confidence bound of the loss in percent; None without a confidence.
    """

    changes: int
    judged: str
    loss: float
    samples: int
    bound: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the trial as plain JSON values; the loss is None where an output was NaN or infinite."""
        return asdict(self) | {"loss": self.loss if math.isfinite(self.loss) else None}


def share_of(settings: Settings) -> float:
    """Return the share of the samples in the decision split: 0 without a search that has to keep to a budget."""
    return SHARE if settings.drop == "auto" and math.isfinite(settings.loss_limit) else 0.0


@dataclass
class Decision:
    """Judges the plans of one search on the decision split.

    Attributes:
        losses: measures the loss of graphs on the decision split.
        limit: largest loss of the engine against the original, in percent.
        confidence: confidence of the bound that is held to the limit, between 0 and 1; None takes the loss itself.
        spent: part of the limit that the precision of the engine takes, in percent.
        trials: the plans judged so far.
        needed: about how many samples would make the last bound meet the limit; None if it does, or none would.
    """

    losses: ValidationLoss
    limit: float
    confidence: float | None = None
    spent: float = 0.0
    trials: list[Trial] = field(default_factory=list)
    needed: int | None = None

    @staticmethod
    def of(subject: TracedModel, settings: Settings, steps: Steps) -> Decision | None:
        """Return the decision of an export; None without a budget or a decision split.

        Raises:
            DecisionError: a confidence is asked for, but there are no samples, or the loss is no mean over samples.
        """
        if not share_of(settings):
            return None
        confidence = None if settings.confidence is None else settings.confidence / 100.0
        if subject.data.decision is None:
            if confidence is not None:
                raise DecisionError("--confidence needs samples that the search does not see; give at least 4 samples")
            return None
        with steps.step("run the original on fresh samples"):
            losses = ValidationLoss(
                subject.graph, subject.model, subject.data.decision, subject.metric, settings.budget
            )
        if confidence is not None and losses.sample_losses(subject.graph) is None:
            judged = losses.bounded.judged
            name = METRICS[judged].label if judged in METRICS else judged
            raise DecisionError(
                f"--confidence bounds a mean of losses between 0 and 1 per sample, which {name} is not; leave out "
                "--confidence, or give another --budget"
            )
        return Decision(losses, settings.loss_limit, confidence)

    def strongest(self, choice: Choice, steps: Steps) -> Choice:
        """Return the choice with the most changes, of at most those of `choice`, whose graph is within the limit."""
        numbers = [number for number in _efficient(choice) if number <= choice.count]
        with steps.step("decide on fresh samples") as tick:
            if self.confidence is not None:
                return self._certified(choice, numbers[::-1], tick)
            for done, number in enumerate(numbers):
                tick(done, len(numbers), f"{number} changes")
                if self._loss_of_graph(choice, number) <= self.limit - self.spent + ROUNDING:
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
        loss, bound, samples = math.inf, None, len(self.losses.split)
        if evaluation is not None:
            columns = evaluation.columns["result"]
            loss = self.losses.bounded.loss(evaluation.value(reference), columns)
            if certify and self.confidence is not None:
                bound = self._bound(
                    self.losses.bounded.sample_losses(columns), 1.0 - (1.0 - self.confidence) / ATTEMPTS
                )
        self.trials.append(Trial(choice.count, "engine", loss, samples, bound))
        return max(loss, loss if bound is None else bound) <= self.limit + ROUNDING or not choice.count

    def milder(self, choice: Choice, steps: Steps) -> Choice:
        """Return a choice with fewer changes after the engine of `choice` exceeded the limit.

        The engine loses more than its graph; the same difference is expected of the next engine. With a confidence,
        half of the changes are left, a number that does not depend on the decision split. After `ATTEMPTS` engines
        nothing is changed.
        """
        engine = self.trials[-1]
        if sum(trial.judged == "engine" for trial in self.trials) >= ATTEMPTS or not math.isfinite(engine.loss):
            return choice.at(0)
        if self.confidence is not None:
            return choice.at(choice.count // 2)
        graphs = [trial.loss for trial in self.trials if (trial.changes, trial.judged) == (choice.count, "graph")]
        self.spent = max(self.spent, engine.loss - graphs[-1]) if graphs else self.spent
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
            self.trials.append(Trial(number, "graph", float(losses.mean()) * 100.0, len(losses), bound))
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

    def _loss_of_graph(self, choice: Choice, number: int) -> float:
        lost = self.losses.loss(choice.at(number).reduced(), limit=self.limit - self.spent)
        self.trials.append(Trial(number, "graph", lost.percent, lost.samples))
        return lost.percent


def _efficient(choice: Choice) -> list[int]:
    """Return the numbers of changes of the Pareto-efficient plans, the strongest first; 0 is none of them."""
    points = choice.facts["front"]
    return [point["number"] for point in reversed(points) if point["efficient"] and point["number"]]


def sentence(facts: dict[str, Any]) -> str:
    """Return the outcome of a decision as a sentence."""
    made, found, samples = facts["changes"], facts["found"], facts["samples"]
    if facts["loss"] > facts["limit"]:
        return (
            f"On {samples} samples that the search did not see, the engine loses {facts['loss']:.2f} % without any "
            f"change, more than the limit of {facts['limit']:g} %."
        )
    kept = f"all {found}" if made == found else f"{made} of the {found}"
    decided = (
        f"Decided on {samples} samples that the search did not see: {kept} changes of the search stay, with a loss of "
        f"{facts['loss']:.2f} % (limit {facts['limit']:g} %)"
    )
    return f"{decided}{_certificate(facts)}."


def _certificate(facts: dict[str, Any]) -> str:
    """Return what held of the confidence, or how many samples it would take, as the end of a sentence."""
    if facts["confidence"] is None:
        return ""
    confidence = f"{facts['confidence'] * 100.0:g}"
    more = "" if facts["needed"] is None else f"; the next plan would need about {facts['needed']} samples"
    if facts["bound"] is None or facts["bound"] > facts["limit"]:
        return f"; nothing can be certified at {confidence} % on so few samples{more}"
    return f", certified at {confidence} % to be at most {facts['bound']:.2f} %{more}"
