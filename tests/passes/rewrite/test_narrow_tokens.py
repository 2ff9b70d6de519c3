"""Dead token elimination keeps the outputs of real architectures, small modules and random programs."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from compressor import models
from compressor.lower.trace import trace
from compressor.lower.write_onnx import lower
from passes.analysis.counted_cost import Costs
from passes.base import apply
from passes.execute.interpreter import run
from passes.graph.edit import propagate_fake_value
from passes.graph.graph import value_of
from passes.graph.sites import find_sites
from passes.rewrite.drop import Drop
from passes.rewrite.narrow_tokens import NarrowTokens
from tests import architectures
from tests.architectures import Architecture, pictures, segments, timm_model, tokens, transformers_model

aten = torch.ops.aten

# Matrix products sum one row in another order than many rows: float32 rounding of values of about 1.
SAME = {"atol": 1e-5, "rtol": 1e-5}


def one_token(name, build):
    return Architecture(name, build, {})


class Reader(nn.Module):
    """Model of transformers that returns a single value."""

    def __init__(self, model, read):
        super().__init__()
        self.model, self.read = model, read

    def forward(self, pixel_values):
        return self.read(self.model(pixel_values))


class TextReader(Reader):
    def forward(self, input_ids, attention_mask):
        return self.read(self.model(input_ids, attention_mask=attention_mask))


def read_at(reader, build, read):
    def built():
        model, inputs = build()
        return reader(model, read), inputs

    return built


def llama(position):
    build = transformers_model("LlamaModel", tokens, **architectures.DECODER)
    return read_at(TextReader, build, lambda out: out.last_hidden_state[:, position])


CLIP = transformers_model("CLIPVisionModelWithProjection", pictures, **architectures.PICTURE)

HEADS = (
    one_token("eva_rotary", timm_model("eva02_tiny_patch14_224", **architectures.VIT, global_pool="token")),
    one_token("beit_class_token", timm_model("beit_base_patch16_224", **architectures.VIT, global_pool="token")),
    one_token("vit_norm_qk", timm_model("vit_tiny_patch16_224", **architectures.VIT, qk_norm=True)),
    one_token("hf_vit_head", transformers_model("ViTForImageClassification", pictures, **architectures.PICTURE)),
    one_token("hf_clip_head", read_at(Reader, CLIP, lambda out: out.image_embeds)),
    one_token("hf_bert_head", transformers_model("BertForSequenceClassification", segments, **architectures.TEXT)),
    one_token("hf_roberta_head", transformers_model("RobertaForSequenceClassification", tokens, **architectures.TEXT)),
    one_token("hf_llama_last", llama(-1)),
)
# tests/passes/graph/test_graph.py applies the pass to all listed architectures, which it traces anyway.
CASES = [pytest.param(case, id=case.name) for case in HEADS]


def feeds(model, size):
    """Draw `size` rows from the example inputs of the model, so that masks and ids are valid."""
    rows = torch.randint(0, 2, (size,), generator=torch.Generator().manual_seed(size))
    return {name: value[rows] for name, value in model.example.items()}


def narrowed(graph):
    """Return the narrowed graph and the names of the narrowed nodes."""
    twin = graph.fork()
    return twin, apply(NarrowTokens(), twin).changed


def shapes(graph):
    return {node.name: str(getattr(value_of(node), "shape", None)) for node in graph.nodes()}


def assert_same(graph, twin, batch):
    for left, right in zip(run(graph, batch), run(twin, batch), strict=True):
        torch.testing.assert_close(right, left, **SAME)


def multiply_adds(graph, model):
    return Costs(graph, feeds(model, 1)).total.multiply_adds


def calls(graph, target):
    return [node for node in graph.nodes() if node.target == target]


# ------------------------------------------------------------------------------------------------- real architectures


@pytest.mark.parametrize("architecture", CASES)
def test_models_read_at_one_token_keep_their_outputs(architecture):
    model = architecture.load()
    graph = trace(model)
    twin, changed = narrowed(graph)
    assert changed
    assert multiply_adds(twin, model) < multiply_adds(graph, model)
    for size in (1, 3):
        assert_same(graph, twin, feeds(model, size))
    recorded = shapes(twin)
    for node in [node for node in twin.nodes() if node.op == "call_function"]:
        propagate_fake_value(twin, node)
    assert shapes(twin) == recorded
    again, changed_again = narrowed(twin)
    assert changed_again == ()
    assert again.signature() == twin.signature()


@pytest.fixture(scope="module")
def deit():
    torch.manual_seed(0)
    module, inputs = timm_model("deit_tiny_patch16_224", depth=2)()
    model = models.load(module, example_inputs={"x": torch.rand(2, 3, 224, 224)})
    assert inputs.keys() == model.example.keys()
    return model, trace(model)


def test_last_block_of_deit_keeps_all_keys_and_values_only(deit):
    model, graph = deit
    twin, _ = narrowed(graph)
    many, width = 197, 192
    attention, projection, mlp = 2 * many * width, width * width, 8 * width * width
    saved = multiply_adds(graph, model) - multiply_adds(twin, model)
    assert saved == (many - 1) * (attention + projection + mlp)


@pytest.mark.parametrize("kinds", [("attention",), ("mlp",), ("attention", "mlp")])
def test_narrowing_after_drops_in_the_last_block(deit, kinds):
    model, graph = deit
    pruned = graph.fork()
    last = find_sites(graph)[-2:]
    apply(Drop(tuple(site.name for site in last if site.kind in kinds)), pruned)
    twin, changed = narrowed(pruned)
    assert_same(pruned, twin, feeds(model, 1))
    assert multiply_adds(twin, model) < multiply_adds(pruned, model)
    assert set(changed) <= {node.name for node in twin.nodes()}


@pytest.mark.parametrize("name", ["deit_distilled", "hf_llama_last"])
def test_onnx_file_computes_the_same_outputs(name, tmp_path):
    ort = pytest.importorskip("onnxruntime", reason="ONNX Runtime runs the ONNX file")
    (architecture,) = [architecture for architecture in HEADS + architectures.TIMM if architecture.name == name]
    model = architecture.load()
    graph = trace(model)
    twin, _ = narrowed(graph)
    path = lower(twin, model, tmp_path / "m.onnx")
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    for size in (1, 3):
        batch = feeds(model, size)
        outputs = session.run(None, {name: value.numpy() for name, value in batch.items()})
        for left, right in zip(run(graph, batch), outputs, strict=True):
            np.testing.assert_allclose(right, left.numpy(), **SAME)


# ---------------------------------------------------------------------------------------------------- small modules


class Ops(nn.Module):
    """Three square linear maps, a wide one and a norm of width 8; `rule` is the forward function."""

    def __init__(self, rule):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))
        self.wide, self.norm = nn.Linear(8, 16), nn.LayerNorm(8)
        self.gamma = nn.Parameter(torch.rand(8))
        self.table = nn.Parameter(torch.rand(1, 6, 8))
        self.rule = rule

    def forward(self, x):
        return self.rule(self, x)


def smaller(rule, shape=(2, 6, 8)):
    """Return the operators, without slices, that compute fewer tokens; check that the outputs do not change."""
    torch.manual_seed(0)
    model = models.load(Ops(rule).eval(), example_inputs=torch.rand(shape))
    graph = trace(model)
    twin, changed = narrowed(graph)
    for size in (1, 3):
        assert_same(graph, twin, feeds(model, size))
    assert changed or twin.signature() == graph.signature()
    by_name = {node.name: node for node in twin.nodes()}
    operators = [by_name[name].target.__name__.split(".")[0] for name in changed]
    return [name for name in operators if name != "slice"]  # every x[:, i] first slices the whole batch


def heads(x):
    return x.reshape(x.shape[0], -1, 2, 4).transpose(1, 2)


def joined(x):
    return x.transpose(1, 2).flatten(2)


def softmax_attention(m, x):
    q, k, v = heads(m.a(x)), heads(m.b(x)), heads(m.c(x))
    mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    scores = (q @ k.transpose(-2, -1) / 2).masked_fill(mask, -1e9)
    return joined(scores.softmax(-1) @ v)[:, 2]


def causal_flag(m, x):
    attended = F.scaled_dot_product_attention(heads(m.a(x)), heads(m.b(x)), heads(m.c(x)), is_causal=True)
    return m.c(joined(attended))[:, 2]


def swiglu(m, x):
    gate, value = m.wide(x).chunk(2, dim=-1)
    return m.a(F.silu(gate) * value)[:, 0]


def other_gate(m, x):
    gate, value = m.wide(x).chunk(2, dim=-1)
    return m.a(gate)[:, 0] + value.sum(1)


def row_against_all(m, x):
    y = m.a(x)
    return (y @ y.transpose(1, 2))[:, 0]


def table_and_scale(m, x):
    return (m.norm(m.a(x) + m.table) * m.gamma)[:, 3:4].flatten(1)


def two_tokens(m, x):
    y = m.a(x)
    return y[:, 1] - y[:, 2]


def tail_of_both(m, x):
    y = torch.cat([x[:, :1] * 2, m.a(x)[:, 1:]], dim=1)
    return m.b(y)[:, 4:]


def class_token(m, x):
    y = torch.cat([m.gamma.expand(x.shape[0], 1, -1), m.a(x)], dim=1)
    return m.b(y)[:, 0]


def sequence_first(m, x):
    y = m.a(x.transpose(0, 1)).tanh().permute(1, 0, 2)
    return m.b(y)[:, 5]


def feature_of_a_map(m, x):
    return (m.a(x) @ m.b(x).transpose(1, 2))[:, :, 1]


def stacked_and_averaged(m, x):
    return torch.stack([m.a(x), m.b(x)], dim=1).mean(1)[:, 0]


def slice_of_slice(m, x):
    return m.a(x)[:, 1:][:, :4][:, 2:3].squeeze(1)


OUT = ["transpose", "flatten"]  # merging of the heads


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (
            softmax_attention,
            ["linear", "reshape", "transpose", "matmul", "div", "masked_fill", "softmax", "matmul", *OUT],
        ),
        (causal_flag, [*OUT, "linear"]),
        (swiglu, ["linear", "chunk", "getitem", "getitem", "silu", "mul", "linear"]),
        (other_gate, ["linear"]),
        (row_against_all, ["matmul"]),
        (table_and_scale, ["linear", "add", "layer_norm", "mul"]),
        (two_tokens, ["linear"]),
        (tail_of_both, ["linear", "linear"]),
        (class_token, ["linear"]),
        (sequence_first, ["transpose", "linear", "tanh", "permute", "linear"]),
        (feature_of_a_map, ["linear", "transpose", "matmul"]),
        (stacked_and_averaged, ["linear", "linear", "stack", "mean"]),
        (slice_of_slice, ["linear"]),
    ],
)
def test_operators_are_narrowed(rule, expected):
    assert smaller(rule) == expected


UNTOUCHED = {
    "the batch": lambda m, x: m.b(x) + m.a(x)[:1],
    "most tokens": lambda m, x: m.a(x)[:, 1:],
    "everything as well": lambda m, x: [part(y) for y in [m.a(x)] for part in (torch.tanh, READS[0])],
    "no product above": lambda m, x: m.norm(x * m.gamma)[:, 0],
    "tokens mixed": lambda m, x: m.a(x).softmax(1)[:, 0],
    "tokens summed": lambda m, x: m.a(x).cumsum(1)[:, 0],
    "features normalised": lambda m, x: m.norm(m.a(x))[..., 0],
    "one of two with all of the other": lambda m, x: (m.a(x).mean(1), m.norm(x)[:, 0]),
    "merged with the features": lambda m, x: m.a(x).reshape(x.shape[0], -1)[:, 3:4],
    "every other token": lambda m, x: m.a(x)[:, ::2],
}


@pytest.mark.parametrize("rule", UNTOUCHED.values(), ids=UNTOUCHED)
def test_graph_is_not_narrowed(rule):
    assert smaller(rule) == []


@pytest.mark.parametrize("position", [pytest.param(0, marks=pytest.mark.slow), -2])
def test_sequence_of_dynamic_length(position):
    graph = trace(one_token("llama", llama(position)).load())
    twin, changed = narrowed(graph)
    assert changed
    for length in (4, 11):
        ids = torch.randint(3, 50, (3, length), generator=torch.Generator().manual_seed(length))
        assert_same(graph, twin, dict(zip(graph.inputs, (ids, torch.ones_like(ids)), strict=True)))


def test_slices_are_shared(deit):
    _, graph = deit
    twin, _ = narrowed(graph)
    assert len(calls(twin, aten.slice.Tensor)) == len(calls(graph, aten.slice.Tensor)) + 2  # the trunk and the query


# ---------------------------------------------------------------------------------------------------- random programs


def attended(m, x, y):
    return joined(F.scaled_dot_product_attention(heads(m.a(x)), heads(m.b(y)), heads(m.c(y))))


STEPS = (
    lambda m, x, y: m.a(x),
    lambda m, x, y: m.norm(x),
    lambda m, x, y: x + m.b(y),
    lambda m, x, y: x * y.sigmoid(),
    attended,
    lambda m, x, y: torch.cat([x[:, :2], y[:, 2:]], dim=1),
    lambda m, x, y: torch.cat([x[..., :4], y[..., 4:]], dim=-1),
    lambda m, x, y: torch.cat([x[:, 4:5], m.c(y), x[:, :1]], dim=1)[:, 1:7],
    lambda m, x, y: m.table * F.gelu(x) + y[:, 3:4],
    lambda m, x, y: (x @ y.transpose(1, 2)).softmax(-1) @ m.a(x),
    lambda m, x, y: torch.stack([x, m.c(y)], dim=2).unbind(2)[1],
    lambda m, x, y: x.softmax(1) + m.gamma,
    lambda m, x, y: m.wide(x).chunk(2, dim=-1)[1] - y,
    lambda m, x, y: x.permute(2, 0, 1).unsqueeze(1).squeeze(1).permute(1, 2, 0),
)
READS = (
    lambda x: x[:, 0],
    lambda x: x[:, -1],
    lambda x: x[:, 2:4].flatten(1),
    lambda x: x[:, 1] + x[:, 3],
    lambda x: x[:, 1:].mean(1),
)


def program(seed):
    """Return a chain of eight random steps over the last three values, read one to three times."""
    draw = random.Random(seed)
    plan = [(draw.choice(STEPS), draw.random(), draw.random()) for _ in range(8)]
    reads = [(draw.choice(READS), draw.choice((-1, -1, -2, -3))) for _ in range(draw.randint(1, 3))]

    def rule(m, x):
        values = [x]
        for step, first, second in plan:
            recent = values[-3:]
            values.append(step(m, recent[int(first * len(recent))], recent[int(second * len(recent))]))
        return tuple(read(values[position]) for read, position in reads)

    return rule


@pytest.mark.parametrize("seeds", [range(7), pytest.param(range(7, 20), marks=pytest.mark.slow)])
def test_random_programs_keep_their_outputs(seeds):
    narrowed_operators = [smaller(program(seed)) for seed in seeds]
    assert len(seeds) / 4 <= sum(map(bool, narrowed_operators)) < len(seeds)  # some are narrowed and some are not
