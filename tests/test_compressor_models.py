"""From a MODEL argument to a model: what loads, what is refused, and that nothing a checkpoint brings is executed."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compressor.models import SAMPLE, ModelError, load
from compressor.models.base import first_line, of_hub, why

FACTORIES = """
import torch

class Residual(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(8, 8)

    def forward(self, x):
        return x + torch.relu(self.inner(x))

class Silent(Residual):
    def forward(self, x):
        return None

X = torch.zeros(2, 8)
number = 5
def good(): return Residual(), X
def half(): return Residual().half(), X.half()
def bare(): return Residual()
def three(): return 3
def fails(): raise RuntimeError("kaboom")
def leaves(): raise SystemExit(0)
def silent(): return Silent(), X
def text(): return Residual(), "abc"
def scalar(): return Residual(), torch.tensor(3.0)
def many(): return Residual(), (X, X)
def uneven(): return Residual(), {"x": X, "y": X[:1]}
"""


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "own_factories.py").write_text(FACTORIES)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def sample(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    folder.mkdir()
    weights = load_file(SAMPLE / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(SAMPLE / "config.json", folder)
    return folder


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("vit_basse_patch16_224", "did you mean vit_base_patch16_224"),
        ("deit-tiny", "did you mean deit_tiny"),
        ("qqqqqqqqqqqq", "expected a timm name, a hub id"),
        ("/no/such/folder", "there is no folder /no/such/folder"),
        ("./no_such", "there is no folder ./no_such"),
        ("vit_tiny_patch16_224.nonsense", "expected one of vit_tiny_patch16_224."),
    ],
)
def test_an_unknown_name_gets_a_suggestion(spec: str, words: str) -> None:
    with pytest.raises(ModelError) as caught:
        load(spec)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [("m.onnx", "what Compressor writes"), ("m.pt", "may run code"), ("m.safetensors", "the folder"), ("m", "hub id")],
)
def test_a_file_is_no_model_and_the_sentence_says_what_to_pass(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ModelError, match="is a file") as caught:
        load(tmp_path / name)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (None, "holds no config.json"),
        ("{nope", "cannot be read as JSON"),
        ("[]", "names neither"),
        ('{"architecture": 3}', "names neither"),
        ('{"architecture": "foo_bar"}', "foo_bar"),
        ('{"model_type": "strange"}', "strange"),
    ],
)
def test_a_folder_without_a_usable_config_is_refused(tmp_path: Path, config: str | None, words: str) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(ModelError) as caught:
        load(tmp_path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_damaged_checkpoints_are_named(tmp_path: Path) -> None:
    def poison(weights: dict[str, torch.Tensor]) -> None:
        weights["head.weight"][0, :2] = torch.tensor([float("nan"), float("inf")])

    with pytest.raises(ModelError, match=r"2 of 640 values of head.weight are NaN or infinite"):
        load(sample(tmp_path / "nan", poison))
    with pytest.raises(ModelError, match=r"[Mm]issing key.*head.weight"):
        load(sample(tmp_path / "missing", lambda weights: weights.pop("head.weight")))
    whole = sample(tmp_path / "short", lambda _: None) / "model.safetensors"
    whole.write_bytes(whole.read_bytes()[:5000])
    with pytest.raises(ModelError, match="could not load"):
        load(whole.parent)
    whole.unlink()
    with pytest.raises(ModelError, match="could not load"):
        load(whole.parent)


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("kind", ["timm", "transformers"])
def test_a_pickle_that_runs_code_is_refused_and_not_run(tmp_path: Path, kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "model"
    folder.mkdir()
    if kind == "timm":
        shutil.copy(SAMPLE / "config.json", folder)
    else:
        transformers.BertConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=1).save_pretrained(folder)
    torch.save({"a": Evil(tmp_path / "ran")}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="are a pickle that runs code when it is read, which is refused"):
        load(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("model_type", ["bert", "strange"])
def test_a_repositorys_own_code_is_not_run(tmp_path: Path, model_type: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        num_hidden_layers=1, hidden_size=8, num_attention_heads=1, intermediate_size=8, vocab_size=20
    )
    folder = tmp_path / "model"
    transformers.BertModel(config).save_pretrained(folder)
    content = json.loads((folder / "config.json").read_text())
    own = {"auto_map": {"AutoConfig": "own.C", "AutoModel": "own.M"}, "model_type": model_type}
    (folder / "config.json").write_text(json.dumps(content | own))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    if model_type == "bert":
        assert type(load(folder).module).__name__ == "BertModel"
    else:
        with pytest.raises(ModelError, match="brings code of its own, which is not run; pass --trust-remote-code"):
            load(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("attribute", "words"),
    [
        ("nope", "has no attribute 'nope'"),
        ("number", "not callable"),
        ("three", "returned int; expected an nn.Module"),
        ("fails", "RuntimeError: kaboom"),
        ("leaves", "SystemExit"),
        ("bare", "without example inputs"),
        ("silent", "returned NoneType without tensors"),
        ("text", "example input x is str"),
        ("scalar", "example input x is the shape []"),
        ("many", "2 example inputs, but forward takes 1"),
        ("uneven", "different numbers of samples"),
    ],
)
def test_a_factory_that_gives_something_else_is_refused(factories: Path, attribute: str, words: str) -> None:
    with pytest.raises(ModelError) as caught:
        load(f"own_factories:{attribute}")
    assert words in str(caught.value)


def test_a_factory_in_a_missing_module_is_refused() -> None:
    with pytest.raises(ModelError, match="No module named 'no_such_package'"):
        load("no_such_package:make")


@pytest.mark.parametrize("attribute", ["good", "half"])
def test_a_factory_gives_a_float32_model(factories: Path, attribute: str) -> None:
    model = load(f"own_factories:{attribute}")
    assert model.inputs == ("x",)
    assert model.example["x"].dtype == torch.float32
    assert not model.module.training


class Sum(torch.nn.Module):
    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a + b


@pytest.mark.parametrize("form", ["tuple", "list", "dict"])
def test_a_module_takes_its_example_inputs_in_any_form(form: str) -> None:
    x = torch.ones(1, 3)
    inputs = {"tuple": (x, x), "list": [x, x], "dict": {"a": x, "b": x}}[form]
    model = load(Sum(), example_inputs=inputs)
    assert model.inputs == ("a", "b")
    assert model.example["a"].shape == (2, 3)


def test_a_task_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ModelError, match="cannot do text-generation; expected image-classification or image-feature"):
        load(None, task="text-generation")
    with pytest.raises(ModelError, match="text-generation needs input_ids"):
        load(Sum(), example_inputs=(torch.ones(1, 3), torch.ones(1, 3)), task="text-generation")
    with pytest.raises(ModelError, match="unknown task 'flying'"):
        load(None, task="flying")


def test_the_reason_of_an_error_is_one_readable_line() -> None:
    assert first_line(ValueError("Error in loading:\n\tMissing key(s): a.\n more")) == (
        "Error in loading: Missing key(s): a"
    )
    assert first_line(ValueError("x" * 300)).endswith("x ...")
    assert first_line(ValueError("")) == "ValueError"
    assert why(ValueError("plain")) == "plain"


def test_the_hubs_errors_are_told_apart() -> None:
    errors = pytest.importorskip("huggingface_hub").errors
    offline = of_hub(errors.LocalEntryNotFoundError("..."))
    assert offline is not None
    assert "cannot be reached" in offline
    assert of_hub(errors.OfflineModeIsEnabled("...")) == offline
    assert of_hub(ValueError("...")) is None
    outer = RuntimeError("outer")
    outer.__cause__ = ConnectionError("inner")
    assert of_hub(outer) == offline


def test_a_hub_id_while_offline_says_so_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"'nobody/no-such-model' is no local folder .* the hub cannot be reached"):
        load("nobody/no-such-model")
