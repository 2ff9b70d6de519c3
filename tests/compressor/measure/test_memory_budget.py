"""How memory under a limit is shared out: what is said to be enough is, and what is given is within the limit."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from compressor import models
from compressor.data.splits import load
from compressor.lower.trace import trace
from compressor.measure.memory_budget import GIB, SPARE, WORKING, RoomError, bounded, limited
from compressor.workspace.environment import held_memory
from passes.analysis.redundancy import MASK
from passes.execute.interpreter import Program
from passes.execute.sections import pieces, section_ends, weight_bytes, working_bytes
from passes.graph.sites import find_sites
from tests.decoders import random_tokens, saved

TOKENS = 1500  # of the longest text: its values, of which nothing is computed here, are larger than the model
NOISE = 2**22  # bytes by which what a process holds changes from one look to the next


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A model on disk and two splits, the second with the longest text."""
    folder = saved(tmp_path_factory.mktemp("room"), "Llama", max_position_embeddings=4096, vocab_size=100_000)
    model = models.load(folder, on_disk=True)
    splits = []
    for tokens in (9, TOKENS):
        path = folder / f"{tokens}.npy"
        np.save(path, random_tokens(6, tokens).numpy())
        splits.append(load(str(path), model.preprocess, task=model.task).calibration)
    return SimpleNamespace(model=model, graph=trace(model), splits=splits)


def limit_for(free, at_once=1):
    """The limit that leaves so many bytes beside what this process holds."""
    return int((held_memory() + free * at_once) / (1.0 - SPARE)) + 1


def moving(large):
    """Bytes of the largest weight in 16 bits, which is there beside the one in 32 bits while that is made."""
    return max(weight.numel() for weight in large.model.module.parameters()) * 2


def working(large, rows):
    program = Program(large.graph, keep={find_sites(large.graph)[-1].root}, outputs=["logits"])
    feeds = next(large.splits[1].batches(1)).feeds
    tensors = {name: torch.from_numpy(value) for name, value in feeds.items()}
    assert tensors[MASK].shape[1] == TOKENS
    return working_bytes(program, {name: value.expand(rows, *value.shape[1:]) for name, value in tensors.items()})


def of(large, limit, tmp_path, at_once=1):
    return bounded(large.graph, large.splits, limit, tmp_path, ["logits"], at_once)


@pytest.mark.parametrize("at_once", [1, 2])
@pytest.mark.parametrize("rows", [1, 4, 32])
def test_as_many_texts_go_together_as_fit(rows, at_once, large, tmp_path):
    """Of the longest text in any split, whatever the order of splits."""
    free = int(working(large, rows) / WORKING) + moving(large) + 2 * NOISE
    found = of(large, limit_for(free, at_once), tmp_path, at_once)
    assert found.rows == rows
    assert found.room.folder == tmp_path
    taken = found.room.weights + working(large, rows) + moving(large)
    assert moving(large) > NOISE
    assert free - 2 * NOISE <= taken <= free + NOISE


def test_too_little_is_refused_with_what_is_enough_and_that_is(large, tmp_path):
    with pytest.raises(RoomError) as told:
        of(large, held_memory(), tmp_path, at_once=2)
    text = str(told.value)
    assert re.match(r"--max-memory [\d.]+GiB is too little: this program takes [\d.]+ GiB, the largest block ", text)
    least = float(re.search(r"give at least ([\d.]+)GiB\.$", text)[1])
    found = of(large, int(least * GIB), tmp_path, at_once=2)
    program = Program(large.graph)
    ends = section_ends(large.graph)
    assert found.room.weights >= max(weight_bytes(program, piece.weights) for piece in pieces(program, ends))
    assert found.rows >= 1
    with pytest.raises(RoomError):
        of(large, int((least - 0.2) * GIB), tmp_path, at_once=2)


def test_without_a_limit_there_is_no_folder(large, tmp_path):
    with limited(large.graph, large.splits, None, tmp_path / "out", ["logits"]) as bounds:
        assert bounds is None
        assert not any(tmp_path.iterdir())


def test_the_folder_is_beside_the_output_and_goes_whatever_happens(large, tmp_path):
    def fail():
        with limited(large.graph, large.splits, limit_for(GIB), tmp_path / "out", ["logits"]) as bounds:
            assert bounds.room.folder.parent == tmp_path
            (bounds.room.folder / "batch0.pt").write_bytes(b"waits")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert not any(tmp_path.iterdir())
