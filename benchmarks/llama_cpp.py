"""Measure GGUF files of a trained language model in llama.cpp, dense and without some attentions.

    python benchmarks/llama_cpp.py --model SmolLM2-135M-Instruct.Q4_1.gguf --data wikitext2/paragraphs.txt

All files are timed against each other in one interleaved run (one thread), and their perplexity is that of the file in
llama.cpp. Greedy generation of the F16 files, from the first tokens of test texts, is compared with the rewritten torch
model. `python benchmarks/tables.py` writes the table.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
import torch

from compressor.lower.traced_model import TracedModel, load
from compressor.measure.engine_parity import engine_parity
from compressor.measure.engine_quality import quality_on_test
from compressor.measure.graph_evaluator import graph_evaluator
from compressor.measure.workload import feeds_with_cache, generation_lengths, token_ids
from compressor.models import Model
from compressor.quantize.precision import Source
from compressor.search.planner import apply_fixed_plan
from compressor.settings import Settings
from compressor.target.availability import check_target
from compressor.workspace.environment import environment
from compressor.workspace.output_folder import engine_bytes
from compressor.workspace.progress import Steps
from passes.execute.interpreter import run
from passes.graph.cache_state import bytes_per_token
from passes.graph.graph import Graph
from runtimes.base.protocols import BuildOptions
from runtimes.gguf import target

Ids = npt.NDArray[np.int64]

RESULTS = Path(__file__).parent / "results" / "llama_cpp.json"
PRECISIONS = ("fp16", "int8", "int4")
FLOAT = "fp32 0"
PROMPTS, PROMPT, NEW = 10, 32, 64
THREADS = 1


def measured(
    subject: TracedModel, settings: Settings, graphs: Mapping[int, Graph], scratch: Path
) -> Iterator[dict[str, Any]]:
    """Yield the table row of each file: every graph, by the number of its dropped attentions, in every precision."""
    runtime, options = check_target(settings)
    evaluator = graph_evaluator(subject, runtime, options, settings, scratch)
    builder, steps = evaluator.builder, Steps()
    engines: dict[tuple[str, int], Path] = {}
    for dropped, graph in graphs.items():
        path = builder.lower(builder.fold(graph), f"without{dropped}")
        engine_parity(builder, path, graph)
        for precision in PRECISIONS if dropped else ("fp32", *PRECISIONS):
            engines[precision, dropped] = builder.build(Source(path, precision))
    named = {" ".join(map(str, key)): path for key, path in engines.items()}
    click.echo(f"{len(engines)} files", err=True)
    quality = quality_on_test(builder, named, FLOAT, steps)
    click.echo("quality measured", err=True)
    latencies = evaluator.timer.latencies(builder, named, steps)
    for (precision, dropped), path in engines.items():
        name = f"{precision} {dropped}"
        over = {"dense": f"{precision} 0", "float": FLOAT}
        row: dict[str, Any] = {"precision": precision, "dropped": dropped, "bytes": engine_bytes(path)}
        row["cache_bytes_per_token"] = bytes_per_token(graphs[dropped]) // 2  # F16
        for call, latency in latencies[name].items():
            speedups = {key: latency.speedup_over(latencies[other][call])._asdict() for key, other in over.items()}
            row[call] = {"median": latency.median, "speedup": speedups}
        if quality is not None:
            losses = {key: asdict(quality.loss(other, name)) for key, other in over.items() if other != name}
            row |= {"figure": asdict(quality.figure(name)), "loss": losses}
        yield row


def greedy(graph: Graph, model: Model, ids: Ids, count: int) -> npt.NDArray[np.float32]:
    """Return torch's logits [rows, count, vocabulary] of a greedy generation behind tokens [rows, tokens]."""
    feeds = dict(feeds_with_cache(ids, 0))
    for name in graph.state.values():
        _, heads, _, width = model.example[name].shape
        feeds[name] = np.zeros((len(ids), heads, 0, width), np.float32)
    logits = []
    while True:
        values = run(graph, {name: torch.from_numpy(np.asarray(feeds[name])) for name in graph.inputs})
        outputs = dict(zip(graph.outputs, (value.numpy() for value in values), strict=True))
        logits.append(outputs[model.answer][:, -1])
        if len(logits) == count:
            return np.stack(logits, 1)
        ids = np.concatenate([ids, logits[-1].argmax(-1)[:, None]], 1)
        feeds = feeds_with_cache(ids, ids.shape[1] - 1) | {past: outputs[now] for now, past in graph.state.items()}


def generation(subject: TracedModel, graph: Graph, dropped: int, ids: Ids, path: Path) -> dict[str, Any]:
    """Compare greedy generation of the F16 file in llama.cpp with the rewritten torch model.

    Returns:
        Equal texts; along torch's texts the tokens that llama.cpp predicts too; and where it does not, the largest
        difference between torch's logits of the two tokens, beside the spread of its logits over the vocabulary.
    """
    logits = greedy(graph, subject.model, ids, NEW)
    theirs = logits.argmax(-1)
    whole = np.concatenate([ids, theirs], 1)
    with target.load(path, BuildOptions(threads=THREADS)) as engine:
        texts = np.array([engine.generate(row, NEW) for row in ids])
        found = engine.run({"input_ids": whole, "attention_mask": np.ones_like(whole)})["logits"]
    ours = found[:, ids.shape[1] - 1 : -1].argmax(-1)
    other = np.argwhere(ours != theirs)
    gaps = [logits[row, place, theirs[row, place]] - logits[row, place, ours[row, place]] for row, place in other]
    first = [int(np.argmax(left != right)) for left, right in zip(texts, theirs, strict=True) if (left != right).any()]
    return {
        "dropped": dropped,
        "prompts": len(ids),
        "new": NEW,
        "equal_texts": int((texts == theirs).all(1).sum()),
        "first_differences": first,
        "same_next_token": int((ours == theirs).sum()),
        "tokens": int(theirs.size),
        "largest_gap": float(max(gaps, default=0.0)),
        "spread": float(logits.std(-1).mean()),
    }


def compare(settings: Settings) -> dict[str, Any]:
    """Measure every file, and the generation of the dense model and of the plan of the settings."""
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        subject = load(settings, Steps())
        choice = apply_fixed_plan(subject, settings, Steps())
        graphs = {0: subject.graph, len(choice.plan.changes): choice.graph}
        rows = list(measured(subject, settings, graphs, scratch))
        length = max(settings.max_length or 0, PROMPT)
        ids = token_ids(subject.data.test, PROMPTS, length)[:, :PROMPT]
        files = {dropped: scratch / f"without{dropped}.fp16.gguf" / target.FILE for dropped in graphs}
        made = [generation(subject, graph, dropped, ids, files[dropped]) for dropped, graph in graphs.items()]
    lengths = generation_lengths(settings, subject.model)
    assert lengths is not None
    return {
        "model": subject.model.name,
        "data": Path(str(settings.data)).name,
        "samples": len(subject.data.test),
        "length": settings.max_length,
        "threads": THREADS,
        "calls": asdict(lengths) | {"behind": lengths.behind},
        "changes": dict(choice.plan.changes),
        "rows": rows,
        "generation": made,
        "environment": environment(),
    }


@click.command()
@click.option("--model", required=True, help="A Llama or Mistral as export takes it.")
@click.option("--data", required=True, help="Texts, as export takes them.")
@click.option("--drop", default="attention:8", show_default=True, help="Plan of the compressed files.")
@click.option("--samples", type=click.IntRange(min=3), default=40, show_default=True, help="Windows of text.")
@click.option("--length", type=click.IntRange(min=PROMPT), default=128, show_default=True, help="Tokens in a window.")
@click.option("--rounds", type=click.IntRange(min=1), default=4, show_default=True, help="Timed bursts per engine.")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), default=RESULTS, help="Results file.")
def main(model: str, data: str, drop: str, samples: int, length: int, rounds: int, output: Path) -> None:
    """Measure all files and write results/llama_cpp.json."""
    settings = Settings(model=model, data=data, drop=drop, target="gguf", samples=samples, max_length=length,
                        rounds=rounds, threads=THREADS)  # fmt: skip
    found = compare(settings)
    output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
