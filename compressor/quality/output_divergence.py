"""Output divergence of rewritten graphs from the original on calibration samples; no labels are needed."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

from compressor.data.splits import Split
from compressor.executor.base import Executor, InProcess
from compressor.models import Model
from compressor.models.base import EvaluatedOutput
from compressor.quality.evaluate import EvaluationError, tensor_batches
from compressor.quality.heads.base import Head
from compressor.quality.heads.registry import head_for
from passes.analysis.redundancy import output_mask
from passes.base import apply
from passes.execute.interpreter import Program
from passes.execute.shared_prefix import SharedPrefixRun
from passes.graph.graph import Graph, Site
from passes.rewrite.drop import Drop

Key = TypeVar("Key", bound=Hashable)
Array = npt.NDArray[np.float64]
Rows = dict[Key | None, Array]  # by graph, divergences [rows, scales] of one batch

POSITIONS = 64  # tokens per text at which the divergence of a language model is measured


@dataclass(frozen=True)
class _Comparison:
    """How the output of a graph is compared with that of the original, on one batch."""

    head: Head
    scales: tuple[float, ...]
    output: EvaluatedOutput
    model: str

    @torch.inference_mode()
    def answer(self, program: Program, feeds: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Run the original; return its output, of texts at `POSITIONS` tokens."""
        answer = self._answer(program.run(feeds))
        finite = torch.isfinite(answer.flatten(1)).all(1)
        if not bool(finite.all()):
            count = f"{int((~finite).sum())} of {len(finite)} samples in a batch of calibration data"
            cause = "these samples" if bool(finite.any()) else "its weights"
            raise EvaluationError(f"{self.model} gave NaN or infinity for {count}; check {cause}.")
        return answer

    def divergences(
        self, forks: SharedPrefixRun[Key], feeds: Mapping[str, torch.Tensor], original: torch.Tensor
    ) -> Rows[Key]:
        """Return the divergence of each row at each scale, for each graph of a joint run."""
        mask, found = self._mask(feeds, original), dict[Key | None, Array]()

        def receive(key: Key | None, outputs: tuple[torch.Tensor, ...]) -> None:
            answer = self._answer(outputs)
            by_scale = [self.head.divergence(answer * scale, original, mask) for scale in self.scales]
            found[key] = torch.stack(by_scale, -1).double().numpy()

        forks.run(feeds, receive)
        return found

    def _answer(self, outputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        answer = self.output.evaluated_in(outputs)
        return subsample_tokens(answer) if self.head.by_token else answer

    def _mask(self, feeds: Mapping[str, torch.Tensor], original: torch.Tensor) -> torch.Tensor | None:
        mask = output_mask(feeds)
        if mask is None or original.ndim < 3:
            return None
        return subsample_tokens(mask) if self.head.by_token else mask


@dataclass
class OutputDivergence:
    """Output divergence of rewritten graphs from the original on a few calibration samples.

    The outputs of the original are kept in memory (for language models at `POSITIONS` tokens per text); activations are
    not. The divergence is taken at the best scale of the head, or without scaling if `scaled` is false. `sweeps` counts
    forward passes over the samples, each weighted by the share of the graph's nodes that run in one process. `progress`
    is called with the finished and all parts of a measurement, and the number of graphs in it.

    Raises:
        EvaluationError: the output of the original contains NaN or infinity.
    """

    graph: Graph
    model: Model
    split: Split
    executor: Executor = field(default_factory=InProcess)
    scaled: bool = True
    sweeps: float = 0.0
    progress: Callable[[int, int, int], None] | None = None

    def __post_init__(self) -> None:
        head = head_for(self.model.task, self.model.problem_type)
        self.scales = head.scales if self.scaled else (1.0,)
        self.compared = _Comparison(head, self.scales, self.model.evaluated_output, self.model.name)
        self._feeds = self.executor.share_each(partial(tensor_batches, self.split))
        program = self.executor.share(Program(self.graph))
        self._originals = self.executor.keep(self.compared.answer, ((program, feeds) for feeds in self._feeds))
        self.sweeps += 1

    def measure(self, main: Graph, variants: Mapping[Key, Graph]) -> tuple[float, dict[Key, float]]:
        """Return the divergence of a graph and of each variant derived from it.

        The divergence is the mean over rows at the best scale, and infinity where an output is not finite.
        """
        unchanged, divergences = self.by_row(main, variants)
        return _mean(unchanged), {key: _mean(rows) for key, rows in divergences.items()}

    def by_row(self, main: Graph, variants: Mapping[Key, Graph]) -> tuple[Array, dict[Key, Array]]:
        """Return the divergence of each row [rows], as `measure`: of a graph and of each variant derived from it."""
        forks = SharedPrefixRun(main, variants)
        parts = [self.executor.share(part) for part in forks.parts(self.executor.workers // len(self._originals))]
        batches = zip(self._feeds, self._originals, strict=True)
        calls = ((part, *batch) for batch in batches for part in parts)
        found: dict[Key | None, list[Array]] = {key: [] for key in (None, *variants)}
        total = len(self._originals) * len(parts)
        for done, divergences in enumerate(self.executor.run(self.compared.divergences, calls, total), 1):
            for key, rows in divergences.items():
                found[key].append(rows)
            if self.progress is not None:
                self.progress(done, total, len(variants))
        self.sweeps += forks.share
        best = {key: _at_best_scale(np.concatenate(parts)) for key, parts in found.items()}
        return best[None], {key: best[key] for key in variants}

    def of_units(self, units: Sequence[Sequence[Site]]) -> list[float]:
        """Return the divergence of each unit: that of the graph with all sites of only this unit dropped."""
        variants = {}
        for number, unit in enumerate(units):
            variants[number] = self.graph.fork()
            apply(Drop(tuple(site.name for site in unit)), variants[number])
        _, divergences = self.measure(self.graph, variants)
        return [divergences[number] for number in range(len(units))]


def subsample_tokens(values: torch.Tensor) -> torch.Tensor:
    """Select `POSITIONS` evenly spaced tokens of [rows, tokens, ...]; the logits of all may not fit in memory."""
    if values.shape[1] <= POSITIONS:
        return values
    return values[:, torch.linspace(0, values.shape[1] - 1, POSITIONS).long()]


def _at_best_scale(rows: Array) -> Array:
    """Return the divergences at the scale of the least finite mean, [rows] of [rows, scales]."""
    means = rows.mean(0)
    return rows[:, int(np.where(np.isfinite(means), means, math.inf).argmin())]


def _mean(rows: Array) -> float:
    mean = float(rows.mean())
    return mean if math.isfinite(mean) else math.inf
