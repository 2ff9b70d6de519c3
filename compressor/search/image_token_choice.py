"""Choose how many image tokens a language model keeps of its prompt, by the loss on samples of the user.

The schedules are those of PyramidDrop (Xing et al., CVPR 2025, arXiv 2410.17247): behind a quarter, a half and three
quarters of the blocks, each stage keeps the same share of the image tokens that the one before kept. Schedules are
judged from the strongest to the mildest, on the validation and then on the decision split, and the first one whose loss
is within the limit on both is taken. With ``--drop auto`` the limit is half of ``--max-loss``, and the rest is left to
the search, whose decision is about the engine with both. A plan without a search comes first: schedules are judged on
its graph, so that their loss is that of both.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from compressor.choices import AUTO, NO_STAGES
from compressor.data.splits import Split
from compressor.errors import SettingsError
from compressor.limitations import Limitation
from compressor.lower.traced_model import SubjectError, TracedModel, quarters, without_image_tokens
from compressor.quality.validation_loss import ROUNDING, ValidationLoss
from compressor.search.decision import loss_to_hold
from compressor.search.planner import Choice, apply_fixed_plan
from compressor.settings import Settings
from compressor.workspace.progress import Steps
from passes.graph.graph import Graph

SHARES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # kept by each stage of what reaches it, the strongest first
PART = 0.5  # of the limit, where a search takes the rest


@dataclass(frozen=True)
class TriedSchedule:
    """A schedule that was judged.

    Attributes:
        stages: it, as a value of ``--image-tokens``.
        validation: loss on the validation split in percent; a lower bound where it exceeds the limit.
        fresh: loss to hold on the decision split in percent, see `compressor.search.decision.loss_to_hold`; None where
            the validation split refused the schedule.
    """

    stages: str
    validation: float
    fresh: float | None

    def sentence(self) -> str:
        """Return the schedule with its loss; a pass that ends early tells the least that it is."""
        loss = self.validation if self.fresh is None else self.fresh
        return f"{self.stages} {f'at least {loss:.2f} %' if math.isfinite(loss) else 'NaN or infinity'}"

    def to_dict(self) -> dict[str, Any]:
        """Return the schedule as plain JSON values; a loss is None where an output was NaN or infinite."""
        losses = {"validation": self.validation, "fresh": self.fresh}
        return {"stages": self.stages} | {
            name: value if value is not None and math.isfinite(value) else None for name, value in losses.items()
        }


@dataclass(frozen=True)
class ImageTokenChoice:
    """The outcome of ``--image-tokens auto``.

    Attributes:
        stages: the value of ``--image-tokens`` that was chosen; none if no schedule is within the limit.
        limit: largest loss, in percent, of the schedule with `plan`.
        tried: the schedules judged, in order.
        plan: the plan on whose graph they were judged; None with a search, which comes later, and without a schedule.
        changes: number of changes of the plan that they were judged with.
    """

    stages: str
    limit: float
    tried: tuple[TriedSchedule, ...]
    plan: Choice | None = None
    changes: int = 0

    @property
    def spent(self) -> float:
        """Part of the budget that the stages take, in percent."""
        return max(self.tried[-1].fresh or 0.0, 0.0) if self.stages != NO_STAGES else 0.0

    def sentence(self) -> str:
        """Return what was chosen among how many schedules, and what each one that was judged lost."""
        beside = " with the changes of the plan" if self.changes else ""
        *stronger, last = [each.sentence() for each in self.tried]
        if self.stages == NO_STAGES:
            return (
                f"Image tokens: all are kept, because each of {len(self.tried)} schedules loses more{beside} than the "
                f"limit of {self.limit:g} %: {', '.join([*stronger, last])}."
            )
        refused = f"; stronger ones lose more: {', '.join(stronger)}" if stronger else ""
        return (
            f"Image tokens: {self.stages} was chosen among {len(SHARES)} schedules, the strongest within the limit of "
            f"{self.limit:g} % on validation samples and on others (loss{beside} "
            f"{max(self.tried[-1].fresh or 0.0, 0.0):.2f} %{refused})."
        )

    def limitations(self, settings: Settings) -> Iterator[Limitation]:
        """Yield what the limit does not hold for: a precision below fp32 without a search, which has no decision."""
        if self.plan is not None and settings.precision != "fp32":
            yield Limitation(
                "image tokens",
                f"chosen by the loss in float32; what {settings.precision} loses is not part of --max-loss without "
                "--drop auto",
            )


def choose_image_tokens(subject: TracedModel, settings: Settings, steps: Steps) -> ImageTokenChoice | None:
    """Return the strongest schedule within the limit; None unless ``--image-tokens auto`` asks for a choice.

    Raises:
        SettingsError: the loss is not limited.
        SubjectError: the data cannot tell the loss: it has no quality, no image, or too few samples.
    """
    if settings.image_tokens != AUTO:
        return None
    validation, decision = _checked(subject, settings)
    plan = None if settings.drop == AUTO else apply_fixed_plan(subject, settings, steps)
    start = subject.graph if plan is None else plan.reduced()
    changes = 0 if plan is None else len(plan.plan.changes)
    limit = settings.loss_limit * (PART if plan is None else 1.0)
    tried: list[TriedSchedule] = []
    with steps.step("choose image tokens") as tick:
        before = _losses(subject, validation, settings)
        fresh = _losses(subject, decision, settings)
        for number, share in enumerate(SHARES):
            stages = schedule(share, quarters(subject.model))
            tick(number, len(SHARES), stages)
            graph = _dropping(start, subject, settings, stages)
            loss = before.loss(graph, limit=limit)
            held = None
            if loss.percent <= limit + ROUNDING:
                held = loss_to_hold(fresh, fresh.loss(graph, limit=limit, with_error=True), loss)
            tried.append(TriedSchedule(stages, loss.percent, held))
            if held is not None and held <= limit + ROUNDING:
                return ImageTokenChoice(stages, limit, tuple(tried), plan, changes)
    return ImageTokenChoice(NO_STAGES, limit, tuple(tried), changes=changes)


def schedule(share: float, depths: tuple[int, ...]) -> str:
    """Return a value of ``--image-tokens`` whose stages each keep `share` of what reaches them.

    >>> schedule(0.5, (8, 16, 24))
    '50%@8,25%@16,12.5%@24'
    """
    return ",".join(f"{100 * share**number:.4g}%@{depth}" for number, depth in enumerate(depths, 1))


def _losses(subject: TracedModel, split: Split, settings: Settings) -> ValidationLoss:
    """Return what measures losses on a split; the outputs are those of a graph with stages, the original's first."""
    mildest = _dropping(subject.graph, subject, settings, schedule(SHARES[-1], quarters(subject.model)))
    model = dataclasses.replace(subject.model, outputs=mildest.outputs)
    return ValidationLoss(subject.graph, model, split, subject.metric, settings.budget, subject.executor)


def _dropping(graph: Graph, subject: TracedModel, settings: Settings, stages: str) -> Graph:
    return without_image_tokens(graph, subject.model, dataclasses.replace(settings, image_tokens=stages))


def _checked(subject: TracedModel, settings: Settings) -> tuple[Split, Split]:
    """Return the splits that schedules are judged on."""
    remedy = "give the stages, such as --image-tokens 50%@8,25%@16, or none"
    if not math.isfinite(settings.loss_limit):
        raise SettingsError(
            "found --image-tokens auto without a limit of the loss, which --speedup and --latency lift; give "
            f"--max-loss too, or {remedy}."
        )
    if subject.no_quality_because is not None:
        raise SubjectError(
            f"--image-tokens auto chooses by the loss, but no quality can be measured: {subject.no_quality_because}; "
            f"give --data with images and texts, or {remedy}."
        )
    validation, decision = subject.data.validation, subject.data.decision
    if decision is None or not len(decision):
        raise SubjectError(
            "--image-tokens auto decides on samples that the validation does not see, and there are too few for both; "
            f"give at least 4 samples, or {remedy}."
        )
    token = subject.model.preprocess.image_token
    splits = (validation, decision)
    if not all(any((batch.feeds["input_ids"] == token).any() for batch in split.batches(1)) for split in splits):
        raise SubjectError(
            f"--image-tokens auto found no image token in the samples of {subject.data.source}; {remedy}."
        )
    return splits
