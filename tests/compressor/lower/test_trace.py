"""Tracing: the batch is dynamic, in-place operators become functional ones, and errors name the cause."""

import dataclasses
import functools

import pytest
import torch
from torch import nn

from compressor import models
from compressor.lower.trace import TraceError, trace
from passes.execute.interpreter import run
from passes.graph.sites import find_sites
from tests.architectures import TIMM, TRANSFORMERS
from tests.samples import traced

BY_NAME = {architecture.name: architecture for architecture in TIMM + TRANSFORMERS}


def load(module, *shape):
    torch.manual_seed(0)
    return models.load(module, example_inputs=torch.rand(*shape))


class Branches(nn.Module):
    def forward(self, x):
        return x + 1 if x.sum() > 0 else x - 1


class FixedBatch(nn.Module):
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(2, 4))

    def forward(self, x):
        return x + self.bias


class Converting(nn.Module):
    def __init__(self, convert):
        super().__init__()
        self.inner, self.convert = nn.Linear(4, 4), convert

    def forward(self, x):
        inner = self.convert(self.inner)
        return x + inner(x.to(inner.weight.dtype)).float()


class InPlace(nn.Module):
    """relu_ on a value that is used again, and add_ on a view, which changes the base tensor."""

    def __init__(self):
        super().__init__()
        self.stem, self.branch = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        x = self.stem(x)
        x.relu_()
        x[:, :2].add_(1.0)
        y = self.branch(x)
        y += x
        return y.mul_(2.0)


class Length(nn.Module):
    """Asks for the batch size by `len`, as RT-DETR does."""

    def forward(self, x):
        return x + torch.zeros(len(x), len([1, 2, 3, 4]))


def test_the_length_of_a_tensor_is_dynamic():
    graph = trace(load(Length(), 2, 4))
    x = torch.rand(5, 4)
    torch.testing.assert_close(run(graph, {"x": x})[0], x)


class Sorted(nn.Module):
    """Orders values by others, as PP-DocLayoutV2 orders its boxes."""

    def forward(self, x):
        order = x.sum(-1).argsort(1)
        rows = torch.take_along_dim(x, order[..., None], dim=1)
        first = x[:1].take_along_dim(order[..., :2, None], 1)
        return rows + first.sum(1, keepdim=True) + torch.take_along_dim(x, order[:, :1, None]).sum()


def test_values_are_taken_by_indices_for_any_batch():
    graph = trace(load(Sorted(), 2, 4, 3))
    for rows in (1, 3):
        x = torch.rand(rows, 4, 3)
        torch.testing.assert_close(run(graph, {"x": x})[0], Sorted()(x))


@pytest.mark.parametrize("name", ["vit", "swinv2", "hf_vit", "hf_bert", "hf_llama"])
def test_the_batch_is_dynamic(name):
    model, graph, _ = traced(name)
    assert graph.inputs == model.inputs
    assert graph.outputs == model.outputs
    assert graph.parameter_count() <= sum(parameter.numel() for parameter in model.module.parameters())
    for size in (1, 5):
        feeds = {key: value.repeat(3, *[1] * (value.ndim - 1))[:size] for key, value in model.example.items()}
        with torch.inference_mode():
            expected = model.call(model.module, *feeds.values())
        for actual, value in zip(run(graph, feeds), expected, strict=True):
            # The kernel may run with or without a mask that is true everywhere: float32 sums in another order.
            torch.testing.assert_close(actual, value, rtol=1e-5, atol=1e-5)


def test_in_place_operators_become_functional_ones():
    model = load(InPlace(), 2, 4)
    graph = trace(model)
    schemas = [node.target._schema for node in graph.nodes() if hasattr(node.target, "_schema")]
    assert schemas
    assert not any(schema.is_mutable for schema in schemas)
    assert [site.name for site in find_sites(graph)] == ["branch"]
    x = torch.rand(5, 4)
    kept = x.clone()
    with torch.inference_mode():
        assert torch.equal(run(graph, {"x": x})[0], model.module(x.clone()))
    assert torch.equal(x, kept)


def one_sentence(text):
    return text.endswith(".") and ". " not in text and "\n" not in text


def test_a_branch_on_values_is_an_error_in_one_sentence(capfd):
    with pytest.raises(TraceError, match=r"^Branches could not be traced by torch\.export") as caught:
        trace(load(Branches(), 2, 4))
    assert one_sentence(str(caught.value)), str(caught.value)
    assert "branches on tensor values" in str(caught.value)
    assert "`return x + 1 if x.sum() > 0 else x - 1`" in str(caught.value)
    assert "--task" not in str(caught.value)  # which chooses the head of a transformers model
    assert caught.value.__cause__ is not None
    assert capfd.readouterr().err == ""  # the partial graph that torch prints is suppressed


class MaskedEncoder(nn.Module):
    """An encoder of torch with a causal mask, as in its tutorials; `told` says that it is causal."""

    def __init__(self, **told):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), 2)
        self.told = told

    def forward(self, x):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.encoder(x, mask, **self.told)


def test_an_encoder_of_torch_with_a_mask_is_told_to_say_whether_it_is_causal():
    with pytest.raises(TraceError) as refusal:
        trace(load(MaskedEncoder(), 2, 5, 8))
    assert one_sentence(str(refusal.value)), str(refusal.value)
    assert "a TransformerEncoder of torch.nn compares the mask" in str(refusal.value)
    assert "pass is_causal=True or is_causal=False beside the mask" in str(refusal.value)
    for causal in (True, False):
        module = MaskedEncoder(is_causal=causal).eval()
        graph = trace(load(module, 2, 5, 8))
        x = torch.randn(3, 5, 8)
        torch.testing.assert_close(run(graph, {"x": x})[0], module(x), rtol=1e-5, atol=1e-5)


class Headless(nn.Module):
    """Fails after it was loaded, as a head of a wrong config does, which loading does not call."""

    loaded = False

    def forward(self, x):
        if self.loaded:
            raise KeyError("cls_tokens")
        return x + 1


def test_a_model_that_fails_without_torch_export_is_told_so():
    model = load(Headless(), 2, 4)
    model.module.loaded = True
    with pytest.raises(TraceError, match=r"^Headless \(Headless\) fails on its example inputs, x \[2, 4\]") as caught:
        trace(model)
    assert one_sentence(str(caught.value)), str(caught.value)
    assert "cls_tokens" in str(caught.value)
    assert "torch.export" not in str(caught.value)


def in_a_loop(x):
    state, states = torch.zeros_like(x[:, 0]), []
    for token in range(x.shape[1]):
        state = (state + x[:, token]).tanh()
        states.append(state)
    return torch.stack(states, 1)


def scaled_by_length(x):
    return x * torch.linspace(0, 1, x.shape[1])[:, None]


class Fixing(torch.nn.Module):
    def __init__(self, rule, only=None):
        super().__init__()
        self.embed, self.head, self.rule, self.only = torch.nn.Embedding(9, 4), torch.nn.Linear(4, 2), rule, only

    def forward(self, tokens):
        assert self.only in (None, tokens.shape[1])
        x = self.embed(tokens)
        found = self.rule(x)
        return self.head((x + (found[0] if isinstance(found, tuple) else found)).mean(1))


@pytest.mark.parametrize("rule", [in_a_loop, scaled_by_length, torch.nn.GRU(4, 4, batch_first=True)])
def test_code_that_fixes_the_number_of_tokens_is_told_how_to_export_it(rule):
    """The advice was about branches on values and the batch size, neither of which such a module has."""
    example = torch.arange(6).repeat(2, 1)
    with pytest.raises(TraceError, match=r"for any number of tokens .* assert tokens\.shape\[1\] == 6\.$") as caught:
        trace(models.load(Fixing(rule), example_inputs=example))
    assert one_sentence(str(caught.value)), str(caught.value)
    fixed = models.load(Fixing(rule, only=6), example_inputs=example)
    assert fixed.dynamic_axes["tokens"] == {0: "batch"}
    assert len(trace(fixed).inputs) == 1


def test_a_fixed_batch_is_an_error_in_one_sentence():
    with pytest.raises(TraceError, match="the code fixes axis 0 of input x to 2") as caught:
        trace(load(FixedBatch(), 2, 4))
    assert one_sentence(str(caught.value)), str(caught.value)


@pytest.mark.parametrize("convert", [nn.Module.half, nn.Module.double, lambda inner: inner.to(torch.bfloat16)])
def test_weights_that_are_converted_in_forward_are_an_error_in_one_sentence(convert):
    with pytest.raises(TraceError, match=r"^Converting converts the weights of its own modules in forward") as caught:
        trace(load(Converting(convert), 2, 4))
    assert one_sentence(str(caught.value)), str(caught.value)


class Filled(nn.Module):
    """Fills a value slice by slice, as multi-head latent attention fills its keys."""

    def forward(self, x):
        keys = x.new_empty(x.shape[0], 6)
        keys[..., :4] = x
        keys[..., 4:] = x[:, :2] * 2
        return keys


def test_slices_that_fill_a_value_are_one_concatenation():
    model, x = load(Filled(), 2, 4), torch.rand(3, 4)
    graph = trace(model)
    targets = [node.target for node in graph.nodes()]
    assert torch.ops.aten.cat.default in targets
    assert torch.ops.aten.slice_scatter.default not in targets
    assert torch.equal(run(graph, {graph.inputs[0]: x})[0], Filled()(x))


def test_another_head_is_a_way_round_for_a_model_of_transformers_only():
    model = dataclasses.replace(load(Branches(), 2, 4), source="transformers")
    with pytest.raises(TraceError, match=r"decides by a value .*; --task may choose another head\.$"):
        trace(model)


def test_tracing_does_not_change_the_module():
    model = BY_NAME["vit"].load()
    state = {name: value.clone() for name, value in model.module.state_dict().items()}
    trace(model)
    assert not model.module.training
    assert state.keys() == model.module.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in model.module.state_dict().items())


@functools.lru_cache(maxsize=4)
def positions(width):
    return torch.arange(width, dtype=torch.float32)


class CachesPositions(nn.Module):
    def __init__(self):
        super().__init__()
        self.branch = nn.Linear(4, 4)

    def forward(self, x):
        return x + self.branch(x + positions(4))


def test_a_table_that_a_module_caches_has_values_after_the_trace():
    positions.cache_clear()
    x = torch.rand(2, 3, 4)
    model = load(CachesPositions(), 2, 3, 4)
    positions.cache_clear()  # the trace is the first to compute it
    graph = trace(model)
    with torch.no_grad():
        (found,) = model.call(model.module, x)
        assert type(positions(4)) is torch.Tensor
        torch.testing.assert_close(run(graph, {model.inputs[0]: x})[0], found)
