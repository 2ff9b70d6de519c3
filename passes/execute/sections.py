"""Run a graph section by section, all samples through one before the next: a model of any size in bounded memory.

The weights of a section are read from disk once for all samples. What later sections need of a batch (its hidden
states, masks, positions) waits in a folder meanwhile, so that memory does not grow with the samples either.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from passes.base import PassError
from passes.execute.offloaded_weights import in_memory, is_offloaded, shapes_alone
from passes.graph.sites import find_sites
from passes.torch_internals import storage_key, tree_leaves

if TYPE_CHECKING:
    from torch import fx

    from passes.execute.interpreter import Program
    from passes.graph.graph import Graph

Feeds: TypeAlias = Mapping[str, torch.Tensor]
Values: TypeAlias = "dict[fx.Node, Any]"
See: TypeAlias = "Callable[[int, fx.Node, Values], None]"


@dataclass(frozen=True)
class Room:
    """What a run in sections may take: bytes of the weights that are in memory at a time, and a folder to write in."""

    weights: int
    folder: Path


@dataclass(frozen=True)
class Section:
    """Positions `start` to `stop` of a program's order, and the weights that are read there: ``get_attr`` nodes."""

    start: int
    stop: int
    weights: frozenset[fx.Node]

    def with_next(self, other: Section) -> Section:
        """This section and the one behind it as one."""
        return Section(self.start, other.stop, self.weights | other.weights)


def cut(program: Program, ends: Collection[str], most: int) -> tuple[Section, ...]:
    """Divide a program, behind some of the given nodes, into few sections of at most `most` bytes of weights each.

    Args:
        program: what is to be run.
        ends: names of nodes behind which a section may end.
        most: bytes.

    Raises:
        PassError: what lies between two of those nodes is more; says how many bytes it takes.
    """
    sections: list[Section] = []
    for piece in pieces(program, ends):
        if (size := weight_bytes(program, piece.weights)) > most:
            behind = program.order[piece.stop - 1].name
            raise PassError(f"the weights up to {behind} take {size} bytes at once, more than the {most} there are.")
        joined = sections[-1].with_next(piece) if sections else piece
        if sections and weight_bytes(program, joined.weights) <= most:
            sections[-1] = joined
        else:
            sections.append(piece)
    return tuple(sections)


def section_ends(graph: Graph) -> frozenset[str]:
    """Where a graph may be divided: behind what the first block reads, and behind every block."""
    sites = find_sites(graph)
    blocks = groupby(sites, key=lambda site: site.block)
    return frozenset({sites[0].trunk, *(list(members)[-1].root for _, members in blocks)})


def pieces(program: Program, ends: Collection[str]) -> Iterator[Section]:
    """The smallest sections of a program, each up to one of the nodes `ends`."""
    stops = [place + 1 for place, node in enumerate(program.order) if node.name in ends]
    for start, stop in pairwise(sorted({0, *stops, len(program.order)})):
        read = {source for node in program.order[start:stop] for source in node.all_input_nodes}
        yield Section(start, stop, frozenset(node for node in read if is_offloaded(program.constants.get(node))))


def weight_bytes(program: Program, weights: Collection[fx.Node]) -> int:
    """Bytes that weights take in memory; a tied one is one node."""
    values = (program.constants[node] for node in weights)
    return sum(value.numel() * value.itemsize for value in values)


def working_bytes(program: Program, feeds: Feeds) -> int:
    """Most bytes that the values of one batch take at a time, weights left out: found without computing any.

    Args:
        program: what is to be run.
        feeds: input name to tensor; only their shapes count.
    """
    most = 0
    with shapes_alone(program, feeds) as values:
        for _ in program.walk(values):
            alive = [each for node, value in values.items() if node.op != "get_attr" for each in _tensors(value)]
            storages = {storage_key(tensor): tensor.untyped_storage().nbytes() for tensor in alive}
            most = max(most, sum(storages.values()))
    return most


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    return (each for each in tree_leaves(value) if isinstance(each, torch.Tensor))


@torch.inference_mode()
def run_in_sections(
    program: Program, sections: Iterable[Section], batches: Iterable[Feeds], folder: Path, see: See | None = None
) -> Iterator[tuple[torch.Tensor, ...]]:
    """The outputs of each batch, in order, as the last section computes them.

    Args:
        program: what is run.
        sections: all of it, in order.
        batches: input name to tensor; gone through once.
        folder: exists; what waits there is gone when the last batch is done.
        see: called with the batch's number behind each node, before the node's inputs may be freed.
    """
    *before, last = sections
    waiting = (program.start(feeds) for feeds in batches)
    for section in (*before, last):
        weights = {node: in_memory(program.constants[node]) for node in section.weights}
        ready: list[Path] = []
        for number, batch in enumerate(waiting):
            values = batch | program.constants | weights
            for node in program.walk(values, start=section.start, stop=section.stop):
                if see is not None:
                    see(number, node, values)
            if section is last:
                yield program.results(values)
            else:
                ready.append(_put_aside(values, folder / f"batch{number}.pt"))
            del batch, values
        waiting = (_taken_up(path, program) for path in ready)
        del weights


def _put_aside(values: Values, path: Path) -> Path:
    """Write what a batch still needs: all but weights and constants, which are there anyway."""
    kept = {node.name: _alone(value) for node, value in values.items() if node.op != "get_attr"}
    torch.save(kept, path)
    return path


def _alone(value: Any) -> Any:
    """A tensor without what else lies in its storage, which would be written too."""
    shared = isinstance(value, torch.Tensor) and value.untyped_storage().nbytes() > value.nbytes
    return value.clone() if shared else value


def _taken_up(path: Path, program: Program) -> Values:
    values = torch.load(path, weights_only=True)
    path.unlink()
    by_name = {node.name: node for node in program.order} | {node.name: node for node in program.graph.placeholders()}
    return {by_name[name]: value for name, value in values.items()}
