"""Sentence embeddings: held to closed formulas and to numbers that sentence-transformers 6.2 computed."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file

from compressor.lower import checkpoint
from compressor.lower.trace import trace
from compressor.lower.write_onnx import lower
from compressor.models import Model, ModelError, load
from compressor.models.text.sentence_transformers import POOLINGS, pooling_modes
from compressor.search.rewriter import Rewriter
from passes.graph.sites import find_sites
from runtimes.base.protocols import BuildOptions
from runtimes.onnxruntime import target

WIDTH, LAYERS = 8, 2
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "query", ":", "this", "is", "a", "longer", "sentence"]
TEXTS = ["this is a longer sentence", "This"]
# SentenceTransformer(folder).encode(TEXTS) of release 6.2.0 on the folders that `saved` writes.
GOLDEN = {
    "mean": [
        [1.231173, -0.396398, -0.275689, 1.057126, -1.318625, -0.965028, 1.006323, -0.338881],
        [1.308983, -0.038129, -0.845833, 0.208034, -0.418747, -1.925518, 1.098328, 0.612882],
    ],
    "flags": [
        [
            0.251101,
            -0.118648,
            0.021795,
            0.227375,
            -0.342158,
            -0.178381,
            0.251198,
            -0.11228,
            0.27091,
            0.141078,
            0.022077,
            0.370797,
            -0.067817,
            -0.178178,
            0.251481,
            0.142951,
            0.25895,
            -0.083374,
            -0.057985,
            0.222343,
            -0.277343,
            -0.202972,
            0.211658,
            -0.071276,
        ],
        [
            0.277687,
            -0.021857,
            -0.157839,
            0.055114,
            -0.103424,
            -0.388798,
            0.231244,
            0.107872,
            0.277687,
            0.019415,
            -0.157839,
            0.055114,
            -0.050593,
            -0.388798,
            0.231244,
            0.157801,
            0.266865,
            -0.007773,
            -0.172441,
            0.042412,
            -0.085371,
            -0.392559,
            0.223918,
            0.124949,
        ],
    ],
    "narrower": [[0.384857, 0.911871, 0.808324, 0.176483], [0.630312, 0.858087, 0.724562, 0.490975]],
    "instructor": [[1.784032, -1.949396, 2.102305, -1.760005], [1.004184, -2.72716, 4.197116, -4.000535]],
    "tokens": [
        [2.11471, 3.299098, 0.608469, -0.031831, 0.059052, 0.57368],
        [2.006502, 3.320422, 0.650232, 0.026342, -0.093559, 0.583694],
    ],
}
EXACT = 5e-6  # sums in another order; values are below 8


def waves(shape: torch.Size, step: float) -> torch.Tensor:
    """Return weights that no release of torch draws differently."""
    return torch.sin(torch.arange(shape.numel(), dtype=torch.float64) * step + 1).reshape(shape).float()


def saved(folder: Path, modules: list[tuple[str, dict[str, Any]]] | None, *, side: str = "right", **files: Any) -> Path:
    """Save a BERT with a tokenizer of words, `modules` by kind with their configs, and further JSON files."""
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "intermediate_size": 8}
    module = transformers.BertModel(transformers.BertConfig(vocab_size=len(WORDS), max_position_embeddings=32, **sizes))
    with torch.no_grad():
        for number, parameter in enumerate(module.parameters()):
            if parameter.ndim > 1:
                parameter.copy_(waves(parameter.shape, 0.7 + number / 50))
    module.save_pretrained(folder)
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, model_max_length=12, padding_side=side, **special
    ).save_pretrained(folder)
    listed = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]
    for index, (kind, config) in enumerate(modules or [], start=1):
        part = folder / f"{index}_{kind}"
        part.mkdir()
        (part / "config.json").write_text(json.dumps(config))
        listed.append(
            {"idx": index, "name": str(index), "path": part.name, "type": f"sentence_transformers.models.{kind}"}
        )
        weights = weights_of(kind, config)
        if weights:
            save_file(weights, part / "model.safetensors")
    if modules is not None:
        files = {"modules": listed, **files}
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def weights_of(kind: str, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    if kind == "LayerNorm":
        return {f"norm.{name}": waves(torch.Size([config["dimension"]]), 0.9) for name in ("weight", "bias")}
    if kind != "Dense":
        return {}
    shape = torch.Size([config["out_features"], config["in_features"]])
    weights = {"linear.weight": waves(shape, 0.3) / 4}
    if config.get("bias", True):
        weights["linear.bias"] = waves(shape[:1], 0.4)
    if config.get("use_residual") and shape[0] != shape[1]:
        weights["residual.weight"] = waves(shape, 0.6)
    return weights


def pooling(*modes: str, **others: Any) -> tuple[str, dict[str, Any]]:
    return "Pooling", {"embedding_dimension": WIDTH, "pooling_mode": list(modes)} | others


def flags(*modes: str) -> tuple[str, dict[str, Any]]:
    """Return a pooling in the format of releases before 6."""
    return "Pooling", {"word_embedding_dimension": WIDTH} | {flag: mode in modes for mode, flag in POOLINGS.items()}


def dense(size: int, out: int, **others: Any) -> tuple[str, dict[str, Any]]:
    return "Dense", {"in_features": size, "out_features": out} | others


def embeddings(model: Model, texts: list[str] = TEXTS) -> np.ndarray:
    assert model.preprocess.text is not None
    feeds = model.preprocess.text(texts, None)
    with torch.inference_mode():
        return model.call(model.module, *(torch.from_numpy(feeds[name]) for name in model.inputs))[1].numpy()


PROMPT = {"prompts": {"query": "query :", "document": ""}, "default_prompt_name": "query"}
CASES: dict[str, tuple[list[tuple[str, dict[str, Any]]], dict[str, Any]]] = {
    "mean": ([pooling("mean")], {}),
    "flags": ([flags("cls", "max", "mean"), ("Normalize", {})], {}),
    "narrower": (
        [pooling(*POOLINGS), dense(6 * WIDTH, 4, activation_function="torch.nn.modules.activation.Tanh")],
        {"side": "left"},
    ),
    "instructor": (
        [pooling(*POOLINGS, include_prompt=False), dense(6 * WIDTH, 5, bias=False, use_residual=True)],
        {"config_sentence_transformers": PROMPT | {"truncate_dim": 4}},
    ),
    "tokens": (
        [
            dense(
                WIDTH, 6, module_input_name="token_embeddings", activation_function="torch.nn.modules.linear.Identity"
            ),
            ("Normalize", {"module_input_name": "token_embeddings"}),
            pooling("mean"),
            ("LayerNorm", {"dimension": 6}),
            ("Dropout", {"dropout": 0.5}),
            dense(6, 6, activation_function="torch.nn.modules.activation.GELU", use_residual=True),
        ],
        {"sentence_bert_config": {"max_seq_length": 4, "do_lower_case": True}},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_embeddings_are_those_of_the_library(name: str, tmp_path: Path) -> None:
    modules, options = CASES[name]
    model = load(saved(tmp_path / "m", modules, **options))
    assert model.task == "sentence-similarity"
    assert model.answer == model.outputs[1] == "sentence_embedding"
    got, rows = embeddings(model), 1 if "side" in options else 2
    # Two releases of torch, and numbers rounded to 1e-6. With padding on the left, the library gives the shorter text
    # other positions than it has alone; here it keeps those that it has alone.
    np.testing.assert_allclose(got[:rows], GOLDEN[name][:rows], rtol=0, atol=2e-5)


def by_hand(mode: str, states: np.ndarray) -> np.ndarray:
    """Pool the hidden states [tokens, width] of one text without padding."""
    count = np.arange(1, len(states) + 1)[:, None]
    return {
        "cls": lambda: states[0],
        "max": lambda: states.max(0),
        "mean": lambda: states.mean(0),
        "mean_sqrt_len_tokens": lambda: states.sum(0) / np.sqrt(len(states)),
        "weightedmean": lambda: (states * count).sum(0) / count.sum(),
        "lasttoken": lambda: states[-1],
    }[mode]()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("form", [pooling, flags])
def test_every_pooling_is_its_formula_over_the_tokens_of_a_text(form: Any, side: str, tmp_path: Path) -> None:
    model = load(saved(tmp_path / "m", [form(*POOLINGS)], side=side))
    assert model.preprocess.text is not None
    feeds = model.preprocess.text(TEXTS, None)
    with torch.inference_mode():
        states, got = model.call(model.module, *(torch.from_numpy(feeds[name]) for name in model.inputs))
    for row, mask in enumerate(feeds["attention_mask"]):
        wanted = np.concatenate([by_hand(mode, states[row].numpy()[mask == 1]) for mode in POOLINGS])
        np.testing.assert_allclose(got[row], wanted, rtol=0, atol=EXACT)
    assert not np.allclose(np.linalg.norm(got, axis=1), 1)


@pytest.mark.parametrize(
    "kind",
    [
        "sentence_transformers.models.Pooling",
        "sentence_transformers.models.Pooling.Pooling",
        "sentence_transformers.sentence_transformer.modules.Pooling",
        "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
    ],
)
def test_a_module_has_the_names_of_all_releases(kind: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", [pooling("mean")])
    content = json.loads((folder / "modules.json").read_text())
    content[1]["type"] = kind
    (folder / "modules.json").write_text(json.dumps(content))
    np.testing.assert_allclose(embeddings(load(folder)), GOLDEN["mean"], rtol=0, atol=2e-5)


def test_weights_of_a_module_may_be_a_pickle_of_tensors_but_not_of_code(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", CASES["narrower"][0], side="left")
    weights = folder / "2_Dense" / "model.safetensors"
    torch.save(load_file(weights), weights.with_name("pytorch_model.bin"))
    weights.unlink()
    np.testing.assert_allclose(embeddings(load(folder))[:1], GOLDEN["narrower"][:1], rtol=0, atol=2e-5)
    torch.save({"linear.weight": Path("code")}, weights.with_name("pytorch_model.bin"))
    with pytest.raises(ModelError, match=r"2_Dense/pytorch_model.bin .* runs code when it is read, which is refused"):
        load(folder)


def changed(folder: Path, name: str, **fields: Any) -> None:
    path = folder / name
    content = json.loads(path.read_text()) if path.is_file() else {}
    if isinstance(content, list):
        content[-1] |= fields
    else:
        content |= fields
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        (
            "modules.json",
            {"type": "sentence_transformers.models.CNN"},
            "type sentence_transformers.models.CNN, which is",
        ),
        (
            "modules.json",
            {"type": "os.system"},
            "type os.system, which is not supported; expected Transformer, Pooling",
        ),
        ("modules.json", {"type": "custom_st.Pooling"}, "type custom_st.Pooling"),
        ("modules.json", {"path": "../2_Dense"}, r"has the path '../2_Dense'; expected a name"),
        ("modules.json", {"path": "/tmp"}, "has the path '/tmp'"),
        ("modules.json", {"path": "3_Dense"}, "has no 3_Dense/config.json, which modules.json refers to"),
        ("modules.json", {"type": "sentence_transformers.models.Transformer"}, "expected one Transformer"),
        ("1_Pooling/config.json", {"pooling_mode": "median"}, "sets the pooling median; expected cls, max, mean"),
        (
            "1_Pooling/config.json",
            {"pooling_mode": None, "pooling_mode_mean_tokens": False},
            "switches every pooling off; expected one of cls, max, mean",
        ),
        ("1_Pooling/config.json", {"window": 3}, "sets window, which is not supported"),
        ("2_Dense/config.json", {"activation_function": "os.getcwd"}, "activation function os.getcwd; expected one of"),
        ("2_Dense/config.json", {"activation_function": "torch.nn.Softmax"}, "activation function torch.nn.Softmax"),
        ("2_Dense/config.json", {"in_features": 9}, "is for a width of 9, but sentence_embedding has 8"),
        ("2_Dense/config.json", {"out_features": 5}, "2_Dense/model.safetensors of .* cannot be loaded"),
        ("2_Dense/config.json", {"out_features": "5"}, "needs positive numbers for in_features, out_features"),
        ("2_Dense/config.json", {"module_input_name": "scores"}, "reads scores, which no module before it computes"),
        (
            "sentence_bert_config.json",
            {"transformer_task": "fill-mask"},
            "sets transformer_task to a value that is not",
        ),
        ("sentence_bert_config.json", {"model_args": {"x": 1}}, "sets model_args to a value"),
        ("config_sentence_transformers.json", {"default_prompt_name": "q"}, "default prompt q; expected one of none"),
        ("config_sentence_transformers.json", {"model_type": "SparseEncoder"}, "it is a SparseEncoder"),
    ],
)
def test_what_cannot_be_computed_as_the_library_does_is_refused(
    name: str, fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = saved(tmp_path / "m", [pooling("mean"), dense(WIDTH, 4)])
    changed(folder, name, **fields)
    with pytest.raises(ModelError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    assert load(folder, task="feature-extraction").outputs == ("last_hidden_state",)


@pytest.mark.parametrize(
    ("config", "modes"),
    [
        ({}, ("mean",)),
        ({"pooling_mode_cls_token": True}, ("cls", "mean")),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, ("cls",)),
        ({"pooling_mode_mean_tokens": False}, ()),
    ],
)
def test_mean_pooling_is_on_unless_it_is_switched_off(config: dict[str, bool], modes: tuple[str, ...]) -> None:
    """The library's default for a flag that a config leaves out."""
    assert pooling_modes(config) == modes


@pytest.mark.parametrize("content", ["{}", "[", "[1]", "[]"])
def test_a_damaged_list_of_modules_is_refused(content: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", [pooling("mean")])
    (folder / "modules.json").write_text(content)
    with pytest.raises(ModelError, match=r"modules\.json of"):
        load(folder)


def test_a_model_without_a_transformer_in_its_folder_is_refused(tmp_path: Path) -> None:
    static = [{"path": "", "type": "sentence_transformers.models.StaticEmbedding"}]
    below = [{"path": "0_Transformer", "type": "sentence_transformers.models.Transformer"}]
    for content, message in (
        (static, "StaticEmbedding, which is not supported"),
        (below, "Transformer in 0_Transformer"),
    ):
        (tmp_path / "modules.json").write_text(json.dumps(content))
        with pytest.raises(ModelError, match=message):
            load(tmp_path)


def features(model: Model) -> dict[str, str]:
    return {limitation.feature: limitation.reason for limitation in model.limitations}


def test_what_is_assumed_or_not_used_is_a_limitation(tmp_path: Path) -> None:
    plain = load(saved(tmp_path / "plain", None), task="sentence-similarity")
    assert features(plain)["pooling"].startswith("the model has no modules.json, so mean pooling without normalization")
    np.testing.assert_allclose(embeddings(plain), GOLDEN["mean"], rtol=0, atol=2e-5)
    plain.save(tmp_path / "plain")  # what was assumed is written, so that the folder is complete
    assert "pooling" not in features(load(tmp_path / "plain"))
    settings = {"prompts": {"query": "query :", "document": "a"}, "similarity_fn_name": "dot"}
    model = load(saved(tmp_path / "m", [pooling("mean")], config_sentence_transformers=settings))
    assert features(model)["other prompts"].startswith("document, query: not used")
    assert "by dot, but quality here is that of their cosine" in features(model)["similarity"]
    changed(tmp_path / "m", "config_sentence_transformers.json", default_prompt_name="query")
    prompted = load(tmp_path / "m")
    assert "'query :'" in features(prompted)["prompt"]
    np.testing.assert_array_equal(embeddings(prompted), embeddings(model, [f"query :{text}" for text in TEXTS]))


def test_the_embedding_is_part_of_the_graph_and_of_the_file(tmp_path: Path) -> None:
    modules, options = CASES["instructor"]
    model = load(saved(tmp_path / "m", modules, **options))
    graph = trace(model)
    assert "model.sentence_head.2_Dense.linear.weight" in {node.target for node in graph.nodes()}
    assert model.preprocess.text is not None
    feeds = {name: model.preprocess.text(TEXTS, None)[name] for name in model.inputs}
    with target.load(lower(graph, model, tmp_path / "model.onnx"), BuildOptions(threads=1)) as engine:
        got = engine.run(feeds)["sentence_embedding"]
    np.testing.assert_allclose(got, GOLDEN["instructor"], rtol=0, atol=2e-5)


def test_a_smaller_checkpoint_is_a_model_of_the_library(tmp_path: Path) -> None:
    modules, options = CASES["narrower"]
    model = load(saved(tmp_path / "m", modules, **options))
    graph = trace(model)
    sites = find_sites(graph)
    dropped = [site.name for site in sites if site.block == sites[0].block]
    smaller = Rewriter(graph, sites, None, whole=True).apply_changes(dict.fromkeys(dropped, "drop"))
    checkpoint.write(smaller, model, tmp_path / "smaller" / "config.json")
    written, original = (
        load_file(path / "2_Dense" / "model.safetensors") for path in (tmp_path / "smaller", tmp_path / "m")
    )
    assert written.keys() == original.keys()
    for path in ("modules.json", "1_Pooling/config.json", "2_Dense/config.json"):
        assert (tmp_path / "smaller" / path).read_bytes() == (tmp_path / "m" / path).read_bytes()
    again = load(tmp_path / "smaller")
    assert again.module.config.num_hidden_layers == LAYERS - 1
    # The original without its first layer, by surgery.
    model.module.encoder.layer = model.module.encoder.layer[1:]
    np.testing.assert_allclose(embeddings(again), embeddings(model), rtol=0, atol=EXACT)
    if find_spec("sentence_transformers") is not None:  # no dependency of this project
        from sentence_transformers import SentenceTransformer

        by_library = SentenceTransformer(str(tmp_path / "smaller"), device="cpu").encode(TEXTS)
        np.testing.assert_allclose(by_library, embeddings(again), rtol=0, atol=EXACT)


def test_random_weights_need_no_files_of_weights(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", [pooling("mean"), dense(WIDTH, 4)])
    (folder / "2_Dense" / "model.safetensors").unlink()
    state = torch.get_rng_state()
    assert embeddings(load(folder, random_weights=True)).shape == (2, 4)
    assert torch.equal(torch.get_rng_state(), state)
