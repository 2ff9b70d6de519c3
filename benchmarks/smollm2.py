"""Measure what dropping layers of a trained language model costs, by every published way, on text that it has not seen.

    python benchmarks/smollm2.py --model SmolLM2-135M-Instruct.Q4_1.gguf --data wikitext2/paragraphs.txt --work DIR

Layers are ranked on calibration texts (cosine as in LLM-Drop, or the measured effect on the output), and a share of
them is dropped, or replaced by a linear map (ReplaceMe). Each row has the perplexity on test texts, the agreement with
the original's next tokens, and how long greedy texts stay equal to the original's. Every row is written when it is
measured, and a second run measures only rows that are missing. `python benchmarks/tables.py` writes the tables.

The part export writes the files of every engine into the work folder. `--timing` times them against each other, and
needs a machine that does nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from smollm2_engines import ENGINES, exported, factorial, products, task, timing
from smollm2_generation import generation
from smollm2_search import searched
from smollm2_subject import (
    DENSE,
    DESIGNS,
    LENGTH,
    NEW,
    ORIGINAL,
    PROMPT,
    PROMPTS,
    SAMPLES,
    Design,
    Results,
    Row,
    Subject,
)

from compressor.heal.heal import heal
from compressor.lower.traced_model import load
from compressor.quality.validation_loss import ValidationLoss
from compressor.settings import Settings
from compressor.workspace.environment import environment
from compressor.workspace.progress import Steps

RESULTS = Path(__file__).parent / "results" / "smollm2.json"
PARTS = ("quality", "searched", "export", "factorial", "generation", "healing", "task")
HEAL_SECONDS = 240.0
HEALED = tuple(
    (design, method)
    for design in (Design("attention", 25), Design("block", 10))
    for method in ("closed-form", "distill")
)


def quality(subject: Subject) -> dict[str, Callable[[], Row]]:
    """Return the measurements of all designs, by name."""

    def measure(design: Design) -> Row:
        facts = {"kind": design.kind, "percent": design.percent, "metric": design.metric, "action": design.action}
        return facts | subject.whole_row(subject.graph(design), subject.changes(design) if design.percent else {})

    designs = {ORIGINAL: DENSE} | {design.name: design for design in DESIGNS}
    return {name: lambda design=design: measure(design) for name, design in designs.items()}  # type: ignore[misc]


def healing(subject: Subject, seconds: float) -> dict[str, Callable[[], Row]]:
    """Return the measurements of healed designs, by name."""
    traced = subject.traced

    def measure(design: Design, method: str) -> Row:
        validation = ValidationLoss(traced.graph, traced.model, traced.data.validation, traced.metric)
        graph, changes = subject.graph(design), subject.changes(design)
        changed = [site for site in traced.sites if site.name in changes]
        healed, facts = heal(method, graph, traced.graph, traced.model, traced.data.calibration, validation,
                             changed=changed, budget=seconds, seed=0, progress=lambda *_: None)  # fmt: skip
        found = {"design": design.name, "method": method, "budget": seconds, "healed": asdict(facts)}
        return found | subject.whole_row(healed, changes)

    return {
        f"{design.name}, {method}": lambda design=design, method=method: measure(design, method)  # type: ignore[misc]
        for design, method in HEALED
    }


def facts(subject: Subject) -> Iterator[tuple[str, Any]]:
    """Yield the conditions that all rows share."""
    data = subject.traced.data
    yield "model", subject.traced.model.name
    yield "data", Path(data.source).name
    yield "length", subject.settings.max_length
    parts = (data.calibration, data.validation, subject.test)
    yield "texts", {part.name: len(part) for part in parts}
    yield "tokens", {part.name: sum(part.tokens.get(index, 0) for index in part.indices) for part in parts}
    yield "prompts", {"count": PROMPTS, "tokens": PROMPT, "new": NEW}
    yield "environment", environment()


@click.command()
@click.option("--model", required=True, help="A language model as export takes it.")
@click.option("--data", required=True, help="Texts, as export takes them.")
@click.option("--work", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder of large files.")
@click.option("--part", "parts", type=click.Choice(PARTS), multiple=True, help="Only these parts.  [default: all]")
@click.option("--engine", "engines", type=click.Choice(tuple(ENGINES)), multiple=True, help="Only these are exported.")
@click.option("--timing", "timed", is_flag=True, help="Only time the exported files, on a machine that does no more.")
@click.option("--heal-seconds", type=float, default=HEAL_SECONDS, show_default=True, help="Time budget of a healing.")
@click.option("--rounds", type=click.IntRange(min=1), default=4, show_default=True, help="Timed bursts per engine.")
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True, help="Threads of timed engines.")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), default=RESULTS, help="Results file.")
@torch.no_grad()
def main(
    model: str,
    data: str,
    work: Path,
    parts: tuple[str, ...],
    engines: tuple[str, ...],
    timed: bool,
    heal_seconds: float,
    rounds: int,
    threads: int,
    output: Path,
) -> None:
    """Measure the rows that results/smollm2.json lacks; --timing measures again."""
    work.mkdir(exist_ok=True)
    settings = Settings(model=model, data=data, drop="none", samples=SAMPLES, max_length=LENGTH)
    subject, results = Subject(load(settings, Steps()), settings, work), Results(output)
    if timed:
        results.write("products", products(rounds, threads))
        results.write("timing", timing(subject, rounds, threads) | {"environment": environment()})
        return
    for name, value in facts(subject):
        results.write(name, value)
    for part in parts or PARTS:
        if part == "export":
            exported(subject, engines or tuple(ENGINES))
        else:
            rows = {
                "quality": quality,
                "searched": searched,
                "healing": partial(healing, seconds=heal_seconds),
                "factorial": factorial,
                "generation": generation,
                "task": task,
            }
            results.rows(part, rows[part](subject))


if __name__ == "__main__":
    main()
