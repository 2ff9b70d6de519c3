"""Time graphs in torch whose linear layers run in oneDNN against the same in MKL, in one interleaved run.

    python benchmarks/linear_kernels.py --model DeiT-Tiny=FOLDER --data FOLDER [--model ... --data ...]

A pass is that of scores, searches and quality; a step has its backward pass too, as distillation does, with gradients
of every matrix. Each runs on one batch of the calibration samples. `python benchmarks/tables.py` writes the table.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch

from compressor.lower.traced_model import TracedModel, load
from compressor.quality.evaluate import tensor_batches
from compressor.settings import Settings
from compressor.workspace.environment import environment
from compressor.workspace.progress import Steps
from passes.execute import linear_kernels
from passes.execute.interpreter import Program
from runtimes.base.timing import interleave

RESULTS = Path(__file__).parent / "results" / "linear_kernels.json"
BATCH, TOKENS, SAMPLES = 16, 256, 64
KERNELS = {"MKL": False, "oneDNN": True}


class Timed:
    """A pass or a step of a graph on one batch, with the kernels of one library."""

    def __init__(self, subject: TracedModel, feeds: dict[str, torch.Tensor], *, onednn: bool, trained: bool) -> None:
        self.program, self.feeds, self.onednn, self.trained = Program(subject.graph), feeds, onednn, trained
        self.constants = self.program.constants

    def __enter__(self) -> Timed:
        return self

    def __exit__(self, *_: object) -> None:
        self.program.constants = self.constants

    def bind(self, _: Any) -> Callable[[], None]:
        """Return the call that is timed."""
        if not self.trained:
            return self._pass
        plain = {node: value.detach().clone() for node, value in self.constants.items()}
        matrices = [value.requires_grad_() for value in plain.values() if value.ndim == 2 and value.is_floating_point()]
        self.program.constants = plain
        return partial(self._step, matrices)

    @torch.inference_mode()
    def _pass(self) -> None:
        with kernels(onednn=self.onednn):
            self.program.run(self.feeds)

    def _step(self, matrices: list[torch.Tensor]) -> None:
        with kernels(onednn=self.onednn):
            outputs = self.program.run(self.feeds)
            torch.autograd.grad(outputs[0].square().mean(), matrices, allow_unused=True)


@contextmanager
def kernels(*, onednn: bool) -> Iterator[None]:
    """Let linear layers run in oneDNN, or in MKL."""
    before = linear_kernels.prefers_onednn
    linear_kernels.prefers_onednn = lambda: onednn  # type: ignore[assignment]
    try:
        yield
    finally:
        linear_kernels.prefers_onednn = before


def measure(model: str, data: str, rounds: int) -> dict[str, Any]:
    """Return the latency of a pass and of a step with both libraries, and their ratio, for one thread and for two."""
    settings = Settings(model=model, data=data, drop="none", samples=SAMPLES)
    subject = load(settings, Steps())
    feeds = next(tensor_batches(subject.data.calibration.middle(BATCH, TOKENS), BATCH))
    threads, rows = torch.get_num_threads(), dict[str, Any]()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            for name, trained in (("pass", False), ("step", True)):
                openers = {
                    each: partial(Timed, subject, feeds, onednn=onednn, trained=trained)
                    for each, onednn in KERNELS.items()
                }
                found = interleave(openers, {}, rounds=rounds)
                rows[f"{name}, {count}"] = {
                    "threads": count,
                    "call": name,
                    "milliseconds": {each: latency.median for each, latency in found.items()},
                    "speedup": found["oneDNN"].speedup_over(found["MKL"])._asdict(),
                }
    finally:
        torch.set_num_threads(threads)
    name = subject.model.inputs[0]
    return {"batch": {name: list(feeds[name].shape)}, "rows": rows}


@click.command()
@click.option("--model", "models", multiple=True, required=True, help="NAME=MODEL; repeatable.")
@click.option("--data", "sources", multiple=True, required=True, help="The data of each model.")
@click.option("--rounds", type=click.IntRange(min=1), default=6, show_default=True, help="Timed bursts.")
@click.option("--output", type=click.Path(path_type=Path), default=RESULTS, help="Results file.")
def main(models: tuple[str, ...], sources: tuple[str, ...], rounds: int, output: Path) -> None:
    """Time every model and write results/linear_kernels.json."""
    rows = {}
    for named, data in zip(models, sources, strict=True):
        name, _, model = named.partition("=")
        rows[name] = measure(model, data, rounds)
    output.write_text(json.dumps({"models": rows, "environment": environment()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
