"""Division of the memory under a limit: the stated least limit suffices, and the budget stays within the limit."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from compressor import models
from compressor.data.splits import load
from compressor.lower.trace import trace
from compressor.measure.memory_budget import GIB, SPARE, WORKING, MemoryBudgetError, divide_memory, memory_budget
from compressor.workspace.environment import held_memory
from passes.analysis.redundancy import MASK
from passes.execute.interpreter import Program
from passes.execute.sections import peak_activation_bytes, section_ends, smallest_sections, weight_bytes
from passes.graph.sites import find_sites
from tests.decoders import random_tokens, saved

TOKENS = 1500  # length of the longest text; its values, which are not computed here, are larger than the model
NOISE = 2**22  # bytes by which the memory of a process changes between two measurements


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A model on disk and two splits, of which the second has the longest text."""
    folder = saved(tmp_path_factory.mktemp("room"), "Llama", max_position_embeddings=4096, vocab_size=100_000)
    model = models.load(folder, on_disk=True)
    splits = []
    for tokens in (9, TOKENS):
        path = folder / f"{tokens}.npy"
        np.save(path, random_tokens(6, tokens).numpy())
        splits.append(load(str(path), model.preprocess, task=model.task).calibration)
    return SimpleNamespace(model=model, graph=trace(model), splits=splits)


def limit_for(free, at_once=1):
    """Return the limit under which `free` bytes are left for each of `at_once` graphs."""
    return int((held_memory() + free * at_once) / (1.0 - SPARE)) + 1


def moving(large):
    """Return the bytes of the largest weight in 16 bits, which is in memory during its conversion to 32 bits."""
    return max(weight.numel() for weight in large.model.module.parameters()) * 2


def working(large, rows):
    program = Program(large.graph, keep={find_sites(large.graph)[-1].root}, outputs=["logits"])
    feeds = next(large.splits[1].batches(1)).feeds
    tensors = {name: torch.from_numpy(value) for name, value in feeds.items()}
    assert tensors[MASK].shape[1] == TOKENS
    return peak_activation_bytes(
        program, {name: value.expand(rows, *value.shape[1:]) for name, value in tensors.items()}
    )


def bounds_of(large, limit, tmp_path, at_once=1):
    return divide_memory(large.graph, large.splits, limit, tmp_path, ["logits"], at_once)


@pytest.mark.parametrize("at_once", [1, 2])
@pytest.mark.parametrize("rows", [1, 4, 32])
def test_the_batch_has_as_many_rows_as_fit(rows, at_once, large, tmp_path):
    """The longest text of all splits decides, in any order of the splits."""
    free = int(working(large, rows) / WORKING) + moving(large) + 2 * NOISE
    bounds = bounds_of(large, limit_for(free, at_once), tmp_path, at_once)
    assert bounds.rows == rows
    assert bounds.room.folder == tmp_path
    taken = bounds.room.weights + working(large, rows) + moving(large)
    assert moving(large) > NOISE
    assert free - 2 * NOISE <= taken <= free + NOISE


def test_a_limit_that_is_too_small_is_refused_and_the_stated_least_limit_suffices(large, tmp_path):
    with pytest.raises(MemoryBudgetError) as caught:
        bounds_of(large, held_memory(), tmp_path, at_once=2)
    text = str(caught.value)
    assert re.match(r"--max-memory [\d.]+GiB is too little: this process takes [\d.]+ GiB, the largest block ", text)
    least = float(re.search(r"give at least ([\d.]+)GiB\.$", text)[1])
    bounds = bounds_of(large, int(least * GIB), tmp_path, at_once=2)
    program = Program(large.graph)
    ends = section_ends(large.graph)
    assert bounds.room.weights >= max(
        weight_bytes(program, piece.weights) for piece in smallest_sections(program, ends)
    )
    assert bounds.rows >= 1
    with pytest.raises(MemoryBudgetError):
        bounds_of(large, int((least - 0.2) * GIB), tmp_path, at_once=2)


def test_without_a_limit_there_is_no_folder(large, tmp_path):
    with memory_budget(large.graph, large.splits, None, tmp_path / "out", ["logits"]) as bounds:
        assert bounds is None
        assert not any(tmp_path.iterdir())


def test_the_folder_is_next_to_the_output_and_is_removed_after_an_interrupt(large, tmp_path):
    def fail():
        with memory_budget(large.graph, large.splits, limit_for(GIB), tmp_path / "out", ["logits"]) as bounds:
            assert bounds.room.folder.parent == tmp_path
            (bounds.room.folder / "batch0.pt").write_bytes(b"waits")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert not any(tmp_path.iterdir())
