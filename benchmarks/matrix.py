"""Models x plans x targets x precisions x batches, and the rivals: each model on a target in one interleaved run.

    python benchmarks/matrix.py --data-root ../shared/data [--rivals PYTHON] [--model NAME ...]

Each model is exported once, with the cells of its factorial, as a user would on the command line; `compressor bench`
then measures all cells at all batch sizes on every target, beside torch eager, torch.compile and what other tools make
of the dense ONNX file. `--rivals` is the Python of an environment that holds them (see rivals.py); without it there
is ONNX Runtime's own dynamic int8 alone. `python benchmarks/tables.py` makes the tables.
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
LATER = " (again)"  # the same command once more, after everything else


@dataclass(frozen=True)
class Case:
    """A model of the matrix: how it is exported, and in how many rounds it is timed.

    `plan` is the case whose plan it takes, None where its own flags say; `again` measures it a second time at the end.
    `compiled` adds torch.compile.
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
         rounds=3, batches="1", compiled=False),  # its tokens are all alike at random: no two engines merge the same
)  # fmt: skip


def run(*command: str | Path) -> None:
    """Run a command of Compressor as a user would."""
    subprocess.run([sys.executable, "-m", "compressor", *map(str, command)], check=True, stdout=subprocess.DEVNULL)


def transferred(plan: Mapping[str, Any], spec: str) -> Plan:
    """The plan of one model for another whose sites have the same names."""
    sites = find_sites(trace(models.load(spec, random_weights=True)))
    return replace(Plan.from_json(json.dumps(plan)), model=spec, fingerprint=fingerprint(sites))


def export(case: Case, where: Mapping[str, str], plan: Path | None, folder: Path) -> dict[str, Any]:
    """Export with all cells of the factorial; what it found."""
    drop = () if plan is None else ("--drop", plan)
    start = time.perf_counter()
    run("export", where.get(case.model, case.model), "--data", where["images"], *case.flags, *drop, "--factorial",
        "--rounds", "2", "--target", "onnxruntime", "--output", folder)  # fmt: skip
    report = json.loads((folder / "report.json").read_text())
    kept = {name: report[name] for name in ("model", "plan", "sizes", "quality", "precision", "notes", "environment")}
    kept["model"] = report["model"]["name"]
    kept["plan"] = report["plan"]["changes"]
    return kept | {"export_seconds": time.perf_counter() - start}


def rivals(python: str | None, folder: Path, images: str, scratch: Path) -> dict[str, list[Path]]:
    """Files that other tools make of the dense model, by the target they are measured on; named for the table."""
    made: dict[str, list[Path]] = {target: [] for target in TARGETS}
    tools: dict[str, tuple[str, ...]] = {"onnxruntime": ("ONNX Runtime dynamic int8",), "openvino": ()}
    if python is not None:
        tools = {"onnxruntime": (*tools["onnxruntime"], "optimum-onnx dynamic int8"), "openvino": ("NNCF int8",)}
    for target, names in tools.items():
        for name in names:
            path = scratch / f"{name}.onnx"
            subprocess.run([python or sys.executable, RIVALS, name, folder, images, path], check=True)
            made[target].append(path)
    return made


def bench(case: Case, target: str, things: list[str | Path], where: Mapping[str, str]) -> dict[str, Any]:
    """One interleaved run of everything on one target."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "bench.json"
        flags = [flag for flag in case.flags if flag in RANDOM] + list(_samples(case))
        flags += ["--compile"] if case.compiled else []
        run("bench", *things, "--data", where["images"], *flags, "--batch", case.batches, "--target", target,
            "--rounds", str(case.rounds), "--output", out)  # fmt: skip
        return slim(json.loads(out.read_text()))


def _samples(case: Case) -> Iterator[str]:
    if "--samples" in case.flags:
        at = case.flags.index("--samples")
        yield from case.flags[at : at + 2]


def slim(found: dict[str, Any]) -> dict[str, Any]:
    """What the tables need: everything but the raw samples, and where files lay on this machine."""
    for each in found["measurements"]:
        del each["latency"]["samples_ms"]
    for each in found["factorials"]:
        for cell in each["cells"].values():
            del cell["latency"]["samples_ms"]
            cell["file"] = Path(cell["file"]).name
    for each in found["engines"].values():
        each["file"] = None if each["file"] is None else Path(each["file"]).name
    kept = ("engines", "measurements", "factorials", "against", "metric", "environment", "notes")
    return {name: found[name] for name in kept} | {"data": {"sizes": found["data"]["sizes"]}}


def measure(case: Case, where: Mapping[str, str], python: str | None, plan: Path | None, work: Path) -> dict[str, Any]:
    """One model: exported once, then measured on every target."""
    folder = work / "export"
    found = export(case, where, plan, folder)
    others = rivals(python, folder, where["images"], work)
    model = where.get(case.model, case.model)
    targets = {}
    for target in TARGETS:
        click.echo(f"  {target}", err=True)
        targets[target] = bench(case, target, [folder, *others[target], model], where)
    if case.again:
        targets[TARGETS[0] + LATER] = bench(case, TARGETS[0], [folder, *others[TARGETS[0]], model], where)
    return found | {"targets": targets}


@click.command()
@click.option("--data-root", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True)
@click.option("--rivals", "python", type=click.Path(exists=True, dir_okay=False), help="Python that has the rivals.")
@click.option("--model", "chosen", multiple=True, type=click.Choice([case.name for case in CASES]), help="Only these.")
def main(data_root: Path, python: str | None, chosen: tuple[str, ...]) -> None:
    """Measure the models and keep the results; the others keep theirs."""
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
            found = measure(case, where, python, plan, Path(scratch))
            found["plan_file"] = json.loads((Path(scratch) / "export" / "plan.json").read_text())
        results[case.name] = found
        ordered = {known.name: results[known.name] for known in CASES if known.name in results}
        RESULTS.write_text(json.dumps(ordered, indent=1) + "\n")


if __name__ == "__main__":
    main()
