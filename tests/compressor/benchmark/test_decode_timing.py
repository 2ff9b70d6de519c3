"""Tests of the generation timing: the timed decode step continues its prompt, on every engine."""

import io
import json
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner
from rich.console import Console

import compressor
from compressor import models
from compressor.benchmark.bench_settings import BenchSettings
from compressor.benchmark.contenders import BenchError, EngineEntry
from compressor.benchmark.decode_results import GenerationResults
from compressor.benchmark.decode_timing import MAX_DISTANCE, Generation, _checked, contexts, distance, prepare
from compressor.benchmark.runner import BenchRunner, Condition
from compressor.cli.main import main
from compressor.data.splits import load
from compressor.errors import SettingsError
from compressor.lower.trace import trace
from compressor.lower.traced_model import ModelAndData
from compressor.lower.write_onnx import lower
from compressor.measure import latency as engine_timing
from compressor.measure.workload import token_ids
from compressor.quantize.int8_search import quantize
from compressor.settings import Settings
from compressor.target.torch_eager import Module
from passes.base import apply
from passes.graph.cache_state import bytes_per_token
from passes.graph.sites import find_sites
from passes.rewrite.drop import Drop
from runtimes.base.protocols import BuildOptions
from runtimes.base.registry import runtime
from runtimes.base.timing import Latency, interleave
from runtimes.onnxruntime import target
from tests.paths import SHARED_DATA

pytest.importorskip("onnxruntime", reason="the target of these engines")

LLAMA = SHARED_DATA / "stories260k"
needs_llama = pytest.mark.skipif(not LLAMA.is_dir(), reason="the trained Llama in ../shared/data is not here")

CLOSE = 2e-5  # rounding of float32 sums in another order, for logits of size 1
INT8 = 0.1  # share of the logits' spread, for dynamic ranges of a single token; measured 0.03
ONE = BuildOptions(threads=1)
ROWS, CONTEXT = 2, 9


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Write a checkpoint of two small random layers with 32 positions."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "tiny"
    config = transformers.LlamaConfig(
        vocab_size=48, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24,
        num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(folder):
    return models.load(folder, task="text-generation")


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(0).integers(0, 48, (ROWS, CONTEXT + 1))


@pytest.fixture(scope="module")
def engines(model, ids, tmp_path_factory):
    """Return functions that open the engines, and the cache bytes of each token, by name."""
    scratch = tmp_path_factory.mktemp("engines")
    graph = trace(model)
    sites = [site for site in find_sites(graph) if site.kind == "attention"]
    by_name = {"eager": (partial(Module(model).open, ONE), bytes_per_token(graph))}
    for name, dropped in (("dense", ()), ("pruned", sites[:1])):
        fork = graph.fork()
        apply(Drop(tuple(site.name for site in dropped)), fork)
        path = lower(fork, model, scratch / f"{name}.onnx")
        by_name[name] = (partial(target.load, path, ONE), bytes_per_token(fork))
        if name == "pruned":
            small = scratch / "int8.onnx"
            quantize(path, small, lambda: iter([]), mode="dynamic")  # ranges are found at run time
            by_name["pruned int8"] = (partial(target.load, small, ONE), bytes_per_token(fork))
    return by_name


@pytest.fixture(autouse=True)
def short_timing(monkeypatch):
    """Shorten the timing."""
    monkeypatch.setattr(engine_timing, "interleave", partial(interleave, burst_seconds=0.001, warmup_seconds=0.001))


def reference_logits(model, ids):
    """Return the logits of a text, computed by transformers without a cache."""
    with torch.inference_mode():
        return model.module(input_ids=torch.from_numpy(ids), use_cache=False).logits.numpy()


# --------------------------------------------------------------------------------------------------------- the step


@pytest.mark.parametrize("name", ["eager", "dense", "pruned", "pruned int8"])
def test_decode_step_equals_the_whole_text(engines, model, ids, tmp_path, name):
    """Compare with one call of the same engine on the whole text; the cache has the size of the report."""
    opener, per_token = engines[name]
    with opener() as engine:
        ready = prepare(engine, model, ids, tmp_path / "cache")
        at_once = engine.run({**model.preprocess.complete({"input_ids": ids, "attention_mask": np.ones_like(ids)})})
        step = engine.run(ready.step)
        prompt = engine.run(ready.prompt)
    assert ready.step["input_ids"].shape == (ROWS, 1)
    assert ready.prompt["input_ids"].shape == (ROWS, CONTEXT)
    assert ready.cache == per_token * CONTEXT * ROWS
    assert {value.shape[2] for key, value in ready.step.items() if key.startswith("past_key_values")} <= {CONTEXT}
    assert ready.difference <= (INT8 if "int8" in name else CLOSE)
    if "int8" not in name:  # dynamic ranges depend on the input of a call
        np.testing.assert_allclose(step["logits"][:, 0], at_once["logits"][:, -1], atol=CLOSE, rtol=0)
        np.testing.assert_allclose(prompt["logits"], at_once["logits"][:, :-1], atol=CLOSE, rtol=0)
    if name in ("eager", "dense"):
        np.testing.assert_allclose(step["logits"][:, 0], reference_logits(model, ids)[:, -1], atol=CLOSE, rtol=0)


def test_decode_step_on_openvino(engines, model, ids, tmp_path):
    pytest.importorskip("openvino", reason="the target of this engine")
    other = runtime("openvino")
    path = other.build(engines["pruned"][0].args[0], tmp_path, ONE)
    with other.load(path, ONE) as engine:
        ready = prepare(engine, model, ids, tmp_path / "cache")
        found = engine.run(ready.step)["logits"]
    assert ready.cache == engines["pruned"][1] * CONTEXT * ROWS
    with engines["pruned"][0]() as engine:
        np.testing.assert_allclose(found, engine.run(ready.step)["logits"], atol=CLOSE, rtol=0)


def test_bound_step_equals_run(engines, model, ids, tmp_path):
    """Each timed call writes the outputs of the step to the same memory."""
    with engines["pruned"][0]() as engine:
        ready = prepare(engine, model, ids, tmp_path / "cache")
        expected = engine.run(ready.step)
        step = engine.bind(ready.step)
        assert step.outputs() == {}
        for _ in range(3):
            step()
            found = step.outputs()
            assert found.keys() == expected.keys()
            for key, value in found.items():  # the same kernels on the same numbers
                np.testing.assert_array_equal(value, expected[key])
            places = [value.data_ptr() for value in step._outputs.values()]
            assert places == [value.data_ptr() for value in step._binding.get_outputs()]
        assert found["present.0.key"].shape[2] == CONTEXT + 1


def test_step_that_ignores_its_cache_is_refused(engines, model, ids, tmp_path):
    class Forgetful:
        """An engine that ignores its cache."""

        def __init__(self, engine):
            self.inputs, self.input_shapes, self.input_dtypes = engine.inputs, engine.input_shapes, engine.input_dtypes
            self.engine = engine

        def run(self, feeds):
            past = {key: np.zeros_like(value) for key, value in feeds.items() if key.startswith("past")}
            return self.engine.run({**feeds, **past})

    entry = EngineEntry("forgetful", "onnxruntime", None)
    with engines["dense"][0]() as engine:
        good = prepare(engine, model, ids, tmp_path / "good")
        bad = prepare(Forgetful(engine), model, ids, tmp_path / "bad")
    assert _checked(entry, good) is good
    assert bad.difference > 100 * good.difference
    for wrong in (2 * MAX_DISTANCE, float("nan")):
        with pytest.raises(BenchError, match="forgetful does not continue its prompt"):
            _checked(entry, type(bad)(bad.prompt, bad.step, bad.cache, wrong))


def test_distance_is_relative_to_the_spread():
    expected = np.array([[0.0, 2.0, 4.0], [10.0, 10.0, 13.0]], np.float32)
    other_token = expected[:, ::-1]
    assert distance(expected, expected) == 0.0
    assert distance(expected + 100.0, expected) > 1.0  # a common offset counts as a difference
    assert distance(other_token, expected) == pytest.approx(2.0)
    assert np.isnan(distance(np.full_like(expected, np.nan), expected))


def test_token_ids_are_those_of_the_data_without_padding(model):
    data = load("random", model.preprocess, task="text-generation")
    found = token_ids(data.test, 2, 1000)
    assert (found.shape, found.dtype) == ((2, 1000), np.int64)
    texts = [batch.feeds["input_ids"][batch.feeds["attention_mask"].astype(bool)] for batch in data.test.batches(1)]
    every = np.concatenate(texts)
    np.testing.assert_array_equal(found.ravel()[: every.size], every[:2000])
    np.testing.assert_array_equal(found.ravel(), np.resize(every, 2000))


# ------------------------------------------------------------------------------------------------- context lengths


def test_context_is_limited_by_the_positions(model):
    assert contexts(None, model) == (31,)
    assert contexts((4, 31), model) == (4, 31)
    assert contexts((), model) == ()
    with pytest.raises(SettingsError, match="--context 32 plus one token exceeds the 32 positions of tiny"):
        contexts((4, 32), model)


def test_engines_are_built_for_the_longest_context(model):
    """Runtimes that plan their memory ahead need the largest length."""
    data = load("random", model.preprocess, task="text-generation")
    settings = Settings(data="random", drop="none")
    runner = BenchRunner(ModelAndData(model, data), settings, (), "", (Condition(1, None),), {}, (900, 30))
    least, _, longest = runner.options(Condition(1, 2), EngineEntry("x", "onnxruntime", None)).lengths
    assert (least, longest) == (0, 901)


def test_context_of_another_task_is_refused():
    digits = models.load(None)
    assert contexts(None, digits) == ()
    with pytest.raises(SettingsError, match=r"--context needs a language model with a KV cache; .* does image-class"):
        contexts((4,), digits)
    with pytest.raises(SettingsError, match=r"context is 0; expected distinct integers of at least 1\."):
        BenchSettings(("model",), context=(0,))


# ------------------------------------------------------------------------------------------------------------ results


CELLS = {"dense float": 8.0, "dense int8": 4.0, "compressed float": 4.0, "compressed int8": 1.0}


@pytest.fixture(scope="module")
def made_up():
    """Return cells whose decode speed-ups exceed their product, and whose prefill speed-ups multiply."""
    condition, context = Condition(2, 1), 10
    entries = tuple(EngineEntry(f"out/{cell}", "onnxruntime", Path("x.onnx"), cell=("out", cell)) for cell in CELLS)
    first = {**CELLS, "compressed int8": 2.0}

    def constant(value):
        return Latency(((value, value),) * 2)

    runs = tuple(
        Generation(f"out/{cell}", condition, context, constant(first[cell] * context), constant(value), 1000 * context,
                   1e-6)
        for cell, value in CELLS.items()
    )  # fmt: skip
    return GenerationResults("tiny", entries, "out/dense float", runs)


def test_speedups_and_interactions_of_both_calls(made_up):
    content = made_up.to_dict()
    row = content["measurements"][3]
    assert (row["engine"], row["context"], row["batch"], row["threads"]) == ("out/compressed int8", 10, 2, 1)
    assert row["token"]["speedup"] == {"ratio": 8.0, "low": 8.0, "high": 8.0}
    assert row["first"]["speedup"]["ratio"] == 4.0
    assert row["tokens_per_second"] == pytest.approx(2000.0)  # two rows, 1 ms
    assert row["cache_bytes"] == 10000
    assert [(each["part"], each["context"]) for each in content["factorials"]] == [
        ("first", 10), ("token", 10)
    ]  # fmt: skip
    ratios = [each["interactions"][0]["ratio"]["ratio"] for each in content["factorials"]]
    assert ratios == [1.0, 2.0]  # 4 / (2 x 2) and 8 / (2 x 2)
    lines = list(made_up.summary())
    assert lines[0].startswith("out: The speed-ups of compression and int8 multiply for the first token of 10 tokens")
    assert "gain more than the product of their speed-ups for each token after 10 tokens, at batch 2" in lines[1]


def test_tables_fit_a_terminal(made_up):
    out = Console(width=80, file=io.StringIO())
    for table in made_up.tables():
        out.print(table)
    text = out.file.getvalue()
    assert "tiny, ms for a token after 10 tokens, batch 2, threads 1; speed-up over" in text
    assert re.search(r"out/compressed int8 +20\.00 +4\.00x +1\.00 +8\.00x +2000\.0 +0\.01", text)


@needs_llama
def test_trained_model_equals_transformers(tmp_path):
    """A wrong position id changes the logits after 100 tokens of a text sampled from the model."""
    model = models.load(LLAMA)
    ids = np.load(LLAMA / "sampled_tokens.npy")[:3, :101].astype(np.int64)
    with Module(model).open(ONE) as engine:
        ready = prepare(engine, model, ids, tmp_path / "cache")
        found = engine.run(ready.step)["logits"][:, 0]
    np.testing.assert_allclose(found, reference_logits(model, ids)[:, -1], atol=10 * CLOSE, rtol=0)  # logits of size 10
    assert len(set(found.argmax(-1))) > 1


def test_bench_times_generation_of_every_engine(engines, folder, tmp_path):
    dense, pruned = (engines[name][0].args[0] for name in ("dense", "pruned"))
    output = tmp_path / "bench.json"
    comparison = compressor.bench(
        dense, pruned, folder, data="random", samples=6, batch=[2], threads=[1], context=[5], rounds=2, output=output
    )
    content = json.loads(output.read_text())
    rows = content["generation"]["measurements"]
    assert [row["engine"] for row in rows] == ["dense.onnx", "pruned.onnx", "tiny (eager)"]
    per_token = engines["dense"][1]
    assert [row["cache_bytes"] for row in rows] == [per_token * 5 * 2, per_token * 5, per_token * 5 * 2]
    for row in rows:
        assert (row["batch"], row["threads"], row["context"]) == (2, 1, 5)
        assert row["difference_from_whole_text"] < CLOSE
        assert row["tokens_per_second"] == pytest.approx(2000.0 / row["token"]["latency"]["median"])
        assert len(row["token"]["latency"]["samples_ms"]) == 2
    assert rows[0]["token"]["speedup"] == {"ratio": 1.0, "low": 1.0, "high": 1.0}
    assert "With a KV cache, the logits of each engine differ" in comparison.summary()
    assert len(list(comparison.tables())) == 2  # the prompt of the data, and generation


def test_bench_of_another_task_refuses_context(tmp_path):
    options = ["--data", "random", "--context", "8", "--output", str(tmp_path / "bench.json")]
    done = CliRunner().invoke(main, ["bench", str(models.SAMPLE), *options])
    assert done.exit_code == 2
    assert "--context needs a language model with a KV cache; " in " ".join(done.stderr.split())
    assert not (tmp_path / "bench.json").exists()
