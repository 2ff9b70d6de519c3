"""Limitations of an export appear in the terminal, in report.json, on the page and in the model card."""

import html
import json
import logging
import subprocess
import sys
import types
from functools import partial

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import compressor
from compressor import models
from compressor.cli.param_types import filter_library_logs
from compressor.data.splits import load as load_data
from compressor.errors import DataError, SettingsError
from compressor.limitations import Limitation, format_limitations
from compressor.measure import latency
from compressor.models.weights.stored_dtypes import as_stored
from compressor.pipeline import export
from compressor.quality import chance
from compressor.quantize.precision import Converted, Trial
from compressor.quantize.qdq_rewrite import Kept
from compressor.report.collect_limitations import limitations_of, of_engine, of_sweep, of_weight_types
from compressor.settings import Settings
from runtimes.base.timing import interleave
from tests.samples import DIGITS, five_blocks, worded

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
    """Export a language model without its cache, on texts."""
    folder = tmp_path_factory.mktemp("out")
    rng = np.random.default_rng(0)
    texts = folder / "texts.txt"
    texts.write_text("\n".join(" ".join(f"w{token}" for token in rng.integers(3, 40, 20)) for _ in range(12)))
    settings = Settings(
        model=str(llama), data=str(texts), drop="attention:1", output=str(folder / "small"), rounds=1, cache=False
    )
    return export.export(settings), folder / "small"


def test_a_limitation_is_in_terminal_report_page_and_card(exported):
    report, folder = exported
    (limitation,) = [each for each in report.limitations if each.feature == "KV cache"]
    assert str(limitation) == "KV cache: left out by --no-cache, so every new token recomputes the whole text."
    assert f"- {limitation}" in report.summary()
    stored = json.loads((folder / "report.json").read_text())["limitations"]
    assert {"feature": limitation.feature, "reason": limitation.reason} in stored
    for name in ("report.html", "README.md"):
        text = html.unescape((folder / name).read_text())
        assert all(entry["feature"] in text and entry["reason"] in text for entry in stored), name


def test_an_export_without_a_cache_has_no_cache_inputs(exported):
    import onnx

    model = onnx.load(exported[1] / "model.onnx")
    names = [end.name for end in (*model.graph.input, *model.graph.output)]
    assert names == ["input_ids", "attention_mask", "logits"]


def test_generate_with_no_cache_is_rejected(llama):
    with pytest.raises(SettingsError, match="found --generate and --no-cache"):
        Settings(model=str(llama), data="texts.txt", generate="8:8", cache=False)


def test_nothing_is_listed_without_limitations():
    assert format_limitations(()) == []
    assert format_limitations([Limitation("tokenizer", "none")]) == ["Limitations:", "- tokenizer: none."]


# --------------------------------------------------------------------------------------------------------- of the model


def saved(folder, **files):
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(**BERT)).save_pretrained(folder)
    for name, text in files.items():
        (folder / f"{name}.json").write_text(text)
    return folder


def test_a_folder_without_a_tokenizer_has_no_tokenizer(tmp_path):
    """transformers would create one with five special tokens, for which every word is unknown."""
    model = models.load(saved(tmp_path))
    assert model.tokenizer is None
    assert "tokenizer" in features(model.limitations)
    (tmp_path / "texts.txt").write_text("one\ntwo\nthree\n")
    with pytest.raises(DataError, match="has no tokenizer"):
        load_data(str(tmp_path / "texts.txt"), model.preprocess, task=model.task)


@pytest.mark.parametrize(("name", "kind"), [("tokenizer", "tokenizer"), ("tokenizer_config", "tokenizer")])
def test_a_tokenizer_that_cannot_be_read_is_an_error(tmp_path, name, kind):
    with pytest.raises(models.ModelError, match=rf"the {kind} of .* cannot be read \({name}.json: "):
        models.load(saved(tmp_path, **{name: "{"}))


def test_an_image_processor_that_cannot_be_read_is_an_error(tmp_path):
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=8
    )
    transformers.ViTModel(config).save_pretrained(tmp_path)
    assert features(models.load(tmp_path).limitations) == ["preprocessing", "image size"]
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(models.ModelError, match=r"the image processor of .* cannot be read"):
        models.load(tmp_path)


def test_assumed_image_sizes_are_a_limitation(tmp_path):
    config = transformers.ResNetConfig(hidden_sizes=[8, 8], depths=[1, 1], embedding_size=8, layer_type="basic")
    transformers.ResNetModel(config).save_pretrained(tmp_path)
    limitations = models.load(tmp_path, task="image-feature-extraction").limitations
    assert "image_size of the config" in features(limitations)
    assert any("224" in limitation.reason for limitation in limitations)


def test_padding_with_the_end_token_is_a_limitation(llama):
    names = features(models.load(llama).limitations)
    assert "padding token" in names
    assert "length" not in names  # the config has 64 positions


def test_unused_weights_are_a_limitation(tmp_path):
    torch.manual_seed(0)
    transformers.BertForMaskedLM(transformers.BertConfig(**BERT)).save_pretrained(tmp_path)
    (limitation,) = [
        each
        for each in models.load(tmp_path, task="feature-extraction").limitations
        if each.feature == "weights left out"
    ]
    assert "cls.predictions" in limitation.reason


class Several(torch.nn.Module):
    """A module with two output tensors and a tuple of tensors."""

    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(4, 4)

    def forward(self, x):
        y = x + self.inner(x)
        return {"state": y, "mean": y.mean(-1, keepdim=True), "hidden": (-y, 3.5), "loss": None}


def test_limitations_of_a_user_defined_module():
    model = models.load(Several(), example_inputs=torch.rand(2, 4))
    reasons = {limitation.feature: limitation.reason for limitation in model.limitations}
    assert model.outputs == ("state", "mean", "hidden.0")
    assert reasons["outputs left out"].startswith("hidden.1 (float)")
    assert reasons["judged output"].startswith("state, the first of 3")
    assert "text-classification" in reasons["task"]
    assert "4" in reasons["shape of x"]
    with_task = models.load(Several(), example_inputs=torch.rand(2, 4), task="feature-extraction")
    assert "task" not in features(with_task.limitations)


# ---------------------------------------------------------------------------------------------------------- of the data


def read(path, model, task=None):
    return load_data(str(path), model.preprocess, task=task or model.task).limitations


@pytest.fixture(scope="module")
def sample():
    return models.load()


def test_the_numbering_of_class_folders_is_a_limitation(tmp_path, sample):
    for name in ("cat", "bird"):
        (tmp_path / name).mkdir()
        for number in range(3):
            Image.new("L", (8, 8), number).save(tmp_path / name / f"{number}.png")
    (tmp_path / "cat" / "notes.txt").write_text("not a picture")
    reasons = {each.feature: each.reason for each in read(tmp_path, sample)}
    assert "bird = 0, cat = 1" in reasons["class order"]
    assert reasons["files of the data"].startswith("1 of 7 not read because of their extension (.txt)")


def test_class_names_and_unread_columns_of_a_table_are_limitations(tmp_path, llama):
    model = models.load(llama, task="feature-extraction")
    rows = "".join(f"w{number},{'yes' if number % 2 else 'no'},x{number}\n" for number in range(3, 15))
    (tmp_path / "named.csv").write_text(f"text,label,origin\n{rows}")
    reasons = {each.feature: each.reason for each in read(tmp_path / "named.csv", model, "text-classification")}
    assert "no = 0, yes = 1" in reasons["class order"]
    assert reasons["columns of the data"] == "'origin' not read"
    (tmp_path / "other.csv").write_text(f"text,mood,origin\n{rows}")
    reasons = {each.feature: each.reason for each in read(tmp_path / "other.csv", model, "text-classification")}
    assert reasons["columns of the data"] == "'mood', 'origin' not read; no column is used as label"


def test_arrays_beside_the_images_are_an_error(tmp_path, sample):
    images = np.zeros((6, 8, 8), np.uint8)
    np.savez(tmp_path / "data.npz", images=images, target=np.arange(6))
    with pytest.raises(DataError, match="holds target beside images; expected labels as labels or y"):
        read(tmp_path / "data.npz", sample)


def test_an_assumed_attention_mask_is_a_limitation(tmp_path, llama):
    np.save(tmp_path / "ids.npy", np.arange(30).reshape(6, 5))
    assert features(read(tmp_path / "ids.npy", models.load(llama))) == ["input attention_mask"]


# -------------------------------------------------------------------------------------- of precision, engine and labels


def subject(metric="accuracy", kind="class", task="image-classification"):
    empty = types.SimpleNamespace(limitations=(), label_kind=kind, task=task, dtypes={})
    return types.SimpleNamespace(model=empty, data=empty, metric=metric)


BUILT = {"state": "built", "layers": {"count": 3, "precisions": {}, "kinds": {}, "fused_attention": True}}


def test_labels_that_the_metric_does_not_use_are_a_limitation():
    assert not list(limitations_of(subject(), "fp32", {}, (), BUILT))
    (limitation,) = limitations_of(subject("agreement", "score"), "fp32", {}, (), BUILT)
    assert (limitation.feature, "score labels" in limitation.reason) == ("labels", True)
    assert not list(limitations_of(subject("spearman", "score"), "fp32", {}, (), BUILT))


def test_a_fallback_or_unmeasured_precision_is_a_limitation():
    slow = Trial("int8", 2.0, 0.9, 0.1, "not faster than fp32")
    assert features(limitations_of(subject(), "fp32", {}, (slow,), BUILT)) == ["precision"]
    blind = Trial("int4", 1.0, 2.0, None, "chosen")
    assert features(limitations_of(subject(), "int4", {}, (blind,), BUILT)) == ["loss of the precisions"]


@pytest.mark.parametrize(
    ("count", "start", "end"),
    [
        (
            7,
            "7 layers compute in float: blocks.0 (LSTM is not quantized), ",
            "blocks.4 (LSTM is not quantized) and 2 more",
        ),
        (1, "1 layer computes in float: ", ": blocks.0 (LSTM is not quantized)"),
    ],
)
def test_float_layers_are_named_with_their_reason(count, start, end):
    kept = [Kept("n", f"blocks.{number}", "LSTM is not quantized") for number in range(count)]
    inner = types.SimpleNamespace(kept=kept)
    converted = {"result": Converted("int8", "compressor", 0.1, inner)}
    (limitation,) = limitations_of(subject(), "int8", converted, (), BUILT)
    assert limitation.reason.startswith(start)
    assert limitation.reason.endswith(end)


@pytest.mark.parametrize(
    ("precision", "counts", "expected"),
    [
        ("fp16", {"fp32": 9, "other": 1}, ["fp16"]),
        ("fp16", {"fp32": 9, "fp16": 1}, []),
        ("int8-dynamic", {"fp32": 9}, ["int8-dynamic"]),
        ("int8", {"unknown": 9}, []),
        ("fp32", {"fp32": 9}, []),
    ],
)
def test_a_precision_that_no_layer_uses_is_a_limitation(precision, counts, expected):
    """OpenVINO stores fp16 weights, but computes in fp32 on a processor without fp16 arithmetic."""
    engine = {"state": "built", "layers": BUILT["layers"] | {"precisions": counts}}
    assert features(limitations_of(subject(), precision, {}, (), engine)) == expected


def test_layers_beyond_fp16_are_named_with_their_largest_value():
    kept = tuple(Kept(f"node{number}", f"blocks.{number}", "largest value 5.5e+05") for number in range(2))
    converted = {"result": Converted("fp16", "compressor", 0.1, float32=kept)}
    (limitation,) = limitations_of(subject(), "fp16", converted, (), BUILT)
    assert limitation.feature == "fp16 of all layers"
    assert limitation.reason.startswith("2 layers stay in float32, because fp16 ends at 65,504")
    assert limitation.reason.endswith("blocks.0 (largest value 5.5e+05), blocks.1 (largest value 5.5e+05)")


def test_a_package_that_failed_to_quantize_is_a_limitation():
    facts = Converted("int8", "compressor", 0.1, refused={"nncf": "NNCF cannot quantize f.onnx: no such operator."})
    (limitation,) = limitations_of(subject(), "int8", {"result": facts}, (), BUILT)
    assert limitation.feature == "int8 by nncf"
    assert limitation.reason == "not compared with Compressor's (NNCF cannot quantize f.onnx: no such operator)"


def test_an_unmeasured_loss_and_an_emulated_device_are_limitations():
    deferred = {"state": "deferred", "target": "tensorrt"}
    half, int8 = Converted("fp16", "compressor", None), Converted("int8", "compressor", 0.1, rest="fp16")
    expected = ["loss of the precision", "fp16 on the device"]
    assert features(limitations_of(subject(), "fp16", {"result": half}, (), deferred)) == expected
    assert features(limitations_of(subject(), "int8", {"result": int8}, (), deferred)) == ["int8 on the device"]
    assert features(limitations_of(subject(), "fp16", {"result": half}, (), BUILT)) == ["loss of the precision"]


@pytest.fixture(scope="module")
def halved(tmp_path_factory):
    """Return a language model that is stored as bfloat16, and texts for it."""
    folder = tmp_path_factory.mktemp("halved")
    worded(folder, vocabulary=40)
    transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    rng = np.random.default_rng(0)
    texts = folder / "texts.txt"
    texts.write_text("\n".join(" ".join(f"w{token}" for token in rng.integers(3, 40, 20)) for _ in range(12)))
    return folder, texts


@pytest.mark.parametrize("command", ["inspect", pytest.param("sweep", marks=pytest.mark.slow), "bench"])
def test_weight_types_are_said_by_every_command(command, halved, tmp_path, monkeypatch):
    """A random model is no better than chance, which is not what is tested."""
    folder, texts = halved
    monkeypatch.setattr(chance, "METRICS", ())
    monkeypatch.setattr(latency, "interleave", partial(interleave, burst_seconds=0.001, warmup_seconds=0.001))
    if command == "inspect":
        found = compressor.inspect(folder, data=texts)
        sentences = [str(each) for each in found.limitations]
    elif command == "sweep":
        swept = {"cost": "macs", "actions": "drop", "points": 2, "rounds": 1, "max_loss": 1e6, "cache": False}
        front = compressor.sweep(folder, data=texts, **swept, output=tmp_path / "front")
        sentences = [str(each) for each in front.limitations]
        assert json.loads((tmp_path / "front" / "sweep.json").read_text())["limitations"]
    else:
        done = compressor.bench(folder, data=texts, rounds=1, cache=False, output=tmp_path / "bench.json")
        sentences = list(done.notes)
        assert any(sentence.startswith("KV cache: left out by --no-cache") for sentence in sentences)
    assert sum("bfloat16" in sentence and "float32" in sentence for sentence in sentences) == 1


def test_a_sweep_names_the_points_that_do_not_share_a_limitation():
    kept = Kept("node", "blocks.1", "largest value 5.5e+05")
    plain, partly = Converted("fp16", "compressor", 0.1), Converted("fp16", "compressor", 0.1, float32=(kept,))
    unmeasured = Converted("fp16", "compressor", None)
    assert not list(of_sweep(subject(), "fp16", "tensorrt", {"0": plain, "3": plain}))
    (some,) = of_sweep(subject(), "fp16", "tensorrt", {"0": plain, "3": partly, "5": partly})
    assert some.feature == "fp16 of all layers at points 3, 5"
    (alone,) = of_sweep(subject(), "fp16", "tensorrt", {"0": plain, "3": partly})
    assert alone.feature == "fp16 of all layers at point 3"
    (shared,) = of_sweep(subject(), "fp16", "tensorrt", {"0": unmeasured, "3": unmeasured})
    assert shared.feature == "loss of the precision"
    (labels,) = of_sweep(subject("agreement", "score"), "fp32", "onnxruntime", {})
    assert labels.feature == "labels"


@pytest.mark.parametrize("saturating", [True, False])
def test_saturating_int8_products_are_a_limitation(saturating, monkeypatch):
    """Only ONNX Runtime is affected, as the target or as the reference of a deferred target."""
    monkeypatch.setattr("compressor.target.saturation.int8_saturates", lambda: saturating)
    expected = ["exact int8 products"] if saturating else []
    for engine in (BUILT | {"target": "onnxruntime_fused"}, {"state": "deferred", "target": "tensorrt"}):
        assert features(limitations_of(subject(), "int8", {}, (), engine)) == expected
    for precision, target in (("int8", "openvino"), ("fp32", "onnxruntime")):
        assert not list(limitations_of(subject(), precision, {}, (), BUILT | {"target": target}))


@pytest.mark.parametrize(
    ("precision", "target", "shared"),
    [
        ("int8-dynamic", "onnxruntime", True),
        ("int8-dynamic", "onnxruntime_mobile", True),
        ("int8-dynamic", "executorch", False),
        ("int8", "onnxruntime", False),
    ],
)
def test_scales_that_the_rows_of_a_batch_share_are_a_limitation(precision, target, shared, monkeypatch):
    monkeypatch.setattr("compressor.target.saturation.int8_saturates", lambda: False)
    expected = ["outputs of a row alone"] if shared else []
    assert features(limitations_of(subject(), precision, {}, (), BUILT | {"target": target})) == expected
    known = {"result": Converted(precision, "compressor", 0.1)}
    assert features(of_sweep(subject(), precision, target, known)) == expected


@pytest.mark.parametrize(
    ("layers", "feature"),
    [
        (None, "layers of the engine"),
        ({"unknown": "no profile."}, "layers of the engine"),
        (BUILT["layers"] | {"fused_attention": False}, "fused attention"),
    ],
)
def test_limitations_of_an_engine(layers, feature):
    assert features(of_engine({"state": "built", "layers": layers})) == [feature]
    assert not list(of_engine({"state": "deferred"}))


# ------------------------------------------------------------------------------------------------ messages of libraries


@pytest.mark.parametrize("which", ["sample", pytest.param("llama", marks=pytest.mark.slow)])
def test_standard_error_has_no_messages_of_libraries(which, llama, tmp_path):
    """With torchao installed, importing transformers logs two lines about enums."""
    pytest.importorskip("torchao")
    command = [sys.executable, "-m", "compressor", "inspect", "--quiet", "--samples", "6", "-o", str(tmp_path / "out")]
    if which == "llama":
        (tmp_path / "texts.txt").write_text("\n".join("w3 w4 w5 w6" for _ in range(6)))
        command += [str(llama), "--data", str(tmp_path / "texts.txt")]
    else:
        command += [five_blocks(tmp_path / "model", kept=(0, 9)), "--data", DIGITS]
    completed = subprocess.run(command, capture_output=True, text=True, check=True)
    assert completed.stderr == ""


def test_a_tried_input_that_torch_logs_is_not_shown(llama, tmp_path):
    """With --max-memory, a mask of 2 x 2 for 3 tokens is tried, which torch logs with a traceback."""
    (tmp_path / "texts.txt").write_text("\n".join(f"w3 w4 w5 w{number}" for number in range(6, 12)))
    command = [sys.executable, "-m", "compressor", "inspect", "--quiet", "--max-memory", "64GiB"]
    command += [str(llama), "--data", str(tmp_path / "texts.txt"), "-o", str(tmp_path / "out")]
    completed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "run meta for" not in completed.stderr
    assert completed.returncode == 0, completed.stderr


def test_other_messages_of_the_same_logger_pass():
    filter_library_logs()
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("torch.utils._pytree")  # releases of torch differ in whether it propagates
    logger.addHandler(handler)
    try:
        logger.warning("Calling register_constant() on Enum subclasses is deprecated")
        logger.warning("something about your model")
    finally:
        logger.removeHandler(handler)
    assert messages == ["something about your model"]


@pytest.mark.parametrize("wide", [False, True])
def test_weights_of_float64_are_not_said_to_keep_their_type(wide):
    """A checkpoint is written from float32 weights, which cannot give float64 its digits back."""
    dtypes = {"a": torch.bfloat16, "b": torch.float64 if wide else torch.float32}
    (found,) = of_weight_types(types.SimpleNamespace(dtypes=dtypes), "", target="transformers")
    assert "they are written in these types" in found.reason
    assert (", float64 as float32" in found.reason) == wide
    stored = as_stored(torch.zeros(2), dtypes["b"])
    assert stored.dtype == torch.float32
