"""The decision between the plans of a search, on samples that the search never saw.

A search takes the best of many candidates on the samples that steer it, so the losses it measures there are too small
(the winner's curse). The plans along its path are therefore judged again on the decision split, from the strongest to
the mildest, and the first whose loss is within the budget is taken. The engine that ships is judged on the same
samples; its precision and its healing are part of the budget.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from compressor.lower.traced_model import TracedModel
from compressor.quality.validation_loss import ROUNDING, ValidationLoss
from compressor.search.planner import Choice
from compressor.settings import Settings
from compressor.workspace.progress import Steps

SHARE = 0.25  # of the samples; an export without a budget has no decision split, and its test split is larger
ATTEMPTS = 4  # engines that are built before the export goes on without changes


@dataclass(frozen=True)
class Trial:
    """A plan judged on the decision split.

    Attributes:
        changes: number of changes of the search, from the first.
        judged: ``graph``, in torch in float32, or ``engine``, as it ships.
        loss: loss in percent; a lower bound if `samples` is smaller than the split.
        samples: samples that were evaluated.
    """

    changes: int
    judged: str
    loss: float
    samples: int


def share_of(settings: Settings) -> float:
    """Return the share of the samples in the decision split: 0 without a search that has to keep to a budget."""
    return SHARE if settings.drop == "auto" and math.isfinite(settings.loss_limit) else 0.0


@dataclass
class Decision:
    """Judges the plans of one search on the decision split.

    Attributes:
        losses: measures the loss of graphs on the decision split.
        limit: largest loss of the engine against the original, in percent.
        spent: part of the limit that the precision of the engine takes, in percent.
        trials: the plans judged so far.
    """

    losses: ValidationLoss
    limit: float
    spent: float = 0.0
    trials: list[Trial] = field(default_factory=list)

    @staticmethod
    def of(subject: TracedModel, settings: Settings, steps: Steps) -> Decision | None:
        """Return the decision of an export; None without a budget or a decision split."""
        if not share_of(settings) or subject.data.decision is None:
            return None
        with steps.step("decide: run the original"):
            losses = ValidationLoss(subject.graph, subject.model, subject.data.decision, subject.metric)
        return Decision(losses, settings.loss_limit)

    def strongest(self, choice: Choice, steps: Steps) -> Choice:
        """Return the choice with the most changes, of at most those of `choice`, whose graph is within the limit."""
        with steps.step("decide on fresh samples") as tick:
            numbers = [number for number in self._efficient(choice) if number <= choice.count]
            for done, number in enumerate(numbers):
                tick(done, len(numbers), f"{number} changes")
                if self._loss_of_graph(choice, number) <= self.limit - self.spent + ROUNDING:
                    return choice.at(number)
        return choice.at(0)

    def holds(self, choice: Choice, loss: float, samples: int) -> bool:
        """Record the loss of the engine of a choice, and return whether it is within the limit."""
        self.trials.append(Trial(choice.count, "engine", loss, samples))
        return loss <= self.limit + ROUNDING or not choice.count

    def milder(self, choice: Choice, loss: float, steps: Steps) -> Choice:
        """Return a choice with fewer changes after the engine of `choice` exceeded the limit with `loss`.

        The engine loses more than its graph; the same difference is expected of the next engine. After `ATTEMPTS`
        engines nothing is changed.
        """
        if sum(trial.judged == "engine" for trial in self.trials) >= ATTEMPTS or not math.isfinite(loss):
            return choice.at(0)
        graphs = [trial.loss for trial in self.trials if (trial.changes, trial.judged) == (choice.count, "graph")]
        self.spent = max(self.spent, loss - graphs[-1]) if graphs else self.spent
        return self.strongest(choice.at(max(choice.count - 1, 0)), steps)

    def facts(self, choice: Choice) -> dict[str, Any]:
        """Return the decision as plain JSON values."""
        engines = [trial for trial in self.trials if trial.judged == "engine"]
        return {
            "samples": len(self.losses.split),
            "metric": self.losses.judged,
            "limit": self.limit,
            "loss": engines[-1].loss,
            "found": choice.found,
            "trials": [asdict(trial) for trial in self.trials],
        }

    def _efficient(self, choice: Choice) -> Sequence[int]:
        """Return the numbers of changes of the Pareto-efficient plans, the strongest first; 0 is none of them."""
        points = choice.facts["front"]
        return [point["number"] for point in reversed(points) if point["efficient"] and point["number"]]

    def _loss_of_graph(self, choice: Choice, number: int) -> float:
        lost = self.losses.loss(choice.at(number).reduced(), limit=self.limit - self.spent)
        self.trials.append(Trial(number, "graph", lost.percent, lost.samples))
        return lost.percent


def sentence(facts: dict[str, Any]) -> str:
    """Return the outcome of a decision as a sentence."""
    last, made, found = facts["trials"][-1], facts["trials"][-1]["changes"], facts["found"]
    kept = f"all {found} changes of the search" if made == found else f"{made} of the {found} changes of the search"
    if last["loss"] > facts["limit"]:
        return (
            f"On {facts['samples']} samples that the search did not see, the engine loses {last['loss']:.2f} % without "
            f"any change, more than the limit of {facts['limit']:g} %."
        )
    return (
        f"Decided on {facts['samples']} samples that the search did not see: {kept} stay, with a loss of "
        f"{last['loss']:.2f} % (limit {facts['limit']:g} %)."
    )
