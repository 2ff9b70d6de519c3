"""Train what is left of a rewritten graph to answer as the original does: from calibration inputs alone, no labels."""

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
from compressor.models import Model
from compressor.quality.evaluate import divergence, tensor_batches
from compressor.quality.output_divergence import spaced
from passes.analysis.redundancy import MASK
from passes.execute.interpreter import Program
from passes.graph.edit import own
from passes.graph.graph import Graph, attribute
from passes.graph.sites import LINEAR_OPS

CACHE = 2**28  # bytes of the teacher's answers that are kept
SMALLEST_CROP = 0.6  # share of a picture that a crop holds at least
LONGEST_GRADIENT = 1.0
JUDGING = 0.3  # share of the time that may go into judging drafts


@dataclass(frozen=True)
class Recipe:
    """How a student is trained: AdamW without decay, a short warm-up, then a cosine to zero.

    `rate` is the largest learning rate, `rank` that of the low-rank terms, `steps` the most steps, `fewest` the number
    below which training is not begun, `checks` how often the student is handed out to be
    judged (less often where that takes long).
    """

    rate: float = 1e-3
    rank: int = 8
    batch: int = 16
    steps: int = 400
    fewest: int = 8
    warmup: float = 0.1
    checks: int = 8


RECIPE = Recipe()


class Student:
    """A rewritten graph with some of its parameters exchanged for trained ones; the graph itself stays as it is.

    Vectors (norms, biases, scales) are trained as copies. The matrix W of a linear map is used as W + B A with A
    [rank, in] and B [out, rank], B zero at first (LoRA, Hu et al., arXiv 2106.09685), so it is merged at every step
    and the result has no node more. Nothing else is copied or gets a gradient.
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
        """The tensors that get gradients."""
        return [*self.vectors.values(), *itertools.chain.from_iterable(self.factors.values())]

    def merged(self) -> dict[str, torch.Tensor]:
        """The trained parameters by name, as the graph uses them."""
        maps = {name: self.matrices[name] + up @ down for name, (down, up) in self.factors.items()}
        return self.vectors | maps

    def run(self, feeds: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The outputs for one batch, with gradients."""
        merged = self.merged()
        self.program.constants = {node: merged.get(self.names[node], value) for node, value in self.fixed.items()}
        return self.program.run(feeds)

    def written(self) -> Graph:
        """A fork of the graph that holds the trained parameters, and shares the others."""
        fork = self.graph.fork()
        for name, value in self.merged().items():
            own(fork, name, value.detach().clone())
        return fork


def _plain(value: object) -> torch.Tensor:
    """A tensor that gradients can pass by: made in inference mode, it could not be used at all."""
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
    """A student to be judged, after `step` of `steps` steps."""

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
    """Train a student of `original` that starts as `graph`; it is handed out to be judged from time to time.

    The number of steps is what fits in the time, by the speed of the first ones (at most the recipe's). A student is
    given only the logits or features of the original, of pictures in crops and mirrored. Yields nothing where the time
    is too short or nothing can be trained.

    Args:
        graph: the rewritten fork; it stays as it is.
        original: the teacher; it stays as it is.
        model: what both were traced from.
        calibration: samples; their labels are not read.
        blocks: module paths whose parameters are trained; all where it is empty.
        seconds: wall time for everything, including the judging.
        check: seconds that judging takes once.
        seed: of batches, crops and initial factors.
    """
    recipe, start = RECIPE, time.perf_counter()
    generator = torch.Generator().manual_seed(seed)
    student = Student(graph, blocks, recipe, generator)
    if not student.trained():
        return
    lesson = Lesson(student, original, model, calibration, recipe, generator)
    checks = max(1, min(recipe.checks, int(seconds * JUDGING / max(check, 1e-6))))
    steps = _affordable(lesson, seconds - (time.perf_counter() - start) - checks * check, recipe)
    if steps < recipe.fewest:
        return
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
    """Share of the largest rate: up in a line, then down a cosine."""
    if done < warmup:
        return (done + least) / (warmup + least)
    return 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))


def _affordable(lesson: Lesson, seconds: float, recipe: Recipe) -> int:
    """How many steps fit, by the time that two take; their gradients are not used."""
    start = time.perf_counter()
    lesson.learn()
    first = time.perf_counter()
    lesson.learn()
    each = max(time.perf_counter() - first, 1e-6)
    left = seconds - (time.perf_counter() - start)
    return max(0, min(recipe.steps, int(left / each)))


class Lesson:
    """Batches of calibration inputs with the original's answers to them, and the gradients that they give."""

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
        self.generator = generator
        self.pictures = model.preprocess.kind == "image"
        order = torch.randperm(len(calibration), generator=generator).tolist()
        size = max(1, recipe.batch // 4) if model.task == "text-generation" else recipe.batch
        self.parts = [
            dataclasses.replace(calibration, indices=tuple(calibration.indices[row] for row in order[at : at + size]))
            for at in range(0, len(order), size)
        ]
        self.waiting: list[int] = []
        self.answers: dict[int, torch.Tensor] = {}

    @torch.inference_mode(False)
    @torch.enable_grad()
    def learn(self) -> float:
        """Leave the gradients of the next batch's loss at the student's tensors; returns the loss."""
        if not self.waiting:
            self.waiting = torch.randperm(len(self.parts), generator=self.generator).tolist()
        part = self.waiting.pop()
        (feeds,) = tensor_batches(self.parts[part], len(self.parts[part]))
        if self.pictures:
            feeds = {name: cropped(value, self.generator) for name, value in feeds.items()}
        target = self._target(part, feeds)
        with cheaper():
            answer = self._read(self.student.run(feeds))
        mask = feeds.get(MASK)
        loss = distance(self.model.task, answer, target, None if mask is None else self._spaced(mask))
        for tensor in self.student.trained():
            tensor.grad = None
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    def _target(self, part: int, feeds: Mapping[str, torch.Tensor]) -> torch.Tensor:
        if part in self.answers:
            return self.answers[part]
        with torch.no_grad(), cheaper():
            target = self._read(self.teacher.run(feeds)).float()
        room = target.nbytes * len(self.parts) <= CACHE
        if room and not self.pictures:
            self.answers[part] = target
        return target

    def _read(self, outputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        answer = outputs[self.model.outputs.index(self.model.answer)]
        return self._spaced(answer)

    def _spaced(self, values: torch.Tensor) -> torch.Tensor:
        return spaced(values) if self.model.task == "text-generation" else values


def distance(task: str, answer: torch.Tensor, target: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """What is minimised: KL(original || student) of logits, half the relative squared error of features.

    At equal lengths the latter is 1 - cosine, the divergence that is judged; it keeps the length too.
    """
    if task.endswith("classification") or task == "text-generation":
        return divergence(task, answer, target, mask).mean()
    target = target.float()
    each = (answer.float() - target).square().sum(-1) / target.square().sum(-1).clamp(min=1e-12) / 2
    if mask is not None and each.shape == mask.shape:
        return (each * mask).sum() / mask.sum().clamp(min=1)
    return each.mean()


def cheaper() -> contextlib.AbstractContextManager[object]:
    """bfloat16 products where the processor has instructions for them (training is three times as fast)."""
    known = torch.cpu.get_capabilities()
    supported = known.get("avx512_bf16", False) or known.get("amx_tile", False)
    return torch.autocast("cpu", torch.bfloat16) if supported else contextlib.nullcontext()


def cropped(pictures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A random crop of each picture [n, channels, height, width] at the same size, half of them mirrored."""
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
