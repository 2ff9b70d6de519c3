"""Models and data that do not fit together are refused before anything is measured."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import compressor
from compressor import models
from compressor.data.splits import Data
from compressor.errors import CompressorError
from compressor.lower import traced_model
from compressor.lower.trace import TraceError
from compressor.lower.traced_model import SubjectError, load
from compressor.models import SAMPLE, Model
from compressor.settings import Settings
from compressor.workspace.progress import Steps
from tests.text_models import save_model


class Answering(torch.nn.Module):
    """A residual branch and a head with `outputs` outputs, on vectors of 4."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.head = torch.nn.Linear(4, 4), torch.nn.Linear(4, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x + torch.relu(self.inner(x)))


def checked(model: Model, data: object, **options: Any) -> Data:
    return traced_model.load_data(Settings(model="any", data=str(data), **options), model, lambda done, total: None)


def vectors(folder: Path) -> Path:
    np.savez(folder / "x.npz", x=np.random.default_rng(0).standard_normal((12, 4)).astype(np.float32))
    return folder / "x.npz"


def pictures(folder: Path, classes: int) -> Path:
    for label in range(classes):
        (folder / f"c{label:02}").mkdir(parents=True)
        for number in range(2):
            Image.new("L", (8, 8), 20 * label + number).save(folder / f"c{label:02}" / f"{number}.png")
    return folder


def test_a_single_output_is_no_classifier(tmp_path: Path) -> None:
    model = models.load(Answering(1), example_inputs=torch.zeros(2, 4))
    with pytest.raises(SubjectError) as refusal:
        checked(model, vectors(tmp_path))
    assert str(refusal.value) == (
        "Answering has a single output, so it predicts no class; pass --problem-type regression if the output is a "
        "number, or multi_label_classification if it is the logit or the "
        "probability of a yes or no."
    )
    assert checked(model, "random", drop="1").random
    features = models.load(Answering(1), example_inputs=torch.zeros(2, 4), task="feature-extraction")
    assert len(checked(features, vectors(tmp_path)).test) > 0
    two = models.load(Answering(2), example_inputs=torch.zeros(2, 4))
    assert len(checked(two, vectors(tmp_path)).test) > 0


def test_a_single_label_of_the_hub_is_a_regression(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.BertConfig(**sizes, vocab_size=40, num_labels=1)
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "m")
    np.save(tmp_path / "ids.npy", np.arange(48, dtype=np.int64).reshape(6, 8) % 40)
    model = models.load(tmp_path / "m")
    assert model.problem_type == "regression"
    assert len(checked(model, tmp_path / "ids.npy").test) > 0
    features = models.load(tmp_path / "m", task="feature-extraction")
    assert len(checked(features, tmp_path / "ids.npy").test) > 0


@pytest.mark.parametrize("classes", [2, 9])
def test_class_names_that_are_neither_the_models_nor_as_many_are_refused(tmp_path: Path, classes: int) -> None:
    folder = pictures(tmp_path / "part", classes)
    with pytest.raises(SubjectError) as refusal:
        checked(models.load(None), folder)
    assert str(refusal.value) == (
        f"{folder} has {classes} class names ({', '.join(f'c{label:02}' for label in range(min(classes, 5)))}"
        f"{', ...' if classes > 5 else ''}), but sample has 10 classes and has other names for them (0, 1, 2, 3, 4, "
        "...); give its names or numbers as labels, or no labels to compare the result with the original."
    )


def test_all_class_folders_and_other_forms_of_labels_are_accepted(tmp_path: Path) -> None:
    sample = models.load(None)
    assert checked(sample, pictures(tmp_path / "all", 10)).label_kind == "class"
    assert checked(sample, SAMPLE / "digits.npz", samples=12).label_kind == "class"
    pixels = np.zeros((6, 8, 8), np.uint8)
    np.savez(tmp_path / "few.npz", images=pixels, labels=np.array([3, 3, 5, 5, 3, 5]))
    assert checked(sample, tmp_path / "few.npz").label_kind == "class"
    flat = tmp_path / "flat"
    flat.mkdir()
    for number in range(4):
        Image.new("L", (8, 8), number).save(flat / f"{number}.png")
    assert checked(sample, flat).label_kind is None
    features = models.load(None, task="image-feature-extraction")
    found = checked(features, pictures(tmp_path / "part", 3))  # features are not measured with classes
    assert found.label_kind is None
    assert [each.feature for each in found.limitations] == ["labels"]


def test_too_high_labels_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images=np.zeros((6, 8, 8), np.uint8), labels=np.full(6, 10))
    with pytest.raises(SubjectError, match="labels up to 10, but sample has only 10 classes"):
        checked(models.load(None), tmp_path / "x.npz")


def test_the_revision_of_the_model_is_not_passed_to_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    revisions: list[object] = []
    original = traced_model.data_module.load

    def load(spec: str, preprocess: Any, *, revision: str | None, **options: Any) -> Data:
        revisions.append(revision)
        return original(spec, preprocess, revision=revision, **options)

    monkeypatch.setattr(traced_model.data_module, "load", load)
    checked(models.load(None), SAMPLE / "digits.npz", revision="v1")
    assert revisions == [None]


def test_class_names_of_a_table_or_array_that_are_not_as_many_are_refused(tmp_path: Path) -> None:
    """Before, only folders were counted, and two names of three classes were numbered 0 and 1."""
    model = models.load(Answering(3), example_inputs=torch.zeros(2, 4))
    x = np.zeros((6, 4), np.float32)
    np.savez(tmp_path / "x.npz", x=x, labels=np.array(["yes", "no"] * 3))
    with pytest.raises(SubjectError, match=r"2 class names \(no, yes\), but Answering has 3 classes and does not name"):
        checked(model, tmp_path / "x.npz")
    np.savez(tmp_path / "x.npz", x=x, labels=np.array(["yes", "no", "maybe"] * 2))
    assert checked(model, tmp_path / "x.npz").limitations[0].feature == "class order"


@pytest.mark.parametrize("kind", ["Mamba", "Rwkv"])
def test_a_refusal_names_no_cache_only_if_it_helps(kind: str, tmp_path: Path) -> None:
    """The advice of the sentence is followed: the export that it names works."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2}
    sizes |= {"state_size": 4} if kind == "Mamba" else {"context_length": 32}
    config = getattr(transformers, f"{kind}Config")(**sizes)
    getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(tmp_path / "m")
    settings = Settings(model=str(tmp_path / "m"), data="random", samples=12, drop="none")
    without = replace(settings, cache=False)
    with pytest.raises(CompressorError, match="the KV cache of m could not be detected") as refusal:
        traced_model.load(settings, Steps(None))
    if kind == "Mamba":
        assert "; pass --no-cache to export without a cache, so every new token" in str(refusal.value)
        assert len(traced_model.load(without, Steps(None)).sites) == 2
        return
    with pytest.raises(TraceError, match=r"; pass --no-cache --sequence-length N to export it for N tok") as other:
        traced_model.load(without, Steps(None))
    assert str(refusal.value).endswith(f", and without one, {other.value}")


def test_one_score_for_a_regression_of_two_numbers_is_refused(tmp_path: Path) -> None:
    model = replace(models.load(Answering(2), example_inputs=torch.zeros(2, 4)), problem_type="regression")
    values = np.random.default_rng(0).standard_normal((12, 4)).astype(np.float32)
    np.savez(tmp_path / "one.npz", x=values, labels=values[:, 0])
    with pytest.raises(SubjectError, match=r"has one number for each sample, but Answering predicts 2, of which"):
        checked(model, tmp_path / "one.npz")
    np.savez(tmp_path / "none.npz", x=values)
    assert len(checked(model, tmp_path / "none.npz").test) > 0


def test_a_classifier_that_does_not_pool_its_tokens_is_refused_and_its_features_are_not(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2, "global_pool": ""}
    module = timm.create_model("vit_tiny_patch16_224", num_classes=3, **sizes)
    module.pretrained_cfg["input_size"] = (3, 8, 8)
    timm.models.save_for_hf(module, tmp_path / "m", model_args=sizes)
    settings = Settings(model=str(tmp_path / "m"), data="random", samples=8, drop="1")
    with pytest.raises(SubjectError, match=r"returns logits of 5 x 3 values for each sample; .*--task image-feature-e"):
        traced_model.load(settings, Steps(None))
    features = traced_model.load(replace(settings, task="image-feature-extraction"), Steps(None))
    assert len(features.sites) == 2


class Mixing(torch.nn.Module):
    """Attentions that a sum, a gate or a part of the tokens take up, and an MLP in a plain residual branch."""

    def __init__(self, rule: str) -> None:
        super().__init__()
        self.rule, self.head, self.gate = rule, torch.nn.Linear(8, 4), torch.nn.Linear(8, 8)
        self.attn, self.mlp = torch.nn.MultiheadAttention(8, 2, batch_first=True), torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, gate = self.attn(x, x, x, need_weights=False)[0], torch.sigmoid(self.gate(x))
        if self.rule == "gate":
            x = gate * x + (1 - gate) * y
        elif self.rule == "part":
            x = torch.cat([x[:, :1], x[:, 1:] + y[:, 1:]], 1)
        else:
            x = x + y
        return self.head((x + self.mlp(x).relu() if self.rule != "gate" else x).mean(1))


def mixing(rule: str, folder: Path, **options: Any) -> Settings:
    np.savez(folder / "x.npz", x=np.random.default_rng(0).standard_normal((12, 5, 8)).astype(np.float32))
    inputs = torch.zeros(2, 5, 8)
    return Settings(model=Mixing(rule), example_inputs=inputs, data=str(folder / "x.npz"), **options)


def test_attentions_outside_of_branches_are_a_limitation(tmp_path: Path) -> None:
    found = traced_model.load(mixing("part", tmp_path), Steps(None))
    assert [site.name for site in found.sites] == ["mlp"]
    (said,) = [each.reason for each in found.data.limitations if each.feature == "attentions outside of branches"]
    assert said.startswith(
        "1 of 1 attention (attn): in no residual branch, so they are not listed, dropped or replaced"
    )
    covered = traced_model.load(mixing("sum", tmp_path), Steps(None))
    assert [site.name for site in covered.sites] == ["attn", "mlp"]
    assert not any(each.feature == "attentions outside of branches" for each in covered.data.limitations)


def test_a_model_of_gates_is_refused_by_export_and_inspect_with_its_attentions(tmp_path: Path) -> None:
    match = r"Mixing has no residual branch .*; 1 attention \(attn\) is outside of any\. .*--drop none"
    with pytest.raises(SubjectError, match=match):
        traced_model.load(mixing("gate", tmp_path, drop="1"), Steps(None))
    settings = mixing("gate", tmp_path)
    with pytest.raises(SubjectError, match=match):
        compressor.inspect(settings.model, example_inputs=settings.example_inputs, data=settings.data)
    assert traced_model.load(mixing("gate", tmp_path, drop="none"), Steps(None)).sites == ()


GIT = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
    "vision_config": {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
        "image_size": 32, "patch_size": 16,
    },
}  # fmt: skip


def test_a_model_that_branches_on_an_empty_cache_is_told_to_leave_it_out(tmp_path):
    """Once GIT's cache holds tokens, its mask counts those of an image in front."""
    folder = save_model(tmp_path, "GitForCausalLM", "GitConfig", **GIT)
    options = {"model": str(folder), "data": "random", "drop": "none"}
    with pytest.raises(SubjectError, match=r"empty cache than with tokens in it .*; pass --no-cache to export"):
        load(Settings(**options), Steps(None))
    assert not load(Settings(**options, cache=False), Steps(None)).model.state
