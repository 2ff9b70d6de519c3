"""Output divergence of rewritten graphs from the original on calibration samples; no labels are needed."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

from compressor.data.splits import Split
from compressor.models import Model
from compressor.quality.evaluate import EvaluationError, tensor_batches
from compressor.quality.heads.registry import head_for
from passes.analysis.redundancy import output_mask
from passes.base import apply
from passes.execute.interpreter import Program, SharedPrefixRun
from passes.graph.graph import Graph, Site
from passes.rewrite.drop import Drop

Key = TypeVar("Key", bound=Hashable)

POSITIONS = 64  # tokens per text at which the divergence of a language model is measured


@dataclass
class OutputDivergence:
    """Output divergence of rewritten graphs from the original on a few calibration samples.

    The outputs of the original are kept in memory (for language models at `POSITIONS` tokens per text); activations are
    not. `sweeps` counts forward passes over the samples, each weighted by the share of the graph's nodes that ran.

    Raises:
        EvaluationError: the output of the original contains NaN or infinity.
    """

    graph: Graph
    model: Model
    split: Split
    sweeps: float = 0.0
    _originals: list[torch.Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.head = head_for(self.model.task, self.model.problem_type)
        self.scales = self.head.scales
        program = Program(self.graph)
        with torch.inference_mode():
            for feeds in tensor_batches(self.split):
                self._originals.append(self._answer(program.run(feeds)))
        if not all(bool(torch.isfinite(answer).all()) for answer in self._originals):
            raise EvaluationError(f"{self.model.name} gave NaN or infinity on calibration data; check its weights.")
        self.sweeps += 1

    def measure(self, main: Graph, variants: Mapping[Key, Graph]) -> tuple[float, dict[Key, float]]:
        """Return the divergence of a graph and of each variant derived from it.

        The divergence is the mean over rows at the best scale, and infinity where an output is not finite.
        """
        forks = SharedPrefixRun(main, variants)
        sums: dict[Key | None, npt.NDArray[np.float64]] = {key: np.zeros(len(self.scales)) for key in (None, *variants)}
        rows = 0
        for original, feeds in zip(self._originals, tensor_batches(self.split), strict=True):
            mask = self._mask(feeds, original)

            def receive(
                key: Key | None,
                outputs: tuple[torch.Tensor, ...],
                original: torch.Tensor = original,
                mask: torch.Tensor | None = mask,
            ) -> None:
                sums[key] += self._divergences(self._answer(outputs), original, mask)

            forks.run(feeds, receive)
            rows += len(original)
        self.sweeps += forks.share
        means = {key: _least(total / rows) for key, total in sums.items()}
        return means[None], {key: means[key] for key in variants}

    def of_units(self, units: Sequence[Sequence[Site]]) -> list[float]:
        """Return the divergence of each unit: that of the graph with all sites of only this unit dropped."""
        variants = {}
        for number, unit in enumerate(units):
            variants[number] = self.graph.fork()
            apply(Drop(tuple(site.name for site in unit)), variants[number])
        _, divergences = self.measure(self.graph, variants)
        return [divergences[number] for number in range(len(units))]

    def _divergences(
        self, answer: torch.Tensor, original: torch.Tensor, mask: torch.Tensor | None
    ) -> npt.NDArray[np.float64]:
        """Return the divergence summed over rows, for each scale."""
        return np.array([float(self.head.divergence(answer * scale, original, mask).sum()) for scale in self.scales])

    def _answer(self, outputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        answer = self.model.evaluated_in(outputs)
        return subsample_tokens(answer) if self.head.by_token else answer

    def _mask(self, feeds: Mapping[str, torch.Tensor], original: torch.Tensor) -> torch.Tensor | None:
        mask = output_mask(feeds)
        if mask is None or original.ndim < 3:
            return None
        return subsample_tokens(mask) if self.head.by_token else mask


def subsample_tokens(values: torch.Tensor) -> torch.Tensor:
    """Select `POSITIONS` evenly spaced tokens of [rows, tokens, ...]; the logits of all may not fit in memory."""
    if values.shape[1] <= POSITIONS:
        return values
    return values[:, torch.linspace(0, values.shape[1] - 1, POSITIONS).long()]


def _least(means: npt.NDArray[np.float64]) -> float:
    finite = means[np.isfinite(means)]
    return float(finite.min()) if finite.size else math.inf
