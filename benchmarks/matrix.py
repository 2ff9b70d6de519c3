"""Measure models x targets x precisions x batch sizes against other tools, one interleaved run per model and target.

    python benchmarks/matrix.py --data-root ../shared/data [--rivals PYTHON] [--model NAME ...]

Each model is exported once on the command line, with the cells of its factorial. `compressor bench` then measures all
cells at all batch sizes on every target, beside torch eager, torch.compile and the int8 files that other tools make
from the dense ONNX file. `--rivals` is the Python of an environment with these tools (see rivals.py); without it, the
only one is ONNX Runtime's dynamic int8. `python benchmarks/tables.py` writes the tables.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
from main_job import sources

from compressor import models
from compressor.lower.trace import trace
from passes.graph.sites import find_sites
from passes.plan.plan import Plan, fingerprint

RESULTS = Path(__file__).parent / "results" / "matrix.json"
RIVALS = Path(__file__).with_name("rivals.py")
TARGETS = ("onnxruntime", "openvino")
LATER = " (again)"  # a repetition of the same command, after all others


@dataclass(frozen=True)
class Case:
    """A model of the matrix.

    Attributes:
        name: name in the tables.
        model: a key of `sources`, or a model name.
        flags: further arguments of the export.
        plan: name of the case whose plan is reused; None uses the flags.
        rounds: timed bursts of each engine.
        again: repeat the measurement at the end.
        batches: batch sizes, separated by commas.
        compiled: also measure torch.compile.
    """

    name: str
    model: str
    flags: tuple[str, ...] = ()
    plan: str | None = None
    rounds: int = 10
    again: bool = False
    batches: str = "1,8"
    compiled: bool = True


RANDOM = ("--random-weights",)
CASES = (
    Case("DeiT-Tiny", "deit", ("--drop", "auto", "--max-loss", "1.5"), again=True),
    Case("ViT-B/16, random weights", "vit_base_patch16_224", (*RANDOM, "--samples", "96"), "DeiT-Tiny", rounds=4),
    Case("SwinV2-T, random weights", "swinv2_tiny_window8_256", (*RANDOM, "--samples", "96", "--drop", "6"), rounds=4),
    Case("DINOv2-S/14 at 518, random weights", "vit_small_patch14_dinov2", (*RANDOM, "--samples", "24", "--drop", "6"),
         rounds=3, batches="1", compiled=False),  # random weights make all tokens similar: engines merge different ones
)  # fmt: skip


def run(*command: str | Path) -> None:
    """Run a command of Compressor in a process of its own."""
    subprocess.run([sys.executable, "-m", "compressor", *map(str, command)], check=True, stdout=subprocess.DEVNULL)


def transferred(plan: Mapping[str, Any], spec: str) -> Plan:
    """Return the plan of one model for another model whose sites have the same names."""
    sites = find_sites(trace(models.load(spec, random_weights=True)))
    return replace(Plan.from_dict(plan), model=spec, fingerprint=fingerprint(sites))


def export(case: Case, where: Mapping[str, str], plan: Path | None, folder: Path) -> dict[str, Any]:
    """Export with all cells of the factorial; return the part of the report that the tables need."""
    drop = () if plan is None else ("--drop", plan)
    start = time.perf_counter()
    run("export", where.get(case.model, case.model), "--data", where["images"], *case.flags, *drop, "--factorial",
        "--rounds", "2", "--target", "onnxruntime", "--output", folder)  # fmt: skip
    report = json.loads((folder / "report.json").read_text())
    facts = {name: report[name] for name in ("model", "plan", "sizes", "quality", "precision", "notes", "environment")}
    facts["model"] = report["model"]["name"]
    facts["plan"] = report["plan"]["changes"]
    return facts | {"export_seconds": time.perf_counter() - start}


def rivals(python: str | None, folder: Path, images: str, scratch: Path) -> dict[str, list[Path]]:
    """Quantize the dense model with other tools; return the files by target, named as in the table."""
    files: dict[str, list[Path]] = {target: [] for target in TARGETS}
    tools: dict[str, tuple[str, ...]] = {"onnxruntime": ("ONNX Runtime dynamic int8",), "openvino": ()}
    if python is not None:
        tools = {"onnxruntime": (*tools["onnxruntime"], "optimum-onnx dynamic int8"), "openvino": ("NNCF int8",)}
    for target, names in tools.items():
        for name in names:
            path = scratch / f"{name}.onnx"
            subprocess.run([python or sys.executable, RIVALS, name, folder, images, path], check=True)
            files[target].append(path)
    return files


def bench(case: Case, target: str, contenders: list[str | Path], where: Mapping[str, str]) -> dict[str, Any]:
    """Run `compressor bench` on all contenders with one target."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "bench.json"
        flags = [flag for flag in case.flags if flag in RANDOM] + list(_samples(case))
        flags += ["--compile"] if case.compiled else []
        run("bench", *contenders, "--data", where["images"], *flags, "--batch", case.batches, "--target", target,
            "--rounds", str(case.rounds), "--output", out)  # fmt: skip
        return slim(json.loads(out.read_text()))


def _samples(case: Case) -> Iterator[str]:
    if "--samples" in case.flags:
        at = case.flags.index("--samples")
        yield from case.flags[at : at + 2]


def slim(content: dict[str, Any]) -> dict[str, Any]:
    """Return the part of bench.json that the tables need, without raw samples and paths on this machine."""
    for each in content["measurements"]:
        del each["latency"]["samples_ms"]
    for each in content["factorials"]:
        for cell in each["cells"].values():
            del cell["latency"]["samples_ms"]
            cell["file"] = Path(cell["file"]).name
    for each in content["engines"].values():
        each["file"] = None if each["file"] is None else Path(each["file"]).name
    kept = ("engines", "measurements", "factorials", "against", "metric", "environment", "notes")
    return {name: content[name] for name in kept} | {"data": {"sizes": content["data"]["sizes"]}}


def measure(case: Case, where: Mapping[str, str], python: str | None, plan: Path | None, work: Path) -> dict[str, Any]:
    """Export one model and measure it on every target."""
    folder = work / "export"
    exported = export(case, where, plan, folder)
    others = rivals(python, folder, where["images"], work)
    model = where.get(case.model, case.model)
    targets = {}
    for target in TARGETS:
        click.echo(f"  {target}", err=True)
        targets[target] = bench(case, target, [folder, *others[target], model], where)
    if case.again:
        targets[TARGETS[0] + LATER] = bench(case, TARGETS[0], [folder, *others[TARGETS[0]], model], where)
    return exported | {"targets": targets}


@click.command()
@click.option("--data-root", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True)
@click.option(
    "--rivals", "python", type=click.Path(exists=True, dir_okay=False), help="Python with the tools of rivals.py."
)
@click.option(
    "--model",
    "chosen",
    multiple=True,
    type=click.Choice([case.name for case in CASES]),
    help="Model to measure; repeatable.  [default: all]",
)
def main(data_root: Path, python: str | None, chosen: tuple[str, ...]) -> None:
    """Measure the models and write results/matrix.json; results of other models are kept."""
    where = sources(data_root)
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for case in CASES:
        if chosen and case.name not in chosen:
            continue
        click.echo(case.name, err=True)
        with tempfile.TemporaryDirectory() as scratch:
            plan = None
            if case.plan is not None:
                plan = Path(scratch) / "plan.json"
                plan.write_text(transferred(results[case.plan]["plan_file"], case.model).to_json())
            result = measure(case, where, python, plan, Path(scratch))
            result["plan_file"] = json.loads((Path(scratch) / "export" / "plan.json").read_text())
        results[case.name] = result
        ordered = {each.name: results[each.name] for each in CASES if each.name in results}
        RESULTS.write_text(json.dumps(ordered, indent=1) + "\n")


if __name__ == "__main__":
    main()
