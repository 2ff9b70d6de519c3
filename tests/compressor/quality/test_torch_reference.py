"""Tests of torch's outputs as a reference: channels, rounding in float64, and ties told from faults."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from compressor import models
from compressor.lower.trace import trace
from compressor.quality.parity import ROUNDING, TOLERANCE, Array, Parity, ParityError, check_parity
from compressor.quality.torch_reference import channel_axes, reference_of, with_rounding
from passes.graph.graph import Graph

ROWS = {"x": torch.randn(8, 8, generator=torch.Generator().manual_seed(1))}


class Routed(torch.nn.Module):
    """Adds one of four vectors, that of the largest score; the scores of the first two are equal up to rounding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.router = torch.nn.Linear(8, 8), torch.nn.Linear(8, 4)
        self.experts = torch.nn.Parameter(torch.randn(4, 8))
        with torch.no_grad():
            self.router.weight[1] = self.router.weight[0] * (1 + 1e-7)
            self.router.bias[:2] = 0.3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.inner(x)
        return x + self.experts[self.router(x).argmax(-1)]


class Cancelling(torch.nn.Module):
    """Two columns, of which the first is the difference of large numbers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.inner(x)
        return torch.stack([(x[:, 0] + 1e4) - 1e4, x[:, 1]], -1)


class Sigmoids(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(x.abs() * -2 - 10)


def graph_of(module: torch.nn.Module) -> Graph:
    return trace(models.load(module, example_inputs={"x": torch.zeros(2, 8)}, task="feature-extraction"))


def checked(graph: Graph, value: Array) -> Parity:
    reference = reference_of(graph, ROWS)
    (output,) = graph.outputs
    refine = partial(with_rounding, reference, graph, [ROWS])
    return check_parity(reference, lambda: {output: value}, name="m", refine=refine)


def output_of(module: torch.nn.Module) -> Array:
    with torch.inference_mode():
        return module(ROWS["x"]).numpy()


def test_the_scale_includes_the_rounding_of_float32_alone() -> None:
    module = Cancelling()
    graph, single = graph_of(module), output_of(module)
    with torch.inference_mode():
        double = module.double()(ROWS["x"].double()).numpy()
    module.float()
    reference = with_rounding(reference_of(graph, ROWS), graph, [ROWS])
    (scale,) = reference.scale.values()
    rounding = np.abs(single - double).max(0)
    expected = np.maximum(np.abs(single).max(0), rounding * ROUNDING / TOLERANCE)
    np.testing.assert_allclose(scale[0], expected, rtol=1e-5)
    assert scale[0, 0] > 10 * scale[0, 1]  # the difference of large numbers is off by 5e-4
    assert reference.ties is None
    assert reference.notes == ()


def test_rows_that_flip_within_rounding_are_ties_and_others_are_not() -> None:
    module = Routed()
    graph, single = graph_of(module), output_of(module)
    with torch.inference_mode():
        x = ROWS["x"] + module.inner(ROWS["x"])
        chosen = module.router(x).argmax(-1)
        swapped = torch.where(chosen < 2, 1 - chosen, chosen)
        flipped = (x + module.experts[swapped]).numpy()
    tied = int((chosen < 2).sum())
    assert 0 < tied < 8
    parity = checked(graph, flipped)
    (note,) = parity.notes
    assert note.startswith(f"{tied} of 8 rows are ties, in which torch itself decides otherwise within the rounding")
    assert "(aten.argmax)" in note
    clear = int((chosen >= 2).nonzero()[0])
    wrong = flipped.copy()
    wrong[clear] += 0.01
    with pytest.raises(ParityError, match=rf"in 1 of 8 rows.*row {clear}, channel \d: .*rows are ties.*report it"):
        checked(graph, wrong)
    assert checked(graph, single).notes == ()


def test_a_sigmoid_may_be_off_by_the_rounding_of_one() -> None:
    module = Sigmoids()
    graph, single = graph_of(module), output_of(module)
    rounding = np.float32(2**-23)
    assert single.max() < 5e-5
    checked(graph, single + rounding / 2)  # 1e-3 of the values: what ONNX Runtime's approximation does
    with pytest.raises(ParityError):
        checked(graph, single + 2 * rounding)


def test_channels_are_the_axes_without_a_symbol() -> None:
    graph = graph_of(Routed())
    assert channel_axes(graph) == {graph.outputs[0]: (1,)}


def test_an_operator_without_float64_is_noted() -> None:
    graph = graph_of(Routed())
    node = next(node for node in graph.nodes() if "argmax" in str(node.target))
    original = node.target

    def only_float32(value: torch.Tensor, axis: int) -> torch.Tensor:
        if value.dtype != torch.float32:
            raise NotImplementedError("only float32")
        return original(value, axis)

    node.target = only_float32
    reference = with_rounding(reference_of(graph, ROWS), graph, [ROWS])
    assert reference.notes == (
        "the rounding of torch and its ties were not measured, because the model did not run in float64 (only float32)",
    )


class Gated(torch.nn.Module):
    """Adds one of three vectors, that of the largest score; in about half of the rows, two scores are equal."""

    def __init__(self, *, sort: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.sort = torch.nn.Linear(8, 8), sort
        self.experts = torch.nn.Parameter(torch.randn(3, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = torch.relu(x[:, :1]) * torch.tensor([1.0, 2.0, 1.0]) - torch.tensor([0.0, 0.0, 1.0])
        chosen = scores.sort(-1, descending=True)[1][:, 0] if self.sort else scores.topk(1)[1][:, 0]
        return x + self.inner(x) + self.experts[chosen]


@pytest.mark.parametrize("sort", [False, True])
def test_candidates_that_are_equal_are_ties_although_nothing_was_rounded(sort: bool) -> None:
    """The order of equal candidates is not defined: an engine may take another one than torch."""
    module = Gated(sort=sort)
    graph, x = graph_of(module), ROWS["x"]
    tied = x[:, 0] <= 0
    clear = int((~tied).nonzero()[0])
    assert 0 < int(tied.sum()) < 8
    with torch.inference_mode():
        trunk = x + module.inner(x)
        first, second = (torch.where(tied[:, None], trunk + expert, module(x)).numpy() for expert in module.experts[:2])
    found = output_of(module)
    other = second if np.allclose(found, first, atol=1e-6) else first
    (note,) = checked(graph, other).notes
    assert note.startswith(f"{int(tied.sum())} of 8 rows are ties")
    other[clear] += 0.01
    with pytest.raises(ParityError, match=rf"row {clear}, "):
        checked(graph, other)
