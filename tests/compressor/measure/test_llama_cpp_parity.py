"""The comparison of a GGUF file in llama.cpp with torch: what it allows, what it refuses, and what it notes."""

import re

import numpy as np
import pytest

from compressor.lower.gguf import writer
from compressor.measure.llama_cpp_parity import TOLERANCE, llama_cpp_parity
from compressor.quality.parity import ParityError
from passes.base import apply
from passes.rewrite.drop import Drop
from runtimes.base.protocols import BuildOptions

pytest.importorskip("gguf", reason="the package gguf is not installed (pip install gguf)")
pytest.importorskip("xllamacpp", reason="llama.cpp is not installed (pip install xllamacpp)")

from runtimes.gguf import target
from tests.llama_cpp import Traced, saved, tokens


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return Traced(saved(tmp_path_factory.mktemp("llama")))


@pytest.fixture(scope="module")
def written(llama, tmp_path_factory):
    return writer.write(llama.graph, llama.model, tmp_path_factory.mktemp("file") / "small.gguf")


def padded(model):
    feeds = tokens(rows=3, length=20)
    feeds["attention_mask"][0, 12:] = 0
    return model.preprocess.complete(feeds)


def compared(graph, llama, path, feeds):
    with target.load(path, BuildOptions(threads=1)) as engine:
        return llama_cpp_parity(graph, engine, feeds, llama.model, path)


def test_tokens_that_are_attended_to_are_compared(llama, written):
    parity = compared(llama.graph, llama, written, padded(llama.model))
    assert (parity.output, parity.rows) == ("logits", 3)
    assert 0 < parity.difference < TOLERANCE
    (note,) = parity.notes
    same, of = map(int, re.search(r"predicts torch's next token at (\d+) of (\d+) tokens", note).groups())
    assert of == 12 + 20 + 20
    assert of - 2 <= same <= of


def test_a_file_of_another_model_is_refused(llama, written):
    graph = llama.graph.fork()
    apply(Drop(llama.named((2, "attention"))), graph)
    with pytest.raises(ParityError, match=r"small\.gguf: output logits differs from torch in 3 of 3 rows"):
        compared(graph, llama, written, padded(llama.model))


def test_texts_that_are_split_otherwise_are_noted(llama, written, monkeypatch):
    monkeypatch.setattr(target.LlamaCpp, "tokenize", lambda self, text: [0])
    notes = compared(llama.graph, llama, written, padded(llama.model)).notes
    assert any(note.startswith("llama.cpp splits 3 of 3 sample texts into other tokens") for note in notes)


def test_the_closeness_of_other_next_tokens_is_noted():
    from compressor.measure.llama_cpp_parity import _next_tokens

    expected = np.array([[1.0, 0.75, 0.0], [0.0, 3.0, 1.0]], np.float32)
    found = np.array([[0.75, 1.0, 0.0], [0.0, 3.0, 1.0]], np.float32)
    assert _next_tokens(expected, found).endswith(
        "predicts torch's next token at 1 of 2 tokens; at the others torch's two logits differ by at most 0.25"
    )
