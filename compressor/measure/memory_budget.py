"""``--max-memory``: division of the memory between the weights of a model and the values of a batch."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from compressor.data.splits import Split
from compressor.errors import CompressorError
from compressor.executor.base import Executor
from compressor.quality.evaluate import BATCH, tensor_batches
from compressor.workspace.environment import held_memory
from compressor.workspace.output_folder import scratch_folder
from passes.analysis.redundancy import MASK
from passes.execute.interpreter import Program
from passes.execute.offloaded_weights import is_offloaded
from passes.execute.sections import SectionBudget, peak_activation_bytes, section_ends, smallest_sections, weight_bytes
from passes.graph.graph import Graph
from passes.graph.sites import find_sites

GIB = 1024**3
WORKING = 0.25  # of the free memory, for the values of a batch; the weights get the rest, so that sections are few
SPARE = 0.15  # of the limit, for memory that allocators keep and workspace of operators
STORED = 0.5  # a weight is read in 16 bits and converted to 32 bits; both are in memory at the same time


class MemoryBudgetError(CompressorError):
    """A memory limit under which the model cannot run."""


@dataclass(frozen=True)
class MemoryBudget:
    """Budget of a run under a memory limit.

    Attributes:
        room: memory for the weights, and the folder for values between two sections.
        rows: largest number of rows in a batch.
    """

    room: SectionBudget
    rows: int


@contextlib.contextmanager
def memory_budget(
    graph: Graph,
    splits: Sequence[Split],
    limit: int | None,
    beside: Path,
    outputs: Collection[str],
    at_once: int = 1,
    executor: Executor | None = None,
) -> Iterator[MemoryBudget | None]:
    """Yield the budget of a run under a memory limit, or None without a limit.

    The values between two sections go to a temporary folder next to `beside`, which is removed at the end. The limit is
    that of this process and of each worker of the executor, which asks for as much memory for them.

    Raises:
        MemoryBudgetError: see `divide_memory`.
    """
    if limit is None:
        yield None
        return
    held = None
    if executor is not None:
        executor.ask(limit)
        held = _held(executor, Program(graph, outputs=outputs))
    with scratch_folder(beside) as folder:
        yield divide_memory(graph, splits, limit, folder.absolute(), outputs, at_once, held)


def _held(executor: Executor, program: Program) -> int | None:
    """Return the bytes that this process or a worker holds with a program, the larger; None if one is not known."""
    (there,) = executor.run(_held_with, [(executor.share(program),)])
    here = held_memory()
    return None if here is None or there is None else max(here, there)


def _held_with(_: Program) -> int | None:
    return held_memory()


def divide_memory(
    graph: Graph,
    splits: Sequence[Split],
    limit: int,
    folder: Path,
    outputs: Collection[str],
    at_once: int = 1,
    held: int | None = None,
) -> MemoryBudget:
    """Divide the free memory under a limit between the weights and the values of a batch.

    Args:
        graph: graph of a model whose weights stay on disk.
        splits: the texts that will be run; the longest one decides.
        limit: bytes that the process may hold.
        folder: folder for the values between two sections.
        outputs: names of the outputs that will be computed.
        at_once: number of graphs of this size that run at the same time; each gets an equal share.
        held: bytes that the process holds before; None takes those of this process.

    Raises:
        MemoryBudgetError: the limit is too small for one text and one block at a time (the message states the least
            limit), or the system does not report the memory of a process.
    """
    held = held_memory() if held is None else held
    if held is None:
        raise MemoryBudgetError(
            "--max-memory needs the memory use of this process, which this system does not report; leave it out."
        )
    program = Program(graph, keep={find_sites(graph)[-1].root}, outputs=outputs)
    longest = _longest(splits)
    free = (int(limit * (1.0 - SPARE)) - held) // at_once - _moving(program)
    rows = BATCH
    while rows > 1 and peak_activation_bytes(program, _repeated(longest, rows)) > free * WORKING:
        rows //= 2
    working = peak_activation_bytes(program, _repeated(longest, rows))
    largest = max(weight_bytes(program, piece.weights) for piece in smallest_sections(program, section_ends(graph)))
    if largest > free - working:
        least = (held + at_once * (_moving(program) + working + largest)) / (1.0 - SPARE)
        raise MemoryBudgetError(
            f"--max-memory {limit / GIB:.3g}GiB is too little: this process takes {held / GIB:.2g} GiB, the largest "
            f"block {largest / GIB:.2g} GiB and one text {working / GIB:.2g} GiB; give at least "
            f"{math.ceil(least / GIB * 10) / 10:g}GiB."
        )
    return MemoryBudget(SectionBudget(free - working, folder), rows)


def _moving(program: Program) -> int:
    """Return the bytes of the largest weight as stored, which is in memory while it is converted to 32 bits."""
    sizes = (value.numel() * value.itemsize for value in program.constants.values() if is_offloaded(value))
    return int(max(sizes) * STORED)


def _longest(splits: Sequence[Split]) -> dict[str, torch.Tensor]:
    """Return the feeds of the longest text."""
    texts = (batch for split in splits for batch in tensor_batches(split, 1))
    return max(texts, key=lambda feeds: feeds[MASK].shape[1])


def _repeated(feeds: Mapping[str, torch.Tensor], rows: int) -> dict[str, torch.Tensor]:
    return {name: value.expand(rows, *value.shape[1:]) for name, value in feeds.items()}
