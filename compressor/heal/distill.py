"""Distillation of the original into a rewritten graph, on calibration inputs without labels."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from compressor.data.splits import Split
from compressor.errors import CompressorError
from compressor.models import Model
from compressor.quality.heads.registry import head_for
from compressor.quality.output_divergence import subsample_tokens
from passes.analysis.redundancy import output_mask
from passes.execute.interpreter import Program
from passes.graph.edit import replace_parameter
from passes.graph.graph import Graph, attribute
from passes.graph.sites import LINEAR_OPS

CACHE = 2**28  # bytes; limit of the cache of teacher outputs
SMALLEST_CROP = 0.6  # smallest area of a crop as a share of the image
LONGEST_GRADIENT = 1.0
TIMED = 2  # steps before the training, of which the last is timed
JUDGING = 0.3  # largest share of the time for the evaluation of drafts


@dataclass(frozen=True)
class Recipe:
    """Training hyperparameters: AdamW without weight decay, a short warm-up, then cosine decay to zero.

    `rate` is the peak learning rate, `rank` the rank of the low-rank terms, `batch` the batch size, `steps` the maximum
    number of steps, `fewest` the minimum number of steps for which training starts, `warmup` the share of steps for
    warm-up, and `checks` the maximum number of drafts that are evaluated.
    """

    rate: float = 1e-3
    rank: int = 8
    batch: int = 16
    steps: int = 400
    fewest: int = 8
    warmup: float = 0.1
    checks: int = 8


RECIPE = Recipe()
NO_WEIGHT = "no weight after the changed sites can be adapted"


class NotStartedError(CompressorError):
    """No draft can be made; the message is the reason, as a clause."""


class Student:
    """A rewritten graph with some parameters replaced by trainable ones; the graph itself is not modified.

    Vectors (norms, biases, scales) are trained as copies. The matrix W of a linear map is replaced by W + B A with A
    [rank, in] and B [out, rank], B initially zero (LoRA, Hu et al., arXiv 2106.09685). B A is merged at every step, so
    the result has no additional node. No other parameter is copied or gets a gradient.
    """

    def __init__(self, graph: Graph, blocks: Sequence[str], recipe: Recipe, generator: torch.Generator) -> None:
        self.graph = graph
        self.program = Program(graph)
        self.names = {node: str(node.target) for node in self.program.constants}
        self.fixed = {node: _plain(value) for node, value in self.program.constants.items()}
        self.vectors: dict[str, torch.Tensor] = {}
        self.factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.matrices: dict[str, torch.Tensor] = {}
        for node, name in self.names.items():
            value = self.fixed[node]
            if not (isinstance(attribute(graph, node), torch.nn.Parameter) and _lies_in(name, blocks, graph.prefix)):
                continue
            if value.ndim == 1:
                self.vectors[name] = value.clone().requires_grad_()
            elif value.ndim == 2 and all(_is_map(user, node) for user in node.users):
                down = torch.randn(recipe.rank, value.shape[1], generator=generator) / math.sqrt(value.shape[1])
                up = torch.zeros(value.shape[0], recipe.rank)
                self.matrices[name], self.factors[name] = value, (down.requires_grad_(), up.requires_grad_())

    def trained(self) -> list[torch.Tensor]:
        """Return the trainable tensors."""
        return [*self.vectors.values(), *itertools.chain.from_iterable(self.factors.values())]

    def merged(self) -> dict[str, torch.Tensor]:
        """Return the trained parameters by name, with low-rank terms merged."""
        maps = {name: self.matrices[name] + up @ down for name, (down, up) in self.factors.items()}
        return self.vectors | maps

    def run(self, feeds: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Return the outputs for one batch, with gradients."""
        merged = self.merged()
        self.program.constants = {node: merged.get(self.names[node], value) for node, value in self.fixed.items()}
        return self.program.run(feeds)

    def written(self) -> Graph:
        """Return a fork of the graph with the trained parameters; it shares the others."""
        fork = self.graph.fork()
        for name, value in self.merged().items():
            replace_parameter(fork, name, value.detach().clone())
        return fork


def _plain(value: object) -> torch.Tensor:
    """Detach a tensor; clone one created in inference mode, which autograd rejects."""
    assert isinstance(value, torch.Tensor)
    return value.detach().clone() if value.is_inference() else value.detach()


def _lies_in(name: str, blocks: Sequence[str], prefix: str) -> bool:
    path = name.removeprefix(prefix)
    return name.startswith("fitted_") or not blocks or any(path.startswith(f"{block}.") for block in blocks)


def _is_map(user: torch.fx.Node, weight: torch.fx.Node) -> bool:
    return user.target in LINEAR_OPS and len(user.args) > 1 and user.args[1] is weight and user.args[0] is not weight


# --------------------------------------------------------------------------------------------------------- training


@dataclass(frozen=True)
class Draft:
    """A candidate graph to evaluate, after `step` of `steps` steps."""

    graph: Graph
    step: int
    steps: int


def distil(
    graph: Graph,
    original: Graph,
    model: Model,
    calibration: Split,
    *,
    blocks: Sequence[str],
    seconds: float,
    check: float,
    seed: int,
) -> Iterator[Draft]:
    """Train a student, initialised from `graph`, on the outputs of `original` and yield drafts.

    The number of steps is estimated from the time of the first two and limited by the recipe. The targets are the
    logits or features of the original; images are cropped and mirrored at random.

    Args:
        graph: rewritten fork; it is not modified.
        original: teacher; it is not modified.
        model: model that both graphs were traced from.
        calibration: samples; their labels are not used.
        blocks: module paths whose parameters are trained; all parameters if empty.
        seconds: wall time in seconds, including the evaluation of drafts.
        check: seconds that the evaluation of one draft takes.
        seed: seed of batches, crops and initial factors.

    Raises:
        NotStartedError: no parameter can be trained, or the time is too short for `Recipe.fewest` steps.
    """
    recipe, start = RECIPE, time.perf_counter()
    generator = torch.Generator().manual_seed(seed)
    student = Student(graph, blocks, recipe, generator)
    if not student.trained():
        raise NotStartedError(NO_WEIGHT)
    lesson = Distillation(student, original, model, calibration, recipe, generator)
    checks = max(1, min(recipe.checks, int(seconds * JUDGING / max(check, 1e-6))))
    left = seconds - (time.perf_counter() - start) - checks * check
    step_seconds = _step_seconds(lesson)
    steps = min(recipe.steps, int(left / step_seconds) - TIMED)
    if steps < recipe.fewest:
        least = (recipe.fewest + TIMED) * step_seconds + check
        raise NotStartedError(
            f"the time budget is too short: {recipe.fewest} training steps, the fewest, take about {least:.0f} s "
            f"(a step {step_seconds:.1f} s, judging a draft {check:.1f} s), and {max(seconds, 0.0):.0f} s were left; "
            "give more with --heal-budget"
        )
    optimizer = torch.optim.AdamW(student.trained(), lr=recipe.rate, betas=(0.9, 0.99), weight_decay=0.0)
    due = {steps * number // checks for number in range(1, checks + 1)}
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate * _schedule(step / steps, recipe.warmup, 1 / steps)
        lesson.learn()
        torch.nn.utils.clip_grad_norm_(student.trained(), LONGEST_GRADIENT)
        optimizer.step()
        late = time.perf_counter() - start + check > seconds
        if step + 1 in due or late:
            yield Draft(student.written(), step + 1, steps)
        if late:
            return


def _schedule(done: float, warmup: float, least: float) -> float:
    """Return the learning rate as a share of the peak: linear warm-up, then cosine decay."""
    if done < warmup:
        return (done + least) / (warmup + least)
    return 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))


def _step_seconds(lesson: Distillation) -> float:
    """Time one training step after a first one; the gradients of both are discarded."""
    for _ in range(TIMED):
        start = time.perf_counter()
        lesson.learn()
    return max(time.perf_counter() - start, 1e-6)


class Distillation:
    """Training batches of calibration inputs, the teacher's outputs for them, and the backward pass."""

    def __init__(
        self,
        student: Student,
        original: Graph,
        model: Model,
        calibration: Split,
        recipe: Recipe,
        generator: torch.Generator,
    ) -> None:
        self.student, self.teacher, self.model = student, Program(original), model
        self.head = head_for(model.task, model.problem_type)
        self.generator = generator
        self.pictures = model.preprocess.kind == "image"
        order = torch.randperm(len(calibration), generator=generator).tolist()
        size = max(1, recipe.batch // 4) if self.head.by_token else recipe.batch
        self.parts = [
            dataclasses.replace(calibration, indices=tuple(calibration.indices[row] for row in order[at : at + size]))
            for at in range(0, len(order), size)
        ]
        self.waiting: list[int] = []
        self.answers: dict[int, torch.Tensor] = {}

    @torch.inference_mode(False)
    @torch.enable_grad()
    def learn(self) -> float:
        """Compute the gradients of the student's tensors for the next batch; return the loss."""
        if not self.waiting:
            self.waiting = torch.randperm(len(self.parts), generator=self.generator).tolist()
        part = self.waiting.pop()
        (batch,) = self.parts[part].batches(len(self.parts[part]))
        feeds = {name: torch.from_numpy(value) for name, value in batch.feeds.items()}
        if self.pictures:
            feeds = {name: cropped(value, self.generator) for name, value in feeds.items()}
        target = self._target(part, feeds)
        with cheaper():
            answer = self._read(self.student.run(feeds))
        mask = output_mask(feeds)
        loss = self.head.training_loss(answer, target, None if mask is None else self._spaced(mask))
        for tensor in self.student.trained():
            tensor.grad = None
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    def _target(self, part: int, feeds: Mapping[str, torch.Tensor]) -> torch.Tensor:
        if part in self.answers:
            return self.answers[part]
        with torch.no_grad(), cheaper():
            target = self._read(self.teacher.run(feeds)).float()
        fits = target.nbytes * len(self.parts) <= CACHE
        if fits and not self.pictures:
            self.answers[part] = target
        return target

    def _read(self, outputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return self._spaced(self.model.evaluated_in(outputs))

    def _spaced(self, values: torch.Tensor) -> torch.Tensor:
        return subsample_tokens(values) if self.head.by_token else values


def cheaper() -> contextlib.AbstractContextManager[object]:
    """Return a bfloat16 autocast context if the processor has instructions for it (training is three times as fast)."""
    capabilities = torch.cpu.get_capabilities()
    supported = capabilities.get("avx512_bf16", False) or capabilities.get("amx_tile", False)
    return torch.autocast("cpu", torch.bfloat16) if supported else contextlib.nullcontext()


def cropped(pictures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Crop each image of [n, channels, height, width] at random, resize it back, and mirror half of them."""
    if pictures.ndim != 4 or not pictures.is_floating_point():
        return pictures
    draw = torch.rand(4, len(pictures), generator=generator)
    side = (SMALLEST_CROP + (1 - SMALLEST_CROP) * draw[0]).sqrt()
    corners = torch.zeros(len(pictures), 2, 3)
    corners[:, 0, 0] = side * torch.where(draw[1] < 0.5, -1.0, 1.0)
    corners[:, 1, 1] = side
    corners[:, :, 2] = (2 * draw[2:].T - 1) * (1 - side)[:, None]
    grid = functional.affine_grid(corners, list(pictures.shape), align_corners=False)
    return functional.grid_sample(pictures, grid, padding_mode="reflection", align_corners=False)
