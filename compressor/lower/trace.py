"""Tracing of a loaded model into a `Graph` with torch.export."""

from __future__ import annotations

import contextlib
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from compressor.errors import CompressorError
from compressor.internals.transformers import MaskAsked, unpadded_masks
from compressor.lower.size_guards import (
    SizeGuard,
    counts_tokens,
    fewer_counts,
    other_counts,
    shorter_counts,
    size_guards,
    with_tokens,
)
from compressor.lower.symbolic.sizes import symbolic_gathers, symbolic_lengths, symbolic_windows
from compressor.lower.symbolic.truths import FixedTruth, constant_truths, truths_of
from compressor.lower.symbolic.whole_numbers import holds_numbers, whole_numbers
from compressor.lower.unsupported_operators import unsupported_operator
from compressor.models.audio.inputs import SEQUENCE, unit_of
from compressor.models.base import first_line
from compressor.models.text.probe import calling
from compressor.models.text.recurrence import as_operators
from compressor.quality.parity import TOLERANCE
from passes.base import apply
from passes.canonical.clean import Clean
from passes.canonical.expand_einsum import EINSUM, ExpandEinsum
from passes.canonical.join_slices import SCATTER, JoinSlices
from passes.canonical.real_arithmetic import RealArithmetic, is_complex
from passes.canonical.separate_batch import SeparateBatch, joins_batch
from passes.canonical.slice_ends import EndsFromStart, ends_before_end
from passes.canonical.write_sums import WriteSums, has_other_sums
from passes.execute.interpreter import run
from passes.execute.offloaded_weights import is_offloaded
from passes.graph.cached_functions import forget_results
from passes.graph.graph import Graph
from passes.rewrite.read_size import ReadSize
from passes.torch_internals import is_higher_order, is_mutable, without_stack_traces
from runtimes.base.encoder_decoder import ENCODER_HIDDEN
from runtimes.base.protocols import suppress_output

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from compressor.models import Model

# Kinds of data that may have one length, and what becomes of others.
KINDS = {
    "text": "to which texts are padded and cut",
    "audio": "to which clips are padded and cut",
    "tensor": "which the arrays must have",
}
PREFIX = "model."
# Modules of torch that ask whether a mask is causal, unless they are told.
MASKED = (torch.nn.TransformerEncoder, torch.nn.TransformerDecoder)
_FIXED = re.compile(r"\['tensors'\]\[(\d+)\]\.size\(\)\[(\d+)\].* to be a constant \((\d+)\)")


class TraceError(CompressorError):
    """A model that torch.export cannot turn into a graph."""


class OneLengthError(TraceError):
    """A model that torch.export turns into a graph for one number of tokens, samples or frames alone."""


class Traced(torch.nn.Module):
    """The model with positional tensors as inputs and a flat tuple of tensors as output."""

    # The exporter writes this name into every node of model.onnx; it does not change with the layout of the package.
    __module__ = "compressor.trace"

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model.module
        self._call = model.call

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Call the model with its inputs in the order of `model.inputs`.

        The copies of the outputs are removed again (`Clean`). Without them, torch.export 2.15 cannot inline a region
        under torch.enable_grad that computes an output.
        """
        outputs = self._call(self.model, *tensors)
        with torch.no_grad():
            return tuple(output.clone() for output in outputs)


def trace(model: Model) -> Graph:
    """Trace a model into a graph (see `trace_with_guards`)."""
    return trace_with_guards(model)[0]


def trace_with_guards(model: Model) -> tuple[Graph, tuple[SizeGuard | FixedTruth, ...]]:
    """Trace a model with a dynamic batch (sequence, height, width) axis into a clean fx graph of ATen operators.

    A graph with dynamic height and width is compared with the model at `Model.sizes`. A model whose attention has
    blocks of tokens pads what is no multiple of them; it is traced where it does so, and then computes multiples too.
    One that has a single block of tokens in its example is traced with more.

    Returns:
        The graph, and the conditions on sizes and the values of truth under which it holds.

    Raises:
        SizeError: the model branches on the batch size.
        TraceError: the model cannot be traced, or only with a fixed batch size, or the graph differs from the model at
            another size, or has an operator that Compressor does not take (see `unsupported_operator`). The message
            names the line of code, if torch.export states it, and a remedy.
    """
    graph, guards, truths = _traced(model)
    guards = _restricting(graph, model, guards)
    usual: tuple[Graph, tuple[SizeGuard | FixedTruth, ...]] = graph, (*guards, *truths)
    guard = next((each for each in guards if _more_tokens(model, each) is not None), None)
    tokens = None if guard is None else _more_tokens(model, guard)
    if guard is None or tokens is None:
        return usual
    try:
        padding, found, others = _traced(replace(model, example=with_tokens(model, guard, tokens)))
    except CompressorError:  # it takes only multiples
        return usual
    if guard.counts_one and not _holds_for_fewer(padding, model, guard):
        return usual
    found = _restricting(padding, model, found)
    return (padding, (*found, *others)) if len(found) < len(guards) else usual


def _more_tokens(model: Model, guard: SizeGuard) -> int | None:
    """Return the number of tokens with which to trace again, for a condition on blocks of them; None without one.

    torch.export takes one block for a constant; a graph of two or more often holds for one too.
    """
    if not (guard.wants_multiples or guard.counts_one) or not counts_tokens(model, guard):
        return None
    name, axis = guard.sized
    tokens = int(model.example[name].shape[axis])
    if guard.wants_multiples:
        return tokens + 1
    return next((count for count in other_counts(model, guard) if count > tokens), None)


def _holds_for_fewer(graph: Graph, model: Model, guard: SizeGuard) -> bool:
    """Return whether a graph of several blocks of tokens computes what its model does for those of the example."""
    name, axis = guard.sized
    tokens = int(model.example[name].shape[axis])
    return all(_same(graph, model, with_tokens(model, guard, count)) for count in (*shorter_counts(tokens), tokens))


def _restricting(graph: Graph, model: Model, guards: tuple[SizeGuard, ...]) -> tuple[SizeGuard, ...]:
    return tuple(guard for guard in guards if not _holds_elsewhere(graph, model, guard))


def _holds_elsewhere(graph: Graph, model: Model, guard: SizeGuard) -> bool:
    """Return whether a graph computes what its model does where a condition on tokens is false.

    It is so for a graph of forward's padding to a multiple, which pads by nothing then, and may be so where a condition
    asks for a least size.
    """
    if guard.is_least:
        counts = fewer_counts(model, guard)
    elif guard.block is not None and not guard.wants_multiples and counts_tokens(model, guard):
        counts = other_counts(model, guard)
    else:
        return False
    return all(_same(graph, model, with_tokens(model, guard, count)) for count in counts)


def _same(graph: Graph, model: Model, feeds: dict[str, torch.Tensor]) -> bool:
    """Return whether a graph computes what its model does, within `TOLERANCE` of the largest value of each output.

    There is nothing to compare where the model fails, as on fewer samples than a convolution reads.
    """
    with torch.inference_mode():
        try:
            expected = model.call(model.module, *(feeds[name] for name in model.inputs))
        except Exception:  # modules raise errors of all kinds
            return True
        try:
            found = run(graph, feeds)
        except (RuntimeError, ArithmeticError):  # of shapes that do not fit, and of a division by the count of blocks
            return False
    return all(_error(value, wanted) <= TOLERANCE for value, wanted in zip(found, expected, strict=True))


def _error(value: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return the largest difference of two outputs, relative to the largest value; infinity for other shapes."""
    if value.shape != wanted.shape:
        return float("inf")
    if not wanted.numel():
        return 0.0
    return float((value - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12))


def _traced(model: Model) -> tuple[Graph, tuple[SizeGuard, ...], tuple[FixedTruth, ...]]:
    """Trace a model with its example inputs."""
    try:
        traced, program, truths = _exported(model)
    except Exception as error:
        raise _refusal(model, error) from error
    guards = size_guards(traced, model)
    graph = Graph(program.module(check_guards=False), model.inputs, model.outputs, PREFIX, state=model.state)
    if (found := unsupported_operator(graph)) is not None:
        raise TraceError(f"{model.name} {found}.")
    apply(Clean(), graph)
    if any(node.target is SCATTER for node in graph.nodes()):
        apply(JoinSlices(), graph)
    if any(map(is_complex, graph.nodes())):
        apply(RealArithmetic(), graph)
    if any(node.target is EINSUM for node in graph.nodes()):
        apply(ExpandEinsum(), graph)
    if any(map(ends_before_end, graph.nodes())):
        apply(EndsFromStart(), graph)
    if joins_batch(graph):
        apply(SeparateBatch(), graph)
    if has_other_sums(graph):
        apply(WriteSums(), graph)
    if ENCODER_HIDDEN in model.outputs:  # the decoder is cut off, and does not read the inputs of the encoder
        apply(ReadSize(ENCODER_HIDDEN), graph)
    for size in model.sizes:
        _check_size(graph, model, size)
    return graph, guards, truths


def _exported(model: Model) -> tuple[ExportedProgram, ExportedProgram, tuple[FixedTruth, ...]]:
    """Return the program of a model, the same without operators that change tensors, and the values of truth it fixes.

    A model of one length that cannot be traced as it is, is traced with its whole numbers as numbers of Python. One of
    transformers that branches on a value of truth is traced with the one of all trial calls; who passes a module of
    their own can change its forward. One whose attentions read both sides, and no mask, is traced without the masks
    that transformers makes only where a module is exported, if it fails with them.
    """
    masks = MaskAsked()
    try:
        with unpadded_masks(leave_out=False) as masks:
            return (*_programs(model), ())
    except Exception:
        if masks.asked:
            with contextlib.suppress(Exception), unpadded_masks(leave_out=True):
                return (*_programs(model), ())
        one_length = not any(name.endswith(SEQUENCE) for axes in model.dynamic_axes.values() for name in axes.values())
        if one_length and holds_numbers(model.module):
            with contextlib.suppress(Exception), whole_numbers(model.module):  # the first error is the one to tell
                return (*_programs(model), ())
        if model.source == "transformers" and not any(map(is_offloaded, model.module.parameters())):
            with contextlib.suppress(Exception), constant_truths(truths_of(model)) as truths:
                return (*_programs(model), truths.fixed)
        raise


def _programs(model: Model) -> tuple[ExportedProgram, ExportedProgram]:
    wrapped = Traced(model).eval()
    feeds = tuple(model.example[name] for name in model.inputs)
    shapes = {"tensors": tuple(_dynamic(model.dynamic_axes.get(name, {})) for name in model.inputs)}
    with (
        suppress_output(),
        forget_results(model.module),
        torch.no_grad(),
        as_operators(model.module),
        symbolic_lengths(model.module),
        symbolic_gathers(),
        symbolic_windows(),
        without_stack_traces(),
    ):
        traced = torch.export.export(wrapped, feeds, dynamic_shapes=shapes, strict=False)
        if any(is_mutable(node.target) or is_higher_order(node.target) for node in traced.graph.nodes):
            return traced, traced.run_decompositions({})
        return traced, traced


def _check_size(graph: Graph, model: Model, size: tuple[int, int]) -> None:
    """Compare a graph with dynamic height and width with its model at one size, on one image.

    Raises:
        TraceError: the outputs differ by more than `TOLERANCE` of their largest value.
    """
    feeds = images_of(model, size)
    with torch.inference_mode():
        expected = model.call(model.module, *feeds.values())
        found = run(graph, feeds)
    for output, value, wanted in zip(graph.outputs, found, expected, strict=True):
        error = _error(value, wanted)
        if not error <= TOLERANCE:
            raise TraceError(
                f"{model.name} with dynamic height and width differs from the model at {size[0]} x {size[1]} "
                f"pixels (output {output}, by {error:.1e} of its largest value); give --image-size a number instead "
                "of dynamic."
            )


def images_of(model: Model, size: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Return one random image of a size as the input of an image model, [1, channels, height, width]."""
    (name,) = model.inputs
    channels = model.example[name].shape[1]
    return {name: torch.rand(1, channels, *size, generator=torch.Generator().manual_seed(1))}


def _dynamic(axes: dict[int, str]) -> dict[int, object]:
    return dict.fromkeys(axes, torch.export.Dim.DYNAMIC)


def _refusal(model: Model, error: Exception) -> TraceError:
    """Return the error for a model that torch.export refuses; it names ``--sequence-length`` if that helps."""
    failure = _failure(model)
    option = None if failure is not None else one_length_option(model)
    if option is None:
        return TraceError(_explain(model, error, failure))
    reason = _reason(model, str(error)) or type(error).__name__
    return OneLengthError(
        f"{model.name} could not be traced by torch.export for any number of {_unit(model)} ({reason}); {option}."
    )


def one_length_option(model: Model) -> str | None:
    """Return how to export a model of texts or of sound for one length, a clause; None if that cannot be traced."""
    one = _of_one_length(model)
    if one is None:
        return None
    try:
        trace_with_guards(one)
    except CompressorError:
        return None
    option = "--no-cache --sequence-length N" if model.task == "text-generation" else "--sequence-length N"
    return f"pass {option} to export it for N {_unit(model)} alone, {KINDS[model.preprocess.kind]}"


def _of_one_length(model: Model) -> Model | None:
    """Return a model of texts or of sound for the length of its example alone; None for others."""
    varies = any(name == SEQUENCE for axes in model.dynamic_axes.values() for name in axes.values())
    alone = model.preprocess.kind in KINDS and not model.state
    if not varies or model.source != "transformers" or not alone:
        return None
    axes = model.dynamic_axes.items()
    fixed = {name: {axis: each for axis, each in found.items() if each != SEQUENCE} for name, found in axes}
    return replace(model, dynamic_axes=fixed)


def _unit(model: Model) -> str:
    """Return what the axis of time of a model of texts or of sound counts."""
    return unit_of(model.inputs[0]) if model.preprocess.kind == "audio" else "tokens"


def _explain(model: Model, error: Exception, failure: str | None) -> str:
    """Return one sentence with the reason of torch.export, the line of the user's code and a remedy.

    A model that fails without torch.export too is told so; `failure` is the reason.
    """
    if failure is not None:
        shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in model.example.items())
        return (
            f"{model.name} ({type(model.module).__name__}) fails on its example inputs, {shapes} ({failure}); check "
            "its config, or pass it as a module of your own, package.module:factory, with example inputs."
        )
    reason = _reason(model, str(error)) or type(error).__name__
    if "_apply()" in reason:  # torch.nn.Module._apply, of .half(), .to() and others
        return (
            f"{model.name} converts the weights of its own modules in forward ({reason}), such as by .half() or .to(); "
            "do so before the model is passed, in float32."
        )
    if ".numpy() is not supported for tensor subclasses" in reason:
        return (
            f"{model.name} computes with a NumPy array or calls .numpy() in forward ({reason}), which torch.export "
            "cannot trace; keep the values as a tensor, such as by self.register_buffer(name, torch.from_numpy(array))."
        )
    asking = sorted({type(each).__name__ for each in model.module.modules() if isinstance(each, MASKED)})
    if asking and "data-dependent" in reason:
        return (
            f"{model.name} could not be traced by torch.export ({reason}): a {asking[0]} of torch.nn compares the mask "
            "that it is called with to a causal one; pass is_causal=True or is_causal=False beside the mask "
            "(tgt_is_causal to a decoder), or branch on no other tensor value."
        )
    of_tokens = _axis(model, str(error)).endswith("sequence")
    if model.preprocess.kind == "text" and of_tokens:
        return (
            f"{model.name} could not be traced by torch.export ({reason}), as a loop in Python over the tokens or a "
            "list of them does; Compressor needs a forward pass for any number of tokens, and no option changes that."
        )
    if model.source == "module" and of_tokens and (fixed := _FIXED.search(str(error))):
        name, size = model.inputs[int(fixed[1])], fixed[3]
        return (
            f"{model.name} could not be traced by torch.export for any number of tokens ({reason}), as a Python loop "
            "over the tokens, an nn.GRU, or a number that is computed from their count does; compute with tensor "
            f"operators, or export it for {size} tokens alone by a line that fails for others: assert "
            f"{name}.shape[1] == {size}."
        )
    if model.source == "transformers" and "data-dependent" in reason:
        place = reason.rpartition(", at ")[2] if ", at " in reason else "in its forward"
        return (
            f"{model.name} is a {type(model.module).__name__}, which decides by a value that it computes what to "
            f"compute next ({place}), and a graph holds one way alone; pass the part of it that you need as a module "
            "of your own, package.module:factory, with example inputs; --task may choose another head."
        )
    if model.source == "transformers" and _axis(model, str(error)) == "batch":
        return (
            f"{model.name} is a {type(model.module).__name__}, which computes with the number of rows in Python, as a "
            f"list with an entry for each does, so a graph would hold for one number of rows alone ({reason}); pass it "
            "as a module of your own, package.module:factory, whose forward computes with tensors of all rows."
        )
    if model.sizes:
        return (
            f"{model.name} could not be traced by torch.export with dynamic height and width ({reason}); give "
            "--image-size with numbers instead of dynamic."
        )
    other = "; --task may choose another head" if model.source == "transformers" else ""
    return (
        f"{model.name} could not be traced by torch.export ({reason}); Compressor needs a forward pass without "
        f"branches on tensor values that works at any batch size{other}."
    )


def _failure(model: Model) -> str | None:
    """Return why a model fails on its example inputs; None if it does not."""
    try:
        with calling(model.module):
            model.call(model.module, *(model.example[name] for name in model.inputs))
    except Exception as error:  # modules raise errors of all kinds
        return first_line(error)
    return None


def _axis(model: Model, text: str) -> str:
    """Return the name of the axis that an error of torch.export calls fixed, such as ``sequence``; empty for others."""
    fixed = _FIXED.search(text)
    if fixed is None:
        return ""
    return model.dynamic_axes[model.inputs[int(fixed[1])]].get(int(fixed[2]), "")


def _reason(model: Model, text: str) -> str:
    fixed = _FIXED.search(text)
    if fixed:
        position, axis, size = (int(number) for number in fixed.groups())
        return f"the code fixes axis {axis} of input {model.inputs[position]} to {size}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    first = re.split(r"(?<=[.!;])\s", lines[0])[0].rstrip(".!:;")[:300] if lines else ""
    frames = re.findall(r'File "([^"]+)", line (\d+), in .+\n\s+(.+)', text)
    if not frames:
        return first
    path, line, code = frames[-1]
    return f"{first}, at {Path(path).name}:{line}, `{code.strip()[:100]}`"
