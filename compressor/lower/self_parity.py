"""Compare a model with itself in torch: one call with the next, and the traced graph with the module.

Engines are compared with the traced graph. That comparison is only fair if the model computes the same for the same
rows, and only complete if the graph computes what the module does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import torch

from compressor.errors import CompressorError
from compressor.models import Model
from compressor.models.base import first_line
from compressor.quality.parity import Array, NotFiniteError, ParityError, Reference, check_parity
from compressor.quality.torch_reference import channel_axes, torch_outputs, with_rounding
from passes.execute.offloaded_weights import has_offloaded
from passes.graph.graph import Graph
from passes.graph.random_operators import random_operators

NAMED = 3  # largest number of operators or modules in a sentence
REMEDY = (
    "expected the same outputs; switch dropout and noise off in evaluation, such as "
    "F.dropout(x, p, training=self.training) and no torch.rand in forward, or pass the noise as an input"
)
OF_A_LIBRARY = (
    "expected the same outputs; its class draws them in evaluation too, so pass it as a module of your own, "
    "package.module:factory, whose forward takes the noise as an input"
)


class RandomModelError(CompressorError):
    """A model whose outputs for the same inputs differ from call to call."""


class BatchError(CompressorError):
    """A model whose outputs for a row depend on the other rows of its batch."""


class TracedGraphError(CompressorError):
    """A traced graph that does not compute what its module computes, and the first place where they differ."""

    def __init__(self, place: str, message: str) -> None:
        super().__init__(message)
        self.place = place


def check_self_parity(model: Model, graph: Graph, feeds: Mapping[str, torch.Tensor]) -> None:
    """Run the module twice and its traced graph once on the same rows, and both on the first row, and compare outputs.

    A model whose weights stay on disk does not run as a module; only its graph is searched for random operators.

    Args:
        model: the loaded model.
        graph: its traced graph.
        feeds: rows of the data. Their number should differ from the two of the example that was traced.

    Raises:
        RandomModelError: the outputs are random, or the model changes with each call.
        BatchError: the outputs for a row depend on the other rows.
        TracedGraphError: tracing turned a value that depends on the inputs into a constant.
    """
    operators = random_operators(graph)
    if has_offloaded(graph):
        if operators:
            raise RandomModelError(f"{model.name} draws random numbers ({_named(operators)}): {_remedy(model)}.")
        return
    first, second = (_module_outputs(model, feeds) for _ in range(2))
    same = all(np.array_equal(first[name], second[name], equal_nan=True) for name in first)
    if operators and not same:
        raise RandomModelError(
            f"{model.name} returns other outputs when it runs again on the same rows, because it draws random numbers "
            f"({_named(operators)}){_training(model)}: {_remedy(model)}."
        )
    if operators and _varies(graph, feeds):
        raise RandomModelError(
            f"{model.name} draws random numbers ({_named(operators)}), and returns the same outputs when it runs again "
            "only because forward seeds the generator, which an engine cannot do: draw them once in __init__, and keep "
            "them as a buffer."
        )
    reference = Reference.of(first, channel_axes(graph))
    check = partial(
        check_parity, reference, refine=lambda: with_rounding(reference, graph, [feeds]), advice="see above"
    )
    try:
        check(lambda: second, name=model.name)
    except NotFiniteError:
        raise
    except ParityError as error:
        raise RandomModelError(
            f"{model.name} returns other outputs when it runs again on the same rows ({error.place}"
            f"{_training(model)}); its graph has no random operator, so it changes its own state or draws numbers "
            f"outside torch: {_remedy(model)}."
        ) from error
    row = {name: value[:1] for name, value in feeds.items()}
    compared = feeds
    try:
        check(lambda: torch_outputs(graph, feeds), name="the traced graph")
        compared, alone = row, _alone(model, row)  # torch.export assumes batches of at least two rows
        _check_alone(reference, alone, graph, feeds, lambda: torch_outputs(graph, row))
    except ParityError as error:
        place = error.place or first_line(error)
        raise TracedGraphError(
            place,
            f"{model.name} was traced into a graph that computes other outputs than the module "
            f"({place}), expected the same for every batch; a value that depends on the "
            "inputs, such as a size, a mask or a branch in Python, was fixed by the example inputs: compute it with "
            f"tensor operators in forward{_keeping_the_mask(model, compared)}.",
        ) from error
    _check_row(reference, alone, model, graph, feeds)
    rows = len(feeds[model.inputs[0]])
    if rows > 1 and all(len(value) == rows for value in feeds.values()):
        last = {name: value[-1:] for name, value in feeds.items()}
        _check_row(reference, _alone(model, last), model, graph, feeds, last=True)


def _varies(graph: Graph, feeds: Mapping[str, torch.Tensor]) -> bool:
    """Return whether a graph computes other outputs with another state of the random generator."""
    outputs = []
    with torch.random.fork_rng(devices=[]):
        for seed in (0, 1):
            torch.manual_seed(seed)
            outputs.append(torch_outputs(graph, feeds))
    return not all(np.allclose(outputs[0][name], outputs[1][name], equal_nan=True) for name in outputs[0])


def _keeping_the_mask(model: Model, feeds: Mapping[str, torch.Tensor]) -> str:
    """Return what else to try, for a class of transformers that differs on texts without padding.

    Transformers makes no mask for them where torch computes attention, and AIMv2 then lets tokens attend to later ones;
    a graph keeps the mask.
    """
    mask = feeds.get("attention_mask")
    if model.source != "transformers" or mask is None or not mask.all():
        return ""
    return (
        ", or, if its class leaves out the mask of texts without padding, write "
        '"attn_implementation": "eager" into its config.json'
    )


def _check_alone(
    reference: Reference,
    expected: Mapping[str, Array],
    graph: Graph,
    feeds: Mapping[str, torch.Tensor],
    outputs: Callable[[], Mapping[str, Array]],
    name: str = "the traced graph of one row",
    *,
    last: bool = False,
) -> None:
    """Compare outputs for the first or last row alone with `expected`, within the tolerance of it among the others.

    Raises:
        ParityError: the outputs differ.
    """

    def part(of: Reference) -> Reference:
        return of.part(slice(-1, None) if last else slice(0, 1), expected)

    check_parity(
        part(reference),
        outputs,
        refine=lambda: part(with_rounding(reference, graph, [feeds])),
        name=name,
        advice="see above",
    )


def _check_row(
    reference: Reference,
    alone: Mapping[str, Array],
    model: Model,
    graph: Graph,
    feeds: Mapping[str, torch.Tensor],
    *,
    last: bool = False,
) -> None:
    """Compare the outputs of the module for the first row alone, or for the last, with those for it among the others.

    The rows of a batch are samples that have nothing to do with each other, and the engine is timed with one of them.
    The first row does not depend on those after it where rows are summed up one by one, such as the places that a
    mixture of experts has for tokens.

    Raises:
        BatchError: they differ.
    """
    rows = len(next(iter(feeds.values())))
    if rows < 2:
        return
    for name, value in reference.expected.items():
        if len(value) == rows and alone[name].ndim != value.ndim:
            raise BatchError(
                f"{model.name} returns {name} with shape {list(alone[name].shape)} for a row alone, and with shape "
                f"{list(value.shape)} for {rows} rows; expected the batch as first axis of both, so name the axis of "
                "each squeeze in forward, such as x.squeeze(-1)."
            )
    place = slice(-1, None) if last else slice(0, 1)
    among = {
        name: value[place] for name, value in reference.expected.items() if len(value) == rows and len(alone[name]) == 1
    }
    if not among:
        shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in reference.expected.items())
        raise BatchError(
            f"{model.name} returns {shapes} for {rows} rows; expected one entry for each row as the first axis of an "
            "output, so have forward return it with the batch as first axis."
        )
    if model.has_two_towers:  # the row is one image and one text, whose similarity is that of their places
        sides = {name: [slice(-size, None) if last else slice(size) for size in alone[name].shape] for name in among}
        among = {name: value[tuple(sides[name])] for name, value in among.items()}
    try:
        _check_alone(reference, among, graph, feeds, lambda: alone, model.name, last=last)
    except ParityError as error:
        raise BatchError(
            f"{model.name} returns other outputs for a row alone than for the same row among {rows} "
            f"({error.place or first_line(error)}); expected outputs that do not depend on the other rows, so leave "
            "out what mixes rows, such as a mean or a sort over the first axis."
        ) from error


def _alone(model: Model, row: Mapping[str, torch.Tensor]) -> dict[str, Array]:
    """Return the outputs of the module for one row.

    Raises:
        BatchError: the module fails on it, as batch norm without running statistics does.
    """
    try:
        return _module_outputs(model, row)
    except (RuntimeError, ValueError, IndexError) as error:
        raise BatchError(
            f"{model.name} computes several rows, but fails on a row alone ({type(error).__name__}: "
            f"{first_line(error)}); expected a forward pass for any number of rows, so leave out what needs several."
        ) from error


def _module_outputs(model: Model, feeds: Mapping[str, torch.Tensor]) -> dict[str, Array]:
    with torch.inference_mode():
        outputs = model.call(model.module, *(feeds[name] for name in model.inputs))
        return {name: np.atleast_1d(value.numpy()) for name, value in zip(model.outputs, outputs, strict=True)}


def _remedy(model: Model) -> str:
    """Return what to do with a model that draws random numbers: change its forward, or that of a library in another."""
    return OF_A_LIBRARY if model.source == "transformers" else REMEDY


def _training(model: Model) -> str:
    """Name the modules that are in training mode although the model was set to evaluation, with dropout in them."""
    modules = model.module.named_modules()
    names = [name for name, module in modules if module.training and getattr(module, "p", 0)]
    return f", as {_named(names)} stays in training mode" if names else ""


def _named(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
