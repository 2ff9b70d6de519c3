"""Lowering: the ONNX file against torch, and what the parity check refuses."""

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch

from compressor.lower import OPSET, TOLERANCE, LowerError, check_parity, lower
from compressor.models import load
from compressor.trace import trace
from passes.run import run


class Residual(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(8, 8)
        self.head = torch.nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x + torch.relu(self.inner(x)))


def test_the_file_has_the_stated_opset_names_and_free_batch_and_computes_what_torch_does(tmp_path: object) -> None:
    ort = pytest.importorskip("onnxruntime", reason="the ONNX file is run by ONNX Runtime")
    model = load(Residual(), example_inputs=torch.zeros(2, 8))
    graph = trace(model)
    path = lower(graph, model, tmp_path / "m.onnx")  # type: ignore[operator]
    written = onnx.load(path)
    assert [entry.version for entry in written.opset_import if entry.domain in ("", "ai.onnx")] == [OPSET]
    assert [value.name for value in (*written.graph.input, *written.graph.output)] == ["x", "output"]
    assert not any("stack_trace" in prop.key for node in written.graph.node for prop in node.metadata_props)
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    found = ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x.numpy()})[0]
    # Two float32 products of width 8, summed in another order.
    np.testing.assert_allclose(found, run(graph, {"x": x})[0].numpy(), atol=1e-5)


def arrays(*values: float) -> dict[str, npt.NDArray[np.float32]]:
    return {"y": np.array(values, dtype=np.float32)}


def test_a_difference_within_the_tolerance_is_measured() -> None:
    parity = check_parity(arrays(1.0, 100.0), lambda: arrays(1.005, 100.0), name="m")
    assert parity.output == "y"
    assert parity.difference == pytest.approx(0.005 / 100.0, rel=1e-4)  # float32 rounding of 1.005
    assert parity.rows == 2


def test_a_larger_difference_is_an_error() -> None:
    with pytest.raises(LowerError, match=r"m: output y differs from torch by 1.00e-02 .* allowed is 0.0001"):
        check_parity(arrays(1.0, 100.0), lambda: arrays(2.0, 100.0), name="m")
    assert TOLERANCE == 1e-4


def test_nan_in_the_file_alone_is_a_fault_of_the_export() -> None:
    with pytest.raises(LowerError, match="fault of the export"):
        check_parity(arrays(1.0), lambda: arrays(np.nan), name="m")


def test_nan_in_torch_already_is_a_fault_of_the_model() -> None:
    with pytest.raises(LowerError, match="in torch already, output y is NaN or infinite"):
        check_parity(arrays(np.inf), lambda: arrays(np.inf), name="m")


def test_another_shape_is_an_error() -> None:
    with pytest.raises(LowerError, match=r"shape \(2,\), torch gives \(1,\)"):
        check_parity(arrays(1.0), lambda: arrays(1.0, 2.0), name="m")
