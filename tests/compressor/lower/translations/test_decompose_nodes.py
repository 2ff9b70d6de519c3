"""Decomposition of operators without a translation to ONNX."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.export import ExportedProgram

from compressor.lower.exported_program import exported_program
from compressor.lower.trace import trace
from compressor.lower.translations.decompose_nodes import decompose_nodes
from compressor.lower.write_onnx import lower
from compressor.models import load

aten = torch.ops.aten


class Parts(torch.nn.Module):
    """Has an operator with several results, one whose result is an output, and one that reads a size."""

    def forward(self, x):
        first, second = x.chunk(2, 1)
        return first.reshape(-1, 2) * second.shape[0], second.flatten(1)


def program_of(module, *inputs):
    batch = {0: torch.export.Dim("batch")}
    return torch.export.export(module.eval(), inputs, dynamic_shapes=tuple(batch for _ in inputs))


def targets(program):
    return {node.target for node in program.graph.nodes if node.op == "call_function"}


def test_operators_are_decomposed_in_place_and_the_program_computes_the_same(monkeypatch):
    x = torch.randn(3, 4, 2)
    program = program_of(Parts(), x)
    expected = program.module()(x)
    composite = {aten.chunk.default, aten.reshape.default, aten.flatten.using_ints}
    assert composite <= targets(program)
    table = torch.export.default_decompositions().materialize()
    monkeypatch.setattr(ExportedProgram, "run_decompositions", None)  # nothing is traced again
    assert decompose_nodes(program, lambda target: target not in composite, table)
    assert not composite & targets(program)
    assert all("val" in node.meta for node in program.graph.nodes if node.op == "call_function")
    program.graph.lint()
    for rows in (3, 5):
        y = torch.randn(rows, 4, 2)
        torch.testing.assert_close(program.module()(y), Parts()(y), rtol=0, atol=0)
    torch.testing.assert_close(program.module()(x), expected, rtol=0, atol=0)


class Stages(torch.nn.Module):
    """Splits what it joined along the batch by the number of rows, as ZoeDepth does."""

    def forward(self, x):
        first, second, third = torch.cat([x, x * 2, x + 3]).split(x.shape[0])
        return first * second + third


def test_a_split_by_the_number_of_rows_is_sliced(tmp_path):
    ort = pytest.importorskip("onnxruntime", reason="the ONNX file is run by ONNX Runtime")
    model = load(Stages(), example_inputs=torch.randn(2, 4))
    program = exported_program(trace(model))
    assert aten.split.Tensor in targets(program)
    assert decompose_nodes(program, lambda _: True, {})
    assert aten.split.Tensor not in targets(program)
    session = ort.InferenceSession(lower(trace(model), model, tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    for rows in (1, 3, 5):
        x = torch.randn(rows, 4)
        torch.testing.assert_close(program.module()(x)[0], Stages()(x), rtol=0, atol=0)
        np.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], Stages()(x).numpy(), rtol=1e-6)


class Streams(torch.nn.Module):
    """Cuts what it joined along the batch into a number of parts, as ProphetNet does along its tokens."""

    def forward(self, x):
        first, second, third = torch.cat([x, x * 2, x + 3]).chunk(3, dim=0)
        return first * second + third


def test_a_chunk_of_a_dynamic_axis_is_sliced(tmp_path):
    ort = pytest.importorskip("onnxruntime", reason="the ONNX file is run by ONNX Runtime")
    model = load(Streams(), example_inputs=torch.randn(2, 4))
    program = exported_program(trace(model))
    assert decompose_nodes(program, lambda target: target is not aten.chunk.default, {})
    assert not {aten.chunk.default, aten.split.Tensor} & targets(program)
    program.graph.lint()
    session = ort.InferenceSession(lower(trace(model), model, tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    for rows in (1, 3, 5):
        x = torch.randn(rows, 4)
        torch.testing.assert_close(program.module()(x)[0], Streams()(x), rtol=0, atol=0)
        np.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], Streams()(x).numpy(), rtol=1e-6)


class Loop(torch.nn.Module):
    """Has a subgraph of its own, which cannot be decomposed as a node."""

    def forward(self, x):
        return torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,))


def test_what_cannot_be_decomposed_on_its_own_is_reported_and_still_computes_the_same():
    x = torch.randn(3, 4)
    program = program_of(Loop(), x)
    known = targets(program)
    assert not decompose_nodes(program, lambda target: not isinstance(target, torch._ops.HigherOrderOperator), {})
    assert targets(program) == known
    torch.testing.assert_close(program.module()(x), Loop()(x))


@pytest.mark.parametrize("kept", [True, False])
def test_a_decomposition_must_consist_of_operators_that_are_kept(kept):
    x = torch.randn(3, 4, 2)
    program = program_of(torch.nn.Flatten(), x)
    allowed = {aten.view.default, aten.sym_size.int} if kept else {aten.sym_size.int}
    assert decompose_nodes(program, allowed.__contains__, {}) is kept
    assert (aten.view.default in targets(program)) is kept
    assert (aten.flatten.using_ints in targets(program)) is not kept


class Made(torch.nn.Module):
    """Makes a tensor of a size alone, and subtracts integers from a number, as XLNet does."""

    def forward(self, x):
        return (1.0 - (x > 0).long()) * torch.eye(x.shape[0])


def test_operators_of_a_size_alone_and_of_a_number_first_are_decomposed():
    program = program_of(Made(), torch.randn(3, 1))
    table = torch.export.default_decompositions().materialize()
    assert {aten.eye.default, aten.rsub.Scalar} <= targets(program)
    assert decompose_nodes(program, lambda target: target not in (aten.eye.default, aten.rsub.Scalar), table)
    assert not {aten.eye.default, aten.rsub.Scalar} & targets(program)
    assert not [node for node in program.graph.nodes if node.op == "call_function" and isinstance(node.args[0], float)]
    for rows in (3, 5):
        x = torch.randn(rows, 1)
        torch.testing.assert_close(program.module()(x), Made()(x), rtol=0, atol=0)
