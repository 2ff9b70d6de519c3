"""From a loaded model to a `Graph`: the only caller of torch.export."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch

from compressor.errors import CompressorError
from passes.base import apply
from passes.clean import Clean
from passes.graph import Graph

if TYPE_CHECKING:
    from compressor.models import Model

PREFIX = "model."


class TraceError(CompressorError):
    """torch.export could not turn the model into a graph."""


class Traced(torch.nn.Module):
    """The model behind positional tensors in and a flat tuple of tensors out."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model.module
        self._call = model.call

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Call the model with its inputs in order."""
        return self._call(self.model, *tensors)


def trace(model: Model) -> Graph:
    """Trace a model with a dynamic batch (and sequence) axis into a clean fx graph of ATen operators.

    Raises:
        TraceError: the model cannot be traced, or only with a fixed batch size; says where and what to try.
    """
    wrapped = Traced(model).eval()
    feeds = tuple(model.example[name] for name in model.inputs)
    shapes = {"tensors": tuple(_dynamic(model.dynamic_axes.get(name, {})) for name in model.inputs)}
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.export.export(wrapped, feeds, dynamic_shapes=shapes, strict=False)
            if any(_mutates(node) for node in program.graph.nodes):
                program = program.run_decompositions({})
    except Exception as error:
        raise TraceError(_explain(model, error)) from error
    graph = Graph(program.module(check_guards=False), model.inputs, model.outputs, PREFIX)
    apply(Clean(), graph)
    return graph


def _dynamic(axes: dict[int, str]) -> dict[int, object]:
    return dict.fromkeys(axes, torch.export.Dim.DYNAMIC)


def _mutates(node: torch.fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def _explain(model: Model, error: Exception) -> str:
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return (
        f"{model.name} could not be traced by torch.export: {first[:300]}. Compressor needs a forward pass without "
        "branches on tensor values that works at any batch size; for a transformers model "
        "try --task to choose another head."
    )
