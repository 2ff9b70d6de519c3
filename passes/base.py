"""What a pass is, and `apply`, the only way to run one."""

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
    """A pass was asked for something the graph cannot give."""


class Pass(Protocol[Result_co]):
    """A frozen dataclass whose fields are its options; `rewrites` says whether it may change the graph."""

    rewrites: ClassVar[bool]
    needs_data: ClassVar[bool]

    def run(self, graph: Graph, data: Iterable[Mapping[str, torch.Tensor]] | None) -> Result_co:
        """Analyse or rewrite `graph`; `data` yields batches of named inputs, first axis the samples."""
        ...


class Addable(Protocol):
    """Statistics of some samples, which those of others can be added to."""

    def __add__(self, other: Any, /) -> Any:
        """The statistics of both."""
        ...


Sums = TypeVar("Sums", bound=Addable)


def swept(
    batch: Callable[[Mapping[str, torch.Tensor]], Sums], data: Iterable[Mapping[str, torch.Tensor]] | None, name: str
) -> Sums:
    """The statistics of each batch, added up as they come.

    Args:
        batch: measures one batch.
        data: the batches.
        name: of the pass, for the error.

    Raises:
        PassError: there is no batch.
    """
    total: Sums | None = None
    for feeds in data or ():
        part = batch(feeds)
        total = part if total is None else total + part
    if total is None:
        raise PassError(f"{name} got no batches of data.")
    return total


@dataclass(frozen=True)
class Rewritten:
    """What a rewrite did: the names of the sites or nodes it changed."""

    changed: tuple[str, ...] = ()


def apply(step: Pass[Result_co], graph: Graph, data: Iterable[Mapping[str, torch.Tensor]] | None = None) -> Result_co:
    """Run one pass and hold it to its contract: same interface, a sound graph, no change by an analysis.

    Raises:
        PassError: the pass needs data and got none, an analysis changed the graph, or the result is unsound.
    """
    name = type(step).__name__
    if step.needs_data and data is None:
        raise PassError(f"{name} needs calibration data and got none: pass an iterable of batches.")
    before = graph.signature()
    result = step.run(graph, data)
    if step.rewrites:
        graph.check()
    elif graph.signature() != before:
        raise PassError(f"{name} says it only analyses, but it changed the graph.")
    graph.history.append(Applied(name, _options(step), before[0], graph.signature()[0]))
    return result


def _options(step: object) -> dict[str, str]:
    options = fields(step) if is_dataclass(step) else ()  # class facts such as `rewrites` are no options
    return {option.name: repr(getattr(step, option.name)) for option in options if option.repr}
