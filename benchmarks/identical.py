"""Check that the exports of this working tree are byte-identical to those of another revision.

    python benchmarks/identical.py REVISION

A refactoring must not change what is computed. The script runs five exports with each of the two source trees in the
same environment and compares the SHA-256 of model.onnx and plan.json. The exit status is 1 if any differs.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import click

ROOT = Path(__file__).parents[1]
FILES = ("model.onnx", "plan.json")
SAMPLE = ("export", "--target", "onnxruntime", "--rounds", "1")
# Searches count multiply-adds, since a search by latency depends on the load of the machine.
EXPORTS = {
    "attention dropped": (*SAMPLE, "--drop", "attention:2"),
    "search": (*SAMPLE, "--drop", "auto", "--cost", "macs", "--actions", "drop", "--samples", "300"),
    "linear maps, int8": (*SAMPLE, "--drop", "3", "--actions", "linear", "--precision", "int8"),
    "tokens merged": (*SAMPLE, "--drop", "none", "--tokens", "2"),
    "language model": ("export", "llama", "--data", "tokens.npy", "--drop", "attention:1", "--target",
                       "onnxruntime_fused", "--rounds", "1"),
}  # fmt: skip


def write_inputs(folder: Path) -> None:
    """Write a small random Llama and token ids for the export of a language model."""
    import numpy as np
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=64,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "llama")
    np.save(folder / "tokens.npy", np.random.default_rng(0).integers(3, 64, (24, 12)))


def exported(source: Path, inputs: Path, name: str, arguments: Sequence[str]) -> dict[str, str]:
    """Run one export with the packages of `source`; return the SHA-256 of its files by name."""
    output = inputs / "exported"
    shutil.rmtree(output, ignore_errors=True)
    done = subprocess.run(
        [sys.executable, "-P", "-m", "compressor", *arguments, "--output", str(output)],
        cwd=inputs,
        env=os.environ | {"PYTHONPATH": str(source)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise click.ClickException(f"{name} failed with the packages of {source}:\n{done.stderr}")
    return {file: hashlib.sha256((output / file).read_bytes()).hexdigest() for file in FILES}


@click.command()
@click.argument("revision")
def main(revision: str) -> None:
    """Export with REVISION and with the working tree, and compare the files."""
    different = []
    with tempfile.TemporaryDirectory() as folder:
        before, inputs = Path(folder, "before"), Path(folder, "inputs")
        inputs.mkdir()
        write_inputs(inputs)
        subprocess.run(["git", "worktree", "add", "--detach", "--quiet", str(before), revision], cwd=ROOT, check=True)
        try:
            for name, arguments in EXPORTS.items():
                pair = [exported(source, inputs, name, arguments) for source in (before, ROOT)]
                for file in FILES:
                    same = pair[0][file] == pair[1][file]
                    click.echo(f"{name:18} {file:10} {pair[0][file][:12]} {'same' if same else pair[1][file][:12]}")
                    different += [] if same else [f"{name}: {file}"]
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(before)], cwd=ROOT, check=True)
    if different:
        raise click.ClickException(f"{len(different)} files differ: {', '.join(different)}.")
    click.echo("All exports are byte-identical.")


if __name__ == "__main__":
    main()
