"""Recurrences as one operator: each is held to the function of transformers that it stands for, and to its module."""

import numpy as np
import onnxruntime
import pytest
import torch
import transformers
from transformers.models.kimi_linear import modeling_kimi_linear
from transformers.models.mamba import modeling_mamba
from transformers.models.mamba2 import modeling_mamba2
from transformers.models.minimax import modeling_minimax
from transformers.models.qwen3_next import modeling_qwen3_next
from transformers.models.recurrent_gemma import modeling_recurrent_gemma

from compressor import models
from compressor.internals.transformers import GRIFFIN, quiet
from compressor.lower.fold_graph import fold_graph
from compressor.lower.trace import trace
from compressor.lower.write_onnx import LowerError, lower
from compressor.models.text.recurrence import OPERATOR, as_operators
from passes.graph.sites import RECURRENCE, find_sites

ROWS, TOKENS = 2, 9
CLOSE = {"atol": 1e-5, "rtol": 1e-5}  # transformers sums over blocks of tokens


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + len(shape) + sum(shape)))


def mamba():
    scan = {"hidden_states": draw(ROWS, 6, TOKENS), "dt": draw(ROWS, 6, TOKENS, seed=1), "A": -draw(6, 4).exp()}
    scan |= {
        "B": draw(ROWS, 4, TOKENS),
        "C": draw(ROWS, 4, TOKENS, seed=2),
        "D": draw(6),
        "z": draw(ROWS, 6, TOKENS, seed=3),
    }
    return scan | {"delta_bias": draw(6, seed=4), "delta_softplus": True, "return_last_state": True}


def mamba2():
    scan = {
        "hidden_states": draw(ROWS, TOKENS, 4, 8),
        "dt": draw(ROWS, TOKENS, 4),
        "A": -draw(4).exp(),
        "chunk_size": 4,
    }
    scan |= {"B": draw(ROWS, TOKENS, 2, 5), "C": draw(ROWS, TOKENS, 2, 5, seed=1), "D": draw(4, seed=2)}
    scan |= {"initial_states": draw(ROWS, 4, 8, 5), "return_final_states": True, "dt_limit": (0.01, 1.5)}
    return scan | {"dt_bias": draw(4, seed=5), "dt_softplus": True}


def delta_rule():
    rule = {
        "query": draw(ROWS, TOKENS, 2, 5),
        "key": draw(ROWS, TOKENS, 2, 5, seed=1),
        "value": draw(ROWS, TOKENS, 4, 3),
    }
    rule |= {"g": -draw(ROWS, TOKENS, 4).exp(), "beta": draw(ROWS, TOKENS, 4, seed=1).sigmoid(), "chunk_size": 4}
    return rule | {"initial_state": draw(ROWS, 4, 5, 3), "output_final_state": True, "use_qk_l2norm_in_kernel": True}


def kimi():
    rule = {name: draw(ROWS, TOKENS, 3, 5, seed=seed) for seed, name in enumerate(("query", "key", "value"))}
    rule |= {"g": -draw(ROWS, TOKENS, 3, 5, seed=4).exp(), "beta": draw(ROWS, TOKENS, 3).sigmoid(), "chunk_size": 4}
    return rule | {"output_final_state": True, "use_qk_l2norm_in_kernel": True}


@pytest.mark.parametrize(
    ("file", "name", "arguments", "kind"),
    [
        (modeling_mamba, "mamba_selective_scan", mamba, "MambaMixer"),
        (modeling_mamba2, "mamba2_chunk_scan", mamba2, "Mamba2Mixer"),
        (modeling_qwen3_next, "torch_chunk_gated_delta_rule", delta_rule, "Qwen3NextGatedDeltaNet"),
        (modeling_kimi_linear, "chunk_kimi_delta_attention", kimi, "KimiLinearDeltaAttention"),
    ],
)
def test_a_recurrence_computes_what_the_function_of_transformers_does(file, name, arguments, kind):
    own = getattr(file, name)
    part = getattr(file, kind)
    module = part.__new__(part)
    torch.nn.Module.__init__(module)
    with as_operators(module):
        replaced = getattr(file, name)
        assert replaced is not own
        found = replaced(**arguments())
    assert getattr(file, name) is own
    expected = own(**arguments())
    for value, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(value, wanted, **CLOSE)


def test_the_recurrence_of_recurrent_gemma():
    config = transformers.RecurrentGemmaConfig(lru_width=6, num_attention_heads=2, hidden_size=6)
    module = modeling_recurrent_gemma.RecurrentGemmaRglru(config)
    first = torch.arange(TOKENS)[None, :, None].expand(ROWS, -1, 1) == 0
    values = {"hidden_states": draw(ROWS, TOKENS, 6), "recurrent_gate": draw(ROWS, TOKENS, 6, seed=1).sigmoid()}
    for state in (None, draw(ROWS, 6)):
        expected = scan(module, **values, reset=first, recurrent_states=state)
        with as_operators(module):
            found = scan(module, **values, reset=first, recurrent_states=state)
        for value, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(value, wanted, **CLOSE)


def test_the_recurrence_of_minimax_takes_any_number_of_blocks():
    config = transformers.MiniMaxConfig(
        hidden_size=32, num_attention_heads=4, head_dim=8, num_hidden_layers=2, block_size=4,
        layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip
    torch.manual_seed(0)
    module = modeling_minimax.MiniMaxLightningAttention(config, 0).eval()
    mask = torch.ones(ROWS, TOKENS)
    mask[1, -2:] = 0
    for tokens in (3, 8, TOKENS):  # less than a block of 4, two blocks, and two and a part
        for padding in (None, mask[:, -tokens:]):
            values = {"hidden_states": draw(ROWS, tokens, 32), "position_embeddings": None, "attention_mask": padding}
            expected = module(**values)
            with as_operators(module):
                found = module(**values)
            for value, wanted in zip(found, expected, strict=True):
                torch.testing.assert_close(value, wanted, **CLOSE)


def test_lightning_attention_is_an_attention_and_a_state_behind_a_convolution_is_not(folder, tmp_path):
    config = transformers.MiniMaxConfig(
        vocab_size=48, hidden_size=32, intermediate_size=32, num_attention_heads=4, num_key_value_heads=4, head_dim=8,
        num_hidden_layers=2, num_local_experts=2, block_size=4, layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip
    torch.manual_seed(0)
    with quiet():
        transformers.MiniMaxForCausalLM(config).eval().save_pretrained(tmp_path)
    kinds = {site.name: site.kind for site in find_sites(trace(models.load(str(tmp_path), cache=False)))}
    assert [kinds[f"model.layers.{layer}.self_attn"] for layer in range(2)] == ["attention", "attention"]
    assert [kinds[f"model.layers.{layer}.mlp"] for layer in range(2)] == ["mlp", "mlp"]
    behind = {site.name: site.kind for site in find_sites(trace(models.load(str(folder), cache=False)))}
    assert behind["model.layers.0.linear_attn"] == "conv"


def scan(module, **values):
    return getattr(type(module), GRIFFIN.rpartition(".")[2])(module, **values)


def test_the_operator_agrees_with_its_shapes_and_itself():
    state = draw(ROWS, 4, 5, 3)
    values = (draw(ROWS, TOKENS, 1, 5), draw(ROWS, TOKENS, 4, 5), draw(ROWS, TOKENS, 4, 3), draw(ROWS, TOKENS, 4, 1))
    for rate in (None, draw(ROWS, TOKENS, 4, 1, seed=1)):
        arguments = [None if each is None else each.requires_grad_() for each in (*values, rate)]
        torch.library.opcheck(OPERATOR, (*arguments, state), test_utils=("test_schema", "test_faketensor"))
        short = [None if each is None else each[:1, :3].double() for each in arguments]
        torch.autograd.gradcheck(OPERATOR, (*short, state[:1].double().requires_grad_()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Qwen3-Next of a recurrent layer and one of attention."""
    path = tmp_path_factory.mktemp("recurrent")
    torch.manual_seed(0)
    config = transformers.Qwen3NextConfig(
        vocab_size=48, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=48, layer_types=["linear_attention", "full_attention"], linear_key_head_dim=8,
        linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4, num_experts=0,
        mlp_only_layers=[0, 1],
    )  # fmt: skip
    with quiet():
        transformers.Qwen3NextForCausalLM(config).eval().save_pretrained(path)
    return path


def test_a_file_has_a_loop_over_any_number_of_tokens(folder, tmp_path):
    model = models.load(str(folder), cache=False)
    graph = trace(model)
    assert [node.target for node in graph.nodes()].count(OPERATOR) == 1
    assert str(OPERATOR) == RECURRENCE
    path = lower(fold_graph(graph), model, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for rows, tokens in ((1, 5), (3, 70)):  # more than a block of transformers, which has 64
        ids = torch.randint(0, 48, (rows, tokens), generator=torch.Generator().manual_seed(tokens))
        feeds = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        feeds["attention_mask"][-1, -2:] = 0
        kept = feeds["attention_mask"].bool()
        with torch.inference_mode():
            expected = model.module(**feeds, use_cache=False).logits[kept].numpy()
        (found,) = session.run(["logits"], {name: value.numpy() for name, value in feeds.items()})
        np.testing.assert_allclose(found[kept.numpy()], expected, atol=1e-4, rtol=1e-4)


def test_a_program_of_torch_is_refused(folder, tmp_path):
    model = models.load(str(folder), cache=False)
    with pytest.raises(LowerError, match="read one token after another, which only ONNX files hold as a loop"):
        lower(trace(model), model, tmp_path / "model.pt2")
