"""`bench` refuses models that prepare samples, or number their classes, otherwise than the first."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models._hub import save_config_for_hf

from compressor import models
from compressor.benchmark.bench import bench
from compressor.benchmark.bench_settings import BenchSettings
from compressor.benchmark.contenders import BenchError
from compressor.benchmark.equal_inputs import check_equal_inputs
from compressor.lower.traced_model import load_data
from compressor.models.class_names import ClassNames
from compressor.settings import Settings
from tests.text_models import SIZES, save_letters, save_model

ARGUMENTS = {"img_size": 32, "embed_dim": 16, "depth": 1, "num_heads": 2}


def vit(folder: Path, label_names: list[str], **preprocessing: object) -> str:
    """Save a ViT of timm; return its path."""
    folder.mkdir()
    torch.manual_seed(0)
    module = timm.create_model("vit_tiny_patch16_224", num_classes=3, **ARGUMENTS)
    module.pretrained_cfg = {**module.pretrained_cfg, "input_size": (3, 32, 32), **preprocessing}
    save_config_for_hf(module, folder / "config.json", {"model_args": ARGUMENTS, "label_names": label_names})
    save_file(module.state_dict(), folder / "model.safetensors")
    return str(folder)


@pytest.fixture
def pictures(tmp_path: Path) -> str:
    file = tmp_path / "pictures"
    for number in range(12):
        (file / f"class{number % 3}").mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(number).integers(0, 256, (3, 40, 40), np.uint8)
        np.save(file / f"class{number % 3}" / f"{number}.npy", noise)
    return str(file)


@pytest.mark.parametrize(
    ("preprocessing", "words"),
    [
        ({}, None),
        ({"mean": (0.1, 0.1, 0.1)}, r"b prepares samples otherwise \(the input pixel_values of sample"),
        ({"crop_pct": 0.5}, "prepares samples otherwise"),
        ({"label_names": ["class2", "class1", "class0"]}, "gives the class 'class0' the number 2, not 0"),
    ],
    ids=["the same", "mean", "crop", "classes"],
)
def test_a_model_with_other_inputs_or_classes_is_refused(
    preprocessing: dict[str, object], words: str | None, pictures: str, tmp_path: Path
) -> None:
    names: dict[str, Any] = {"label_names": ["class0", "class1", "class2"]}
    first, other = vit(tmp_path / "a", **names), vit(tmp_path / "b", **(names | preprocessing))
    ours, theirs = models.load(first), models.load(other)
    few = partial(load_data, Settings(first, pictures, drop="none"), tick=lambda *_, **__: None)
    if words is None:
        check_equal_inputs("a", ours, {"b": theirs}, few)
        return
    with pytest.raises(BenchError, match=words):
        check_equal_inputs("a", ours, {"b": theirs}, few)
    with pytest.raises(BenchError, match="or give --data random to compare speed alone"):
        bench(BenchSettings((first, other), data=pictures, rounds=1, output=tmp_path / "bench.json"))
    assert not (tmp_path / "bench.json").exists()


def test_models_with_other_tokenizers_or_labels_are_refused(tmp_path: Path) -> None:
    """The tokens are compared without data, as the tasks of lm-eval have data of their own."""
    folders = [save_model(tmp_path / name, "BertForSequenceClassification", "BertConfig", **SIZES) for name in "ab"]
    save_letters(folders[0], unk_token="<unk>", pad_token="<pad>")
    save_letters(folders[1], unk_token="<unk>", pad_token="<pad>", suffix=True)
    ours, theirs = (models.load(folder) for folder in folders)
    with pytest.raises(BenchError, match="b tokenizes texts otherwise, but all engines of a run"):
        check_equal_inputs("a", ours, {"b": theirs}, None)
    with pytest.raises(BenchError, match="predicts a multi label classification, not a single label classification"):
        check_equal_inputs("a", ours, {"b": replace(ours, problem_type="multi_label_classification")}, None)
    check_equal_inputs("a", ours, {"b": replace(ours, class_names=ClassNames((("x",),)))}, None)
