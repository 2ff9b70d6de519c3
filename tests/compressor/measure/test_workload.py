"""Workloads: the calls of a generation, their feeds and shapes, and the total latency."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner

import compressor
from compressor import models
from compressor.cli.main import main
from compressor.data.splits import load
from compressor.errors import SettingsError
from compressor.lower.trace import trace
from compressor.lower.write_onnx import lower
from compressor.measure import latency as engine_timing
from compressor.measure.workload import (
    PROMPT,
    RUN,
    TOKEN,
    Call,
    GenerationLengths,
    generation_lengths,
    token_ids,
    total_latency,
    workload_calls,
)
from compressor.search.cost_model import multiply_add_cost_model
from compressor.settings import Settings
from passes.analysis.counted_cost import Costs
from passes.base import apply
from passes.graph.sites import find_sites
from passes.rewrite.drop import Drop
from runtimes.base.protocols import BuildOptions
from runtimes.base.timing import Latency, interleave
from runtimes.onnxruntime import target
from tests.samples import small, spread

pytest.importorskip("onnxruntime", reason="the target of these engines")

CLOSE = 2e-5  # float32 sums in another order, on logits of size 1
POSITIONS = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model") / "tiny"
    config = transformers.LlamaConfig(
        vocab_size=48, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24,
        num_key_value_heads=2, max_position_embeddings=POSITIONS,
    )  # fmt: skip
    module = transformers.LlamaForCausalLM(config)
    for parameter in module.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    module.save_pretrained(folder)
    np.save(folder.parent / "tokens.npy", np.random.default_rng(0).integers(3, 48, (24, 10)))
    return folder


@pytest.fixture(scope="module")
def subject(folder):
    model = models.load(folder, task="text-generation")
    data = load(str(folder.parent / "tokens.npy"), model.preprocess, task=model.task)
    return SimpleNamespace(model=model, data=data)


def settings(**options):
    return Settings(data="tokens.npy", **options)


# --------------------------------------------------------------------------------------------- lengths of a generation


def test_the_default_generation_is_as_long_as_the_positions_allow(subject):
    assert generation_lengths(settings(), subject.model) == GenerationLengths(POSITIONS // 2, POSITIONS // 2)
    assert generation_lengths(settings(generate="9:3"), subject.model) == GenerationLengths(9, 3)
    assert GenerationLengths(9, 3).behind == 10
    assert generation_lengths(settings(generate="32:0"), subject.model) == GenerationLengths(32, 0)
    one = {"is_encoder_decoder": False, "is_vision_language": False, "has_two_towers": False}
    endless = SimpleNamespace(state=subject.model.state, module=None, **one)
    assert generation_lengths(settings(), endless) == GenerationLengths(128, 128)
    assert generation_lengths(settings(defer_build=True), endless) == GenerationLengths(128, 0)


def test_a_generation_that_does_not_fit_is_refused(subject):
    with pytest.raises(SettingsError, match=r"--generate 30:3 does not fit .* 32 positions"):
        generation_lengths(settings(generate="30:3"), subject.model)
    picture = SimpleNamespace(
        state={}, name="vit", task="image-classification", is_encoder_decoder=False, has_two_towers=False
    )
    assert generation_lengths(settings(), picture) is None
    with pytest.raises(SettingsError, match="vit does image-classification"):
        generation_lengths(settings(generate="8:8"), picture)


# ------------------------------------------------------------------------------------------------------------ the calls


@pytest.mark.parametrize(
    "dropped", [pytest.param(0, marks=pytest.mark.slow), 1, pytest.param(2, marks=pytest.mark.slow)]
)
def test_a_decode_step_continues_from_the_engines_own_cache(subject, tmp_path, dropped):
    """Also after one or all attention branches are dropped; the oracle is one call with the whole text."""
    graph = trace(subject.model)
    sites = [site.name for site in find_sites(graph) if site.kind == "attention"]
    apply(Drop(tuple(sites[:dropped])), graph)
    path = lower(graph, subject.model, tmp_path / "m.onnx")
    calls = workload_calls(subject, settings(generate="9:6", batch=2))
    assert {name: call.times for name, call in calls.items()} == {PROMPT: 1, TOKEN: 6}
    opener = partial(target.load, path, BuildOptions(threads=1))
    prompt = calls[PROMPT].feeds(opener, tmp_path / "unused")
    assert not (tmp_path / "unused").exists()
    token = calls[TOKEN].feeds(opener, tmp_path / "cache")
    assert prompt["input_ids"].shape == (2, 9)
    assert token["input_ids"].shape == (2, 1)
    assert token["attention_mask"].shape == (2, 9 + 3 + 1)
    assert {value.shape[2] for name, value in token.items() if name.startswith("past_key_values")} == (
        {12} if dropped < 2 else set()
    )
    for name, value in token.items():
        assert calls[TOKEN].shapes[name] == value.shape
    ids = token_ids(subject.data.test, 2, 13)
    whole = subject.model.preprocess.complete({"input_ids": ids, "attention_mask": np.ones_like(ids)})
    with opener() as engine:
        actual, expected = engine.run(token)["logits"][:, 0], engine.run(whole)["logits"]
        np.testing.assert_array_equal(token["input_ids"][:, 0], ids[:, -1])
        np.testing.assert_allclose(actual, expected[:, -1], atol=CLOSE, rtol=0)


def test_multiply_adds_of_a_generation_are_those_of_its_calls(subject):
    """The oracle counts one run of each call."""
    graph = trace(subject.model)
    calls = workload_calls(subject, settings(generate="9:6", batch=2))
    once = {}
    for name, call in calls.items():
        feeds = {key: torch.zeros(shape, dtype=value.dtype) for (key, shape), value in zip(
            ((key, call.shapes[key]) for key in graph.inputs), (subject.model.example[key] for key in graph.inputs),
            strict=True,
        )}  # fmt: skip
        once[name] = 2 * Costs(graph, feeds).total.multiply_adds
    prices = multiply_add_cost_model(graph, calls)
    assert prices.cost(graph) == once[PROMPT] + 6 * once[TOKEN]
    assert prices.multiply_adds(prices.count(graph)) == prices.cost(graph)


def test_a_model_without_a_cache_is_timed_on_one_call():
    model, _, _, split = small(spread())
    data = SimpleNamespace(test=split)
    calls = workload_calls(SimpleNamespace(model=model, data=data), settings(batch=3))
    assert list(calls) == [RUN]
    assert {len(value) for value in calls[RUN].inputs.values()} == {3}


# -------------------------------------------------------------------------------------------------------- the latency


def test_latencies_add_up_round_by_round():
    calls = {PROMPT: Call(1, {}, {}), TOKEN: Call(10, {}, {})}
    parts = {PROMPT: Latency(((5.0, 7.0), (6.0,))), TOKEN: Latency(((1.0, 2.0, 9.0), (3.0, 3.0)))}
    assert total_latency(calls, parts).samples_ms == ((25.0, 27.0), (36.0,))
    alone = {RUN: Latency(((1.0, 2.0),))}
    assert total_latency({RUN: Call(1, {}, {})}, alone) is alone[RUN]


@pytest.fixture
def brief(monkeypatch):
    monkeypatch.setattr(engine_timing, "QUICK_ROUNDS", 2)
    monkeypatch.setattr(engine_timing, "QUICK_SECONDS", 0.001)
    monkeypatch.setattr(engine_timing, "interleave", partial(interleave, burst_seconds=0.001, warmup_seconds=0.001))


@pytest.mark.usefixtures("brief")
def test_an_export_reports_generation_and_the_search_uses_it(folder, tmp_path):
    report = compressor.export(
        folder, data=folder.parent / "tokens.npy", drop="auto", actions="drop", max_loss=1000.0, generate="6:4",
        rounds=2, output=tmp_path / "out",
    )  # fmt: skip
    assert {key: report.generation[key] for key in ("prompt", "new", "behind")} == {"prompt": 6, "new": 4, "behind": 8}
    assert report.timed_inputs["input_ids"] == [1, 6]
    for name, latency in report.latency.items():
        parts = report.generation["calls"][name]
        assert set(parts) == {PROMPT, TOKEN}
        tokens = [float(np.median(burst)) for burst in parts[TOKEN]["samples_ms"]]
        for whole, prompt, token in zip(latency.samples_ms, parts[PROMPT]["samples_ms"], tokens, strict=True):
            assert whole == pytest.approx([sample + 4 * token for sample in prompt])
    prices = report.search["prices"]
    assert {name: call["times"] for name, call in prices["calls"].items()} == {PROMPT: 1, TOKEN: 4}
    for design, total in prices["timings"].items():
        assert total == pytest.approx(sum(call["timings"][design] for call in prices["calls"].values()))
    assert "Latency: a prompt of 6 tokens and 4 new tokens, each with a cache of 8 tokens." in report.summary()
    for page in ("README.md", "report.html"):
        assert "a prompt of 6 tokens and 4 new tokens" in (tmp_path / "out" / page).read_text()
    assert "each new token, ms" in [row[0].strip() for row in report._rows()]


def test_the_command_line_has_the_option_generate():
    for command in ("export", "sweep"):
        assert "--generate PROMPT:NEW" in CliRunner().invoke(main, [command, "--help"]).output
