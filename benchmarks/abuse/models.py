"""Models that cannot be used, in part or at all: modules of one's own, and folders of timm, transformers and GGUF."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from .cases import Answer, Case, command
from .data import DEEP, QUICK, Payload, scored_as, skips, special, text
from .judging import MARKER
from .materials import BERT, IMAGES, LINES, LLAMA, MODULE, MODULE_DATA, TEXTS, VIT, labels

Change = Callable[[Path], object]
RUNS = f"open('{MARKER}', 'w').close()\n"

# Source of a module after the imports and `class Base`, whose `change` is called on the output; words of the refusal.
HEAD = """import os, sys, torch
from torch import nn
import tiny


class Base(tiny.Tiny):
    def forward(self, x):
        return self.change(super().forward(x))

    def change(self, y):
        return y


def make():
    torch.manual_seed(0)
    return Bad(), torch.randn(2, 8)


"""
CHANGES: tuple[tuple[str, str, str], ...] = (
    ("returns a string", "return 'logits'", "return"),
    ("returns None", "return None", "return"),
    ("returns nothing in a dict", "return {}", "return"),
    ("returns a list of numbers", "return [1.0, 2.0]", "return"),
    ("returns NaN", "return y * float('nan')", "NaN or infinity"),
    ("returns infinity", "return y / 0.0", "NaN or infinity"),
    ("returns complex numbers", "return y * 1j", "complex"),
    ("returns one number", "return y.sum()", "for a batch of two"),
    ("returns one row", "return y[:1]", "for a batch of two"),
    ("returns a sparse tensor", "return y.to_sparse()", "sparse"),
    ("raises", "raise ValueError('first\\nsecond \\x1b[31m')", "ValueError"),
    ("raises without words", "raise KeyError", "KeyError"),
    ("leaves by sys.exit", "sys.exit(0)", "calls sys.exit(0)"),
    ("recurses forever", "return self.change(y)", "recursion"),
    ("adds noise", "return y + torch.rand_like(y)", "random"),
    ("has dropout on", "return nn.functional.dropout(y, 0.5, training=True)", "random"),
    (
        "counts its calls",
        "self.calls = getattr(self, 'calls', 0) + 1\n        return y * self.calls",
        "changes its own state",
    ),
    ("changes its weights", "self.head.weight.data += 1.0\n        return y", "could not be traced"),
    ("branches on its values", "return y if y.sum() > 0 else -y", "trace"),
    ("loops over its values", "return y * sum(1 for _ in range(int(y.abs().sum()) + 1))", "trace"),
    ("depends on the rows of a batch", "return y - y.mean(0)", "for a row alone than for the same row among"),
    ("computes in NumPy", "return torch.from_numpy(y.detach().numpy() * 2)", "trace"),
    ("sorts the rows", "return y.sort(0).values", "for a row alone than for the same row among"),
)
SOURCES: tuple[tuple[str, str, str], ...] = (
    ("a syntax error", "def make(:\n", "SyntaxError"),
    ("an import that fails", "import nowhere_to_be_found\n", "ModuleNotFoundError"),
    ("an import that exits", "import sys; sys.exit(3)\n", "SystemExit"),
    ("no factory", "x = 1\n", "AttributeError"),
    ("a factory that is no function", "make = 3\n", "TypeError"),
    ("a factory with arguments", "def make(width): pass\n", "TypeError"),
    ("a factory that raises", "def make(): raise RuntimeError('one\\ntwo')\n", "RuntimeError: one"),
    ("a factory that returns None", "def make(): pass\n", "returned NoneType"),
    ("a factory that returns a class", "import tiny\ndef make(): return tiny.Tiny\n", "returned type"),
    ("a factory that returns three values", "import tiny\ndef make(): return (*tiny.make(), 3)\n", "returned tuple"),
    ("no example inputs", "import tiny\ndef make(): return tiny.make()[0]\n", "example"),
    ("example inputs that are no tensors", "import tiny\ndef make(): return tiny.make()[0], [1, 2]\n", "example"),
    (
        "example inputs without rows",
        "import tiny\ndef make():\n    m, x = tiny.make()\n    return m, x[:0]\n",
        "example",
    ),
    (
        "example inputs of another width",
        "import tiny\ndef make():\n    m, x = tiny.make()\n    return m, x[:, :5]\n",
        "mat1",
    ),
    (
        "example inputs that are NaN",
        "import tiny\ndef make():\n    m, x = tiny.make()\n    return m, x / 0 * 0\n",
        "NaN",
    ),
    (
        "weights that are NaN",
        "import tiny\ndef make():\n    m, x = tiny.make()\n    m.head.weight.data *= float('nan')\n    return m, x\n",
        "NaN or infinite",
    ),
    (
        "weights without memory",
        "import tiny\ndef make():\n    m, x = tiny.make()\n    return m.to('meta'), x\n",
        "has no values",
    ),
    (
        "weights that are not known yet",
        "import torch\ndef make(): return torch.nn.LazyLinear(4), torch.randn(2, 8)\n",
        "has no shape yet",
    ),
    ("no residual branch", "import torch\ndef make(): return torch.nn.Linear(8, 4), torch.randn(2, 8)\n", ""),
    ("another folder as current", "import os, tiny\ndef make():\n    os.chdir('/')\n    return tiny.make()\n", ""),
)
USABLE: tuple[tuple[str, str, str, Answer], ...] = (
    (
        "prints",
        "print('noise'); print('noise', file=sys.stderr)\n        return y",
        "the accuracy of plain ONNX Runtime",
        scored_as(labels()),
    ),
    (
        "computes in float16 inside",
        "return (y.half() * 2).float()",
        "the accuracy of plain ONNX Runtime",
        scored_as(labels()),
    ),
    ("returns float64", "return y.double()", "the accuracy of plain ONNX Runtime", scored_as(labels())),
)
NAMES: tuple[tuple[str, str], ...] = (
    ("nowhere:make", "ModuleNotFoundError"),
    ("tiny:nothing", "AttributeError"),
    ("tiny:make:more", "no model named"),
    (":make", "no model named"),
    ("tiny:", "no model named"),
    ("os:abort()", "no model named"),
    ("json:loads", "TypeError"),
    ("vit_basse_patch16_224", "did you mean"),
    ("nobody/nothing", "could not be fetched"),
    ("../nobody", "there is no folder"),
    ("/nowhere", "there is no folder"),
    ("tiny.py", "tiny.py is a file"),
    ("room", "contains no config.json"),
    ("[red]\x1b[31m", "no model named"),
)


def cases() -> Iterator[Case]:
    """Yield all cases with bad models."""
    for name, body, words in CHANGES:
        yield _module(f"module that {name}", _changed(body), words)
    for name, source, words in SOURCES:
        yield _module(name, source, words)
    for name, body, words, answer in USABLE:
        yield _module(f"module that {name}", _changed(body), words, answer)
    for model, words in NAMES:
        arguments = command("export", (model, "--data", MODULE_DATA, *QUICK))
        yield Case(f"model, name: {model!r}", arguments, words, (MODULE, MODULE_DATA))
    for kind, changes in (("timm", TIMM), ("transformers", TRANSFORMERS)):
        model, samples = (VIT, IMAGES) if kind == "timm" else (BERT, TEXTS)
        for name, change, words in changes:
            yield _folder(f"{kind}: {name}", model, samples, change, words)
    for name, model, samples, change, words in USABLE_FOLDERS:
        yield replace(_folder(f"transformers: {name}", model, samples, change, words), answer=skips())
    for name, change, words in LANGUAGE:
        yield _folder(f"language model: {name}", LLAMA, LINES, change, words)


def _changed(body: str) -> str:
    return f"{HEAD}class Bad(Base):\n    def change(self, y):\n        {body}\n"


def _module(name: str, source: str, words: str, answer: Answer | None = None) -> Case:
    arguments = command("export", ("bad:make", "--data", MODULE_DATA, *QUICK))
    write = text(source)
    return Case(f"model, {name}", arguments, words, (MODULE, MODULE_DATA), lambda at: write(at / "bad.py"), answer)


def _folder(name: str, model: str, samples: str, change: Change, words: str) -> Case:
    arguments = command("export", (model, "--data", samples, *QUICK))
    return Case(f"model, {name}", arguments, words, (model, samples), lambda folder: change(folder / model))


# ------------------------------------------------------------------------------------------------- folders


def without(*names: str) -> Change:
    """Return what deletes files of a folder."""
    return lambda folder: [(folder / name).unlink() for name in names]


def written(name: str, content: str) -> Change:
    """Return what writes a file into a folder."""
    return lambda folder: (folder / name).write_text(content)


def config(**values: Any) -> Change:
    """Return what sets values of config.json."""
    return edited("config.json", lambda content: content.update(values))


def edited(name: str, change: Callable[[Any], object]) -> Change:
    """Return what changes a JSON file."""

    def edit(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return edit


def weights(change: Callable[[bytes], bytes]) -> Change:
    """Return what changes the bytes of the weights."""

    def edit(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return edit


def tensors(change: Callable[[dict[str, np.ndarray[Any, Any]]], object]) -> Change:
    """Return what changes the tensors of the weights."""

    def edit(folder: Path) -> None:
        from safetensors.numpy import load_file, save_file

        content = load_file(folder / "model.safetensors")
        change(content)
        save_file(content, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


def pickled(folder: Path) -> None:
    """Replace the weights by a pickle that writes the marker."""
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload()))


def remote_code(folder: Path) -> None:
    """Name code of the folder in its config."""
    (folder / "evil.py").write_text(RUNS)
    maps = {"AutoConfig": "evil.Config", "AutoModelForSequenceClassification": "evil.Model", "AutoModel": "evil.Model"}
    config(auto_map=maps, model_type="evil")(folder)


def remote_tokenizer(folder: Path) -> None:
    """Name code of the folder in the config of the tokenizer."""
    (folder / "evil.py").write_text(RUNS)
    change = {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}, "tokenizer_class": "Tokenizer"}
    edited("tokenizer_config.json", lambda content: content.update(change))(folder)


def adapter(folder: Path) -> None:
    """Leave the adapter of LoRA alone in a folder."""
    without("config.json", "model.safetensors")(folder)
    written("adapter_config.json", json.dumps({"peft_type": "LORA", "base_model_name_or_path": "nobody/nothing"}))(
        folder
    )
    written("adapter_model.safetensors", "x")(folder)


def index(name: str) -> Change:
    """Return what replaces the weights by an index that names a file."""

    def edit(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
        names = {"classifier.weight": name, "classifier.bias": name}
        written("model.safetensors.index.json", json.dumps({"metadata": {}, "weight_map": names}))(folder)

    return edit


def gguf(content: bytes) -> Change:
    """Return what replaces a folder by a .gguf file in it."""

    def edit(folder: Path) -> None:
        shutil.rmtree(folder)
        folder.mkdir()
        (folder / "model.gguf").write_bytes(content)

    return edit


def _largest(content: dict[str, np.ndarray[Any, Any]]) -> str:
    """Return the name of the largest weight."""
    return max(content, key=lambda name: content[name].size)


def _nan(content: dict[str, np.ndarray[Any, Any]]) -> None:
    name = _largest(content)
    content[name] = np.full_like(content[name], np.nan)


def _other_shape(content: dict[str, np.ndarray[Any, Any]]) -> None:
    name = _largest(content)
    content[name] = np.zeros((3, 3), np.float32)


COMMON: tuple[tuple[str, Change, str], ...] = (
    ("no config", without("config.json"), "contains no config.json"),
    ("an empty config", written("config.json", ""), "config.json"),
    ("a config that is a list", written("config.json", "[]"), "config.json"),
    ("a deep config", written("config.json", DEEP), "config.json"),
    ("a config without a model", written("config.json", "{}"), "names neither"),
    ("a pipe as config", lambda folder: ((folder / "config.json").unlink(), os.mkfifo(folder / "config.json")), "FIFO"),
    ("no weights", without("model.safetensors"), ""),
    ("empty weights", weights(lambda content: b""), ""),
    ("truncated weights", weights(lambda content: content[: len(content) // 2]), ""),
    ("weights with a huge header", weights(lambda content: struct.pack("<Q", 2**60) + content[8:]), ""),
    ("weights that are a text", weights(lambda content: b"version https://git-lfs.github.com/spec/v1\n"), ""),
    ("weights that are NaN", tensors(_nan), "NaN or infinite"),
    ("a weight of another shape", tensors(_other_shape), ""),
    ("a weight is missing", tensors(lambda content: content.pop(_largest(content))), ""),
    ("pickled weights", pickled, ""),
    (
        "a link to itself as weights",
        lambda folder: ((folder / "model.safetensors").unlink(), special("loop")(folder / "model.safetensors")),
        "",
    ),
)
TIMM: tuple[tuple[str, Change, str], ...] = (
    *COMMON,
    ("an unknown architecture", config(architecture="vit_of_nobody"), "vit_of_nobody"),
    ("an architecture that is a number", config(architecture=3), "names neither"),
    ("another number of classes", config(num_classes=7), ""),
    ("classes below 0", config(num_classes=-1), ""),
    (
        "10^12 channels",
        config(model_args={"img_size": 32, "patch_size": 16, "embed_dim": 10**12, "depth": 2, "num_heads": 2}),
        "",
    ),
    (
        "0 heads",
        config(model_args={"img_size": 32, "patch_size": 16, "embed_dim": 16, "depth": 2, "num_heads": 0}),
        "num_heads",
    ),
    (
        "10^9 blocks",
        config(model_args={"img_size": 32, "patch_size": 16, "embed_dim": 16, "depth": 10**9, "num_heads": 2}),
        "depth",
    ),
    ("arguments that are a list", config(model_args=[1, 2]), ""),
    ("an unknown argument", config(model_args={"nothing": 1}), "nothing"),
    ("pictures of no channel", config(pretrained_cfg={"input_size": [0, 32, 32]}), ""),
    ("a mean that is a text", config(pretrained_cfg={"input_size": [3, 32, 32], "mean": "grey", "std": [1, 1, 1]}), ""),
    ("a deviation of 0", config(pretrained_cfg={"input_size": [3, 32, 32], "mean": [0, 0, 0], "std": [0, 0, 0]}), ""),
    ("an unknown interpolation", config(pretrained_cfg={"input_size": [3, 32, 32], "interpolation": "magic"}), ""),
)
TRANSFORMERS: tuple[tuple[str, Change, str], ...] = (
    *COMMON,
    ("an unknown model type", config(model_type="nobody"), ""),
    ("an unknown architecture", config(architectures=["Nobody"]), ""),
    ("code in the folder", remote_code, "custom code"),
    ("an adapter alone", adapter, ""),
    ("an index that names a path", index("../../etc/passwd"), ""),
    ("an index that names a missing file", index("model-00002-of-00002.safetensors"), ""),
    ("a width of 10^12", config(hidden_size=10**12), ""),
    ("a width below 0", config(hidden_size=-32), "hidden_size"),
    ("a width that is a text", config(hidden_size="32"), ""),
    ("heads that do not divide the width", config(num_attention_heads=5), ""),
    ("10^9 layers", config(num_hidden_layers=10**9), "num_hidden_layers"),
    ("another vocabulary", config(vocab_size=41), ""),
    ("an unknown activation", config(hidden_act="magic"), "magic"),
    ("a type of weights that is unknown", config(dtype="float7"), ""),
    ("names of classes that are a list", config(id2label=["a", "b"]), ""),
    ("names of three classes", config(id2label={"0": "a", "1": "b", "2": "c"}), ""),
    ("no tokenizer", without("tokenizer.json", "tokenizer_config.json"), "tokenizer"),
    ("a tokenizer that is empty", written("tokenizer.json", ""), ""),
    ("a tokenizer that is a list", written("tokenizer.json", "[]"), ""),
    ("a deep tokenizer", written("tokenizer.json", DEEP), ""),
    ("a padding token that is unknown", config(pad_token_id=99), ""),
)
PLAIN_WEIGHTS = config(quantization_config={"quant_method": "magic"})
USABLE_FOLDERS: tuple[tuple[str, str, str, Change, str], ...] = (
    (
        "code of the tokenizer in the folder",
        BERT,
        TEXTS,
        remote_tokenizer,
        "tokenizer.json is read and the code not run",
    ),
    ("a quantization that is unknown", BERT, TEXTS, PLAIN_WEIGHTS, "the weights are plain"),
    ("0 positions of rotary embeddings", LLAMA, LINES, config(max_position_embeddings=0), "they have no limit"),
    ("a generation config that is no JSON", LLAMA, LINES, written("generation_config.json", "{"), "logits need none"),
)
LANGUAGE: tuple[tuple[str, Change, str], ...] = (
    ("an empty .gguf", gguf(b""), "model.gguf"),
    ("a .gguf that is a text", gguf(b"no model at all"), "model.gguf"),
    ("a .gguf that ends in its header", gguf(b"GGUF" + struct.pack("<IQQ", 3, 1, 1)), "model.gguf"),
    ("a .gguf of 2^60 tensors", gguf(b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60)), "model.gguf"),
    ("a .gguf of version 99", gguf(b"GGUF" + struct.pack("<IQQ", 99, 0, 0)), "model.gguf"),
    ("more heads of keys than heads", config(num_key_value_heads=8), ""),
    ("rotary settings that are a text", config(rope_scaling="magic"), ""),
)
