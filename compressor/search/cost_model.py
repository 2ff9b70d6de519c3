"""What a rewritten graph costs: multiply-adds, or milliseconds predicted from a handful of timed engines."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import nnls

from compressor.measure.workload import Call
from compressor.search.rewriter import Rewriter
from passes.analysis.least_squares import Map, StandIn
from passes.analysis.symbolic_cost import Counter, Work
from passes.base import PassError, apply
from passes.graph.graph import Graph, Site
from passes.rewrite.drop import Drop
from passes.rewrite.replace import Replace

Clock = Callable[[Mapping[str, Graph]], Mapping[str, Mapping[str, float]]]
Works = tuple[Work, ...]

TINY = 1e-9  # nothing is free: where noise leaves a graph without any priced work
COUNTED = np.array([0.0, 1.0, 1.0, 0.0, 0.0])  # multiply-adds alone


@dataclass(frozen=True)
class Price:
    """A linear model of what one kind of call costs: a constant, multiply-adds, attention, elements and operators.

    `weights` are the cost of each, all `times` that the call is made; `timings` the milliseconds of all of them that
    they were fitted to, and `fitted` what the model says for the same engines.
    """

    counter: Counter = field(repr=False)
    times: int
    weights: npt.NDArray[np.float64]
    timings: Mapping[str, float] = field(default_factory=dict)
    fitted: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Prices:
    """What graphs cost in `unit`: the sum over the calls that are made, each with a price of its own."""

    unit: str
    calls: Mapping[str, Price]

    def count(self, graph: Graph) -> Works:
        """The work of each call."""
        return tuple(price.counter.count(graph) for price in self.calls.values())

    def of(self, works: Works) -> float:
        """The cost of all calls in `unit`."""
        each = (_features(work) @ price.weights for work, price in zip(works, self.calls.values(), strict=True))
        return max(float(sum(each)), TINY)

    def cost(self, graph: Graph) -> float:
        """The cost of a graph in `unit`."""
        return self.of(self.count(graph))

    def multiply_adds(self, works: Works) -> int:
        """The multiply-adds of all calls, as often as each is made."""
        return sum(price.times * work.multiply_adds for work, price in zip(works, self.calls.values(), strict=True))

    @property
    def timings(self) -> dict[str, float]:
        """Milliseconds of all calls by engine."""
        return _summed([price.timings for price in self.calls.values()])

    @property
    def error(self) -> float:
        """Largest relative error of the model on the engines it was fitted to; 0 for multiply-adds."""
        fitted = _summed([price.fitted for price in self.calls.values()])
        return max((abs(fitted[name] / value - 1.0) for name, value in self.timings.items()), default=0.0)


def counted(graph: Graph, calls: Mapping[str, Call]) -> Prices:
    """Prices in multiply-adds, where nothing can be timed.

    Args:
        graph: the traced model.
        calls: what is done with it; the batch counts too.
    """
    return Prices(
        "multiply-adds",
        {name: Price(Counter(graph, call.shapes), call.times, call.times * COUNTED) for name, call in calls.items()},
    )


def timed(graph: Graph, calls: Mapping[str, Call], designs: Mapping[str, Graph], clock: Clock) -> Prices:
    """Prices in milliseconds on the target.

    One engine is timed of each design. Each kind of call has its own weights: of a prompt the arithmetic takes the
    time, of one token behind a cache the reading of the weights. They are the non-negative least-squares solution,
    relative to each engine's time, so that noise cannot give work a negative price.

    Args:
        graph: the traced model.
        calls: what is timed.
        designs: graphs to time, as they are lowered; see `designs_by_kind`.
        clock: builds engines from graphs and gives the milliseconds of each call of each.
    """
    timings = clock(designs)
    return Prices(
        "ms",
        {
            name: _price(
                Counter(graph, call.shapes), call.times, designs, {key: parts[name] for key, parts in timings.items()}
            )
            for name, call in calls.items()
        },
    )


def _price(counter: Counter, times: int, designs: Mapping[str, Graph], timings: Mapping[str, float]) -> Price:
    """The price of one call, from the milliseconds that it takes on some engines."""
    rows = np.array([_features(counter.count(design)) for design in designs.values()])
    took = np.array([times * timings[name] for name in designs])
    scale = rows.max(0)
    scale[scale == 0.0] = 1.0
    solution, _ = nnls(rows / scale / took[:, None], np.ones(len(took)))
    fitted = dict(zip(designs, (rows / scale @ solution).tolist(), strict=True))
    return Price(counter, times, solution / scale, dict(zip(designs, took.tolist(), strict=True)), fitted)


def _summed(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: sum(part[name] for part in parts) for name in parts[0]}


def designs_by_kind(graph: Graph, sites: Sequence[Site]) -> dict[str, Graph]:
    """The model as it is, without the branches of each kind, and with linear maps in the place of one kind.

    That is mostly the MLPs. The last attention stays: without it, a model that is read at its class token has nothing
    left to do.
    """
    last = [site for site in sites if site.kind == "attention"][-1:]
    others = [site for site in sites if site not in last] or list(sites)
    kinds = {
        kind: [site for site in others if site.kind == kind] for kind in dict.fromkeys(site.kind for site in others)
    }
    designs = {"as it is": graph.fork(), "linear": _linear(graph, list(kinds.values())[-1])}
    for kind, gone in kinds.items():
        designs[f"without {kind}"] = graph.fork()
        apply(Drop(tuple(gone)), designs[f"without {kind}"])
    return designs


def designs_by_block(rewriter: Rewriter) -> dict[str, Graph]:
    """The model as it is, without every other block, and with its first block alone."""
    others = list(rewriter.units)[1:]
    gone = {"as it is": [], "without every other block": others[::2], "first block alone": others}
    designs = {}
    for name, blocks in gone.items():
        with contextlib.suppress(PassError):  # some of them cannot be taken out
            designs[name] = rewriter.carried_out(rewriter.of_sites(dict.fromkeys(blocks, "drop")))
    return designs


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
