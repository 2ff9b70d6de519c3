"""Evaluation of models whose weights stay on disk, block by block, here or on workers.

Workers load little more than torch for it, because their memory is limited.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from compressor.data.splits import Batch
from compressor.quality.evaluate import Measured, Part
from compressor.quality.intervals import Array
from passes.execute.interpreter import Program
from passes.execute.sections import SectionBudget, partition, run_in_sections


def run(
    program: Program, ends: Collection[str], batches: Iterable[Mapping[str, torch.Tensor]], room: SectionBudget
) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield the outputs of a program for each batch, computed block by block; `ends` is where it may be divided."""
    with room.own_folder() as folder:
        yield from run_in_sections(program, partition(program, ends, room.weights), batches, folder)


@dataclass(frozen=True)
class Sectioned:
    """Models that are evaluated side by side, block by block.

    Attributes:
        programs: by name, a program with one output, and where it may be divided.
        room: the budget of one program.
        measured: the evaluation.
    """

    programs: Mapping[str, tuple[Program, Collection[str]]]
    room: SectionBudget
    measured: Measured


def parts_of(models: Sectioned, batches: Iterable[tuple[Batch, int]]) -> Iterator[Part]:
    """Yield the part of each batch; each model runs all texts through one section before it loads the next."""
    placed = list(batches)
    tensors = [{name: torch.from_numpy(value) for name, value in batch.feeds.items()} for batch, _ in placed]
    answers = {name: run(*program, tensors, models.room) for name, program in models.programs.items()}
    runners = {name: partial(_next, values) for name, values in answers.items()}
    for batch, place in placed:
        yield models.measured.part(runners, batch, place)


def _next(answers: Iterator[tuple[torch.Tensor, ...]], feeds: Mapping[str, Array]) -> Array:
    """Return the answer of the next batch, whose feeds these are."""
    (answer,) = next(answers)
    values: Array = answer.numpy()
    return values
