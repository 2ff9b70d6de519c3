"""``--max-memory``: how much of a model is in memory at a time, and how many texts go through it together."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from compressor.data.splits import Split
from compressor.errors import CompressorError
from compressor.quality.evaluate import BATCH, tensor_batches
from compressor.workspace.environment import held_memory
from compressor.workspace.output_folder import scratch_folder
from passes.analysis.redundancy import MASK
from passes.execute.interpreter import Program
from passes.execute.offloaded_weights import is_offloaded
from passes.execute.sections import Room, pieces, section_ends, weight_bytes, working_bytes
from passes.graph.graph import Graph
from passes.graph.sites import find_sites

GIB = 1024**3
WORKING = 0.25  # of what is free, for the values of a batch: the rest is the weights', so that sections are few
SPARE = 0.15  # of the limit, for what allocators keep and operators take beside their results
STORED = 0.5  # a weight is read in 16 bits and made one of 32: both are there for a moment


class RoomError(CompressorError):
    """A model cannot be run under a memory limit."""


@dataclass(frozen=True)
class Bounded:
    """How a model is run under a limit: the room for its weights, and the rows of a batch."""

    room: Room
    rows: int


@contextlib.contextmanager
def limited(
    graph: Graph, splits: Sequence[Split], limit: int | None, beside: Path, outputs: Collection[str], at_once: int = 1
) -> Iterator[Bounded | None]:
    """How a model is run under a limit, with a folder for it beside another; None where there is no limit.

    Raises:
        RoomError: as `bounded` does.
    """
    if limit is None:
        yield None
        return
    with scratch_folder(beside) as folder:
        yield bounded(graph, splits, limit, folder, outputs, at_once)


def bounded(
    graph: Graph, splits: Sequence[Split], limit: int, folder: Path, outputs: Collection[str], at_once: int = 1
) -> Bounded:
    """Share the memory that is left under a limit out between weights and the values of a batch.

    Args:
        graph: of a model whose weights stay on disk.
        splits: the texts that will be run, of which the longest counts.
        limit: bytes that the process may hold.
        folder: where what waits between two sections is written.
        outputs: names of those that will be computed.
        at_once: how many graphs of this size are run side by side; each gets its share.

    Raises:
        RoomError: it is not enough even for one text and one block at a time; says what is.
    """
    held = held_memory()
    if held is None:
        raise RoomError("this system does not say how much memory a process holds; leave --max-memory out.")
    program = Program(graph, keep={find_sites(graph)[-1].root}, outputs=outputs)
    longest = _longest(splits)
    free = (int(limit * (1.0 - SPARE)) - held) // at_once - _moving(program)
    rows = BATCH
    while rows > 1 and working_bytes(program, _repeated(longest, rows)) > free * WORKING:
        rows //= 2
    working = working_bytes(program, _repeated(longest, rows))
    largest = max(weight_bytes(program, piece.weights) for piece in pieces(program, section_ends(graph)))
    if largest > free - working:
        least = (held + at_once * (_moving(program) + working + largest)) / (1.0 - SPARE)
        raise RoomError(
            f"--max-memory {limit / GIB:.3g}GiB is too little: this program takes {held / GIB:.2g} GiB, the largest "
            f"block {largest / GIB:.2g} GiB and one text {working / GIB:.2g} GiB; give at least "
            f"{math.ceil(least / GIB * 10) / 10:g}GiB."
        )
    return Bounded(Room(free - working, folder), rows)


def _moving(program: Program) -> int:
    """Bytes of the largest weight as its file has it: there beside the one in 32 bits while that is made of it."""
    sizes = (value.numel() * value.itemsize for value in program.constants.values() if is_offloaded(value))
    return int(max(sizes) * STORED)


def _longest(splits: Sequence[Split]) -> dict[str, torch.Tensor]:
    """The feeds of the longest text."""
    feeds = (batch for split in splits for batch in tensor_batches(split, 1))
    return max(feeds, key=lambda each: each[MASK].shape[1])


def _repeated(feeds: Mapping[str, torch.Tensor], rows: int) -> dict[str, torch.Tensor]:
    return {name: value.expand(rows, *value.shape[1:]) for name, value in feeds.items()}
