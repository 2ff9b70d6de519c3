"""Loading of MODEL arguments: supported and rejected arguments; code in a checkpoint never runs."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from compressor.models import SAMPLE, ModelError, load
from compressor.models.base import first_line, hub_error_reason, load_error_reason
from compressor.models.pretrained.text import _Lengths, _text_example

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
module = torch.nn.Linear(8, 8)
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
    ("spec", "message"),
    [
        ("vit_basse_patch16_224", "did you mean vit_base_patch16_224"),
        ("deit-tiny", "did you mean deit_tiny"),
        ("qqqqqqqqqqqq", "expected a timm name, a hub id"),
        ("/no/such/folder", "there is no folder /no/such/folder"),
        ("./no_such", "there is no folder ./no_such"),
        ("vit_tiny_patch16_224.nonsense", "expected one of vit_tiny_patch16_224."),
    ],
)
def test_an_unknown_name_gets_a_suggestion(spec: str, message: str) -> None:
    with pytest.raises(ModelError) as caught:
        load(spec)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("m.onnx", "Compressor writes ONNX files"),
        ("m.pt", "may run code"),
        ("m.safetensors", "the folder"),
        ("m", "hub id"),
    ],
)
def test_a_file_is_rejected_with_the_argument_to_pass(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ModelError, match="is a file") as caught:
        load(tmp_path / name)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "contains no config.json"),
        ("{nope", "Invalid JSON"),
        ("[]", "should be an object, found a list"),
        ('{"architecture": 3}', "names neither"),
        ('{"architecture": "foo_bar"}', "foo_bar"),
        ('{"model_type": "strange"}', "strange"),
    ],
)
def test_a_folder_without_a_usable_config_is_rejected(tmp_path: Path, config: str | None, message: str) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(ModelError) as caught:
        load(tmp_path)
    assert message in str(caught.value)
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
    with pytest.raises(ModelError, match=r"its weight files have only 5,000 bytes; download them again, or"):
        load(whole.parent)
    whole.unlink()
    with pytest.raises(ModelError, match="could not load"):
        load(whole.parent)


@pytest.mark.parametrize("target", ["model.safetensors", "nowhere"])
def test_a_link_that_leads_nowhere_is_named(tmp_path: Path, target: str) -> None:
    weights = sample(tmp_path / "m", lambda _: None) / "model.safetensors"
    weights.unlink()
    weights.symlink_to(target)
    with pytest.raises(ModelError, match=r"model.safetensors is a link that leads nowhere; copy the model with"):
        load(weights.parent)


class Evil:
    """An object that creates a folder when it is unpickled."""

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
    torch.save({"a": Evil(tmp_path / "ran"), "b": torch.zeros(200_000)}, folder / "pytorch_model.bin")
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
        with pytest.raises(ModelError, match="contains custom code, which is not run; pass --trust-remote-code"):
            load(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("attribute", "message"),
    [
        ("nope", "has no attribute 'nope'"),
        ("number", "not callable"),
        ("module", "is a module of the class Linear; expected a function without arguments that returns (module, ex"),
        ("three", "returned int; expected an nn.Module"),
        ("fails", "RuntimeError: kaboom"),
        ("leaves", "SystemExit"),
        ("bare", "has no example inputs"),
        ("silent", "returned NoneType without tensors"),
        ("text", "example input x is str"),
        ("scalar", "example input x is of shape []"),
        ("many", "2 example inputs, but forward takes 1"),
        ("uneven", "different batch sizes"),
    ],
)
def test_a_factory_with_an_invalid_result_is_rejected(factories: Path, attribute: str, message: str) -> None:
    with pytest.raises(ModelError) as caught:
        load(f"own_factories:{attribute}")
    assert message in str(caught.value)


def test_a_factory_in_a_missing_module_is_refused() -> None:
    with pytest.raises(ModelError, match="No module named 'no_such_package'"):
        load("no_such_package:make")


def test_the_current_folder_has_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = sample(tmp_path / "my_vit", lambda _: None)
    monkeypatch.chdir(folder)
    assert load(".").name == load("../my_vit/../my_vit").name == "my_vit"


@pytest.mark.parametrize("nested", [True, False])
def test_preprocessing_that_a_timm_config_lacks_is_said(tmp_path: Path, nested: bool) -> None:
    timm = pytest.importorskip("timm")
    folder = tmp_path / "model"
    timm.models.save_for_hf(timm.create_model("test_vit", num_classes=3), folder)
    assert "preprocessing of the images" not in {each.feature for each in load(folder).limitations}
    config = json.loads((folder / "config.json").read_text())
    facts = config["pretrained_cfg"]
    for name in ("mean", "std", "crop_pct"):
        del facts[name]
    older = facts | {"architecture": config["architecture"], "num_classes": 3}
    (folder / "config.json").write_text(json.dumps(config if nested else older))
    features = {each.feature: each.reason for each in load(folder).limitations}
    assert features["preprocessing of the images"].startswith(
        "the config has no mean, std, crop_pct, so timm's defaults are assumed (mean 0.485 0.456 0.406, std 0.229 0"
    )


@pytest.mark.parametrize("attribute", ["good", "half"])
def test_a_factory_model_is_float32(factories: Path, attribute: str) -> None:
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


def test_an_unsupported_task_is_rejected() -> None:
    with pytest.raises(
        ModelError, match="does not support the task text-generation; expected image-classification or image-"
    ):
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
    assert load_error_reason(ValueError("plain")) == "plain"


def test_hub_errors_are_distinguished() -> None:
    errors = pytest.importorskip("huggingface_hub").errors
    offline = hub_error_reason(errors.LocalEntryNotFoundError("..."))
    assert offline is not None
    assert "cannot be reached" in offline
    assert hub_error_reason(errors.OfflineModeIsEnabled("...")) == offline
    assert hub_error_reason(ValueError("...")) is None
    outer = RuntimeError("outer")
    outer.__cause__ = ConnectionError("inner")
    assert hub_error_reason(outer) == offline


def test_a_hub_id_while_offline_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"'nobody/no-such-model' is not a local folder .* the hub cannot be reached"):
        load("nobody/no-such-model")


# ------------------------------------------------------------------------------------------------ transformers


SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 40,
    "max_position_embeddings": 32,
}
PICTURE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16} | {
    "image_size": 16,
    "patch_size": 8,
}
ROUND_TRIPS = [
    ("BertForMaskedLM", "BertConfig", SMALL, "feature-extraction", "BertModel", None),
    ("ViTForImageClassification", "ViTConfig", PICTURE, "image-feature-extraction", "ViTModel", None),
    ("ViTForImageClassification", "ViTConfig", PICTURE, None, "ViTForImageClassification", "image-classification"),
    ("CLIPVisionModel", "CLIPVisionConfig", PICTURE, None, "CLIPVisionModel", "image-feature-extraction"),
    (
        "T5EncoderModel",
        "T5Config",
        {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 40},
        None,
        "T5EncoderModel",
        "feature-extraction",
    ),
    (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 40, "n_positions": 32},
        None,
        "GPT2LMHeadModel",
        "text-generation",
    ),
    (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 40, "n_positions": 32},
        "feature-extraction",
        "GPT2Model",
        None,
    ),
]


def saved(folder: Path, kind: str, config: str, sizes: dict[str, int]) -> Path:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    getattr(transformers, kind)(getattr(transformers, config)(**sizes)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("kind", "config", "sizes", "task", "loaded", "expected_task"), ROUND_TRIPS)
def test_a_saved_model_loads_with_the_head_of_its_task(
    tmp_path: Path,
    kind: str,
    config: str,
    sizes: dict[str, int],
    task: str | None,
    loaded: str,
    expected_task: str | None,
) -> None:
    model = load(saved(tmp_path / "m", kind, config, sizes), task=task)
    assert model.task == (expected_task or task)
    assert type(model.module).__name__ == loaded
    with torch.inference_mode():
        answers = model.call(model.module, *model.example.values())
    assert len(answers) == len(model.outputs)
    assert all(torch.isfinite(answer).all() for answer in answers)
    assert load(tmp_path / "m", task=task, random_weights=True).random_weights


def test_the_body_of_a_model_with_a_head_keeps_its_weights(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = load(saved(tmp_path / "m", "BertForMaskedLM", "BertConfig", SMALL), task="feature-extraction")
    whole = transformers.BertForMaskedLM.from_pretrained(tmp_path / "m").eval()
    feeds = dict(zip(model.inputs, model.example.values(), strict=True))
    with torch.inference_mode():
        expected = whole.bert(**feeds).last_hidden_state
        torch.testing.assert_close(model.call(model.module, *feeds.values())[0], expected)


@pytest.mark.parametrize("name", ["AutoModel", "pipeline", "PretrainedConfig", "BertTokenizer", "no_such", "os"])
def test_a_name_in_the_config_selects_only_models(tmp_path: Path, name: str) -> None:
    folder = saved(tmp_path / "m", "BertModel", "BertConfig", SMALL)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"architectures": [name]}))
    assert type(load(folder, task="feature-extraction").module).__name__ == "BertModel"


@pytest.mark.parametrize("head", ["BertForPreTraining", "BertForMultipleChoice"])
def test_a_head_that_is_not_supported_is_refused_and_not_cut_off(tmp_path: Path, head: str) -> None:
    folder = saved(tmp_path / "m", head, "BertConfig", SMALL)
    with pytest.raises(
        ModelError, match=f"is a {head}, a head that is not supported; .* pass --task feature-extraction"
    ):
        load(folder)
    assert load(folder, task="feature-extraction").outputs == ("last_hidden_state",)


HIGGS = {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 24, "vocab_size": 40, "codebook_size": 20}
HIGGS |= dict.fromkeys(
    ("pad_token_id", "bos_token_id", "eos_token_id", "audio_token_id", "audio_bos_token_id", "audio_delay_token_id"), 3
)


@pytest.mark.parametrize(
    ("head", "config", "sizes", "task"),
    [
        ("HiggsAudioV2ForConditionalGeneration", "HiggsAudioV2Config", HIGGS, "feature-extraction"),
        ("MgpstrForSceneTextRecognition", "MgpstrConfig", {}, "image-feature-extraction"),
    ],
)
def test_a_refusal_of_a_head_names_task_only_if_it_helps(
    tmp_path: Path, head: str, config: str, sizes: dict[str, int], task: str
) -> None:
    """The automatic model of these types is the class with the head."""
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2} | sizes
    folder = saved(tmp_path / "m", head, config, small)
    with pytest.raises(ModelError, match=f"is a {head}, a head that is not supported; .*pass --task {task} to export"):
        load(folder)
    assert load(folder, task=task).outputs == ("logits",)


def test_a_refusal_of_pairs_of_images_names_no_task(tmp_path: Path) -> None:
    sizes = {"descriptor_dim": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    folder = saved(tmp_path / "m", "LightGlueForKeypointMatching", "LightGlueConfig", sizes)
    with pytest.raises(ModelError, match=r"a head that is not supported; pass it as a module of your") as refusal:
        load(folder)
    assert "--task" not in str(refusal.value)


def sentence(folder: Path, pooling: str) -> Path:
    """Save a model with the files of sentence-transformers."""
    saved(folder, "BertModel", "BertConfig", SMALL)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({f"pooling_mode_{pooling}": True}))
    kinds = {"": "Transformer", "1_Pooling": "Pooling"}
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds.items()]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 7}))
    return folder


def as_hub(cache: Path, folder: Path, revision: str) -> None:
    """Copy a folder into a hub cache, in the layout of the hub client, as nobody/sentences at one revision."""
    repository = cache / "models--nobody--sentences"
    commit = revision.encode().hex().ljust(40, "0")[:40]
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / revision).write_text(commit)


def test_a_sentence_model_on_the_hub_is_read_like_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    as_hub(tmp_path / "cache", sentence(tmp_path / "cls", "cls_token"), "main")
    as_hub(tmp_path / "cache", sentence(tmp_path / "mean", "mean_tokens"), "v2")
    as_hub(tmp_path / "cache", saved(tmp_path / "plain", "BertModel", "BertConfig", SMALL), "plain")
    for revision, folder in ((None, "cls"), ("v2", "mean")):
        model, local = load("nobody/sentences", revision=revision), load(tmp_path / folder)
        assert model.task == local.task == "sentence-similarity"
        assert model.revision == revision
        with torch.inference_mode():
            embeddings = [each.call(each.module, *each.example.values())[1] for each in (model, local)]
        torch.testing.assert_close(*embeddings)
        (tmp_path / f"out-{folder}").mkdir()
        model.save(tmp_path / f"out-{folder}")
        assert (tmp_path / f"out-{folder}" / "1_Pooling" / "config.json").read_bytes() == (
            tmp_path / folder / "1_Pooling" / "config.json"
        ).read_bytes()
    assert load("nobody/sentences", revision="plain").task == "feature-extraction"


def test_the_maximum_length_of_a_sentence_model_is_read_from_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = pytest.importorskip("compressor.models.pretrained.text")
    processors = pytest.importorskip("compressor.models.pretrained.processors")
    folder = sentence(tmp_path / "m", "mean_tokens")
    requests = []

    def cached_file(location: str, name: str, *, revision: str | None, **flags: bool) -> str | None:
        requests.append((location, name, revision))
        assert flags["_raise_exceptions_for_missing_entries"] is False
        return str(folder / name) if (folder / name).is_file() else None

    monkeypatch.setattr(processors.transformers.utils, "cached_file", cached_file)
    model = load(folder)
    requests.clear()
    monkeypatch.setattr(processors.Path, "is_dir", lambda _: False)  # so that the files are requested from the hub
    sentence_files = text.sentence_transformers.find_files(
        partial(processors.optional_file, "nobody/sentences", revision="v1")
    )
    assert set(requests) == {
        ("nobody/sentences", name, "v1") for name in (*sentence_files, "config_sentence_transformers.json")
    }
    assert set(sentence_files) == {"modules.json", "sentence_bert_config.json", "1_Pooling/config.json"}
    tokenizer = type("Tokenizer", (), {"model_max_length": 512})
    assert text.max_length(model.module, tokenizer, sentence_files) == 7
    assert text.max_length(model.module, tokenizer, {}) == SMALL["max_position_embeddings"]


def test_a_cross_encoder_is_a_classifier(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", "BertForSequenceClassification", "BertConfig", SMALL)
    (folder / "config_sentence_transformers.json").write_text("{}")
    assert load(folder).task == "text-classification"


# ------------------------------------------------------------------------------------------------ options


def test_options_that_do_not_apply_to_a_model_are_rejected(factories: Path, tmp_path: Path) -> None:
    x = torch.ones(1, 3)
    with pytest.raises(ModelError, match=r"own_factories:good is code, not a hub repository.* leave --revision out"):
        load("own_factories:good", revision="v1")
    with pytest.raises(ModelError, match=r"sets its weights in its own code; leave --random-weights out"):
        load("own_factories:good", random_weights=True)
    with pytest.raises(ModelError, match=r"Sum is code"):
        load(Sum(), example_inputs=(x, x), revision="v1")
    with pytest.raises(ModelError, match=r"Sum sets its weights in its own code"):
        load(Sum(), example_inputs=(x, x), random_weights=True)
    with pytest.raises(ModelError, match=r"vit_tiny_patch16_224 is not a hub id, so it has no revision 'v1'"):
        load("vit_tiny_patch16_224", revision="v1")
    with pytest.raises(ModelError, match=r"is a local folder, so it has no revision 'v1'; leave --revision out"):
        load(saved(tmp_path / "m", "BertModel", "BertConfig", SMALL), revision="v1")


def test_a_timm_model_of_the_hub_keeps_its_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    source = pytest.importorskip("compressor.models.timm")
    requests, module = [], source.timm.create_model("test_vit", pretrained=False)

    def create_model(name: str, *, pretrained: bool) -> torch.nn.Module:
        requests.append((name, pretrained))
        return module

    monkeypatch.setattr(source.timm, "create_model", create_model)
    model = source.load("hf-hub:nobody/vit", task=None, revision="v1", random_weights=False, trust_remote_code=False)
    assert requests == [("hf-hub:nobody/vit@v1", True)]
    assert model.revision == "v1"


def test_the_current_folder_is_on_the_path_only_while_the_factory_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "json.py").write_text("raise SystemExit('shadowed')\n")
    (tmp_path / "here_factories.py").write_text(f"import json, sys\nseen = sys.path[-1]\n{FACTORIES}")
    monkeypatch.delitem(sys.modules, "here_factories", raising=False)
    before = list(sys.path)
    assert load("here_factories:good").inputs == ("x",)
    assert sys.modules["here_factories"].seen == str(tmp_path)
    assert sys.path == before
    with pytest.raises(ModelError, match="kaboom"):
        load("here_factories:fails")
    assert sys.path == before


@pytest.mark.parametrize("beside", ["nothing", "the base"])
def test_an_adapter_is_refused_with_the_call_that_merges_it(tmp_path: Path, beside: str) -> None:
    """transformers without peft loads the base and leaves the adapter out without a word."""
    folder = tmp_path / "lora"
    if beside == "the base":
        shutil.copytree(SAMPLE, folder)
    else:
        folder.mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "owner/base"}')
    (folder / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match=r"lora is an adapter of peft for owner/base, .* merge_and_unload"):
        load(folder)
    with pytest.raises(ModelError, match=r"is an adapter of peft, .* merge_and_unload"):
        load(folder / "adapter_model.safetensors")


def test_an_adapter_on_the_hub_is_refused_with_the_call_that_merges_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    config = tmp_path / "adapter_config.json"
    config.write_text('{"base_model_name_or_path": "owner/base"}')

    def download(spec: str, name: str, **_: object) -> str:
        if name == config.name:
            return str(config)
        raise EntryNotFoundError.__new__(EntryNotFoundError)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(ModelError, match=r"owner/adapter is an adapter of peft for owner/base"):
        load("owner/adapter")


def test_a_classifier_that_fails_on_its_own_sizes_is_refused_in_a_sentence(tmp_path):
    import transformers

    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=8
    )
    module = transformers.ViTForImageClassification(config)
    module.save_pretrained(tmp_path)
    model = load(str(tmp_path))
    model.module.vit.embeddings.position_embeddings = torch.nn.Parameter(torch.zeros(1, 3, 16))
    with pytest.raises(ModelError, match=r"fails on inputs of its own sizes, pixel_values \[2, 3, 16, 16\]"):
        model.classes()


def test_a_config_without_the_size_of_its_vocabulary_is_refused():
    """The token ids of the example are drawn from the vocabulary."""
    config = SimpleNamespace(get_text_config=SimpleNamespace)
    with pytest.raises(ModelError, match=r"config of a SimpleNamespace has no vocab_size.*package\.module:factory"):
        _text_example(SimpleNamespace(config=config), ("input_ids", "attention_mask"), _Lengths(3, None, None))
