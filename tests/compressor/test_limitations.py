"""What an export lacks is said: in the terminal, in report.json, on the page and in the card, with the reason."""

import html
import json
import logging
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from compressor import models
from compressor.cli.param_types import drop_messages_about_insides
from compressor.data.splits import load as load_data
from compressor.errors import DataError, SettingsError
from compressor.limitations import Limitation, listed
from compressor.pipeline import export
from compressor.quantize.precision import Trial
from compressor.report.collect_limitations import limitations_of, of_engine
from compressor.settings import Settings
from tests.samples import worded

BERT = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 40,
    "max_position_embeddings": 32,
}  # fmt: skip


def features(limitations):
    return [limitation.feature for limitation in limitations]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return worded(tmp_path_factory.mktemp("llama"), vocabulary=40)


@pytest.fixture(scope="module")
def exported(llama, tmp_path_factory):
    """A language model exported without its cache, on texts."""
    folder = tmp_path_factory.mktemp("out")
    rng = np.random.default_rng(0)
    texts = folder / "texts.txt"
    texts.write_text("\n".join(" ".join(f"w{token}" for token in rng.integers(3, 40, 20)) for _ in range(12)))
    settings = Settings(
        model=str(llama), data=str(texts), drop="attention:1", output=str(folder / "small"), rounds=1, cache=False
    )
    return export.export(settings), folder / "small"


def test_a_limitation_is_in_table_report_page_and_card(exported):
    report, folder = exported
    (found,) = [each for each in report.limitations if each.feature == "KV cache"]
    assert str(found) == "KV cache: left out by --no-cache, so every new token recomputes the whole text."
    assert f"- {found}" in report.summary()
    stored = json.loads((folder / "report.json").read_text())["limitations"]
    assert {"feature": found.feature, "reason": found.reason} in stored
    for name in ("report.html", "README.md"):
        text = html.unescape((folder / name).read_text())
        assert all(limitation["feature"] in text and limitation["reason"] in text for limitation in stored), name


def test_without_a_cache_there_is_none_in_the_file(exported):
    import onnx

    model = onnx.load(exported[1] / "model.onnx")
    names = [end.name for end in (*model.graph.input, *model.graph.output)]
    assert names == ["input_ids", "attention_mask", "logits"]


def test_generation_behind_no_cache_is_refused(llama):
    with pytest.raises(SettingsError, match="found --generate and --no-cache"):
        Settings(model=str(llama), data="texts.txt", generate="8:8", cache=False)


def test_nothing_is_printed_where_there_is_nothing_to_say():
    assert listed(()) == []
    assert listed([Limitation("tokenizer", "none")]) == ["Limitations:", "- tokenizer: none."]


# --------------------------------------------------------------------------------------------------------- of the model


def saved(folder, **files):
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(**BERT)).save_pretrained(folder)
    for name, text in files.items():
        (folder / f"{name}.json").write_text(text)
    return folder


def test_a_folder_without_a_tokenizer_gets_none_made_up(tmp_path):
    """transformers makes one up of five special tokens, for which every word is unknown."""
    model = models.load(saved(tmp_path))
    assert model.tokenizer is None
    assert "tokenizer" in features(model.limitations)
    (tmp_path / "texts.txt").write_text("one\ntwo\nthree\n")
    with pytest.raises(DataError, match="has no tokenizer"):
        load_data(str(tmp_path / "texts.txt"), model.preprocess, task=model.task)


@pytest.mark.parametrize(("name", "what"), [("tokenizer", "tokenizer"), ("tokenizer_config", "tokenizer")])
def test_a_tokenizer_that_cannot_be_read_is_not_taken_for_none(tmp_path, name, what):
    with pytest.raises(models.ModelError, match=rf"the {what} of .* cannot be read \({name}.json: "):
        models.load(saved(tmp_path, **{name: "{"}))


def test_an_image_processor_that_cannot_be_read_is_not_taken_for_none(tmp_path):
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=8
    )
    transformers.ViTModel(config).save_pretrained(tmp_path)
    assert features(models.load(tmp_path).limitations) == ["preprocessing", "image size"]
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(models.ModelError, match=r"the image processor of .* cannot be read"):
        models.load(tmp_path)


def test_sizes_that_the_config_does_not_say_are_said_to_be_assumed(tmp_path):
    config = transformers.ResNetConfig(hidden_sizes=[8, 8], depths=[1, 1], embedding_size=8, layer_type="basic")
    transformers.ResNetModel(config).save_pretrained(tmp_path)
    found = models.load(tmp_path, task="image-feature-extraction").limitations
    assert "image_size of the config" in features(found)
    assert any("224" in each.reason for each in found)


def test_an_end_token_that_pads_and_a_limit_that_is_not_known_are_said(llama):
    found = features(models.load(llama).limitations)
    assert "padding token" in found
    assert "length" not in found  # the config has 64 positions


def test_weights_that_have_no_place_are_said(tmp_path):
    torch.manual_seed(0)
    transformers.BertForMaskedLM(transformers.BertConfig(**BERT)).save_pretrained(tmp_path)
    (found,) = [
        each
        for each in models.load(tmp_path, task="feature-extraction").limitations
        if each.feature == "weights left out"
    ]
    assert "cls.predictions" in found.reason


class Several(torch.nn.Module):
    """Two tensors, and a tuple of others."""

    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(4, 4)

    def forward(self, x):
        y = x + self.inner(x)
        return {"state": y, "mean": y.mean(-1, keepdim=True), "hidden": (y, y), "loss": None}


def test_of_ones_own_module_it_is_said_what_is_left_out_and_assumed():
    model = models.load(Several(), example_inputs=torch.rand(2, 4))
    told = {each.feature: each.reason for each in model.limitations}
    assert told["outputs left out"].startswith("hidden (tuple)")
    assert told["judged output"].startswith("state, the first of 2")
    assert "text-classification" in told["task"]
    assert "4" in told["shape of x"]
    asked = models.load(Several(), example_inputs=torch.rand(2, 4), task="feature-extraction")
    assert "task" not in features(asked.limitations)


# ---------------------------------------------------------------------------------------------------------- of the data


def read(path, model, task=None):
    return load_data(str(path), model.preprocess, task=task or model.task).limitations


@pytest.fixture(scope="module")
def sample():
    return models.load()


def test_class_folders_are_said_to_be_numbered_in_sorted_order(tmp_path, sample):
    for name in ("cat", "bird"):
        (tmp_path / name).mkdir()
        for number in range(3):
            Image.new("L", (8, 8), number).save(tmp_path / name / f"{number}.png")
    (tmp_path / "cat" / "notes.txt").write_text("not a picture")
    found = {each.feature: each.reason for each in read(tmp_path, sample)}
    assert "bird = 0, cat = 1" in found["class order"]
    assert found["files of the data"].startswith("1 of 7 not read because of their extension (.txt)")


def test_class_names_in_a_table_and_columns_that_are_not_read_are_said(tmp_path, llama):
    model = models.load(llama, task="feature-extraction")
    rows = "".join(f"w{number},{'yes' if number % 2 else 'no'},x{number}\n" for number in range(3, 15))
    (tmp_path / "named.csv").write_text(f"text,label,origin\n{rows}")
    found = {each.feature: each.reason for each in read(tmp_path / "named.csv", model, "text-classification")}
    assert "no = 0, yes = 1" in found["class order"]
    assert found["columns of the data"] == "'origin' not read"
    (tmp_path / "other.csv").write_text(f"text,mood,origin\n{rows}")
    found = {each.feature: each.reason for each in read(tmp_path / "other.csv", model, "text-classification")}
    assert found["columns of the data"] == "'mood', 'origin' not read; no column is used as label"


def test_arrays_beside_the_images_are_not_left_out(tmp_path, sample):
    images = np.zeros((6, 8, 8), np.uint8)
    np.savez(tmp_path / "data.npz", images=images, target=np.arange(6))
    with pytest.raises(DataError, match="holds target beside images; expected labels as labels or y"):
        read(tmp_path / "data.npz", sample)


def test_masks_that_token_ids_come_without_are_said_to_be_assumed(tmp_path, llama):
    np.save(tmp_path / "ids.npy", np.ones((6, 5), np.int64))
    assert features(read(tmp_path / "ids.npy", models.load(llama))) == ["input attention_mask"]


# -------------------------------------------------------------------------------------- of precision, engine and labels


def subject(metric="accuracy", kind="class", task="image-classification"):
    empty = types.SimpleNamespace(limitations=(), label_kind=kind, task=task)
    return types.SimpleNamespace(model=empty, data=empty, metric=metric)


BUILT = {"state": "built", "layers": {"count": 3, "precisions": {}, "kinds": {}, "fused_attention": True}}


def test_labels_that_the_task_is_not_judged_by_are_said():
    assert not list(limitations_of(subject(), "fp32", {}, (), BUILT))
    (found,) = limitations_of(subject("agreement", "score"), "fp32", {}, (), BUILT)
    assert (found.feature, "score labels" in found.reason) == ("labels", True)
    assert not list(limitations_of(subject("spearman", "score"), "fp32", {}, (), BUILT))


def test_a_precision_that_fell_back_or_was_not_measured_is_said():
    slow = Trial("int8", 2.0, 0.9, 0.1, "not faster than fp32")
    assert features(limitations_of(subject(), "fp32", {}, (slow,), BUILT)) == ["precision"]
    blind = Trial("int4", 1.0, 2.0, None, "chosen")
    assert features(limitations_of(subject(), "int4", {}, (blind,), BUILT)) == ["loss of the precisions"]


def test_layers_that_stay_in_float_are_named():
    kept = [types.SimpleNamespace(module=f"blocks.{number}", node="n") for number in range(7)]
    converted = {"result": types.SimpleNamespace(quantized=types.SimpleNamespace(kept=kept))}
    (found,) = limitations_of(subject(), "int8", converted, (), BUILT)
    assert found.reason.startswith("7 layers")
    assert found.reason.endswith("blocks.4 and 2 more")


@pytest.mark.parametrize(
    ("precision", "counts", "said"),
    [
        ("fp16", {"fp32": 9, "other": 1}, ["fp16"]),
        ("fp16", {"fp32": 9, "fp16": 1}, []),
        ("int8-dynamic", {"fp32": 9}, ["int8-dynamic"]),
        ("int8", {"unknown": 9}, []),
        ("fp32", {"fp32": 9}, []),
    ],
)
def test_a_precision_that_no_layer_computes_in_is_said(precision, counts, said):
    """OpenVINO stores weights in 16 bits and computes in 32 where the processor has no other arithmetic."""
    engine = {"state": "built", "layers": BUILT["layers"] | {"precisions": counts}}
    assert features(limitations_of(subject(), precision, {}, (), engine)) == said


@pytest.mark.parametrize("saturating", [True, False])
def test_products_that_saturate_on_this_processor_are_said(saturating, monkeypatch):
    """Only where ONNX Runtime computed them: as the target, or in the place of one that is elsewhere."""
    monkeypatch.setattr("compressor.quantize.saturation.int8_saturates", lambda: saturating)
    expected = ["exact int8 products"] if saturating else []
    for engine in (BUILT | {"target": "onnxruntime_fused"}, {"state": "deferred", "target": "tensorrt"}):
        assert features(limitations_of(subject(), "int8-dynamic", {}, (), engine)) == expected
    for precision, target in (("int8", "openvino"), ("fp32", "onnxruntime")):
        assert not list(limitations_of(subject(), precision, {}, (), BUILT | {"target": target}))


@pytest.mark.parametrize(
    ("layers", "feature"),
    [
        (None, "layers of the engine"),
        ({"unknown": "no profile."}, "layers of the engine"),
        (BUILT["layers"] | {"fused_attention": False}, "fused attention"),
    ],
)
def test_what_an_engine_does_not_tell_or_fuse_is_said(layers, feature):
    assert features(of_engine({"state": "built", "layers": layers})) == [feature]
    assert not list(of_engine({"state": "deferred"}))


# ------------------------------------------------------------------------------------------------ messages of libraries


@pytest.mark.parametrize("which", ["sample", "llama"])
def test_standard_error_holds_nothing_but_ours(which, llama, tmp_path):
    """With torchao installed, importing transformers logs two lines about enums."""
    pytest.importorskip("torchao")
    command = [sys.executable, "-m", "compressor", "inspect", "--quiet", "--samples", "6", "-o", str(tmp_path / "out")]
    if which == "llama":
        (tmp_path / "texts.txt").write_text("\n".join("w3 w4 w5 w6" for _ in range(6)))
        command += [str(llama), "--data", str(tmp_path / "texts.txt")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_other_messages_of_the_same_logger_pass(caplog):
    drop_messages_about_insides()
    logger = logging.getLogger("torch.utils._pytree")
    logger.propagate, before = True, logger.propagate
    try:
        logger.warning("Calling register_constant() on Enum subclasses is deprecated")
        logger.warning("something about your model")
    finally:
        logger.propagate = before
    assert [record.getMessage() for record in caplog.records] == ["something about your model"]
