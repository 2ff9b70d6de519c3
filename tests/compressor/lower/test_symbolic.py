"""Tests of what is replaced while a model is traced, so that torch.export sees sizes."""

import torch

from compressor import models
from compressor.lower.symbolic.sizes import symbolic_gathers, symbolic_windows
from compressor.lower.symbolic.whole_numbers import whole_numbers
from compressor.lower.trace import trace
from passes.execute.interpreter import run

LENGTH = 13


class Padded(torch.nn.Module):
    """Pads a clip to a whole number of strides, which it holds as a buffer; a persistent one and a plain tensor too."""

    def __init__(self):
        super().__init__()
        self.register_buffer("stride", torch.tensor(4), persistent=False)
        self.register_buffer("seen", torch.tensor(7))
        self.register_buffer("table", torch.ones(2))
        self.offset = torch.tensor(1)

    def forward(self, clips):
        length = clips.shape[-1]
        assert self.stride.device == clips.device  # as a number too
        whole = torch.ceil(length / self.stride).to(torch.int64) * self.stride
        return torch.nn.functional.pad(clips, (self.offset, whole - length))


def test_sizes_from_buffers_are_numbers_while_a_module_is_traced():
    module, clips = Padded(), torch.randn(2, LENGTH)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with whole_numbers(module):
        program = torch.export.export(module, (clips,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), strict=False)
    assert not [node for node in program.graph.nodes if "item" in str(node.target)]
    three = torch.randn(3, LENGTH)
    torch.testing.assert_close(program.module()(three), module(three))
    assert isinstance(module.stride, torch.Tensor)
    assert isinstance(module.offset, torch.Tensor)
    torch.testing.assert_close(dict(module.state_dict()), before)
    assert set(dict(module.named_buffers())) == {"stride", "seen", "table"}


def test_distances_do_not_ask_for_the_rows_of_one_side_where_those_of_the_other_are_many():
    class Nearest(torch.nn.Module):
        def forward(self, values):
            return torch.cdist(values, torch.arange(60.0).reshape(30, 2)).argmin(-1)

    values = torch.randn(4, 2)
    with symbolic_gathers():
        program = torch.export.export(Nearest(), (values,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    for rows in (2, 40):
        values = torch.randn(rows, 2)
        torch.testing.assert_close(program.module()(values), Nearest()(values))


class Scaled(torch.nn.Module):
    """Reads a whole number as a tensor."""

    def __init__(self):
        super().__init__()
        self.register_buffer("steps", torch.tensor(3))

    def forward(self, values):
        return values + values * self.steps.float()


def test_a_number_that_is_read_as_a_tensor_stays_one():
    model = models.load(Scaled(), example_inputs=torch.randn(2, 4))
    graph = trace(model)
    values = torch.randn(3, 4)
    torch.testing.assert_close(run(graph, {model.inputs[0]: values})[0], values * 4)


def test_a_module_of_fixed_sizes_is_traced_with_its_numbers_if_it_cannot_be_otherwise():
    model = models.load(Padded(), example_inputs=torch.randn(2, LENGTH))
    graph = trace(model)
    clips = torch.randn(3, LENGTH)
    torch.testing.assert_close(run(graph, {model.inputs[0]: clips})[0], Padded()(clips))


def test_windows_of_tokens_are_slices():
    """Blocks overlap by a half (Longformer's keys), or are windows of padded tokens (its values); others stay."""
    blocks, tokens = torch.randn(3, 5, 4, 6), torch.randn(3, 20, 6)
    cases = (
        (blocks, (3, 9, 4, 6), (120, 12, 6, 1)),
        (tokens, (3, 8, 6, 6), (120, 12, 6, 1)),
        (tokens, (3, 3, 6, 6), (120, 18, 6, 1)),  # windows that leave out tokens at the end
        (tokens, (3, 4, 5, 6), (120, 18, 6, 1)),  # no whole number of steps
        (tokens.transpose(0, 1), (20, 3, 6), (6, 120, 1)),
        (tokens, (3, 20), (120, 6)),
        (tokens, (3, 4, 5, 6), (120, 30, 6, 1)),
        (torch.randn(3, 1, 6), (3, 2, 4, 6), (6, 0, 0, 1)),
    )
    for values, size, stride in cases:
        expected = values.as_strided(size, stride)
        with symbolic_windows():
            found = values.as_strided(size, stride)
        assert torch.equal(found, expected)


def test_sizes_are_divided_as_sizes():
    class Halves(torch.nn.Module):
        def forward(self, values):
            half = torch.div(values.shape[1], 2, rounding_mode="trunc")
            return values[:, :half] + torch.div(values[:, :half], 2, rounding_mode="floor")

    dynamic = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},)
    with symbolic_windows():
        program = torch.export.export(Halves(), (torch.randn(2, 8),), dynamic_shapes=dynamic, strict=False)
    values = torch.randn(3, 11)
    torch.testing.assert_close(program.module()(values), Halves()(values))
