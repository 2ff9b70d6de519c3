"""Small traced models, splits and checkpoint folders that several tests share; each model is traced once."""

import dataclasses
import functools
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from compressor import models
from compressor.data.splits import Batch, Shares, Split, load
from compressor.lower.trace import trace
from passes.execute.interpreter import Program
from passes.graph.sites import find_sites
from tests.architectures import TIMM, TRANSFORMERS, VIT, Architecture, timm_model

GOLDEN = Path(__file__).parent / "golden"
BY_NAME = {architecture.name: architecture for architecture in TIMM + TRANSFORMERS}


@functools.cache
def digits():
    """Return the trained embedded model with 160 of its samples: 40 for calibration and 40 for validation."""
    model = models.load(None)
    data = load(str(models.SAMPLE / "digits.npz"), model.preprocess, task=model.task, shares=Shares(total=160))
    graph = trace(model)
    return model, data, graph, find_sites(graph)


DIGITS = str(models.SAMPLE / "digits.npz")


def five_blocks(folder, kept=(0, 3, 4, 5, 9)):
    """Write some of the twelve blocks of the embedded model as a timm folder; these five are right for 89 % of DIGITS.

    Commands and exports take half of the time on it.
    """
    shutil.copytree(models.SAMPLE, folder, ignore=shutil.ignore_patterns("digits.npz", "split.json", "README.md"))
    config = json.loads((folder / "config.json").read_text())
    config["model_args"]["depth"] = len(kept)
    (folder / "config.json").write_text(json.dumps(config))
    weights = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        parts = name.split(".")
        if parts[0] == "blocks":
            if int(parts[1]) not in kept:
                continue
            parts[1] = str(kept.index(int(parts[1])))
        weights[".".join(parts)] = weight
    save_file(weights, folder / "model.safetensors")
    return str(folder)


class Residual(torch.nn.Module):
    """Residual branches and a head of four classes, on vectors of 32."""

    def __init__(self, branches=3):
        super().__init__()
        torch.manual_seed(0)
        self.inner = torch.nn.ModuleList(torch.nn.Linear(32, 32) for _ in range(branches))
        self.head = torch.nn.Linear(32, 4)

    def forward(self, x):
        for inner in self.inner:
            x = x + torch.relu(inner(x))
        return self.head(x)


def labelled_rows(path, module, count):
    """Write `count` vectors of 32 with the classes that the module predicts for them, and return the path."""
    rows = np.random.default_rng(0).standard_normal((count, 32)).astype(np.float32)
    with torch.no_grad():
        labels = module(torch.from_numpy(rows)).argmax(-1).numpy()
    np.savez(path, x=rows, y=labels)
    return path


@functools.cache
def traced(name):
    """Return a model of `tests.architectures` with random weights, its graph and its sites."""
    model = BY_NAME[name].load()
    graph = trace(model)
    return model, graph, find_sites(graph)


def small(change=lambda module: None, rows=24, depth=2):
    """Return a ViT of `depth` blocks with random weights, changed by `change`; its graph, sites and random images."""
    model = Architecture("small", timm_model("vit_tiny_patch16_224", **{**VIT, "depth": depth}), {}).load()
    with torch.no_grad():
        change(model.module)
    graph = trace(model)
    images = np.random.default_rng(0).random((rows, 3, 32, 32), dtype=np.float32)
    return dataclasses.replace(model, task="image-classification"), graph, find_sites(graph), Tensors({"x": images})


def spread(scale=0.2, seed=0):
    """Return a change that adds noise to the weights, because freshly initialized branches have almost no effect."""

    def change(module):
        torch.manual_seed(seed)
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.add_(torch.randn_like(parameter) * scale)

    return change


@dataclasses.dataclass
class Tensors:
    """A split of arrays by input name, in batches of at most `most` samples."""

    feeds: dict[str, np.ndarray]
    labels: np.ndarray | None = None
    indices: tuple[int, ...] = ()
    most: int = 32

    def __post_init__(self):
        self.indices = tuple(range(len(next(iter(self.feeds.values()))))) if not self.indices else self.indices

    def __len__(self):
        return len(self.indices)

    def bounded_groups(self, size):
        size = min(size, self.most)
        return [list(self.indices[start : start + size]) for start in range(0, len(self), size)]

    def bounded_batches(self, size):
        for part in self.bounded_groups(size):
            labels = None if self.labels is None else self.labels[part]
            feeds = {name: value[part] for name, value in self.feeds.items()}
            yield Batch(feeds, labels, 1, tuple(map(str, part)))

    batches = bounded_batches
    middle = Split.middle


def states(graph, feeds, *names):
    """Return copies of the values of named nodes for one batch."""
    by_name = {node.name: node for node in graph.nodes()}
    program = Program(graph, keep=names)
    values = program.start(feeds)
    with torch.inference_mode():
        for _ in program.walk(values):
            pass
        return [values[by_name[name]].clone() for name in names]


def check_listing(name, sites):
    """Compare names, kinds, blocks and widths of sites with a committed listing.

    With COMPRESSOR_UPDATE_GOLDEN=1 in the environment, a changed listing is rewritten.
    """
    path = GOLDEN / f"{name}.json"
    lines = [json.dumps([site.name, site.kind, site.block, site.width]) for site in sites]
    listing = "[\n  " + ",\n  ".join(lines) + "\n]\n"
    golden = path.read_text() if path.is_file() else None
    if os.environ.get("COMPRESSOR_UPDATE_GOLDEN") == "1" and listing != golden:
        path.write_text(listing)
        pytest.fail(f"{path.name} was rewritten; look at the diff and run again without COMPRESSOR_UPDATE_GOLDEN.")
    assert golden is not None, f"{path.name} is missing"
    assert json.loads(listing) == json.loads(golden)


def worded(folder, *, vocabulary, weights=None):
    """Save a Llama whose tokens are the words w3, w4, ...; random weights, or those in the folder `weights`."""
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
    tokenizer_of_words(folder, vocabulary)
    return folder


def tokenizer_of_words(folder, vocabulary):
    """Save a tokenizer whose tokens are the words w3, w4, ..."""
    import tokenizers
    import transformers

    words = dict.fromkeys(("<unk>", "<s>", "</s>")) | {f"w{token}": token for token in range(3, vocabulary)}
    token_ids = {word: token for token, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(token_ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", model_max_length=10**30
    ).save_pretrained(folder)
