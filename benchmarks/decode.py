"""Time generation at a real model size: half of the attention layers dropped, float and quantized, two contexts.

    python benchmarks/decode.py [--precision int8-dynamic|int8-weight-only|int4|...] [--layers 28] [--context 128,2048]

The model has the shapes of Qwen3-0.6B and random weights: only speed is measured. Its vocabulary is reduced to 32,000,
so that a float file stays below 2 GB; a larger one would add the same matrix product to every engine. The model is
exported once with the cells of its factorial on the command line. `compressor bench` then measures all cells in one
interleaved run: the portable file on ONNX Runtime, the fused form with a KV cache that is written in place, and torch
eager with the cache of transformers. `python benchmarks/tables.py` writes the tables.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

from compressor.workspace.output_folder import write_manifest

RESULTS = Path(__file__).parent / "results" / "decode.json"
LAYERS = 28
CONTEXTS = "128,2048"
FUSED = "onnxruntime_fused"
PRECISIONS = ("int8-dynamic", "int8-weight-only", "int8", "int4")
DATA = ("--data", "random", "--samples", "6", "--random-weights")


def configured(folder: Path, layers: int, **sizes: int) -> Path:
    """Write the config of the model, from which random weights are built.

    Args:
        folder: the folder to create.
        layers: number of blocks; half of them lose their attention.
        sizes: values of the config that replace those of Qwen3-0.6B.
    """
    from transformers import Qwen3Config

    shapes = {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "num_key_value_heads": 8,
              "head_dim": 128, "vocab_size": 32_000, "max_position_embeddings": 4096}  # fmt: skip
    config = Qwen3Config(num_hidden_layers=layers, tie_word_embeddings=True, **shapes | sizes)
    config.architectures = ["Qwen3ForCausalLM"]
    config.save_pretrained(folder)
    return folder


def run(*command: str | Path) -> None:
    """Run a command of Compressor in a process of its own."""
    subprocess.run([sys.executable, "-m", "compressor", *map(str, command)], check=True, stdout=subprocess.DEVNULL)


def measure(model: Path, work: Path, *, precision: str, layers: int, context: str, rounds: int) -> dict[str, Any]:
    """Export with half of the attention layers dropped, then time generation.

    Args:
        model: the folder of the config.
        work: folder for temporary files.
        precision: precision of the factorial.
        layers: number of blocks.
        context: context lengths in tokens, separated by commas.
        rounds: timed bursts of each engine.
    """
    folder, fused, out = work / "export", work / "fused", work / "bench.json"
    run("export", model, *DATA, "--drop", f"attention:{layers // 2}", "--precision", precision, "--factorial",
        "--rounds", "1", "--output", folder)  # fmt: skip
    retargeted(folder, fused)
    run("bench", folder, fused, model, *DATA, "--context", context, "--rounds", str(rounds), "--output", out)
    report = json.loads((folder / "report.json").read_text())
    kept = {"layers": layers, "plan": report["plan"]["changes"], "sizes": report["sizes"]}
    return kept | slim(json.loads(out.read_text()))


def retargeted(folder: Path, copy: Path) -> None:
    """Copy an export and set the fused target; hard links do not work, since onnx refuses them."""
    shutil.copytree(folder, copy)
    report = json.loads((folder / "report.json").read_text())
    report["settings"]["target"] = FUSED
    (copy / "report.json").write_text(json.dumps(report))
    write_manifest(copy)


def slim(content: dict[str, Any]) -> dict[str, Any]:
    """Return the part of bench.json that the tables need: generation without the raw samples."""
    for each in content["generation"]["measurements"]:
        for part in ("first", "token"):
            del each[part]["latency"]["samples_ms"]
    for each in content["generation"]["factorials"]:
        del each["cells"]
    for name, engine in content["engines"].items():
        if engine.get("file"):  # without the path on this machine
            engine["file"] = f"{name.partition('/')[0]}/{Path(engine['file']).name}"
    return {name: content[name] for name in ("engines", "generation", "against", "environment", "notes")}


@click.command()
@click.option(
    "--precision",
    type=click.Choice(PRECISIONS),
    default=PRECISIONS[0],
    show_default=True,
    help="Precision to compare with float.",
)
@click.option("--layers", type=click.IntRange(min=2), default=LAYERS, show_default=True, help="Number of blocks.")
@click.option("--context", default=CONTEXTS, show_default=True, help="Context lengths in tokens.")
@click.option("--rounds", type=click.IntRange(min=1), default=4, show_default=True, help="Timed bursts per engine.")
@click.option("--output", type=click.Path(path_type=Path), default=RESULTS, help="Results file.")
def main(precision: str, layers: int, context: str, rounds: int, output: Path) -> None:
    """Measure one precision and write results/decode.json; results of other precisions are kept."""
    results: dict[str, Any] = json.loads(output.read_text()) if output.exists() else {}
    with tempfile.TemporaryDirectory() as scratch:
        model = configured(Path(scratch) / "qwen3", layers)
        results[precision] = measure(
            model, Path(scratch), precision=precision, layers=layers, context=context, rounds=rounds
        )
    output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
