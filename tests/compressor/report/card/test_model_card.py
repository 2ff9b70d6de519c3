"""Tests of the model card: its header as the hub's client reads it, its figures, and its snippet, which is run."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import transformers
from huggingface_hub import ModelCard
from onnx import TensorProto, helper
from PIL import Image
from safetensors.torch import save_file
from timm.models._hub import save_config_for_hf
from tokenizers import Tokenizer, models, pre_tokenizers

from compressor.lower.trace import trace
from compressor.lower.write_onnx import lower
from compressor.models import load
from compressor.report.card import loader_snippet as loader
from compressor.report.card import model_card as card
from compressor.report.card import preprocessing_recipe as recipe
from runtimes import openvino, runtime
from runtimes.base.protocols import BuildOptions
from runtimes.onnxruntime import target as onnxruntime
from runtimes.tensorrt import target as tensorrt
from tests.paths import ROOT
from tests.runtimes.tensorrt.test_target import fake, save, value  # noqa: F401  (`fake` is a fixture)

pytest.importorskip("onnxruntime", reason="the tests run the snippets")

OPTIONS = BuildOptions(threads=1)
SAME = 1e-5  # the same file in the same runtime with other options: sums in another order
PIXELS = 1e-5  # normalisation in another order in float32; a rounding to another step of 1/255 would be 1e-2
# Packages that the snippets must not need.
ABSENT = ["compressor", "passes", "runtimes", "torch", "torchvision", "timm", "transformers", "huggingface_hub", "onnx"]
ALONE = f"""
import re, runpy, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {ABSENT!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
found = runpy.run_path("lines.py")
import numpy
numpy.save("answer.npy", found["answer"])
"""
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
PROMPT = ["Once", "upon", "a", "time"]
WORDS = ["[PAD]", "[UNK]", "[END]", *PROMPT, "this", "is", "sentence", "another", "longer", "one"]


def picture(path, size=(50, 37)):
    noise = np.random.default_rng(0).integers(0, 256, (size[1] // 6 + 1, size[0] // 6 + 1, 3), np.uint8)
    Image.fromarray(noise).resize(size, Image.Resampling.BILINEAR).save(path, quality=95)


def timm_folder(folder):
    torch.manual_seed(0)
    module = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=16, depth=1, num_heads=2, num_classes=5)
    own = {"input_size": (3, 32, 32), "crop_pct": 0.9, "license": "apache-2.0", "mean": (0.4, 0.5, 0.6)}
    module.pretrained_cfg = {**module.pretrained_cfg, **own}
    args = {"img_size": 32, "embed_dim": 16, "depth": 1, "num_heads": 2}
    save_config_for_hf(module, folder / "config.json", {"model_args": args})
    save_file(module.state_dict(), folder / "model.safetensors")
    return load(folder)


def tokens(folder, pad, length=12, **options):
    """Save a tokenizer of whole words; without `pad`, it has an end-of-text token but no padding token."""
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"unk_token": "[UNK]", "eos_token": "[END]", **({"pad_token": "[PAD]"} if pad else {})}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=length, **names, **options)
    fast.save_pretrained(folder)


def bert_folder(folder):
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=len(WORDS), max_position_embeddings=16, pad_token_id=0, **SMALL)
    transformers.BertModel(config).save_pretrained(folder)
    tokens(folder, pad=True)
    prompts = {"prompts": {"query": "another one "}, "default_prompt_name": "query"}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    return load(folder, task="sentence-similarity")


def llama_folder(folder, **rules):
    torch.manual_seed(0)
    sizes = {"num_key_value_heads": 1, "vocab_size": len(WORDS), "max_position_embeddings": 64}
    module = transformers.LlamaForCausalLM(transformers.LlamaConfig(bos_token_id=1, eos_token_id=2, **sizes, **SMALL))
    with torch.no_grad():  # so that the next token is not always the same
        module.lm_head.weight.mul_(20)
    for name, rule in rules.items():
        setattr(module.generation_config, name, rule)
    module.save_pretrained(folder)
    tokens(folder, pad=False)
    return load(folder)


def report(model, target="onnxruntime", state="built"):
    """Return the parts of report.json that a card reads."""
    figure = {"value": 78.25, "low": 75.5, "high": 80.75, "n": 616}
    loss = {"value": 0.5, "low": -0.25, "high": 1.25, "n": 616}
    size = {"parameters": 5_000_000, "multiply_adds": 10**9, "bytes": 2 * 10**7, "cache": 0}
    machine = {"processor": "a processor", "cores": 2, "gpus": [], "platform": "Linux", "packages": {"torch": "2.15"}}
    deferred = {"state": state, "target": target}
    return {
        "command": "compressor export my_vit --data photos",
        "settings": {"target": target, "precision": "int8", "batch": 1, "threads": None, "device": None},
        "model": {
            "name": model.name,
            "source": model.source,
            "task": model.task,
            "hub_id": "someone/my_vit",
            "random_weights": False,
            "inputs": list(model.inputs),
            "outputs": list(model.outputs),
            "sites": [{}, {}],
        },
        "data": {"source": "/home/someone/photos", "reading": "flat image folder", "random": False}
        | {"sizes": {"calibration": 20, "validation": 30, "test": 616}},
        "plan": {"rule": "auto", "changes": {"blocks.0.mlp": "drop"}},
        "sizes": {"baseline": size, "result": size},
        "quality": {
            "metric": "accuracy",
            "figures": {"baseline": figure, "result": figure},
            "loss": {"baseline": loss},
            "label_free": {},
        },
        "no_quality_because": None,
        "latency": {name: {"median": 12.0} for name in ("baseline", "result")},
        "speedup": {"baseline": {"ratio": 2.11, "low": 1.9, "high": 2.22}},
        "timed_inputs": {name: [1, 4] for name in model.inputs},
        "environment": machine,
        "healed": None,
        "notes": [],
        "limitations": [{"feature": "tokenizer", "reason": "there is none"}],
        "engine": deferred if state == "deferred" else {"state": "built", "target": target},
    }


def by_pixels(model, path):
    """Write a model whose logits depend on the position of each pixel; an export would take seconds."""
    weights = np.random.default_rng(0).normal(size=(3 * 32 * 32, 5)).astype(np.float32)
    nodes = [
        helper.make_node("Flatten", ["pixel_values"], ["flat"]),
        helper.make_node("MatMul", ["flat", "w"], ["logits"]),
    ]
    save(path, nodes, [value("pixel_values", ["batch", 3, 32, 32])], [value("logits", ["batch", 5])], {"w": weights})


def by_words(model, path):
    """Write a model whose embedding depends on every word, its position and the mask."""
    table, places = np.random.default_rng(0).normal(size=(2, len(WORDS), 16)).astype(np.float32)
    inputs = [value(name, ["batch", "sequence"], TensorProto.INT64) for name in model.inputs]
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["words"]),
        helper.make_node("CumSum", ["attention_mask", "first"], ["count"]),
        helper.make_node("Gather", ["places", "count"], ["there"]),
        helper.make_node("Mul", ["words", "there"], ["each"]),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "two"], ["column"]),
        helper.make_node("Mul", ["each", "column"], ["last_hidden_state"]),
        helper.make_node("ReduceSum", ["last_hidden_state", "one"], ["sentence_embedding"], keepdims=0),
    ]
    outputs = [value("last_hidden_state", ["batch", "sequence", 16]), value("sentence_embedding", ["batch", 16])]
    constants = {"one": np.array([1]), "two": np.array([2])}
    save(path, nodes, inputs, outputs, {"table": table, "places": places, "first": np.array(1), **constants})


def by_export(model, path):
    lower(trace(model), model, path)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return the model and the folder, with engines of both runtimes, of each kind of model."""
    folders = {}
    for name, build in {"image": timm_folder, "text": bert_folder, "causal": llama_folder}.items():
        room = tmp_path_factory.mktemp(name)
        source, folder = room / "source", room / "out"
        source.mkdir(), folder.mkdir()
        model = build(source)
        model.save(folder)
        {"image": by_pixels, "text": by_words}.get(name, by_export)(model, folder / "model.onnx")
        openvino.build(folder / "model.onnx", folder, OPTIONS)
        picture(folder / "photo.jpg")
        folders[name] = model, folder
    return folders


def lines(text):
    (snippet,) = re.findall(r"## Use it without Compressor.*?```python\n(.*?)```", text, re.S)
    return snippet


def expected(kind, model, folder, target):
    """Return the engine's output on inputs from the original's own preprocessing."""
    if kind == "causal":
        prompt = torch.tensor([[WORDS.index(word) for word in PROMPT]])
        generated = model.module.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, do_sample=False
        )
        return generated[0].numpy()
    if kind == "image":
        with Image.open(folder / "photo.jpg") as image:
            feeds = {"pixel_values": model.preprocess.image(image)[None]}
    else:
        feeds = model.preprocess.text(["This is a sentence.", "And this is another, longer one."], None)
    with target.load(folder / ("model.onnx" if target is onnxruntime else openvino.FILE), OPTIONS) as engine:
        return engine.run(feeds)[model.answer]


@pytest.mark.parametrize("target", [onnxruntime, openvino], ids=["onnxruntime", "openvino"])
@pytest.mark.parametrize("kind", ["image", "text", "causal"])
def test_the_snippet_runs_without_compressor_and_answers_as_the_engine(folders, kind, target):
    model, folder = folders[kind]
    (folder / "report.json").write_text(json.dumps(report(model, target.name)))
    card.write(folder)
    text = lines((folder / "README.md").read_text())
    assert f"import {target.name}" in text
    (folder / "lines.py").write_text(text)
    done = subprocess.run([sys.executable, "-c", ALONE], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    answer = np.load(folder / "answer.npy")
    wanted = expected(kind, model, folder, target)
    if kind == "causal":
        assert len(set(wanted.tolist())) > 5  # a repeated token would hide an error of the loop
        np.testing.assert_array_equal(answer, wanted)
    else:
        np.testing.assert_allclose(answer, wanted, rtol=0, atol=SAME)


@pytest.mark.slow  # two compilers
@pytest.mark.parametrize("kind", ["image", "causal"])
@pytest.mark.parametrize("target", ["torch", "executorch"])
def test_the_snippet_of_a_target_built_by_torch_runs_without_compressor(folders, tmp_path, target, kind):
    builder = runtime(target)
    if (reason := builder.missing()) is not None:
        pytest.skip(reason)
    model, source = folders[kind]
    folder = shutil.copytree(source, tmp_path / "out")
    (folder / "model.onnx").unlink()
    graph = trace(model)
    engine = builder.build(lower(graph, model, tmp_path / "model.pt2"), folder, OPTIONS)
    content = report(model, target)
    content["engine"] |= {"inputs": list(graph.inputs), "outputs": list(graph.outputs)}
    content["timed_inputs"] = {name: list(value.shape) for name, value in model.example.items()}
    text = loader.make_snippet(content, folder).text
    assert engine.name in text
    (folder / "lines.py").write_text(text)
    alone = ALONE.replace(repr(ABSENT), repr(ABSENT[:3]))  # torch itself imports the others
    done = subprocess.run([sys.executable, "-c", alone], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    if kind == "causal":
        np.testing.assert_array_equal(np.load(folder / "answer.npy"), expected(kind, model, folder, builder))
        return
    with Image.open(folder / "photo.jpg") as image, builder.load(engine, OPTIONS) as opened:
        wanted = opened.run({"pixel_values": model.preprocess.image(image)[None]})[model.answer]
    np.testing.assert_allclose(np.load(folder / "answer.npy"), wanted, rtol=0, atol=SAME)


@pytest.mark.parametrize("target", ["tensorrt", "tensorrt_rtx"])
def test_the_snippet_of_tensorrt_runs_on_a_fake(folders, fake, monkeypatch, capsys, target):  # noqa: F811
    """Without a GPU, the fake checks the calls of the API and their order."""
    model, folder = folders["image"]
    built = tensorrt.build(folder / "model.onnx", folder, replace(OPTIONS, device="cuda"))
    content = report(model, target)
    text = loader.make_snippet(content, folder).text
    assert f"import {target} as trt" in text
    monkeypatch.setitem(sys.modules, target, fake.trt)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(fake.trt, "Logger", fake.trt.ILogger, raising=False)
    names = {}
    try:
        exec(compile(text, "lines.py", "exec"), names)
    finally:
        built.unlink()
        fake.memory.clear()
        fake.streams.clear()
    np.testing.assert_allclose(names["answer"], expected("image", model, folder, onnxruntime), rtol=0, atol=SAME)
    assert capsys.readouterr().out.strip()


def rtx_snippet(model, folder):
    """Write the snippet of TensorRT for RTX and an engine of the real builder."""
    rtx = runtime("tensorrt_rtx")
    if (reason := rtx.missing_builder()) is not None:
        pytest.skip(reason)
    shutil.copy(rtx.build_for(folder / "model.onnx", folder, OPTIONS, "sm89"), folder / "model.engine")
    (folder / "lines.py").write_text(loader.make_snippet(report(model, "tensorrt_rtx"), folder).text)


def test_the_snippet_of_tensorrt_rtx_opens_its_engine_as_far_as_there_is_a_driver(folders, tmp_path):
    """The real library reads the engine and asks for the driver, which is missing here."""
    if runtime("tensorrt_rtx").missing() is None:
        pytest.skip("there is a GPU")
    model, source = folders["image"]
    folder = shutil.copytree(source, tmp_path / "out")
    rtx_snippet(model, folder)
    done = subprocess.run([sys.executable, "-c", ALONE], cwd=folder, capture_output=True, text=True, check=False)
    assert "CUDA" in done.stdout + done.stderr
    assert "'NoneType' object has no attribute 'create_execution_context'" in done.stderr


@pytest.mark.slow  # mypy reads NumPy
def test_the_snippet_of_tensorrt_rtx_fits_the_type_stubs_of_the_library(folders, tmp_path):
    model, source = folders["image"]
    folder = shutil.copytree(source, tmp_path / "out")
    rtx_snippet(model, folder)
    stubs = next(ROOT.glob("typings/tensorrt-rtx-*"))
    lines = (folder / "lines.py").read_text()
    # Without None, as the snippet ends where the library returns it. The last line shows that the stubs are read.
    command = [sys.executable, "-m", "mypy", "--ignore-missing-imports", "--config-file=", "--no-strict-optional"]
    (folder / "lines.py").write_text(f"{lines}\ncontext.no_such_call()\n")
    checked = {**os.environ, "MYPYPATH": str(stubs)}
    done = subprocess.run([*command, "lines.py"], cwd=folder, env=checked, capture_output=True, text=True, check=False)
    faults = [line for line in done.stdout.splitlines() if ": error:" in line]
    assert len(faults) == 1, done.stdout
    assert '"IExecutionContext" has no attribute "no_such_call"' in faults[0]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_longer_text_is_cut_on_the_side_of_the_tokenizer(folders, tmp_path, side):
    model, source = folders["text"]
    folder = shutil.copytree(source, tmp_path / "out")
    tokens(folder, pad=True, truncation_side=side)
    text = loader.make_snippet(report(model), folder).text
    long = " ".join(["this", *["is"] * 20, "longer"])
    (folder / "lines.py").write_text(re.sub(r"texts = \['This.*\]", f"texts = [{long!r}]", text))
    code = ALONE.replace('found["answer"]', 'found["feeds"]["input_ids"]')
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    original = transformers.AutoTokenizer.from_pretrained(folder)
    wanted = original(["another one " + long], truncation=True)["input_ids"]
    np.testing.assert_array_equal(np.load(folder / "answer.npy"), wanted)


def test_the_loop_chooses_no_token_that_the_generation_config_rules_out(tmp_path):
    """Marian's models have their padding among the bad words, and Whisper's have lists of tokens that no speech has."""
    source = tmp_path / "source"
    source.mkdir()
    free = llama_folder(source).module.generate(torch.tensor([[3, 4, 5, 6]]), max_new_tokens=20, do_sample=False)[0, 4:]
    often, first = sorted(set(free.tolist()) - {2}, key=free.tolist().count)[-2:]
    rules = {"bad_words_ids": [[often], [2], [3, 4]], "begin_suppress_tokens": [first], "repetition_penalty": 1.2}
    shutil.rmtree(source), source.mkdir()
    model = llama_folder(source, **rules)
    model.save(tmp_path)
    by_export(model, tmp_path / "model.onnx")
    found = loader.make_snippet(report(model), tmp_path)
    (tmp_path / "lines.py").write_text(found.text)
    done = subprocess.run([sys.executable, "-c", ALONE], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    model.module.generation_config.repetition_penalty = 1.0
    model.module.generation_config.bad_words_ids = [[often], [2]]  # transformers leaves the end token out of them
    np.testing.assert_array_equal(np.load(tmp_path / "answer.npy"), expected("causal", model, tmp_path, onnxruntime))
    assert found.remarks[-1] == (
        "`generate` of transformers also follows `repetition_penalty`, `bad_words_ids` of `generation_config.json`, so "
        "it can answer otherwise."
    )


@pytest.mark.parametrize(("length", "new"), [(4, 20), (30, 3), (90, 1)])
def test_the_loop_ends_where_the_model_has_no_more_positions(tmp_path, length, new):
    """GPT-2 has a table of them, and names their number in its own way."""
    torch.manual_seed(0)
    sizes = {"vocab_size": len(WORDS), "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, "eos_token_id": 2}
    source = tmp_path / "source"
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).save_pretrained(source)
    tokens(source, pad=False, length=10**30)
    model = load(source)
    model.save(tmp_path)
    by_export(model, tmp_path / "model.onnx")
    text = loader.make_snippet(report(model), tmp_path).text.replace("in [2]", "in []")
    (tmp_path / "lines.py").write_text(text.replace("Once upon a time", " ".join(["this"] * length)))
    done = subprocess.run([sys.executable, "-c", ALONE], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(np.load(tmp_path / "answer.npy")) == min(length, 32) + new


def test_the_snippet_of_a_checkpoint_cuts_longer_texts(tmp_path):
    """Its tokenizer states no maximum length; the config states the number of positions."""
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=len(WORDS), max_position_embeddings=16, pad_token_id=0, **SMALL)
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path)
    tokens(tmp_path, pad=True, length=10**30)
    text = loader.make_snippet(report(load(tmp_path), "transformers"), tmp_path).text
    long = text.replace("This is a sentence.", " ".join(["this"] * 40))
    assert long != text
    names = {}
    exec(compile(long.replace('"."', repr(str(tmp_path))), "lines.py", "exec"), names)
    assert names["feeds"]["input_ids"].shape == (2, 16)


class Echo:
    """A session that returns its inputs."""

    def __init__(self, *_, **__):
        pass

    def run(self, _, feeds):
        return (feeds["pixel_values"],)


def pixels_of(folder, monkeypatch):
    """Return the pixels that the snippet passes to the session for photo.jpg."""
    model = SimpleNamespace(
        name="m", source="", task="image-classification", inputs=("pixel_values",), outputs=("last_hidden_state",)
    )
    monkeypatch.setitem(sys.modules, "onnxruntime", SimpleNamespace(InferenceSession=Echo))
    monkeypatch.chdir(folder)
    names = {}
    exec(compile(loader.make_snippet(report(model), folder).text, "lines.py", "exec"), names)
    return names["answer"][0]


@pytest.mark.parametrize("size", [(50, 37), (33, 64), (24, 24), (47, 37)])
@pytest.mark.parametrize("own", [{}, {"crop_pct": 1.0}, {"crop_mode": "squash", "interpolation": "bilinear"}], ids=str)
def test_images_are_preprocessed_as_by_timm(own, size, tmp_path, monkeypatch):
    config = {"input_size": (3, 28, 28), "crop_pct": 0.875, "interpolation": "bicubic", "mean": (0.5, 0.4, 0.3)}
    config |= {"std": (0.2, 0.3, 0.25), "crop_mode": "center", **own}
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": config}))
    picture(tmp_path / "photo.jpg", size)
    transform = timm.data.create_transform(**config, is_training=False)
    with Image.open(tmp_path / "photo.jpg") as image:
        wanted = transform(image.convert("RGB")).numpy()
    np.testing.assert_allclose(pixels_of(tmp_path, monkeypatch), wanted, rtol=0, atol=PIXELS)


@pytest.mark.parametrize(
    "processor",
    [
        lambda: transformers.ViTImageProcessor(size={"height": 24, "width": 30}),
        lambda: transformers.DeiTImageProcessor(
            size={"height": 32, "width": 32}, crop_size={"height": 28, "width": 28}
        ),
        lambda: transformers.BitImageProcessor(size={"shortest_edge": 30}, crop_size={"height": 28, "width": 28}),
        lambda: transformers.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        lambda: transformers.CLIPImageProcessor(do_resize=False, crop_size={"height": 60, "width": 48}),
    ],
    ids=["vit", "deit", "bit", "clip", "small"],
)
@pytest.mark.parametrize("size", [(50, 37), (53, 37), (37, 58)], ids=str)  # with even and odd borders to crop
def test_images_are_preprocessed_as_by_transformers(processor, size, tmp_path, monkeypatch):
    image_processor = processor()
    image_processor.save_pretrained(tmp_path)
    picture(tmp_path / "photo.jpg", size)
    with Image.open(tmp_path / "photo.jpg") as image:
        wanted = image_processor(images=image, return_tensors="np")["pixel_values"][0]
    pixels = pixels_of(tmp_path, monkeypatch)
    assert pixels.shape == wanted.shape
    # transformers resizes in torch, which rounds a few pixels to an adjacent step: 1/255 over a std of at least 0.2.
    assert np.abs(pixels - wanted).max() < 2.5 / 255 / 0.2
    assert np.abs(pixels - wanted).mean() < 0.2 / 255 / 0.2


@pytest.mark.parametrize(
    "config",
    [
        {"pretrained_cfg": {"input_size": [3, 8, 8], "mean": [0], "std": [1], "crop_mode": "border"}},
        {"pretrained_cfg": {"input_size": [3, 8, 12], "mean": [0], "std": [1]}},
        {"pretrained_cfg": {}},
        {},
    ],
)
def test_other_image_preprocessing_has_no_recipe(config, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert recipe.picture(tmp_path) is None
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "LevitImageProcessor"}))
    assert recipe.picture(tmp_path) is None


def test_the_snippet_of_a_sentence_checkpoint_is_that_of_its_library(folders):
    model, folder = folders["text"]
    snippet = loader.make_snippet(report(model, "transformers"), folder)
    assert snippet.packages == ("sentence-transformers",)
    assert 'SentenceTransformer(".")' in snippet.text
    compile(snippet.text, "lines.py", "exec")


def test_the_hub_reads_the_header(folders):
    model, folder = folders["image"]
    text = card.card(report(model), folder)
    header = ModelCard(text).data.to_dict()
    assert header["base_model"] == "someone/my_vit"
    assert header["base_model_relation"] == "quantized"
    assert header["license"] == "apache-2.0"
    assert header["pipeline_tag"] == "image-classification"
    assert {"onnx", "onnxruntime", "int8", "pruned"} <= set(header["tags"])
    (result,) = header["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == 78.25
    assert result["dataset"]["name"] == "photos"
    assert "/home/someone" not in text
    for stated in ("78.25 (75.5 to 80.75)", "2.11x (1.90–2.22)", "616 test samples", "a processor", "AVX-512"):
        assert stated in text
    assert "compressor export my_vit --data photos" in text
    assert text == card.card(report(model), folder)


def test_the_table_compares_the_result_in_its_own_column(folders):
    model, folder = folders["image"]
    rows = [line.split(" | ") for line in card.card(report(model), folder).splitlines() if line.startswith("| ")]
    cells = {first.removeprefix("| "): [cell.removesuffix(" |") for cell in rest] for first, *rest in rows}
    assert cells["loss vs baseline, %"] == ["reference", "+0.5 (-0.25 to 1.25)"]
    assert cells["speed-up vs baseline"] == ["reference", "2.11x (1.90–2.22)"]


def test_the_card_claims_no_precision_that_no_layer_computes_in(folders):
    model, folder = folders["image"]
    content = report(model, "openvino")
    content["settings"] |= {"precision": "fp16"}
    content["engine"] |= {"layers": {"count": 3, "precisions": {"fp32": 3}, "kinds": {}, "fused_attention": True}}
    text = card.card(content, folder)
    assert "Weights are stored in fp16, but no layer of the engine computes in it." in text
    assert "The engine computes in fp16" not in text


def test_the_card_states_only_measured_figures(folders):
    model, folder = folders["image"]
    content = report(model, "tensorrt", "deferred")
    content |= {
        "quality": None,
        "no_quality_because": "the weights are random",
        "plan": {"rule": "none", "changes": {}},
    }
    content["model"] |= {"random_weights": True}
    text = card.card(content, folder)
    header = ModelCard(text).data.to_dict()
    assert {"base_model", "license", "metrics", "model-index"}.isdisjoint(header)
    assert "No quality is stated, because the weights are random" in text
    assert "ONNX Runtime instead of TensorRT" in text
    assert "not with tensorrt on the device" in text
    assert "The engine of TensorRT is not built yet." in text
    assert "import onnxruntime" in lines(text)


def test_inputs_of_a_users_module_are_arrays(folders, tmp_path, monkeypatch, capsys):
    module = torch.nn.Sequential(torch.nn.Linear(4, 3))
    model = load(module, example_inputs=torch.zeros(2, 4))
    model.save(tmp_path)
    weights = {"w": module[0].weight.detach().numpy().T.copy(), "b": module[0].bias.detach().numpy()}
    nodes = [helper.make_node("MatMul", ["input", "w"], ["h"]), helper.make_node("Add", ["h", "b"], ["output"])]
    save(tmp_path / "model.onnx", nodes, [value("input", ["batch", 4])], [value("output", ["batch", 3])], weights)
    monkeypatch.chdir(tmp_path)
    content = report(model)
    text = loader.make_snippet(content, tmp_path).text
    names = {}
    exec(compile(text, "lines.py", "exec"), names)
    np.testing.assert_allclose(names["answer"], module(torch.ones(1, 4)).detach().numpy(), rtol=0, atol=SAME)
    assert capsys.readouterr().out


def test_the_card_names_the_first_classes_with_their_numbers():
    assert card._classes({"id2label": None}) == ""
    assert card._classes({"id2label": {"0": "no`t", "1": "tench, Tinca tinca"}}) == (
        " Classes: ``no`t`` (0), `tench, Tinca tinca` (1)."
    )
    many = card._classes({"id2label": {str(number): f"c{number}" for number in range(1000)}})
    assert many.endswith("`c9` (9) and 990 more, see `id2label` in `report.json`.")


def test_the_card_repeats_every_setting_that_is_no_default(folders):
    """0 and False are values too: a limit of 0 % is not the usual one."""
    model, folder = folders["image"]
    content = report(model)
    own = {"cache": False, "max_precision_loss": 0.0, "seed": 0, "max_loss": 0.0, "force": False, "samples": None}
    content |= {"command": "compressor.export(...)", "settings": content["settings"] | {"model": "m", **own}}
    text = card.card(content, folder).partition("## Reproduce it")[2]
    for line in ("model='m'", "cache=False", "max_precision_loss=0.0", "max_loss=0.0", "precision='int8'"):
        assert f"    {line},\n" in text
    assert "seed" not in text
    assert "force" not in text
    content["model"]["source"] = "module"
    text = card.card(content, folder).partition("## Reproduce it")[2]
    assert "    model=module,  # 'm', which was in memory\n    example_inputs=inputs,  # as in the export\n" in text
