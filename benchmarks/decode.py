"""Generation at a real size: half of the attention layers dropped, in float and below, behind short and long contexts.

    python benchmarks/decode.py [--precision int8-dynamic|int8|int4] [--layers 28] [--context 128,2048] [--rounds 4]

The model has the shapes of Qwen3-0.6B and random weights: this is about speed alone. Its vocabulary is smaller, 32,000,
so that a float file stays below 2 GB; a larger one adds the same product to every engine. It is exported once with the
cells of its factorial, as a user would on the command line; `compressor bench` then measures all of them on ONNX
Runtime, as they are and fused for it with a cache that is written in place, beside torch eager with transformers' own
cache, in one interleaved run. `python benchmarks/tables.py` makes the tables.
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

RESULTS = Path(__file__).parent / "results" / "decode.json"
LAYERS = 28
CONTEXTS = "128,2048"
FUSED = "onnxruntime_fused"
PRECISIONS = ("int8-dynamic", "int8", "int4")
DATA = ("--data", "random", "--samples", "6", "--random-weights")


def configured(folder: Path, layers: int, **sizes: int) -> Path:
    """A folder with the config of the model, which is all that random weights need.

    Args:
        folder: where it is made.
        layers: blocks, of which half lose their attention.
        sizes: of the config, in place of those of Qwen3-0.6B.
    """
    from transformers import Qwen3Config

    shapes = {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "num_key_value_heads": 8,
              "head_dim": 128, "vocab_size": 32_000, "max_position_embeddings": 4096}  # fmt: skip
    config = Qwen3Config(num_hidden_layers=layers, tie_word_embeddings=True, **shapes | sizes)
    config.architectures = ["Qwen3ForCausalLM"]
    config.save_pretrained(folder)
    return folder


def run(*command: str | Path) -> None:
    """Run a command of Compressor as a user would."""
    subprocess.run([sys.executable, "-m", "compressor", *map(str, command)], check=True, stdout=subprocess.DEVNULL)


def measure(model: Path, work: Path, *, precision: str, layers: int, context: str, rounds: int) -> dict[str, Any]:
    """Export with half of the attention layers dropped, then time generation.

    Args:
        model: the folder of the config.
        work: where files may be written.
        precision: what the gains are set against.
        layers: blocks of the model.
        context: numbers of tokens, with commas.
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


def retargeted(folder: Path, made: Path) -> None:
    """The same export for the fused target; copied: onnx takes files with several links for an attack."""
    shutil.copytree(folder, made)
    report = json.loads((folder / "report.json").read_text())
    report["settings"]["target"] = FUSED
    (made / "report.json").write_text(json.dumps(report))


def slim(found: dict[str, Any]) -> dict[str, Any]:
    """What the tables need: everything on generation but the raw samples."""
    for each in found["generation"]["measurements"]:
        for part in ("first", "token"):
            del each[part]["latency"]["samples_ms"]
    for each in found["generation"]["factorials"]:
        del each["cells"]
    for name, engine in found["engines"].items():
        if engine.get("file"):  # not where it lay on the machine
            engine["file"] = f"{name.partition('/')[0]}/{Path(engine['file']).name}"
    return {name: found[name] for name in ("engines", "generation", "against", "environment", "notes")}


@click.command()
@click.option("--precision", type=click.Choice(PRECISIONS), default=PRECISIONS[0], show_default=True)
@click.option("--layers", type=click.IntRange(min=2), default=LAYERS, show_default=True, help="Blocks; fewer to try.")
@click.option("--context", default=CONTEXTS, show_default=True, help="Tokens to generate after.")
@click.option("--rounds", type=click.IntRange(min=1), default=4, show_default=True, help="Timed bursts of each engine.")
@click.option("--output", type=click.Path(path_type=Path), default=RESULTS, help="File of the results.")
def main(precision: str, layers: int, context: str, rounds: int, output: Path) -> None:
    """Measure one precision and keep the results; the others keep theirs."""
    results: dict[str, Any] = json.loads(output.read_text()) if output.exists() else {}
    with tempfile.TemporaryDirectory() as scratch:
        model = configured(Path(scratch) / "qwen3", layers)
        results[precision] = measure(
            model, Path(scratch), precision=precision, layers=layers, context=context, rounds=rounds
        )
    output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
