"""Formulas of single operators and counts of whole models, exactly equal to the counts of torch or closed formulas."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from passes.analysis import counted_cost
from passes.analysis.counted_cost import Costs
from passes.analysis.multiply_adds import FORMULAS, aten, counted, multiply_adds
from passes.graph.sites import ATTENTION_OPS, CONV_OPS, LINEAR_OPS, PRODUCTS
from tests.samples import traced

SIZES = st.integers(1, 5)


def empty(*shape):
    return torch.empty(shape, device="meta")


def by_formula(target, *args):
    return multiply_adds(target, args, target(*args))


@settings(max_examples=20, deadline=None)
@given(SIZES, SIZES, SIZES, SIZES)
def test_products_equal_the_count_of_torch(batch, rows, inner, columns):
    x, w = empty(batch, rows, inner), empty(columns, inner)
    right = empty(batch, inner, columns)
    assert by_formula(aten.linear.default, x, w, empty(columns)) == batch * rows * inner * columns
    for target, args in (
        (aten.linear.default, (x, w)),
        (aten.matmul.default, (x, right)),
        (aten.matmul.default, (x, empty(inner, columns))),
        (aten.bmm.default, (x, right)),
        (aten.baddbmm.default, (empty(batch, rows, columns), x, right)),
        (aten.mm.default, (x[0], right[0])),
        (aten.addmm.default, (empty(columns), x[0], right[0])),
    ):
        assert by_formula(target, *args) == counted(target, args, {})


@settings(max_examples=20, deadline=None)
@given(SIZES, SIZES, SIZES, SIZES, SIZES, SIZES)
def test_attention_equals_its_two_products(batch, heads, queries, keys, width, value_width):
    q, k, v = (
        empty(batch, heads, queries, width),
        empty(batch, heads, keys, width),
        empty(batch, heads, keys, value_width),
    )
    with FlopCounterMode(display=False) as counter:
        (q @ k.transpose(-2, -1)).softmax(-1) @ v
    assert by_formula(aten.scaled_dot_product_attention.default, q, k, v) == counter.get_total_flops() // 2


def test_grouped_query_attention_counts_query_heads():
    q, k = empty(2, 8, 5, 4), empty(2, 2, 7, 4)
    target = aten.scaled_dot_product_attention.default
    result = empty(2, 8, 5, 4)  # enable_gqa is a keyword
    assert multiply_adds(target, (q, k, k), result) == 2 * 8 * 5 * 7 * (4 + 4)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("stride", "padding"), [(1, 0), (2, 1)])
def test_convolutions_equal_the_count_of_torch(groups, stride, padding):
    x, weight = empty(3, 4, 9, 8), empty(6, 4 // groups, 3, 2)
    back = empty(4, 6 // groups, 3, 2)
    either = ([stride] * 2, [padding] * 2, [1, 1], False, [0, 0], groups)
    for target, args in (
        (aten.conv2d.default, (x, weight, None, [stride] * 2, [padding] * 2, [1, 1], groups)),
        (aten.conv_transpose2d.input, (x, back, None, [stride] * 2, [padding] * 2, [0, 0], groups)),
        (aten.convolution.default, (x, weight, None, *either)),
        (aten.convolution.default, (x, back, None, *either[:3], True, *either[4:])),
    ):
        # torch also counts the channels of one group only for a grouped convolution.
        assert by_formula(target, *args) == counted(target, args, {})


def test_every_product_operator_has_a_formula():
    """Except einsum, which torch counts by its constituent products."""
    missing = (ATTENTION_OPS | CONV_OPS | LINEAR_OPS | PRODUCTS) - FORMULAS.keys()
    assert missing == {aten.einsum.default}
    assert multiply_adds(aten.relu.default, (empty(2),), empty(2)) is None


@pytest.mark.parametrize("name", ["vit", "hf_llama", "hf_bert", "convnext"])
def test_model_counts_do_not_depend_on_the_counter_of_torch(name, monkeypatch):
    """Simulate a torch release whose counter counts no kernel, so that only the formulas count."""

    class CountsNothing(FlopCounterMode):
        def get_total_flops(self):
            return 0

    model, graph, _ = traced(name)
    expected = Costs(graph, model.example).total
    monkeypatch.setattr(counted_cost, "FlopCounterMode", CountsNothing)
    assert Costs(graph, model.example).total == expected
    assert expected.multiply_adds > 0


@pytest.mark.parametrize("length", [4, 9])
def test_llama_equals_the_closed_formula(length):
    """Grouped-query attention (queries and output 16 x 16, keys and values 8 x 16), a gated MLP and the head."""
    model, graph, _ = traced("hf_llama")
    config = model.module.config
    d, m, layers, vocabulary = (
        config.hidden_size,
        config.intermediate_size,
        config.num_hidden_layers,
        config.vocab_size,
    )
    kv = d // config.num_attention_heads * config.num_key_value_heads
    feeds = {name: value[:1].repeat(2, 9)[:, :length] for name, value in model.example.items()}
    block = length * (2 * d * d + 2 * d * kv + 3 * d * m) + 2 * length * length * d
    head = length * d * vocabulary if "logits" in model.outputs else 0
    assert Costs(graph, feeds).total.multiply_adds == layers * block + head
