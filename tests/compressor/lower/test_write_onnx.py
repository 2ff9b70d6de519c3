"""Lowering: the ONNX file compared with torch."""

import resource
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from compressor.lower.trace import trace
from compressor.lower.write_onnx import OPSET, lower
from compressor.models import load
from passes.base import apply
from passes.execute.interpreter import run
from passes.rewrite.drop import Drop
from tests.decoders import saved


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
    onnx.shape_inference.infer_shapes(written, strict_mode=True)  # raises if shapes in the file contradict each other
    noted = {value.name for value in written.graph.value_info}
    assert noted
    assert not noted & {
        tensor.name for tensor in written.graph.initializer
    }  # tools that transpose a weight fail on its old shape
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    actual = ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x.numpy()})[0]
    # Two float32 products of width 8, summed in another order.
    np.testing.assert_allclose(actual, run(graph, {"x": x})[0].numpy(), atol=1e-5)


class States(torch.nn.Module):
    """A model that returns its states, as `output_hidden_states` does."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = x + torch.relu(self.a(x))
        z = y + torch.relu(self.b(y))
        return z.sum(-1, keepdim=True), y, z


@pytest.mark.parametrize("dropped", [("a",), ("b",), ("a", "b")])
def test_states_that_are_equal_after_a_drop_are_outputs_of_their_own(dropped: tuple[str, ...], tmp_path: Path) -> None:
    ort = pytest.importorskip("onnxruntime", reason="the ONNX file is run by ONNX Runtime")
    module = States()
    model = load(module, example_inputs=torch.zeros(2, 8))
    graph = trace(model)
    apply(Drop(dropped), graph)
    session = ort.InferenceSession(lower(graph, model, tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    assert [each.name for each in session.get_inputs()] == ["x"]
    assert [each.name for each in session.get_outputs()] == list(model.outputs)
    for name in dropped:
        torch.nn.init.constant_(module.get_submodule(name).weight, 0)
        torch.nn.init.constant_(module.get_submodule(name).bias, 0)
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    for actual, expected in zip(session.run(None, {"x": x.numpy()}), module(x), strict=True):
        np.testing.assert_allclose(actual, expected.detach().numpy(), atol=1e-5)


class Normalised(torch.nn.Module):
    """A branch of rows of unit length; what is added and multiplied is close to 0 and to 1."""

    def __init__(self, epsilon: float, factor: float) -> None:
        super().__init__()
        self.epsilon, self.factor = epsilon, factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + x * self.factor / ((x * x).sum(-1, keepdim=True).sqrt() - self.epsilon + 2 * self.epsilon)


@pytest.mark.parametrize(("epsilon", "factor"), [(1e-8, 1.0), (1e-12, 1.0), (1e-30, 1.0), (0.0, 1 - 2**-18)])
def test_numbers_close_to_0_and_1_stay_in_the_file(epsilon: float, factor: float, tmp_path: Path) -> None:
    """The optimizer of onnxscript takes numbers within 1e-8 of 0 and within 1e-5 of 1 for 0 and 1."""
    ort = pytest.importorskip("onnxruntime", reason="the ONNX file is run by ONNX Runtime")
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    if epsilon:
        x = torch.cat([torch.zeros(1, 8), x * epsilon])
    module = Normalised(epsilon, factor)
    model = load(module, example_inputs=torch.ones(2, 8))
    path = lower(trace(model), model, tmp_path / "m.onnx")
    found = ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x.numpy()})[0]
    # The order of a few operations on float32 of 24 bits; a factor of 1 - 2^-18 is 64 units in the last place.
    np.testing.assert_allclose(found, module(x).numpy(), rtol=1e-6, atol=0)
    operators = [node.op_type for node in onnx.load(path).graph.node]
    assert operators.count("Mul") == 1 + (factor != 1)


class Clipped(torch.nn.Module):
    """Clips one value twice, by bounds that are buffers, as Gemma 4's encoder of sound does."""

    def __init__(self) -> None:
        super().__init__()
        for name, value in (("low", -1.0), ("high", 1.0), ("lower", -2.0), ("higher", 3.0)):
            self.register_buffer(name, torch.tensor(value))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values = x * 5
        return torch.cat([values.clamp(self.low, self.high), values.clamp(self.lower, self.higher)], 1)


def test_a_value_that_is_clipped_twice_keeps_both_pairs_of_bounds(tmp_path: Path) -> None:
    """The optimizer names the bounds after the value, and the file had one pair, and a name that nothing defined."""
    ort = pytest.importorskip("onnxruntime", reason="the ONNX file is run by ONNX Runtime")
    model = load(Clipped(), example_inputs=torch.randn(2, 8))
    path = lower(trace(model), model, tmp_path / "m.onnx")
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    found = ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x.numpy()})[0]
    np.testing.assert_allclose(found, Clipped()(x).numpy(), rtol=1e-6, atol=0)


def test_a_program_that_cannot_be_written_raises_and_does_not_end_the_process(tmp_path: Path) -> None:
    """The limit on the size of a file stands in for a full disk, at which torch's writer of files calls terminate."""
    model = load(Residual(), example_inputs=torch.zeros(2, 8))
    graph = trace(model)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            lower(graph, model, tmp_path / "m.pt2")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert torch.export.load(lower(graph, model, tmp_path / "m.pt2")).module()(torch.zeros(3, 8))[0].shape == (3, 4)


def test_a_program_holds_no_path_of_the_machine_that_wrote_it(tmp_path: Path) -> None:
    model = load(Residual(), example_inputs=torch.zeros(2, 8))
    with zipfile.ZipFile(lower(trace(model), model, tmp_path / "m.pt2")) as program:
        contents = {name: program.read(name) for name in program.namelist()}
    assert any(b"aten.linear" in content for content in contents.values())
    for name, content in contents.items():
        for path in (Path(torch.__file__).parents[1], Path(__file__).parents[3], tmp_path):
            assert str(path).encode() not in content, name


def test_axes_of_a_language_model_have_the_names_of_optimum(tmp_path: Path) -> None:
    """transformers.js looks the number of rows of an empty cache up by the name batch_size."""
    model = load(str(saved(tmp_path / "llama", "Llama")))
    values = onnx.load(str(lower(trace(model), model, tmp_path / "m.onnx"))).graph.input
    axes = {value.name: [each.dim_param for each in value.type.tensor_type.shape.dim] for value in values}
    assert axes["input_ids"] == axes["position_ids"] == ["batch_size", "sequence_length"]
    assert axes["attention_mask"] == ["batch_size", "total_sequence_length"]
    assert axes["past_key_values.0.key"] == ["batch_size", "", "past_sequence_length", ""]
