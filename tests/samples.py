"""Small traced models and splits that the tests of the search share; each is traced once."""

import dataclasses
import functools
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from compressor import models
from compressor.data.splits import Batch, Shares, load
from compressor.lower.trace import trace
from passes.execute.interpreter import Program
from passes.graph.sites import find_sites
from tests.architectures import TIMM, TRANSFORMERS, VIT, Architecture, timm_model

GOLDEN = Path(__file__).parent / "golden"
BY_NAME = {architecture.name: architecture for architecture in TIMM + TRANSFORMERS}


@functools.cache
def digits():
    """The embedded model, trained, with 160 of its samples: 40 to calibrate, 40 to validate."""
    model = models.load(None)
    data = load(str(models.SAMPLE / "digits.npz"), model.preprocess, task=model.task, shares=Shares(total=160))
    graph = trace(model)
    return model, data, graph, find_sites(graph)


@functools.cache
def traced(name):
    """A model of `tests.architectures` with random weights: model, graph and sites."""
    model = BY_NAME[name].load()
    graph = trace(model)
    return model, graph, find_sites(graph)


def small(change=lambda module: None, rows=24, depth=2):
    """A ViT of so many blocks with random weights, read at its class token, changed, and some random images."""
    model = Architecture("small", timm_model("vit_tiny_patch16_224", **{**VIT, "depth": depth}), {}).load()
    with torch.no_grad():
        change(model.module)
    graph = trace(model)
    images = np.random.default_rng(0).random((rows, 3, 32, 32), dtype=np.float32)
    return dataclasses.replace(model, task="image-classification"), graph, find_sites(graph), Tensors({"x": images})


def spread(scale=0.2, seed=0):
    """A change that makes the branches of a model matter: weights straight from initialisation do next to nothing."""

    def change(module):
        torch.manual_seed(seed)
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.add_(torch.randn_like(parameter) * scale)

    return change


@dataclasses.dataclass
class Tensors:
    """A split of ready arrays by input name; batches are of `most` samples where more are asked for."""

    feeds: dict[str, np.ndarray]
    labels: np.ndarray | None = None
    indices: tuple[int, ...] = ()
    most: int = 32

    def __post_init__(self):
        self.indices = tuple(range(len(next(iter(self.feeds.values()))))) if not self.indices else self.indices

    def __len__(self):
        return len(self.indices)

    def batches(self, size):
        size = min(size, self.most)
        for start in range(0, len(self), size):
            part = list(self.indices[start : start + size])
            labels = None if self.labels is None else self.labels[part]
            feeds = {name: value[part] for name, value in self.feeds.items()}
            yield Batch(feeds, labels, 1, tuple(map(str, part)))


def states(graph, feeds, *names):
    """Values of named nodes of one batch, copied."""
    by_name = {node.name: node for node in graph.nodes()}
    program = Program(graph, keep=names)
    values = program.start(feeds)
    with torch.inference_mode():
        for _ in program.walk(values):
            pass
        return [values[by_name[name]].clone() for name in names]


def check_listing(name, sites):
    """Hold names, kinds, blocks and widths to a committed listing; how to write it anew: tests/test_passes_graph.py."""
    path = GOLDEN / f"{name}.json"
    lines = [json.dumps([site.name, site.kind, site.block, site.width]) for site in sites]
    found = "[\n  " + ",\n  ".join(lines) + "\n]\n"
    known = path.read_text() if path.is_file() else None
    if os.environ.get("COMPRESSOR_UPDATE_GOLDEN") == "1" and found != known:
        path.write_text(found)
        pytest.fail(f"{path.name} was rewritten; look at the diff and run again without COMPRESSOR_UPDATE_GOLDEN.")
    assert known is not None, f"{path.name} is missing"
    assert json.loads(found) == json.loads(known)


def worded(folder, *, vocabulary, weights=None):
    """A folder of a Llama whose tokens are the words w3, w4, ...: random, or the one in the folder `weights`."""
    import tokenizers
    import transformers

    torch.manual_seed(0)
    if weights is None:
        config = transformers.LlamaConfig(
            vocab_size=vocabulary, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=48, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, initializer_range=0.2,
        )  # fmt: skip
        module = transformers.LlamaForCausalLM(config)
    else:
        module = transformers.LlamaForCausalLM.from_pretrained(weights)
    module.save_pretrained(folder)
    words = dict.fromkeys(("<unk>", "<s>", "</s>")) | {f"w{token}": token for token in range(3, vocabulary)}
    numbered = {word: token for token, word in enumerate(words)}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(numbered, unk_token="<unk>"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, bos_token="<s>", eos_token="</s>", unk_token="<unk>", model_max_length=10**30
    ).save_pretrained(folder)
    return folder
