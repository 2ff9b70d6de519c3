"""What a rewritten graph costs: multiply-adds, or milliseconds predicted from a handful of timed engines."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import nnls

from compressor.rewrite import finished
from passes.base import PassError, apply
from passes.drop import Drop
from passes.fit import Map, StandIn
from passes.graph import Graph, Site
from passes.replace import Replace
from passes.work import Counter, Work

Clock = Callable[[Mapping[str, Graph]], Mapping[str, float]]

TINY = 1e-9  # nothing is free: where noise leaves a graph without any priced work
COUNTED = np.array([0.0, 1.0, 1.0, 0.0, 0.0])  # multiply-adds alone


@dataclass(frozen=True)
class Prices:
    """A linear model of the cost of one run: a constant, multiply-adds, attention, elements and operators.

    `weights` are the cost of each in `unit`; `timings` the medians in ms that they were fitted to, and `fitted` what
    the model says for the same engines.
    """

    unit: str
    counter: Counter = field(repr=False)
    weights: npt.NDArray[np.float64]
    timings: Mapping[str, float] = field(default_factory=dict)
    fitted: Mapping[str, float] = field(default_factory=dict)

    def of(self, work: Work) -> float:
        """The cost of work in `unit`."""
        return max(float(_features(work) @ self.weights), TINY)

    def cost(self, graph: Graph) -> float:
        """The cost of a graph in `unit`."""
        return self.of(self.counter.count(graph))

    @property
    def error(self) -> float:
        """Largest relative error of the model on the engines it was fitted to; 0 for multiply-adds."""
        return max((abs(self.fitted[name] / value - 1.0) for name, value in self.timings.items()), default=0.0)


def counted(graph: Graph, inputs: Mapping[str, tuple[int, ...]]) -> Prices:
    """Prices in multiply-adds, where nothing can be timed.

    Args:
        graph: the traced model.
        inputs: input name to shape; the batch counts too.
    """
    return Prices("multiply-adds", Counter(graph, inputs), COUNTED)


def timed(
    graph: Graph,
    inputs: Mapping[str, tuple[int, ...]],
    sites: Sequence[Site],
    clock: Clock,
    others: Mapping[str, Graph] | None = None,
) -> Prices:
    """Prices in milliseconds on the target.

    One engine each is timed of the model as it is, without the branches of each kind (but for the last attention:
    without it, a model that is read at its class token has nothing left to do), and with linear maps in the place of
    one kind, mostly the MLPs. The weights are the non-negative least-squares solution, relative to each engine's time,
    so that noise cannot give work a negative price.

    Args:
        graph: the traced model.
        inputs: shapes of the timed inputs.
        sites: all sites.
        clock: builds engines from graphs and gives the median milliseconds of each.
        others: further designs to time.
    """
    designs = _designs(graph, sites) | {name: finished(design) for name, design in (others or {}).items()}
    counter = Counter(graph, inputs)
    timings = clock(designs)
    rows = np.array([_features(counter.count(design)) for design in designs.values()])
    times = np.array([timings[name] for name in designs])
    scale = rows.max(0)
    scale[scale == 0.0] = 1.0
    solution, _ = nnls(rows / scale / times[:, None], np.ones(len(times)))
    fitted = dict(zip(designs, (rows / scale @ solution).tolist(), strict=True))
    return Prices("ms", counter, solution / scale, dict(timings), fitted)


def _designs(graph: Graph, sites: Sequence[Site]) -> dict[str, Graph]:
    """The graphs whose engines are timed."""
    last = [site for site in sites if site.kind == "attention"][-1:]
    others = [site for site in sites if site not in last] or list(sites)
    kinds = {
        kind: [site for site in others if site.kind == kind] for kind in dict.fromkeys(site.kind for site in others)
    }
    designs = {"as it is": graph.fork(), "linear": _linear(graph, list(kinds.values())[-1])}
    for kind, gone in kinds.items():
        designs[f"without {kind}"] = graph.fork()
        apply(Drop(tuple(gone)), designs[f"without {kind}"])
    return {name: finished(design) for name, design in designs.items()}


def _linear(graph: Graph, sites: Sequence[Site]) -> Graph:
    """Branches replaced by a linear map each, where their trunk takes one; its values do not matter."""
    fork = graph.fork()
    for site in sites:
        matrix = 0.01 * torch.eye(site.width, dtype=torch.float64)
        with contextlib.suppress(PassError):  # its features lie on an axis that no linear map can be put on
            apply(Replace(site, StandIn("state", Map((matrix,), matrix[0]), 1.0)), fork)
    return fork


def _features(work: Work) -> npt.NDArray[np.float64]:
    return np.array([1.0, work.products, work.attention, work.elements, work.operators], dtype=np.float64)
