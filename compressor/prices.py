"""What a rewritten graph costs: multiply-adds, or milliseconds predicted from a handful of timed engines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import nnls

from passes.base import apply
from passes.drop import Drop
from passes.fit import Map, StandIn
from passes.graph import Graph, Site
from passes.replace import Replace
from passes.work import Counter, Work

Clock = Callable[[Mapping[str, Graph]], Mapping[str, float]]

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
        return float(_features(work) @ self.weights)

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


def timed(graph: Graph, inputs: Mapping[str, tuple[int, ...]], sites: Sequence[Site], clock: Clock) -> Prices:
    """Prices in milliseconds on the target.

    One engine each is timed of the model as it is, without all branches of one kind, without any branch, with every
    branch replaced by a linear map, and without the last attention. The weights are the non-negative least-squares
    solution, relative to each engine's time, so that noise cannot give work a negative price.

    Args:
        graph: the traced model.
        inputs: shapes of the timed inputs.
        sites: all sites.
        clock: builds engines from graphs and gives the median milliseconds of each.
    """
    designs = _designs(graph, sites)
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
    kinds = list(dict.fromkeys(site.kind for site in sites))
    dropped = {f"without {kind}": [site for site in sites if site.kind == kind] for kind in kinds if len(kinds) > 1}
    dropped["without branches"] = list(sites)
    attentions = [site for site in sites if site.kind == "attention"]
    dropped |= {"without the last attention": attentions[-1:]} if attentions else {}
    designs = {"as it is": graph.fork(), "linear": _all_linear(graph, sites)}
    for name, gone in dropped.items():
        designs[name] = graph.fork()
        apply(Drop(tuple(gone)), designs[name])
    return designs


def _all_linear(graph: Graph, sites: Sequence[Site]) -> Graph:
    """Every branch replaced by a linear map of zeros, where its trunk takes one."""
    fork = graph.fork()
    for site in sites:
        zeros = torch.zeros(site.width, site.width, dtype=torch.float64)
        apply(Replace(site, StandIn("state", Map((zeros,), zeros[0]), 1.0)), fork)
    return fork


def _features(work: Work) -> npt.NDArray[np.float64]:
    return np.array([1.0, work.products, work.attention, work.elements, work.operators], dtype=np.float64)
