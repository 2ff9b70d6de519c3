"""Sums of whole numbers: the ONNX file adds int64 values exactly, beyond 2^53 and around the largest number."""

import numpy as np
import onnxruntime
import pytest
import torch

from compressor import models
from compressor.lower.trace import trace
from compressor.lower.write_onnx import lower


class Hashed(torch.nn.Module):
    """Buckets of hashes of rows of whole numbers [rows, tokens, 4], as BLT hashes groups of bytes."""

    def __init__(self, keepdim, axis):
        super().__init__()
        self.table, self.keepdim, self.axis = torch.nn.Embedding(12, 8), keepdim, axis
        self.layer = torch.nn.Linear(8, 8)

    def forward(self, x):
        powers = torch.tensor(1_000_000_007) ** torch.arange(4)
        hashes = (x.round().long() * powers).sum(self.axis, keepdim=self.keepdim)
        values = self.table((hashes % 12).flatten(1))
        return values + self.layer(values)


@pytest.mark.parametrize(("keepdim", "axis"), [(False, -1), (True, 2)])
def test_hashes_beyond_double_precision_are_those_of_torch(keepdim, axis, tmp_path):
    torch.manual_seed(0)
    model = models.load(Hashed(keepdim, axis), example_inputs=torch.randint(0, 50, (2, 5, 4)).float())
    path = lower(trace(model), model, tmp_path / "model.onnx")
    x = torch.randint(0, 50, (3, 5, 4)).float()
    (found,) = onnxruntime.InferenceSession(str(path)).run(None, {model.inputs[0]: x.numpy()})
    with torch.inference_mode():
        np.testing.assert_allclose(found, model.module(x).numpy(), rtol=0, atol=1e-5)
