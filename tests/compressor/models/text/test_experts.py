"""Mixtures of experts are written as ONNX, and their limitation states the memory of a token."""

import numpy as np
import onnxruntime
import pytest
import torch
import transformers

from compressor import models
from compressor.lower.fold_graph import fold_graph
from compressor.lower.trace import trace
from compressor.lower.write_onnx import lower
from compressor.models.text import experts
from compressor.models.text.experts import use_writable_experts
from passes.graph.sites import find_sites

SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
CLOSE = 1e-5


def mixture(name):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{name}Config")(**SMALL)).eval()


@pytest.mark.parametrize("name", ["Mixtral", pytest.param("GptOss", marks=pytest.mark.slow)])
def test_a_mixture_is_written_with_each_token_in_its_own_experts(name, tmp_path):
    module = mixture(name)
    module.save_pretrained(tmp_path / "model")
    model = models.load(tmp_path / "model")
    assert [each.feature for each in model.limitations].count("mixture of experts") == 1
    graph = trace(model)
    assert [site.kind for site in find_sites(graph)] == ["attention", "mlp"] * 2
    path = lower(fold_graph(graph), model, tmp_path / "model.onnx")

    ids = torch.randint(3, 64, (3, 11), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = module(ids).logits.numpy()  # in the usual form, which the file cannot have
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feeds = {each.name: np.zeros((3, 2, 0, 8), np.float32) for each in session.get_inputs() if "past" in each.name}
    feeds |= {"input_ids": ids.numpy(), "attention_mask": np.ones((3, 11), np.int64)}
    feeds["position_ids"] = np.tile(np.arange(11), (3, 1))
    (logits,) = session.run(["logits"], feeds)
    np.testing.assert_allclose(logits, expected, atol=CLOSE, rtol=0)


def test_the_limitation_states_the_megabytes_of_the_chosen_experts():
    module = mixture("Mixtral")
    (limitation,) = use_writable_experts(module)
    largest = 2 * 48 * 32  # gate and up of one expert
    assert f"up to {2 * largest * 4 / 1e6:.3g} MB a token" in limitation.reason


def test_an_unknown_number_of_chosen_experts_is_said(monkeypatch):
    module = mixture("Mixtral")
    monkeypatch.setattr(experts, "CHOSEN", ())
    (limitation,) = use_writable_experts(module)
    assert f"up to {2 * 48 * 32 * 4 / 1e6:.3g} MB for each of them (the config names no number)" in limitation.reason


def test_experts_of_one_form_only_have_no_limitation(monkeypatch):
    module = mixture("Mixtral")

    def refuse(form):
        raise ValueError(form)

    monkeypatch.setattr(module, "set_experts_implementation", refuse)
    assert use_writable_experts(module) == ()


def test_a_model_without_experts_is_left_as_it_is():
    config = transformers.LlamaConfig(**SMALL)
    module = transformers.LlamaForCausalLM(config)
    assert use_writable_experts(module) == ()
    assert use_writable_experts(torch.nn.Linear(2, 2)) == ()


LOOPING = {
    "Dbrx": {
        "d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": 64, "max_seq_len": 64,
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "LongcatFlash": {
        "hidden_size": 32, "num_layers": 1, "num_attention_heads": 4, "vocab_size": 64, "ffn_hidden_size": 48,
        "expert_ffn_hidden_size": 16, "n_routed_experts": 4, "zero_expert_num": 2, "moe_topk": 2, "q_lora_rank": 16,
        "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "head_dim": 8,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", LOOPING)
def test_classes_that_loop_over_the_chosen_experts_compute_all(name, tmp_path):
    """LongCat-Flash also has experts that hand out their input."""
    torch.manual_seed(0)
    module = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{name}Config")(**LOOPING[name]))
    for parameter in module.eval().parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    module.save_pretrained(tmp_path / "model")
    model = models.load(tmp_path / "model", cache=False)
    count = {"Dbrx": 4, "LongcatFlash": 6}[name]
    (limitation,) = (each for each in model.limitations if each.feature == "mixture of experts")
    assert limitation.reason.endswith(f"so an engine computes all {count} for every token")
    path = lower(fold_graph(trace(model)), model, tmp_path / "model.onnx")
    ids = torch.randint(3, 64, (3, 11), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = module(ids, use_cache=False).logits.numpy()
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feeds = {"input_ids": ids.numpy(), "attention_mask": np.ones((3, 11), np.int64)}
    (logits,) = session.run(["logits"], {each.name: feeds[each.name] for each in session.get_inputs()})
    np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max(), rtol=0)


def test_a_loop_whose_weights_stay_on_disk_was_not_compared_which_is_said(tmp_path):
    module = transformers.AutoModelForCausalLM.from_config(transformers.DbrxConfig(**LOOPING["Dbrx"]))
    module.save_pretrained(tmp_path)
    model = models.load(tmp_path, cache=False, on_disk=True)
    (limitation,) = (each for each in model.limitations if each.feature == "mixture of experts")
    assert "this form was not compared with the class, because the weights stay on disk" in limitation.reason


def test_a_loop_that_computes_something_else_is_left_alone(monkeypatch):
    """It would be compared with itself later, so that nothing would tell a wrong result."""
    module = transformers.AutoModelForCausalLM.from_config(transformers.DbrxConfig(**LOOPING["Dbrx"]))
    kind = next(type(part) for part in module.modules() if type(part).__name__ == "DbrxExperts")
    own = kind.forward

    def forward(self, hidden_states, top_k_index, top_k_weights):
        return own(self, hidden_states, top_k_index, top_k_weights) * top_k_index.float().mean()

    monkeypatch.setattr(kind, "forward", forward)
    assert use_writable_experts(module) == ()
    assert not any("forward" in vars(part) for part in module.modules() if isinstance(part, kind))
