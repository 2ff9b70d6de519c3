"""Execution of a graph section by section, for models that are larger than memory.

All batches run through one section before the next, so that the weights of a section are read from disk once. Values
of a batch that later sections read (hidden states, masks, positions) are stored in a folder in between. Memory
therefore grows neither with the size of the model nor with the number of samples.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from passes.base import PassError
from passes.execute.offloaded_weights import fake_values, in_memory, is_offloaded
from passes.graph.sites import find_sites
from passes.torch_internals import storage_key, tree_leaves

if TYPE_CHECKING:
    from torch import fx

    from passes.execute.interpreter import Program
    from passes.graph.graph import Graph

Feeds: TypeAlias = Mapping[str, torch.Tensor]
Values: TypeAlias = "dict[fx.Node, Any]"
NodeCallback: TypeAlias = "Callable[[int, fx.Node, Values], None]"


@dataclass(frozen=True)
class SectionBudget:
    """Resources of a run in sections: bytes of weights in memory at a time, and a folder for intermediate values."""

    weights: int
    folder: Path

    @contextlib.contextmanager
    def own_folder(self) -> Iterator[Path]:
        """Yield a folder for one run, which is removed: in `folder`, or on another machine among its temporary ones."""
        with tempfile.TemporaryDirectory(dir=self.folder if self.folder.is_dir() else None) as folder:
            yield Path(folder)


@dataclass(frozen=True)
class Section:
    """Nodes `start` to `stop` of a program's order and the ``get_attr`` nodes of the offloaded weights they read."""

    start: int
    stop: int
    weights: frozenset[fx.Node]

    def with_next(self, other: Section) -> Section:
        """Return this section joined with the next one."""
        return Section(self.start, other.stop, self.weights | other.weights)


def partition(program: Program, ends: Collection[str], most: int) -> tuple[Section, ...]:
    """Divide a program into few sections with at most `most` bytes of weights each.

    Args:
        program: program to divide.
        ends: names of nodes after which a section may end.
        most: maximum bytes of weights in a section.

    Raises:
        PassError: the weights between two consecutive nodes of `ends` exceed `most`.
    """
    sections: list[Section] = []
    for piece in smallest_sections(program, ends):
        if (size := weight_bytes(program, piece.weights)) > most:
            end = program.order[piece.stop - 1].name
            raise PassError(f"the weights of the section up to {end} take {size} bytes; expected at most {most}.")
        joined = sections[-1].with_next(piece) if sections else piece
        if sections and weight_bytes(program, joined.weights) <= most:
            sections[-1] = joined
        else:
            sections.append(piece)
    return tuple(sections)


def section_ends(graph: Graph) -> frozenset[str]:
    """Return the names of the nodes after which a graph may be divided: the first block's input, all block outputs."""
    sites = find_sites(graph)
    blocks = groupby(sites, key=lambda site: site.block)
    return frozenset({sites[0].trunk, *(list(members)[-1].root for _, members in blocks)})


def smallest_sections(program: Program, ends: Collection[str]) -> Iterator[Section]:
    """Yield the smallest sections of a program, each of which ends after one of the nodes `ends`."""
    stops = [index + 1 for index, node in enumerate(program.order) if node.name in ends]
    for start, stop in pairwise(sorted({0, *stops, len(program.order)})):
        read = {source for node in program.order[start:stop] for source in program.reads(node)}
        yield Section(start, stop, frozenset(node for node in read if is_offloaded(program.constants.get(node))))


def weight_bytes(program: Program, weights: Collection[fx.Node]) -> int:
    """Return the bytes that weights take in memory; a tied weight is one node and counts once."""
    values = (program.constants[node] for node in weights)
    return sum(value.numel() * value.itemsize for value in values)


def peak_activation_bytes(program: Program, feeds: Feeds) -> int:
    """Return the peak bytes of the values of one batch, without weights, computed from shapes alone.

    Args:
        program: program to measure.
        feeds: input name to tensor; only shapes and types are used.
    """
    most = 0
    with fake_values(program, feeds) as values:
        for _ in program.walk(values):
            live = [tensor for node, value in values.items() if node.op != "get_attr" for tensor in _tensors(value)]
            storages = {storage_key(tensor): tensor.untyped_storage().nbytes() for tensor in live}
            most = max(most, sum(storages.values()))
    return most


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor))


@torch.inference_mode()
def run_in_sections(
    program: Program,
    sections: Iterable[Section],
    batches: Iterable[Feeds],
    folder: Path,
    see: NodeCallback | None = None,
) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield the outputs of each batch, in order, as the last section computes them.

    Args:
        program: program to run.
        sections: the sections of the whole program, in order.
        batches: batches of input name to tensor; iterated once.
        folder: existing folder for intermediate values, which are deleted when they are read back.
        see: callback after each node, before its inputs are freed; takes the number of the batch, the node and the
            values of the batch.
    """
    *before, last = sections
    states = (program.start(feeds) for feeds in batches)
    for section in (*before, last):
        weights = {node: in_memory(program.constants[node]) for node in section.weights}
        paths: list[Path] = []
        for number, batch in enumerate(states):
            values = batch | program.constants | weights
            for node in program.walk(values, start=section.start, stop=section.stop):
                if see is not None:
                    see(number, node, values)
            if section is last:
                yield program.results(values)
            else:
                paths.append(_save_values(values, folder / f"batch{number}.pt"))
            del batch, values
        states = (_load_values(path, program) for path in paths)
        del weights


def _save_values(values: Values, path: Path) -> Path:
    """Write the live values of a batch, without weights and constants, which every section has anyway."""
    kept = {node.name: _own_storage(value) for node, value in values.items() if node.op != "get_attr"}
    torch.save(kept, path)
    return path


def _own_storage(value: Any) -> Any:
    """Return a tensor with a storage of its own size, because `torch.save` writes the whole storage of a view."""
    shared = isinstance(value, torch.Tensor) and value.untyped_storage().nbytes() > value.nbytes
    return value.clone() if shared else value


def _load_values(path: Path, program: Program) -> Values:
    values = torch.load(path, weights_only=True)
    path.unlink()
    by_name = {node.name: node for node in (*program.order, *program.inputs.values())}
    return {by_name[name]: value for name, value in values.items()}
