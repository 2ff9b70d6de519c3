"""Running maxima and places in sorted values: the ONNX file computes what torch does."""

import numpy as np
import onnxruntime
import pytest
import torch

from compressor import models
from compressor.lower.trace import trace
from compressor.lower.write_onnx import lower

ROWS = 3


class Running(torch.nn.Module):
    """Some operator over the tokens of x [rows, tokens, 4], joined with x."""

    def __init__(self, compute):
        super().__init__()
        self.layer, self.compute = torch.nn.Linear(4, 4), compute
        self.register_buffer("sorted", torch.tensor([-0.5, 0.0, 0.0, 1.0]))

    def forward(self, x):
        return x + self.layer(x) + self.compute(self, (x * 2).round())


def joined(found):
    return sum(each.float() for each in found)


CASES = {
    "largest so far, and its place": lambda self, x: joined(torch.cummax(x, 1)),
    "smallest so far, and its place": lambda self, x: joined(torch.cummin(x, -2)),
    "largest whole number so far": lambda self, x: joined(torch.cummax(x.long(), 1)),
    "smallest whole number, on the last axis": lambda self, x: joined(torch.cummin(x.long(), 2)),
    "place before equal values": lambda self, x: torch.searchsorted(self.sorted, x).float(),
    "place behind equal values": lambda self, x: torch.searchsorted(self.sorted, x, right=True).float(),
    "place in sorted rows": lambda self, x: torch.searchsorted(x.sort(-1)[0], x, side="right", out_int32=True).float(),
    "members of a list": lambda self, x: torch.isin(x, self.sorted).float(),
}


@pytest.mark.parametrize("case", CASES)
def test_the_file_computes_what_torch_does_for_other_rows(case, tmp_path):
    torch.manual_seed(0)
    model = models.load(Running(CASES[case]), example_inputs=torch.randn(2, 16, 4))
    path = lower(trace(model), model, tmp_path / "model.onnx")
    x = torch.randn(ROWS, 16, 4)
    (found,) = onnxruntime.InferenceSession(str(path)).run(None, {model.inputs[0]: x.numpy()})
    with torch.inference_mode():
        expected = model.module(x).numpy()
    assert np.abs(found - expected).max() <= 1e-5
