"""The `Pass` protocol, and `apply`, which runs a pass and checks its contract."""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

from passes.graph.graph import Applied

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    import torch

    from passes.graph.graph import Graph

Result_co = TypeVar("Result_co", covariant=True)


class PassError(Exception):
    """Error of a pass that cannot be applied to a graph, a plan or the data."""


class Pass(Protocol[Result_co]):
    """Protocol of a pass: a frozen dataclass whose fields are its options.

    `rewrites` states whether the pass may change the graph, `needs_data` whether it needs calibration data.
    """

    rewrites: ClassVar[bool]
    needs_data: ClassVar[bool]

    def run(self, graph: Graph, data: Iterable[Mapping[str, torch.Tensor]] | None) -> Result_co:
        """Analyse or rewrite `graph`; `data` yields batches of named inputs whose first axis is the samples."""
        ...


class Addable(Protocol):
    """Statistics of samples that can be added to the statistics of other samples."""

    def __add__(self, other: Any, /) -> Any:
        """Return the statistics of the samples of both."""
        ...


Sums = TypeVar("Sums", bound=Addable)


def over_batches(
    batch: Callable[[Mapping[str, torch.Tensor]], Result_co], data: Iterable[Mapping[str, torch.Tensor]] | None
) -> Iterable[Result_co]:
    """Yield the result of a function for each batch, in order.

    Data with a method `map` runs the function itself, such as in other processes.
    """
    run: Callable[..., Iterable[Result_co]] | None = getattr(data, "map", None)
    return map(batch, data or ()) if run is None else run(batch)


def over_groups(
    group: Callable[[Iterable[Mapping[str, torch.Tensor]]], Iterable[Result_co]],
    data: Iterable[Mapping[str, torch.Tensor]] | None,
) -> Iterable[Result_co]:
    """Yield the results of a function from several batches to a result for each, in order.

    Data with a method `map_groups` runs the function itself, such as in other processes, each on a part of the batches.
    """
    run: Callable[..., Iterable[Result_co]] | None = getattr(data, "map_groups", None)
    return group(data or ()) if run is None else run(group)


def sum_over_batches(
    batch: Callable[[Mapping[str, torch.Tensor]], Sums], data: Iterable[Mapping[str, torch.Tensor]] | None, name: str
) -> Sums:
    """Sum the statistics of all batches, one batch at a time.

    Args:
        batch: function that returns the statistics of one batch.
        data: the batches.
        name: name of the pass, for the error message.

    Raises:
        PassError: `data` holds no batch.
    """
    total: Sums | None = None
    for part in over_batches(batch, data):
        total = part if total is None else total + part
    if total is None:
        raise PassError(f"{name} got no batches of data; expected at least one.")
    return total


@dataclass(frozen=True)
class Rewritten:
    """Result of a rewrite: the names of the sites or nodes that it changed."""

    changed: tuple[str, ...] = ()


def apply(step: Pass[Result_co], graph: Graph, data: Iterable[Mapping[str, torch.Tensor]] | None = None) -> Result_co:
    """Run one pass, check its contract and append it to the history of the graph.

    A rewrite must leave a valid graph with its named inputs and outputs. An analysis must not change the graph.

    Raises:
        PassError: the pass needs data and got none, or an analysis changed the graph.
        GraphError: a rewrite left an invalid graph.
    """
    name = type(step).__name__
    if step.needs_data and data is None:
        raise PassError(f"{name} needs calibration data and got none: pass an iterable of batches.")
    before = graph.signature()
    result = step.run(graph, data)
    if step.rewrites:
        graph.check()
    elif graph.signature() != before:
        raise PassError(f"{name} is declared as an analysis (rewrites=False), but it changed the graph.")
    graph.history.append(Applied(name, _options(step), before[0], graph.signature()[0]))
    return result


def _options(step: object) -> dict[str, str]:
    options = fields(step) if is_dataclass(step) else ()  # leaves out class variables such as `rewrites`
    return {option.name: repr(getattr(step, option.name)) for option in options if option.repr}
