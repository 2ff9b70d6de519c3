"""Tests of the counts in a config, which are checked before the model is built, and of files that are no files."""

import json
import os
import re
import socket

import numpy as np
import pytest
import timm
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file

from compressor.data.readers import read
from compressor.data.splits import load as load_data
from compressor.errors import DataError
from compressor.models import ModelError, load
from compressor.models.preprocess import Preprocess
from compressor.models.weights import config_checks
from compressor.models.weights.config_checks import check_counts, check_parameters
from compressor.workspace.plan_file import PlanFileError, given_plan
from compressor.workspace.special_files import special_kind

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
HUGE = 100_000_000


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A small model of each library, in its folder."""
    parent = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(vocab_size=32, **SMALL)).save_pretrained(parent / "transformers")
    args = {"img_size": 32, "embed_dim": 16, "depth": 1, "num_heads": 2}
    module = timm.create_model("vit_tiny_patch16_224", num_classes=5, **args)
    (parent / "timm").mkdir()
    save_file(module.state_dict(), parent / "timm" / "model.safetensors")
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 5, "model_args": args}
    (parent / "timm" / "config.json").write_text(json.dumps(config | {"pretrained_cfg": {"input_size": [3, 32, 32]}}))
    return parent


def changed(folders, library, tmp_path, name, value):
    """Return a copy of a folder with another value in its config; the weights are linked."""
    folder = tmp_path / library
    folder.mkdir()
    os.link(folders / library / "model.safetensors", folder / "model.safetensors")
    config = json.loads((folders / library / "config.json").read_text())
    (config if library == "transformers" else config["model_args"])[name] = value
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(("names", "kind"), [(["cat", "dog"], "list"), ("cat", "str")])
def test_classes_as_a_list_are_refused_by_their_field(folders, tmp_path, names, kind):
    """transformers says that a list has no attribute items."""
    folder = changed(folders, "transformers", tmp_path, "id2label", names)
    with pytest.raises(ModelError, match=rf"id2label of its config\.json is a {kind}; expected a mapping, such as"):
        load(folder)


def test_a_missing_shard_is_named_with_what_to_do(tmp_path):
    module = transformers.BertModel(transformers.BertConfig(vocab_size=32, **SMALL))
    module.save_pretrained(tmp_path, max_shard_size="4KB")
    sorted(tmp_path.glob("model-*.safetensors"))[1].unlink()
    with pytest.raises(
        ModelError, match=r"model-00002-of-\d+\.safetensors, which another .* copy the whole model again"
    ):
        load(tmp_path)


@pytest.mark.parametrize("library", ["transformers", "timm"])
def test_a_model_whose_config_belongs_to_its_weights_loads(folders, library):
    assert load(folders / library).name == library
    assert load(folders / library, random_weights=True).random_weights


@pytest.mark.parametrize("random_weights", [False, True])
@pytest.mark.parametrize(
    ("library", "name", "value", "words"),
    [
        ("transformers", "num_hidden_layers", HUGE, "num_hidden_layers to 100,000,000; expected 1 to 2,000"),
        ("transformers", "num_hidden_layers", -1, "num_hidden_layers to -1; expected 1 to 2,000"),
        ("transformers", "num_hidden_layers", 0, "num_hidden_layers to 0; expected 1 to 2,000"),
        ("transformers", "hidden_size", -16, "hidden_size to -16; expected at least 1"),
        ("transformers", "vocab_size", 10**11, "implies"),
        ("transformers", "intermediate_size", 10**10, "implies"),
        ("timm", "depth", HUGE, "depth to 100,000,000; expected 1 to 2,000"),
        ("timm", "embed_dim", 2**20, "implies"),
        ("timm", "embed_dim", 0, "embed_dim to 0; expected at least 1"),
        ("timm", "img_size", 10**8, "img_size to 100,000,000; expected 1 to 16,384"),
        ("timm", "img_size", [32, -1], "img_size to -1; expected 1 to 16,384"),
    ],
)
def test_counts_are_refused_before_the_model_is_built(
    folders, tmp_path, library, name, value, words, random_weights, monkeypatch
):
    folder = changed(folders, library, tmp_path, name, value)
    monkeypatch.setattr(config_checks, "_memory", lambda: 2**36)
    with pytest.raises(ModelError, match=f"the config of {re.escape(str(folder))} .*{words}") as caught:
        load(folder, random_weights=random_weights)
    assert str(caught.value).count(". ") == 0


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"interpolation": "magic"}, "KeyError: 'magic'"),
        ({"input_size": [0, 32, 32]}, "image_size to 0; expected 1 to"),
    ],
)
def test_a_preprocessing_that_timm_cannot_make_is_refused(folders, tmp_path, values, words):
    folder = changed(folders, "timm", tmp_path, "depth", 1)
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"] |= values
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=words):
        load(folder)


@pytest.mark.parametrize("text", ["[]", "[" * 200_000])
def test_a_tokenizer_that_is_no_tokenizer_is_refused(folders, tmp_path, text):
    folder = changed(folders, "transformers", tmp_path, "num_hidden_layers", 1)
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(ModelError, match=r"the tokenizer of .* cannot be read \(tokenizer.json: "):
        load(folder)


def test_the_number_of_parameters_is_that_of_the_library():
    """A byte holds at most eight parameters, so 1,000 parameters need 125 bytes; nothing is allocated for them."""
    built = []

    def build():
        built.append(torch.nn.Linear(10**6, 10**6, bias=False))
        return built[-1]

    with pytest.raises(
        ModelError, match=r"implies 1,000,000,000,000 weights, but its weight files have only [\d,]+ bytes"
    ):
        check_parameters(build, __file__, random_weights=False)
    assert built[0].weight.is_meta
    check_parameters(lambda: torch.nn.Linear(10, 10), __file__, random_weights=False)
    check_parameters(build, "owner/name", random_weights=False)  # the files of the hub are not here yet
    assert len(built) == 1


@pytest.fixture
def images(tmp_path):
    """A flat folder, and one of two classes, each with five images, a FIFO and a socket."""
    server = socket.socket(socket.AF_UNIX)
    for folder in (tmp_path / "flat", tmp_path / "classes" / "a", tmp_path / "classes" / "b"):
        folder.mkdir(parents=True)
        for number in range(5):
            Image.new("RGB", (4, 4), (40 * number, 0, 0)).save(folder / f"{number}.png")
    for folder in (tmp_path / "flat", tmp_path / "classes" / "a"):
        os.mkfifo(folder / "9.png")
        (folder / "8.png").symlink_to("9.png")
    server.bind(os.path.relpath(tmp_path / "flat" / "7.png"))
    yield tmp_path
    server.close()


def preprocess():
    def image(picture):
        return np.asarray(picture, np.float32).transpose(2, 0, 1) / 255

    return Preprocess(("pixel_values",), "image", {"pixel_values": np.zeros((2, 3, 4, 4), np.float32)}, image=image)


@pytest.mark.parametrize(("name", "count", "prefix"), [("flat", 5, ""), ("classes", 10, "a/")])
def test_a_fifo_in_an_image_folder_is_skipped_with_a_reason(images, name, count, prefix):
    data = load_data(str(images / name), preprocess(), task="image-classification")
    assert sum(len(part) for part in (data.calibration, data.validation, data.test)) == count
    reasons = {skipped.id: skipped.reason for skipped in data.skipped}
    expected = {f"{prefix}9.png": "a FIFO, not a file", f"{prefix}8.png": "a FIFO, not a file"}
    assert reasons == expected | ({"7.png": "a socket, not a file"} if name == "flat" else {})


@pytest.mark.parametrize("name", ["x.npy", "x.txt", "x.csv", "x", "x.png"])
def test_a_fifo_is_not_opened(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(DataError, match=f"{name} is a FIFO, not a file; expected a folder of images"):
        read(str(tmp_path / name), preprocess(), task="image-classification", seed=0, revision=None)
    with pytest.raises(DataError, match="/dev/zero is a device, not a file"):
        read("/dev/zero", preprocess(), task="image-classification", seed=0, revision=None)
    with pytest.raises(ModelError, match=f"{name} is a FIFO, not a file; expected a timm name"):
        load(tmp_path / name)
    os.mkfifo(tmp_path / "plan.json")
    with pytest.raises(PlanFileError, match=r"plan file .*plan\.json is a FIFO, not a file; expected a plan\.json"):
        given_plan(str(tmp_path / "plan.json"))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "1_Pooling/config.json"])
def test_a_model_folder_with_a_fifo_is_refused(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(ModelError, match=f"the model's .*{name} is a FIFO, not a file; copy the model again"):
        load(tmp_path)


def test_files_folders_and_missing_paths_are_not_special(tmp_path):
    (tmp_path / "link").symlink_to("nowhere")
    assert [special_kind(path) for path in (tmp_path, tmp_path / "link", tmp_path / "no")] == [None] * 3


def test_counts_that_differ_between_layers_are_all_checked():
    differing = {1: {"intermediate_size": 48}}
    check_counts(transformers.LlamaConfig(**SMALL | {"num_hidden_layers": 2}, per_layer_config=differing), "m")
    differing = {1: {"intermediate_size": -4}}
    wrong = transformers.LlamaConfig(**SMALL | {"num_hidden_layers": 2}, per_layer_config=differing)
    with pytest.raises(ModelError, match="sets intermediate_size to -4; expected at least 1"):
        check_counts(wrong, "m")


def test_a_shard_that_is_cut_short_is_named(tmp_path):
    config = transformers.LlamaConfig(vocab_size=32, **SMALL)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path, max_shard_size="4KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ModelError, match=rf"could not load .*: {shard.name} is damaged or cut short \(.*\); copy it"):
        load(tmp_path)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_quantized_checkpoint_is_refused_by_that(tmp_path, method):
    transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=32, **SMALL)).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    settings = {"quant_method": method, "bits": 4, "group_size": 32}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": settings}))
    with pytest.raises(
        ModelError, match=rf"its weights are quantized \({method}\); pass the checkpoint that they were"
    ):
        load(tmp_path)
