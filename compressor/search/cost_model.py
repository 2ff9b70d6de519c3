"""Cost models of rewritten graphs: multiply-adds, or latency predicted from a few timed engines."""

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
from passes.analysis.least_squares import Map, Replacement
from passes.analysis.symbolic_cost import Counter, Work
from passes.base import PassError, apply
from passes.graph.graph import Graph, Site
from passes.rewrite.drop import Drop
from passes.rewrite.replace import Replace

Clock = Callable[[Mapping[str, Graph]], Mapping[str, Mapping[str, float]]]
Works = tuple[Work, ...]

TINY = 1e-9  # least cost of a graph; noisy timings can leave all of its work without a price
COUNTED = np.array([0.0, 1.0, 1.0, 0.0, 0.0])  # the weights of `_features` that sum the multiply-adds


@dataclass(frozen=True)
class CallCostModel:
    """Linear cost model of one kind of call.

    Attributes:
        counter: counts the work of a graph on the inputs of the call.
        times: number of calls.
        shapes: shapes of all inputs of the call.
        weights: cost of the constant, multiply-adds, attention, elements and operators [5], for all `times` calls.
        timings: milliseconds of all calls by engine, to which the weights were fitted; empty for multiply-adds.
        fitted: prediction of the model for the same engines.
    """

    counter: Counter = field(repr=False)
    times: int
    shapes: Mapping[str, tuple[int, ...]]
    weights: npt.NDArray[np.float64]
    timings: Mapping[str, float] = field(default_factory=dict)
    fitted: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class CostModel:
    """Cost model of graphs in `unit`: the sum over several kinds of call, each with its own linear model.

    Attributes:
        unit: ``ms`` or ``multiply-adds``.
        calls: the linear model of each kind of call.
        source: where the timings come from, if they are those of an earlier search.
    """

    unit: str
    calls: Mapping[str, CallCostModel]
    source: str | None = None

    def count(self, graph: Graph) -> Works:
        """Return the work of each call on a graph."""
        return tuple(call.counter.count(graph) for call in self.calls.values())

    def of(self, works: Works) -> float:
        """Return the cost of all calls in `unit`."""
        costs = (_features(work) @ call.weights for work, call in zip(works, self.calls.values(), strict=True))
        return max(float(sum(costs)), TINY)

    def cost(self, graph: Graph) -> float:
        """Return the cost of a graph in `unit`."""
        return self.of(self.count(graph))

    def multiply_adds(self, works: Works) -> int:
        """Return the multiply-adds of all calls, each counted `times` times."""
        return sum(call.times * work.multiply_adds for work, call in zip(works, self.calls.values(), strict=True))

    @property
    def timings(self) -> dict[str, float]:
        """Return the milliseconds of all calls by engine."""
        return _summed([call.timings for call in self.calls.values()])

    @property
    def error(self) -> float:
        """Return the largest relative error of the model on the engines it was fitted to; 0 for multiply-adds."""
        fitted = _summed([call.fitted for call in self.calls.values()])
        return max((abs(fitted[name] / value - 1.0) for name, value in self.timings.items()), default=0.0)


def multiply_add_cost_model(graph: Graph, calls: Mapping[str, Call]) -> CostModel:
    """Return a cost model in multiply-adds, which needs no timing.

    Args:
        graph: the traced model.
        calls: the calls to count, with the shapes of their inputs; the batch size counts too.
    """
    return CostModel(
        "multiply-adds",
        {
            name: CallCostModel(_counter(graph, call), call.times, call.shapes, call.times * COUNTED)
            for name, call in calls.items()
        },
    )


def fit_latency_cost_model(
    graph: Graph, calls: Mapping[str, Call], designs: Mapping[str, Graph], clock: Clock, source: str | None = None
) -> CostModel:
    """Fit a cost model in milliseconds to timings on the target.

    One engine of each design is timed. Each kind of call has its own weights, because arithmetic bounds prefill and the
    reading of the weights bounds decode. The weights are the non-negative least-squares solution of the relative error,
    so that noise cannot give work a negative cost.

    Args:
        graph: the traced model.
        calls: the calls to time.
        designs: graphs to time, ready to be lowered; see `designs_by_kind`.
        clock: builds one engine per graph and returns the milliseconds of each call by engine.
        source: where `clock` takes the timings from, if it does not time.
    """
    timings = clock(designs)
    return CostModel(
        "ms",
        {
            name: _price(graph, call, designs, {key: parts[name] for key, parts in timings.items()})
            for name, call in calls.items()
        },
        source,
    )


def _counter(graph: Graph, call: Call) -> Counter:
    return Counter(graph, call.shapes, call.given, call.left_out)


def _price(graph: Graph, call: Call, designs: Mapping[str, Graph], timings: Mapping[str, float]) -> CallCostModel:
    """Fit the linear model of one call to its milliseconds on the engines of the designs."""
    counter = _counter(graph, call)
    rows = np.array([_features(counter.count(design)) for design in designs.values()])
    measured = np.array([call.times * timings[name] for name in designs])
    scale = rows.max(0)
    scale[scale == 0.0] = 1.0
    solution, _ = nnls(rows / scale / measured[:, None], np.ones(len(measured)))
    fitted = dict(zip(designs, (rows / scale @ solution).tolist(), strict=True))
    timed = dict(zip(designs, measured.tolist(), strict=True))
    return CallCostModel(counter, call.times, call.shapes, solution / scale, timed, fitted)


def _summed(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: sum(part[name] for part in parts) for name in parts[0]}


def designs_by_kind(graph: Graph, sites: Sequence[Site], *, linear: bool = True) -> dict[str, Graph]:
    """Return graphs to time: the original, one without each kind of site, one with linear maps for the last kind.

    The one with linear maps is left out if not `linear`, for targets that cannot express it.

    The last kind is mostly the MLPs. The last attention stays: without it, most work of a model that is read at its
    class token only is dead.
    """
    last = [site for site in sites if site.kind == "attention"][-1:]
    others = [site for site in sites if site not in last] or list(sites)
    kinds = {
        kind: [site for site in others if site.kind == kind] for kind in dict.fromkeys(site.kind for site in others)
    }
    designs = {"as it is": graph.fork()} | ({"linear": _linear(graph, list(kinds.values())[-1])} if linear else {})
    for kind, members in kinds.items():
        designs[f"without {kind}"] = graph.fork()
        apply(Drop(tuple(members)), designs[f"without {kind}"])
    return designs


def designs_by_block(rewriter: Rewriter) -> dict[str, Graph]:
    """Return graphs to time: the original, one without every other block, one with the first block alone."""
    others = list(rewriter.units)[1:]
    dropped = {"as it is": [], "without every other block": others[::2], "first block alone": others}
    designs = {}
    for name, blocks in dropped.items():
        with contextlib.suppress(PassError):  # not every model allows each of these sets of blocks to be removed
            designs[name] = rewriter.apply_changes(rewriter.of_sites(dict.fromkeys(blocks, "drop")))
    return designs


def designs_by_attention(rewriter: Rewriter) -> dict[str, Graph]:
    """Return graphs to time: the original, and ones without attentions or without blocks; the first block stays."""
    attentions = [name for name, members in rewriter.units.items() if len(members) == 1]
    blocks = [name for name, members in rewriter.units.items() if len(members) > 1][1:]
    dropped = {
        "as it is": [],
        "without every other attention": attentions[::2],
        "first attention alone": attentions,
        "without every other block": blocks[::2],
    }
    return {
        name: rewriter.apply_changes(rewriter.of_sites(dict.fromkeys(units, "drop"))) for name, units in dropped.items()
    }


def _linear(graph: Graph, sites: Sequence[Site]) -> Graph:
    """Return a fork with a linear map in place of each branch that allows one; its values do not matter for timing."""
    fork = graph.fork()
    for site in sites:
        matrix = 0.01 * torch.eye(site.width, dtype=torch.float64)
        with contextlib.suppress(PassError):  # a linear map cannot be applied on the channel axis of this site
            apply(Replace(site, Replacement("state", Map((matrix,), matrix[0]), 1.0)), fork)
    return fork


def _features(work: Work) -> npt.NDArray[np.float64]:
    return np.array([1.0, work.products, work.attention, work.elements, work.operators], dtype=np.float64)
