"""Attention of other ranks than four: equal outputs after the rewrite, and files that ONNX Runtime runs."""

import numpy as np
import pytest
import torch

from compressor import models
from compressor.lower.trace import trace
from compressor.lower.write_onnx import lower
from passes.base import apply
from passes.execute.interpreter import run
from passes.rewrite.flatten_attention import FlattenAttention, can_flatten
from tests.architectures import TIMM

# float32 sums of the same terms in another order, on values of about 1.
SAME = {"rtol": 1e-5, "atol": 1e-5}


class Attention(torch.nn.Module):
    """Attention over `shape` after the batch, with a mask of `mask_rank` axes, from an input [batch, values]."""

    def __init__(self, shape, mask_rank=None, keys=None):
        super().__init__()
        self.shape, self.keys = shape, shape[-2] if keys is None else keys
        sizes, generator = (1,) * 4 + (shape[-2], self.keys), torch.Generator().manual_seed(2)
        self.mask = None if mask_rank is None else torch.randn(sizes[-mask_rank:], generator=generator)

    def forward(self, x):
        q = x.reshape(-1, *self.shape)
        k = q[..., : self.keys, :].sin()
        y = torch.nn.functional.scaled_dot_product_attention(q, k, 2 * k, attn_mask=self.mask, scale=0.3)
        return y.flatten(1)


def traced(module, values):
    torch.manual_seed(0)
    model = models.load(module.eval(), example_inputs=torch.randn(3, values))
    return model, trace(model)


def flattenable(graph):
    return [node.name for node in graph.nodes() if can_flatten(node)]


CASES = (
    ((2, 4, 6, 8), None, None),
    ((2, 1, 6, 8), 2, 3),
    ((4, 2, 6, 8), 3, None),
    ((6, 8), None, 3),
    ((6, 8), 2, None),
    ((6, 8), 3, None),
)


@pytest.mark.parametrize(("shape", "mask_rank", "keys"), CASES, ids=str)
def test_outputs_are_equal_for_every_batch(tmp_path, shape, mask_rank, keys):
    module = Attention(shape, mask_rank, keys)
    model, graph = traced(module, int(np.prod(shape)))
    assert len(flattenable(graph)) == 1
    fork = graph.fork()
    assert len(apply(FlattenAttention(), fork).changed) == 1
    assert flattenable(fork) == []
    path = lower(graph, model, tmp_path / "model.onnx")
    (name,) = graph.inputs
    for rows in (1, 5):
        x = torch.randn(rows, int(np.prod(shape)))
        expected = module(x)
        torch.testing.assert_close(run(fork, {name: x})[0], expected, **SAME)
        torch.testing.assert_close(torch.from_numpy(onnx_output(path, name, x)), expected, **SAME)
    assert flattenable(graph)  # the graph itself is as it was


def onnx_output(path, name, x):
    import onnxruntime

    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {name: x.numpy()})[0]


@pytest.mark.parametrize(("shape", "mask_rank"), [((2, 6, 8), None), ((2, 4, 6, 8), 4)], ids=str)
def test_four_axes_and_masks_of_as_many_are_left_alone(shape, mask_rank):
    _, graph = traced(Attention(shape, mask_rank), int(np.prod(shape)))
    assert apply(FlattenAttention(), graph.fork()).changed == ()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hiera", "samvit", "twins_svt", "nest"])
def test_architectures_with_windows_are_written(tmp_path, name):
    model = next(each for each in TIMM if each.name == name).load()
    path = lower(trace(model), model, tmp_path / "model.onnx")
    ((key, x),) = model.example.items()
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(onnx_output(path, key, x)), model.module(x), **SAME)
