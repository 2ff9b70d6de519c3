"""Sliding windows: every token is scored once, and perplexity equals that of a plain loop in transformers."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compressor import models
from compressor.data import sliding_windows, splits
from compressor.data.sliding_windows import TOKENS, USUAL, Window, resolve_window, window_batches
from compressor.errors import DataError
from compressor.lower import traced_model
from compressor.lower.traced_model import SubjectError, load_data
from compressor.measure import engine_parity
from compressor.measure.engine_builder import EngineBuilder
from compressor.measure.engine_parity import graph_parity
from compressor.quality.evaluate import evaluate, graph_runner
from compressor.quality.heads.registry import head_for
from compressor.settings import Settings
from compressor.workspace.progress import Steps
from runtimes.base.protocols import BuildOptions
from runtimes.base.registry import runtime
from tests.paths import SHARED_DATA
from tests.samples import worded

LLAMA = SHARED_DATA / "stories260k"
needs_llama = pytest.mark.skipif(not LLAMA.is_dir(), reason="the trained Llama in ../shared/data is not here")

EQUAL = 1e-4  # relative; rows are padded differently and float32 logits summed in another order; 1e-7 was measured


def windows_of(length):
    return st.builds(Window, st.just(length), st.integers(1, length - 1))


@given(st.integers(1, 90), st.integers(2, 20).flatmap(windows_of))
def test_every_token_but_the_first_is_scored_once_with_enough_context(tokens, window):
    cuts = window.cut(tokens)
    scored = [token for cut in cuts for token in range(cut.scored, cut.end)]
    assert scored == list(range(1, tokens))
    assert all(0 < cut.end - cut.start <= window.length for cut in cuts)
    assert all(cut.scored - cut.start >= window.length - window.stride for cut in cuts[1:])
    assert len(cuts) == 1 + max(0, math.ceil((tokens - window.length) / window.stride))


@given(st.lists(st.integers(1, 40), min_size=1, max_size=9), st.integers(1, 5))
def test_pieces_cover_the_texts(sizes, rows):
    texts = [np.arange(size) + 100 * owner for owner, size in enumerate(sizes)]
    feeds = [{"input_ids": ids, "attention_mask": np.ones_like(ids)} for ids in texts]
    batches = list(window_batches(enumerate(feeds), Window(8, 3), dict, rows))
    for piece in batches:
        ids, mask = piece.feeds["input_ids"], piece.feeds["attention_mask"].astype(bool)
        assert len(ids) == len(piece.owners) <= rows
        assert ids.shape == mask.shape == piece.scored.shape
        assert not (piece.scored & ~mask).any()
        assert all((ids[row] // 100 == owner).all() for row, owner in enumerate(piece.owners))  # padding too
    scored = np.concatenate([piece.feeds["input_ids"][piece.scored] for piece in batches])
    assert scored.tolist() == [token for ids in texts for token in ids[1:]]


def test_batches_of_long_windows_have_a_limited_number_of_tokens():
    feeds = {"input_ids": np.arange(3 * TOKENS), "attention_mask": np.ones(3 * TOKENS, np.int64)}
    batches = list(window_batches([(0, feeds)], Window(TOKENS // 2, TOKENS // 4), dict, 32))
    assert max(piece.scored.size for piece in batches) == TOKENS
    assert [len(piece.owners) for piece in batches][:2] == [2, 2]


def test_batches_of_a_large_vocabulary_have_a_limited_number_of_logits(small, tmp_path, monkeypatch):
    """Batches have fewer tokens, the figures stay the same, and a window that is longer is a batch of its own."""
    model, _, _ = small
    np.save(tmp_path / "ids.npy", np.random.default_rng(1).integers(3, 50, (9, 30)))
    settings = Settings(model="any", data=str(tmp_path / "ids.npy"), max_length=12, stride=4)
    whole = load_data(settings, model, lambda *_: None)
    monkeypatch.setattr(sliding_windows, "LOGITS", 25 * 50)  # 25 tokens, two windows
    data = load_data(settings, model, lambda *_: None)
    assert max(len(batch.feeds["input_ids"]) for batch in data.test.whole(8)) == 2
    assert max(len(batch.ids) for batch in data.calibration.bounded_batches(8)) == 2
    run = graph_runner(model, lambda tensors: _called(model, tensors))
    first, second = (
        evaluate(each.test, {"x": run}, head=head_for("text-generation"), metric="perplexity", reference="x")
        for each in (whole, data)
    )
    assert first.value("x") == pytest.approx(second.value("x"), rel=EQUAL)
    monkeypatch.setattr(sliding_windows, "LOGITS", 1)
    assert {len(batch.ids) for batch in load_data(settings, model, lambda *_: None).test.whole(8)} == {1}


def test_torch_and_engines_are_compared_on_a_limited_number_of_logits(small, tmp_path, monkeypatch):
    _, folder, _ = small
    sizes, ran = [], graph_parity

    def recorded(model, graph, feeds):
        sizes.append(feeds["input_ids"].numel())

    def compared(graph, engine, feeds, **options):
        sizes.append(feeds["input_ids"].size)
        return ran(graph, engine, feeds, **options)

    monkeypatch.setattr(traced_model, "check_self_parity", recorded)
    monkeypatch.setattr(engine_parity, "graph_parity", compared)
    monkeypatch.setattr(sliding_windows, "LOGITS", 30 * 50)
    settings = Settings(model=str(folder / "llama"), data=str(folder / "texts.txt"))
    subject = traced_model.load(settings, Steps(None))
    builder = EngineBuilder(subject, runtime("onnxruntime"), BuildOptions(), tmp_path)
    engine_parity.engine_parity(builder, builder.lower(subject.graph, "model"), subject.graph)
    assert len(sizes) == 3  # the module, the engine, and the engine with the example
    assert max(sizes[:2]) <= 30


def test_the_window_is_that_of_the_options_or_of_the_model():
    assert resolve_window(None, None, 512) == Window(512, 256)
    assert resolve_window(None, None, 131_072) == Window(USUAL, USUAL // 2)
    assert resolve_window(100, None, None) == Window(100, 50)
    assert resolve_window(None, 7, None) == Window(USUAL, 7)
    assert resolve_window(None, None, None) == Window(USUAL, USUAL // 2)
    for length, stride, most, words in ((600, None, 512, "--max-length 600"), (100, 100, 512, "--stride 100")):
        with pytest.raises(DataError, match=words):
            resolve_window(length, stride, most)


def by_hand(module, texts, length, stride):
    """Return negative log-likelihood and token count of each text, with the window loop of Hugging Face's guide."""
    results = []
    for ids in texts:
        total, count, before = 0.0, 0, 0
        for begin in range(0, len(ids), stride):
            end = min(begin + length, len(ids))
            row = torch.tensor([ids[begin:end]])
            labels = row.clone()
            labels[:, : -(end - before)] = -100
            with torch.inference_mode():
                logits = module(row).logits[0, :-1]
            kept = labels[0, 1:] != -100
            entropy = torch.nn.functional.cross_entropy(logits[kept], labels[0, 1:][kept], reduction="sum")
            total, count, before = total + float(entropy), count + int(kept.sum()), end
            if end == len(ids):
                break
        results.append((total, count))
    return results


def evaluate_model(model, source, **options):
    """Return the data, and the quality of the model and of a perturbed one on its test split."""
    data = splits.load(str(source), model.preprocess, task=model.task, **options)
    run = graph_runner(model, lambda tensors: _called(model, tensors))
    runners = {"float": run, "off": lambda feeds: run(feeds) * np.float32(0.9)}
    return data, evaluate(data.test, runners, head=head_for("text-generation"), metric="perplexity", reference="float")


def _called(model, tensors):
    with torch.inference_mode():
        return model.call(model.module, *(tensors[name] for name in model.inputs))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Return a random Llama whose tokens are words, and texts of 2 to 150 words, one per line."""
    folder = tmp_path_factory.mktemp("windows")
    ids = np.random.default_rng(0).integers(3, 50, (14, 150))
    texts = [row[: 2 + 11 * number].tolist() for number, row in enumerate(ids)]
    (folder / "texts.txt").write_text("\n".join(" ".join(f"w{token}" for token in text) for text in texts) + "\n")
    (folder / "texts.csv").write_text("text\n" + "\n".join(" ".join(f"w{i}" for i in text) for text in texts) + "\n")
    return models.load(str(worded(folder / "llama", vocabulary=50))), folder, texts


@pytest.mark.parametrize("name", ["texts.txt", "texts.csv"])
@pytest.mark.parametrize(("length", "stride"), [(16, 5), (40, None), (None, None)])
def test_perplexity_equals_that_of_a_plain_loop(small, name, length, stride):
    model, folder, texts = small
    data, quality = evaluate_model(model, folder / name, max_length=length, stride=stride)
    length = 64 if length is None else length  # number of positions of the model
    assert data.describe()["window"] == {"length": length, "stride": length // 2 if stride is None else stride}
    chosen_texts = [texts[int(id)] for id in data.test.ids]
    expected = by_hand(model.module, chosen_texts, length, length // 2 if stride is None else stride)
    nll, tokens = np.array(expected).T
    assert tokens.tolist() == [len(text) - 1 for text in chosen_texts]
    np.testing.assert_array_equal(quality.columns["float"]["tokens"], tokens)
    np.testing.assert_allclose(quality.columns["float"]["nll"], nll, rtol=EQUAL)
    assert quality.value("float") == pytest.approx(math.exp(nll.sum() / tokens.sum()), rel=EQUAL)
    assert quality.figure("float").n == len(chosen_texts)  # the bootstrap resamples texts, not windows


def test_label_free_metrics_average_over_all_scored_tokens(small):
    """Agreement and divergence weight all scored tokens equally, in all texts and windows."""
    model, folder, _ = small
    _, quality = evaluate_model(model, folder / "texts.txt", max_length=16, stride=5)
    free = quality.label_free("off")
    columns = quality.columns["off"]
    assert free["agreement"].value == 100.0  # smaller logits in the same order
    assert columns["divergence"].min() > 0
    every = (columns["divergence"] * columns["tokens"]).sum() / columns["tokens"].sum()
    assert free["divergence"].value == pytest.approx(every, rel=1e-12)
    assert abs(free["divergence"].value / columns["divergence"].mean() - 1) > 1e-3  # texts differ in length


def test_token_ids_are_split_and_calibration_uses_the_first_window(small, tmp_path):
    model, _, _ = small
    ids = np.random.default_rng(1).integers(3, 50, (9, 30))
    np.save(tmp_path / "ids.npy", ids)
    data, quality = evaluate_model(model, tmp_path / "ids.npy", max_length=12, stride=4)
    nll, tokens = np.array(by_hand(model.module, ids[[int(id) for id in data.test.ids]].tolist(), 12, 4)).T
    np.testing.assert_allclose(quality.columns["float"]["nll"], nll, rtol=EQUAL)
    assert tokens.tolist() == [29] * len(tokens)
    (batch,) = data.calibration.batches(9)
    assert batch.feeds["input_ids"].tolist() == ids[[int(id) for id in data.calibration.ids], :12].tolist()
    assert data.test.head(2).windows == data.test.windows


def test_other_tasks_have_no_window(small):
    model, folder, _ = small
    data = splits.load(str(folder / "texts.txt"), model.preprocess, task="feature-extraction")
    assert data.window is None
    assert data.describe()["window"] is None
    with pytest.raises(SubjectError, match="--max-length"):
        load_data(Settings(max_length=8), models.load(), lambda *_: None)


@needs_llama
def test_perplexity_of_the_trained_llama_equals_that_of_a_plain_loop(tmp_path):
    model = models.load(str(LLAMA))
    ids = np.load(LLAMA / "sampled_tokens.npy")[:48].reshape(12, -1).astype(np.int64)  # four samples a text
    np.save(tmp_path / "ids.npy", ids)
    data, quality = evaluate_model(model, tmp_path / "ids.npy", max_length=256, stride=100)
    nll, tokens = np.array(by_hand(model.module, ids[[int(id) for id in data.test.ids]].tolist(), 256, 100)).T
    assert quality.value("float") == pytest.approx(math.exp(nll.sum() / tokens.sum()), rel=EQUAL)
