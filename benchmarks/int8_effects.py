"""Compare the effects of single changes on the output in float and in int8, by fake quantization in torch.

    python benchmarks/int8_effects.py --data-root ../shared/data [--samples 32]

Every drop, and 25 % of the tokens merged after every attention, is measured alone: in float, and with 8-bit weights of
all linear maps and convolutions (by channel, symmetric) and 8-bit inputs of all products (by tensor, with the ranges of
the original on the same calibration samples). Results are in benchmarks/results/int8_effects.json.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import torch
from main_job import sources
from scipy.stats import spearmanr

from compressor.lower.traced_model import TracedModel, load
from compressor.quality.evaluate import tensor_batches
from compressor.search.rewriter import Rewriter
from compressor.settings import Settings
from compressor.workspace.progress import Steps
from passes.graph.graph import Graph

RESULTS = Path(__file__).parent / "results" / "int8_effects.json"
ATEN = torch.ops.aten
INPUTS = {
    ATEN.linear.default: 1,
    ATEN.conv2d.default: 1,
    ATEN.matmul.default: 2,
    ATEN.scaled_dot_product_attention.default: 3,
}
WEIGHTS = (ATEN.linear.default, ATEN.conv2d.default)


class FakeInt8(torch.fx.Interpreter):
    """Run a graph and note the ranges of the inputs of products, or round them and the weights to 8 bits.

    Args:
        graph: the graph.
        ranges: least and largest value of each input, by node and position; a new one has the range of its first batch.
        observe: whether ranges are noted and nothing is rounded.
    """

    def __init__(self, graph: Graph, ranges: dict[tuple[str, int], tuple[float, float]], *, observe: bool) -> None:
        super().__init__(graph.module)
        self.ranges, self.observe = ranges, observe

    def run_node(self, n: torch.fx.Node) -> Any:
        """Run a node; see the class."""
        if n.target not in INPUTS:
            return super().run_node(n)
        found, options = self.fetch_args_kwargs_from_env(n)
        values: list[Any] = list(found)
        for position in range(INPUTS[n.target]):
            value, key = values[position], (n.name, position)
            now = (float(value.min()), float(value.max()))
            low, high = self.ranges.get(key, now)
            if self.observe:
                self.ranges[key] = (min(low, now[0]), max(high, now[1]))
            else:
                values[position] = rounded(value, low, high)
        if not self.observe and n.target in WEIGHTS:
            values[1] = rounded_weight(values[1])
        return n.target(*values, **options)


def rounded(value: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """Round a tensor to 256 levels between two bounds, of which 0 is one."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max((high - low) / 255.0, 1e-12)
    zero = round(-low / scale)
    return (torch.clamp(torch.round(value / scale) + zero, 0, 255) - zero) * scale


def rounded_weight(weight: torch.Tensor) -> torch.Tensor:
    """Round a weight [channels, ...] to 255 levels by channel, symmetric about 0."""
    scale = weight.abs().flatten(1).amax(1).clamp_min(1e-12) / 127.0
    scale = scale.reshape(-1, *[1] * (weight.ndim - 1))
    return torch.round(weight / scale).clamp(-127, 127) * scale


def changed(subject: TracedModel) -> Iterator[tuple[str, Graph]]:
    """Yield the graphs with one change, by its name."""
    rewriter = Rewriter(subject.graph, subject.sites, subject.data.calibration)
    for site in subject.sites:
        yield f"{site.name} drop", rewriter.rewritten({site.name: "drop"})
    for site in subject.sites:
        if site.kind == "attention":
            yield f"{site.name} merge:25%", rewriter.rewritten({site.name: "merge:25%"})


def measure(subject: TracedModel, samples: int) -> dict[str, Any]:
    """Return the divergence of each change from the original in float, in nats, in float and in int8."""
    batches = list(tensor_batches(subject.data.calibration.head(samples)))
    ranges: dict[tuple[str, int], tuple[float, float]] = {}
    with torch.inference_mode():
        for feeds in batches:
            FakeInt8(subject.graph, ranges, observe=True).run(*feeds.values())

        def answer(graph: Graph, *, int8: bool) -> torch.Tensor:
            parts = []
            for feeds in batches:
                runner = FakeInt8(graph, ranges, observe=False) if int8 else torch.fx.Interpreter(graph.module)
                parts.append(subject.model.evaluated_output.evaluated_in(tuple(runner.run(*feeds.values()))))
            return torch.cat(parts)

        original = answer(subject.graph, int8=False)

        def divergence(graph: Graph, *, int8: bool) -> float:
            found = answer(graph, int8=int8)
            scaled = [subject.head.divergence(found * scale, original) for scale in subject.head.scales]
            return min(float(each.mean()) for each in scaled)

        effects = {
            name: [divergence(graph, int8=False), divergence(graph, int8=True)] for name, graph in changed(subject)
        }
        return {
            "samples": samples,
            "original_in_int8": divergence(subject.graph, int8=True),
            "effects": effects,
        }


@click.command()
@click.option("--data-root", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True)
@click.option("--samples", default=32, show_default=True, help="Calibration samples.")
def main(data_root: Path, samples: int) -> None:
    """Measure DeiT-Tiny and write the results."""
    where = sources(data_root)
    settings = Settings(model=where["deit"], data=where["images"], drop="auto", cost="macs")
    found = measure(load(settings, Steps(None)), samples)
    RESULTS.write_text(json.dumps({"DeiT-Tiny": found}, indent=1) + "\n")
    click.echo(f"rank correlation {correlation(found['effects']):.3f}")


def correlation(effects: dict[str, list[float]]) -> float:
    """Return the rank correlation (Spearman) of the effects in float and in int8."""
    return float(spearmanr(*zip(*effects.values(), strict=True)).statistic)


if __name__ == "__main__":
    main()
