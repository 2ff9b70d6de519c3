"""Measure the language model of a vision-language model with image tokens dropped in stages (PyramidDrop).

    python benchmarks/image_tokens.py [--width 512] [--layers 8] [--runs 5]

The model is a LLaVA of reduced width with random weights: only speed and memory are measured. As PyramidDrop does in
LLaVA, three stages at a quarter, a half and three quarters of the depth keep 50 %, 25 % and 12.5 % of the image tokens.
A prompt has the 576 image tokens of LLaVA-1.5 or the 2,880 of LLaVA-NeXT, and 64 of text. All forms of the decoder's
file run in turns (A B C C B A ...) with one thread each. The measure is the processor time of the calling thread, which
does not include other work on the machine, but depends on caches and memory that it shares with it. `python
benchmarks/tables.py` writes the tables.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from time import thread_time_ns
from typing import Any, cast

import click
import numpy as np
import numpy.typing as npt
import tables_image_tokens
import torch

from compressor import models
from compressor.lower.cut.vision_language import cut
from compressor.lower.trace import trace
from compressor.lower.write_onnx import lower
from compressor.models.base import Model
from compressor.models.vision_language.image_token_stages import with_indices, with_state
from compressor.quantize.convert import convert
from compressor.workspace.environment import environment
from passes.base import apply
from passes.execute.interpreter import run
from passes.graph.graph import Graph
from passes.image_tokens.image_tokens import DropImageTokens, Method
from runtimes.base.protocols import BuildOptions, Engine, Feeds
from runtimes.base.vision_language import DECODER, EMBEDS, IDS, MASK, PIXELS, POSITIONS, is_present, past_of
from runtimes.onnxruntime import target as onnxruntime

RESULTS = tables_image_tokens.RESULTS
IMAGES = (576, 2880)  # image tokens of LLaVA-1.5 and LLaVA-NeXT
TEXT, BEFORE = 64, 8  # tokens of text, and how many of them stand before the image
HEAD = 128  # features of a head, as in LLaVA
LARGE = 1_000  # image tokens from which only the forms of the factorial and a random choice fit into memory together
SHARES = (0.5, 0.25, 0.125)
METHODS = ("attention", "norm", "random")
PRECISIONS = ("fp32", "int8-dynamic", "int4")
ONE = BuildOptions(threads=1)
WARMUP = 1


def configured(folder: Path, width: int, layers: int) -> Path:
    """Write the config of a LLaVA with a small vision tower: 54 x 54 features of an image, of which 2,880 are used."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=756, patch_size=14
    )
    text = LlamaConfig(
        hidden_size=width, intermediate_size=width * 43 // 16, num_hidden_layers=layers, vocab_size=4_000,
        num_attention_heads=width // HEAD, num_key_value_heads=width // HEAD, max_position_embeddings=4096,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=3_999)
    config.architectures = ["LlavaForConditionalGeneration"]
    config.save_pretrained(folder)
    return folder


def stages(layers: int) -> tuple[tuple[int, float], ...]:
    """Return depths and shares of the stages for a number of layers."""
    return tuple((layers * (number + 1) // 4, share) for number, share in enumerate(SHARES))


def forms(folder: Path, layers: int, scratch: Path) -> tuple[dict[str, Path], dict[str, Graph], Model]:
    """Write the decoder's file of every form: dense and dropped, in each precision; return the graphs too."""
    model = models.load(str(folder), random_weights=True)
    depths = [depth for depth, _ in stages(layers)]
    wider = with_state(with_indices(model, depths), depths)
    graphs = {"dense": trace(model)}
    files = {}
    for method in METHODS:
        graphs[method] = graphs["dense"].fork()
        image_token = model.preprocess.image_token
        apply(DropImageTokens(stages(layers), cast("Method", method), image_token=image_token), graphs[method])
    for name, graph in graphs.items():
        out = scratch / name
        out.mkdir()
        cut(lower(graph, wider, out / "whole.onnx"), out, int(model.preprocess.image_token or 0))
        files[f"{name} fp32"] = out / f"{DECODER}.onnx"
    for name in ("dense", "attention"):
        for precision in PRECISIONS[1:]:
            source, path = files[f"{name} fp32"], scratch / f"{name}-{precision}.onnx"
            convert(source, path, precision, onnxruntime.int8, lambda: iter(()))
            files[f"{name} {precision}"] = path
    return files, graphs, wider


def prompt(model: Model, images: int) -> dict[str, npt.NDArray[Any]]:
    """Return the inputs of a whole model: random pixels and tokens, with the placeholders of an image among them."""
    rng, tokens = np.random.default_rng(0), images + TEXT
    ids = rng.integers(0, 1_000, (1, tokens))
    ids[:, BEFORE : BEFORE + images] = model.preprocess.image_token
    pixels = rng.normal(size=(1, *model.example[PIXELS].shape[1:])).astype(np.float32)
    assert model.preprocess.complete is not None
    return model.preprocess.complete({PIXELS: pixels, IDS: ids, MASK: np.ones_like(ids)})


def further(engine: Engine, feeds: Mapping[str, npt.NDArray[Any]], state: Mapping[str, Any]) -> Feeds:
    """Return the feeds of the token behind a prompt."""
    tokens = feeds[IDS].shape[1]
    new = {
        IDS: feeds[IDS][:, :1],
        EMBEDS: feeds[EMBEDS][:, :1],
        MASK: np.ones((1, tokens + 1), np.int64),
        POSITIONS: np.full((1, 1), tokens),
    }
    return {name: value for name, value in (new | dict(state)).items() if name in engine.inputs}


def measure(files: Mapping[str, Path], graphs: Mapping[str, Graph], model: Model, images: int, runs: int) -> Any:
    """Measure every form of the decoder on one prompt and on the token behind it."""
    feeds = prompt(model, images)
    expected = {name: in_torch(graph, feeds) for name, graph in graphs.items()}
    feeds |= {EMBEDS: expected["dense"][EMBEDS]}
    chosen = {name: path for name, path in files.items() if images < LARGE or "norm" not in name}
    engines = {name: onnxruntime.load(path, ONE) for name, path in chosen.items()}
    calls: dict[str, dict[str, Any]] = {"prompt": {}, "token": {}}
    found: dict[str, Any] = {}
    for name, engine in engines.items():
        first = {key: feeds[key] for key in engine.inputs}
        outputs = engine.run(first)
        state = {past_of(key): value for key, value in outputs.items() if is_present(key)}
        calls["prompt"][name] = engine.bind(first)
        calls["token"][name] = engine.bind(further(engine, feeds, state))
        found[name] = {"cache_bytes": sum(value.nbytes for value in state.values())}
        if name.endswith("fp32"):
            found[name] |= compared(expected[name.split()[0]], outputs)
    for call, steps in calls.items():
        times = timed(steps, runs if call == "prompt" else 8 * runs)
        for name, values in times.items():
            found[name][call] = {"median_ms": float(np.median(values)), "ratio": ratio(times["dense fp32"], values)}
        found["interactions"] = found.get("interactions", {}) | {call: dict(interactions(times))}
    for engine in engines.values():
        engine.close()
    return found


def in_torch(graph: Graph, feeds: Feeds) -> dict[str, npt.NDArray[Any]]:
    """Return the outputs of a whole model in torch."""
    outputs = run(graph, {name: torch.from_numpy(feeds[name]) for name in graph.inputs})
    return {name: value.detach().numpy() for name, value in zip(graph.outputs, outputs, strict=True)}


def compared(expected: Feeds, outputs: Feeds) -> dict[str, float]:
    """Compare an engine with torch: logits of the last token, and the share of kept tokens that are the same.

    Two scores that differ by less than rounding may rank otherwise; the tokens then differ, and the logits with them.
    """
    last = expected["logits"][:, -1]
    difference = float(np.abs(outputs["logits"][:, -1] - last).max() / np.abs(last).max())
    same = [np.isin(outputs[name], expected[name]).mean() for name in outputs if name.endswith(".tokens")]
    share = float(min(same)) if same else 1.0
    assert difference < 1e-3 or share < 1, f"the engine differs from torch by {difference:.1e}"
    return {"difference": difference, "same_tokens": share}


def timed(steps: Mapping[str, Any], runs: int) -> dict[str, npt.NDArray[np.float64]]:
    """Return the processor time of every run of every form in milliseconds; the forms run in turns."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(runs + WARMUP):
        for name in list(steps) if number % 2 == 0 else reversed(steps):
            start = thread_time_ns()
            steps[name]()
            times[name].append((thread_time_ns() - start) / 1e6)
    return {name: np.array(values[WARMUP:]) for name, values in times.items()}


def ratio(before: npt.NDArray[np.float64], after: npt.NDArray[np.float64]) -> dict[str, float]:
    """Return the median ratio of runs of the same turn, with a bootstrap 95 % interval."""
    return interval(before / after)


def interval(ratios: npt.NDArray[np.float64]) -> dict[str, float]:
    """Return the median of ratios with a bootstrap 95 % interval."""
    drawn = np.random.default_rng(0).choice(ratios, (2000, ratios.size))
    low, high = np.percentile(np.median(drawn, axis=1), [2.5, 97.5])
    return {"ratio": float(np.median(ratios)), "low": float(low), "high": float(high)}


def interactions(times: Mapping[str, npt.NDArray[np.float64]]) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield, for each precision, the gain of both changes divided by the product of the gain of each alone."""
    dense, dropped = times["dense fp32"], times["attention fp32"]
    for precision in PRECISIONS[1:]:
        alone, both = times[f"dense {precision}"], times[f"attention {precision}"]
        yield precision, interval((dense / both) / ((dense / dropped) * (dense / alone)))


@click.command()
@click.option("--width", type=int, default=512, show_default=True, help="Width of the language model.")
@click.option("--layers", type=int, default=8, show_default=True, help="Blocks of the language model.")
@click.option("--runs", type=click.IntRange(min=2), default=5, show_default=True, help="Timed prompts per form.")
@click.option("--quiet-machine", is_flag=True, help="State in the results that nothing else ran.")
@click.option("--output", type=click.Path(path_type=Path), default=RESULTS, help="Results file.")
def main(width: int, layers: int, runs: int, quiet_machine: bool, output: Path) -> None:
    """Measure prompts of 576 and 2,880 image tokens, print the table and write results/image_tokens.json."""
    results: dict[str, Any] = {
        "width": width, "layers": layers, "text": TEXT, "stages": stages(layers), "runs": runs,
        "quiet": quiet_machine, "environment": environment(), "prompts": {},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        files, graphs, model = forms(configured(Path(scratch) / "llava", width, layers), layers, Path(scratch))
        for images in IMAGES:
            results["prompts"][str(images)] = measure(files, graphs, model, images, runs)
    output.write_text(json.dumps(results, indent=1) + "\n")
    print(tables_image_tokens.image_tokens_table(results))


if __name__ == "__main__":
    main()
