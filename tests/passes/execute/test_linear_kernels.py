"""Linear layers in oneDNN: equal to torch's, forwards and backwards, and used by every run of a graph."""

import pytest
import torch
from torch.nn import functional

from compressor.quality.evaluate import tensor_batches
from passes.execute import linear_kernels
from passes.execute.interpreter import Program, run
from passes.execute.linear_kernels import addmm, kernel_of, linear
from passes.torch_internals import FakeTensorMode
from tests.samples import small

aten = torch.ops.aten
CLOSE = {"rtol": 1e-5, "atol": 1e-4}

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")


@pytest.fixture
def calls(monkeypatch):
    """Use oneDNN for products of every size, and return the list that each call is added to."""
    made = []

    def counted(*tensors):
        made.append(tensors)
        return original(*tensors)

    original = linear_kernels.onednn_linear
    monkeypatch.setattr(linear_kernels, "onednn_linear", counted)
    monkeypatch.setattr(linear_kernels, "prefers_onednn", lambda: True)
    monkeypatch.setattr(linear_kernels, "LEAST", 0)
    return made


def values(*shapes, **kwargs):
    generator = torch.Generator().manual_seed(len(shapes))
    return [None if shape is None else torch.randn(shape, generator=generator, **kwargs) for shape in shapes]


@pytest.mark.parametrize("shape", [(5, 70), (1, 1, 1, 70), (2, 3, 70), (3, 0, 70)])
@pytest.mark.parametrize("bias", [(90,), None])
def test_a_linear_layer_is_that_of_torch(calls, shape, bias):
    x, weight, offset = values(shape, (90, 70), bias)
    torch.testing.assert_close(linear(x, weight, offset), functional.linear(x, weight, offset), **CLOSE)
    assert len(calls) == 1


def test_strided_tensors(calls):
    x, weight = values((70, 5), (70, 180))
    x, weight = x.t(), weight.t()[::2]
    torch.testing.assert_close(linear(x, weight), functional.linear(x, weight), **CLOSE)
    assert len(calls) == 1


@pytest.mark.parametrize(
    "trained", [(True, False, False), (True, True, True), (False, True, False), (False, False, True)]
)
def test_gradients_are_those_of_torch(calls, trained):
    tensors = values((2, 3, 70), (90, 70), (90,))
    for tensor, needed in zip(tensors, trained, strict=True):
        tensor.requires_grad_(needed)
    wanted = [tensor for tensor, needed in zip(tensors, trained, strict=True) if needed]
    (of_output,) = values((2, 3, 90))
    found = torch.autograd.grad(linear(*tensors), wanted, of_output)
    expected = torch.autograd.grad(functional.linear(*tensors), wanted, of_output)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)
    assert len(calls) == 1 + sum(trained[:2])


def test_what_onednn_is_not_asked_for(calls):
    """Other types, tensors without elements, a vector, and a few products."""
    x, weight, offset = values((2, 70), (90, 70), (90,), dtype=torch.float64)
    torch.testing.assert_close(linear(x, weight, offset), functional.linear(x, weight, offset))
    x, weight, offset = (each.float() for each in (x, weight, offset))
    torch.testing.assert_close(linear(x[0], weight), functional.linear(x[0], weight))
    with FakeTensorMode() as mode:
        assert linear(*(mode.from_tensor(each) for each in (x, weight, offset))).shape == (2, 90)
    assert calls == []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_kernels, "LEAST", 2 * 70 * 90 + 1)
        linear(x, weight, offset)
    assert calls == []
    linear(x, weight, offset)
    assert len(calls) == 1


def test_the_number_of_threads_changes_no_bit(calls):
    """On every processor, up to the widest layers; wider ones are left to torch."""
    x, weight, offset = values((8, linear_kernels.WIDEST), (64, linear_kernels.WIDEST), (64,))
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            found.append(linear(x, weight, offset))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert len(calls) == 3
    wider, matrix = values((8, linear_kernels.WIDEST + 1), (64, linear_kernels.WIDEST + 1))
    assert torch.equal(linear(wider, matrix), functional.linear(wider, matrix))
    assert len(calls) == 3


def test_addmm_is_that_of_torch(calls):
    offset, x, weight = values((90,), (5, 70), (70, 90))
    torch.testing.assert_close(addmm(offset, x, weight), torch.addmm(offset, x, weight), **CLOSE)
    assert len(calls) == 1
    torch.testing.assert_close(addmm(offset, x, weight, alpha=2.0), torch.addmm(offset, x, weight, alpha=2.0))
    (rows,) = values((5, 90))
    torch.testing.assert_close(addmm(rows, x, weight), torch.addmm(rows, x, weight))
    torch.testing.assert_close(addmm(rows[0, :1], x, weight), torch.addmm(rows[0, :1], x, weight))
    assert len(calls) == 1


def test_all_linear_layers_of_a_graph_run_in_onednn(calls):
    _, graph, _, images = small()
    feeds = next(tensor_batches(images, 4))
    found = run(graph, feeds)
    layers = [node for node in graph.nodes() if node.target is aten.linear.default]
    assert len(calls) == len(layers) > 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_kernels, "prefers_onednn", lambda: False)
        assert kernel_of(aten.linear.default) is aten.linear.default
        expected = Program(graph).run(feeds)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)
    assert len(calls) == len(layers)


@pytest.mark.parametrize(
    ("vendor", "capability", "expected"),
    [("AuthenticAMD", "AVX512", True), ("AuthenticAMD", "AVX2", False), ("GenuineIntel", "AVX512", False)],
)
def test_onednn_is_preferred_on_amd_processors_with_avx_512(monkeypatch, vendor, capability, expected):
    monkeypatch.setattr(linear_kernels, "_processor", lambda: f"vendor_id : {vendor}")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    available = torch.backends.mkl.is_available()
    assert linear_kernels.prefers_onednn.__wrapped__() == (expected and available)
    assert kernel_of(aten.relu.default) is aten.relu.default
