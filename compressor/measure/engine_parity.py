"""Compare the float engine of a graph with torch, on real samples."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from compressor.lower.checkpoint import ADVICE, CONFIG
from compressor.lower.trace import images_of
from compressor.lower.traced_model import index_errors_as_data_errors
from compressor.measure.engine_builder import PARITY_ROWS, EngineBuilder
from compressor.models.base import as_numpy
from compressor.quality.parity import REPORT_IT, Parity, check_parity
from compressor.quantize.precision import Source
from passes.execute.interpreter import run
from passes.graph.graph import Graph


def engine_parity(builder: EngineBuilder, path: Path, graph: Graph) -> Parity:
    """Build the float engine of a file and compare its outputs with those of a graph.

    The engine runs a batch of samples and a single sample, which reveals a batch size that is fixed in the file. A
    language model also runs its example inputs, which have a KV cache of some tokens, and a model with dynamic height
    and width an image of another size.

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
    batch = next(subject.data.calibration.batches(PARITY_ROWS)).feeds
    batches = [batch, {name: value[:1] for name, value in batch.items()}]
    if graph.state:  # the KV cache is empty in the data
        batches.append(as_numpy(subject.model.example))
    batches += [as_numpy(images_of(subject.model, size)) for size in subject.model.sizes[1:]]
    worst = Parity("", 0.0, 0)
    advice = ADVICE if builder.target.source == CONFIG else REPORT_IT
    with builder.target.load(builder.build(Source(path)), builder.options) as engine:
        for feeds in batches:
            with index_errors_as_data_errors(subject):
                outputs = run(graph, {name: torch.from_numpy(value) for name, value in feeds.items()})
            expected = dict(zip(graph.outputs, (value.numpy() for value in outputs), strict=True))
            parity = check_parity(expected, partial(engine.run, feeds), name=path.name, advice=advice)
            worst = max(worst, parity, key=lambda parity: parity.difference)
    return worst
