"""Attention in ONNX: it computes what torch does, in fewer operators than onnxscript's translation."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from compressor import models
from compressor.lower.trace import trace
from compressor.lower.write_onnx import lower

HEADS, WIDTH = 4, 8


class Attention(torch.nn.Module):
    """Attention of x [rows, tokens, width] to y [rows, other tokens, width] with a mask of a kind."""

    def __init__(self, mask: str, scale: float | None, key_heads: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.query = torch.nn.Linear(HEADS * WIDTH, HEADS * WIDTH)
        self.key = torch.nn.Linear(HEADS * WIDTH, key_heads * WIDTH)
        self.mask, self.options = mask, {"scale": scale, "enable_gqa": key_heads < HEADS}

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        query, key = (
            layer(value).unflatten(-1, (-1, WIDTH)).transpose(1, 2) for layer, value in ((self.query, x), (self.key, y))
        )
        shown = (x[:, :1, :1] < y[:, None, :, 0]) | (torch.arange(y.shape[1]) == 0)  # [rows, 1, other tokens]
        masks = {"bool": shown[:, None], "float": y[:, None, None, :, 0], "none": None, "causal": None}
        mixed = scaled_dot_product_attention(
            query, key, key, masks[self.mask], is_causal=self.mask == "causal", **self.options
        )
        return mixed.transpose(1, 2).flatten(2)


def inputs(rows: int, tokens: int, others: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    return tuple(torch.randn(rows, length, HEADS * WIDTH, generator=generator) for length in (tokens, others))  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("mask", "scale", "key_heads"),
    [*itertools.product(("none", "bool", "float", "causal"), (None, 0.3), (HEADS,)), ("bool", None, 2)],
)
def test_attention_in_onnx_equals_torch(tmp_path: Path, mask: str, scale: float | None, key_heads: int) -> None:
    ort = pytest.importorskip("onnxruntime", reason="the ONNX file is run by ONNX Runtime")
    module = Attention(mask, scale, key_heads).eval()
    model = models.load(module, example_inputs=inputs(2, 5, 5 if mask == "causal" else 7))
    path = lower(trace(model), model, tmp_path / "m.onnx")
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for rows in (1, 2, 5):
        feeds = inputs(rows, 5, 5 if mask == "causal" else 7)
        found = session.run(None, {name: value.numpy() for name, value in zip(model.inputs, feeds, strict=True)})[0]
        with torch.inference_mode():
            np.testing.assert_allclose(found, module(*feeds).numpy(), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("mask", ["none", "bool", "float"])
def test_attention_has_no_operator_that_it_does_not_need(tmp_path: Path, mask: str) -> None:
    model = models.load(Attention(mask, None, HEADS), example_inputs=inputs(2, 5, 7))
    nodes = onnx.load(lower(trace(model), model, tmp_path / "m.onnx")).graph.node
    counts: Counter[Any] = Counter(node.op_type for node in nodes)
    assert counts["MatMul"] == 4
    assert counts["Softmax"] == counts["Mul"] == 1
    assert counts["Transpose"] == 4  # queries, keys, values, and the heads behind them
    assert not counts["IsNaN"]
    assert counts["Where"] == (mask == "bool")
    if mask == "none":
        assert not counts["Slice"]


def test_a_row_without_keys_is_finite(tmp_path: Path) -> None:
    """A boolean mask that hides all keys, as of a row of padding, gives the mean of the values and no NaN."""
    ort = pytest.importorskip("onnxruntime", reason="the ONNX file is run by ONNX Runtime")

    class Masked(torch.nn.Module):
        def forward(self, x: torch.Tensor, shown: torch.Tensor) -> torch.Tensor:
            return scaled_dot_product_attention(x, x, x, (shown > 0)[:, None, None])

    x, shown = torch.randn(2, HEADS, 5, WIDTH), torch.tensor([[1.0] * 5, [0.0] * 5])
    model = models.load(Masked(), example_inputs=(x, shown))
    path = lower(trace(model), model, tmp_path / "m.onnx")
    feeds = dict(zip(model.inputs, (x.numpy(), shown.numpy()), strict=True))
    found = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, feeds)[0]
    expected = x[1].mean(1, keepdim=True).expand(-1, 5, -1)
    np.testing.assert_allclose(found[1], expected.numpy(), atol=1e-6)
