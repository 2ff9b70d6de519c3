"""Compare the float engine of a graph with torch, on real samples."""

from __future__ import annotations

import functools
from functools import partial
from pathlib import Path

import torch

from compressor.data.rows import cut_texts
from compressor.lower.checkpoint import ADVICE, CONFIG
from compressor.lower.trace import images_of
from compressor.lower.traced_model import index_errors_as_data_errors, within_bounds
from compressor.measure.engine_builder import PARITY_ROWS, PARITY_TOKENS, EngineBuilder
from compressor.measure.llama_cpp_parity import llama_cpp_parity
from compressor.models.base import as_numpy
from compressor.quality.parity import REPORT_IT, Parity, Reference, check_parity, largest_parity
from compressor.quality.torch_reference import reference_of, torch_outputs, with_rounding
from compressor.quantize.precision import Source
from passes.graph.graph import Graph
from runtimes.base.protocols import Engine, Feeds


def engine_parity(builder: EngineBuilder, path: Path, graph: Graph) -> Parity:
    """Build the float engine of a file and compare its outputs with those of a graph.

    The engine runs a batch of samples and a single sample, which reveals a batch size that is fixed in the file. A
    language model also runs its example inputs, which have a KV cache of some tokens. One that reads images also runs a
    text of another length, and a model with dynamic height and width an image of another size. llama.cpp runs the batch
    of samples, see `llama_cpp_parity`.

    Args:
        builder: builds and opens the engine.
        path: the file that `builder.lower` wrote.
        graph: the graph before folding.

    Returns:
        The parity with the largest difference.

    Raises:
        ParityError: the outputs differ by more than the tolerance.
    """
    subject = builder.subject
    split = subject.data.calibration.middle(PARITY_ROWS, PARITY_TOKENS)
    batches: list[Feeds] = [within_bounds(next(split.batches(PARITY_ROWS)).feeds, subject.model, split)]
    if graph.state:  # the KV cache is empty in the data
        batches.append(as_numpy(subject.model.example))
    if subject.model.is_vision_language:
        batches.append(cut_texts(batches[0], subject.model.dynamic_axes, slice(-1)))
    batches += [as_numpy(images_of(subject.model, size)) for size in subject.model.sizes[1:]]
    with (
        builder.target.load(builder.build(Source(path)), builder.options) as engine,
        index_errors_as_data_errors(subject),
    ):
        if builder.target.source == ".gguf":
            return llama_cpp_parity(graph, engine, batches[0], subject.model, path)
        advice = ADVICE if builder.target.source == CONFIG else REPORT_IT
        check = partial(graph_parity, graph, engine, name=path.name, advice=advice)
        return largest_parity([check(feeds, alone=number == 0) for number, feeds in enumerate(batches)])


def graph_parity(
    graph: Graph, engine: Engine, feeds: Feeds, *, name: str, advice: str = REPORT_IT, alone: bool = False
) -> Parity:
    """Compare an engine with a graph on one batch.

    Torch runs in float64 only if the engine differs by more than the tolerance without regard to rounding and ties.

    Args:
        graph: computes the expected outputs.
        engine: runs the batch.
        feeds: the batch.
        name: name of the engine in the error message.
        advice: end of the error message.
        alone: whether to compare the first row alone too, on the scales of the batch.

    Raises:
        ParityError: the outputs differ by more than the tolerance.
    """
    tensors = {key: torch.from_numpy(value) for key, value in feeds.items()}
    reference = reference_of(graph, tensors)
    refine = functools.cache(lambda: with_rounding(reference, graph, [tensors]))
    check = partial(check_parity, name=name, advice=advice)
    parities = [check(reference, partial(engine.run, feeds), refine=refine)]
    if alone:
        first = {key: value[:1] for key, value in feeds.items()}
        expected = torch_outputs(graph, {key: value[:1] for key, value in tensors.items()})

        def part(of: Reference) -> Reference:
            return of.part(slice(0, 1), expected)

        parities.append(check(part(reference), partial(engine.run, first), refine=lambda: part(refine())))
    return largest_parity(parities)
