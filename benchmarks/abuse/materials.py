"""The smallest models, data and exports with which commands run, made once; each case works on copies of them."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

MODULE, MODULE_DATA = "tiny:make", "tiny.npz"
VIT, IMAGES = "vit", "images"
BERT, TEXTS = "bert", "texts.csv"
LLAMA, LINES = "llama", "lines.txt"
OUT = "room/out"  # the output of a case; whatever else lies in its folder afterwards is litter
SAMPLES, CLASSES, FEATURES, WIDTH = 24, 4, 8, 16
SOURCE = f'''"""A residual network of three branches."""
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x):
        return x + self.mlp(self.norm(x))


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Linear({FEATURES}, {WIDTH})
        self.blocks = nn.Sequential(*(Block({WIDTH}) for _ in range(3)))
        self.head = nn.Linear({WIDTH}, {CLASSES})

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)))


def make():
    torch.manual_seed(0)
    return Tiny(), torch.randn(2, {FEATURES})
'''


@dataclass(frozen=True)
class Materials:
    """The folder of all materials; a case gets copies."""

    root: Path

    @property
    def deferred(self) -> Path:
        """The output of an export with a deferred build."""
        return self.root / "deferred"

    @property
    def built(self) -> Path:
        """The output of an export with its engine, by another plan."""
        return self.root / "built"

    def workspace(self, *names: str) -> Path:
        """Return a new folder with copies of the named materials, and an empty folder for the output."""
        folder = Path(tempfile.mkdtemp(prefix="case.", dir=self.root))
        (folder / OUT).parent.mkdir()
        for name in names:
            file = "tiny.py" if name == MODULE else name
            source = self.root / file
            copy = shutil.copytree if source.is_dir() else shutil.copyfile
            copy(source, folder / file)
        return folder


def beside(output: Path) -> set[str]:
    """Return the names of everything beside an output."""
    return {path.name for path in output.parent.iterdir()} - {output.name}


def make_module(root: Path) -> Materials:
    """Make the module and its data alone, which takes no time."""
    (root / "tiny.py").write_text(SOURCE)
    np.savez(root / MODULE_DATA, x=rows(), labels=labels())
    return Materials(root)


def make(root: Path) -> Materials:
    """Make the models and the data."""
    made, chance = make_module(root), np.random.default_rng(0)
    _vision_transformer(root / VIT)
    _images(root / IMAGES)
    _text_model(root / BERT, "BertForSequenceClassification", "BertConfig", num_labels=2)
    _text_model(root / LLAMA, "LlamaForCausalLM", "LlamaConfig", num_key_value_heads=2)
    texts = [" ".join(chance.choice(list("abcdefgh"), 6)) for _ in range(SAMPLES)]
    lines = [f"{text},{number % 2}" for number, text in enumerate(texts)]
    (root / TEXTS).write_text("\n".join(["text,label", *lines, ""]))
    (root / LINES).write_text("\n".join([*texts, ""]))
    return made


def rows() -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """Return the inputs of the module, [samples, features]."""
    return np.random.default_rng(0).standard_normal((SAMPLES, FEATURES)).astype(np.float32)


def labels() -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Return the classes of these inputs, [samples]."""
    return np.arange(SAMPLES) % CLASSES


def _vision_transformer(folder: Path) -> None:
    """Save a folder of timm with random weights."""
    import timm
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    args = {"img_size": 32, "patch_size": 16, "embed_dim": 16, "depth": 2, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=2, **args)
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    facts = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 2, "model_args": args, "pretrained_cfg": facts}
    (folder / "config.json").write_text(json.dumps(config))


def _images(folder: Path) -> None:
    """Save pictures in the folders of two classes."""
    chance = np.random.default_rng(0)
    for label in ("0", "1"):
        (folder / label).mkdir(parents=True)
        for number in range(SAMPLES // 2):
            picture(chance.integers(0, 256, (32, 32, 3))).save(folder / label / f"{number:02}.png")


def picture(values: np.ndarray[Any, Any]) -> Image.Image:
    """Return an array of pixels as a picture."""
    return Image.fromarray(values.astype(np.uint8))


def _text_model(folder: Path, name: str, config: str, **options: int) -> None:
    """Save a folder of transformers with random weights and a tokenizer of letters."""
    from tests.text_models import SIZES, save_letters, save_model

    save_letters(folder, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    save_model(folder, name, config, **SIZES, pad_token_id=3, bos_token_id=1, eos_token_id=2, **options)
