"""Measure quality and latency of a model on every available target in every precision, in one interleaved run.

    python benchmarks/targets.py --data-root ../shared/data [--model NAME ...]

The model is not compressed, so the results show the effect of target and precision alone. Each engine is built as by
`compressor export --drop none --precision P --target T`; torch eager and torch.compile are measured in the same run.
`python benchmarks/tables.py` writes the table.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
from main_job import sources

from compressor.errors import CompressorError
from compressor.lower.traced_model import index_errors_as_data_errors, load
from compressor.measure.engine_quality import evaluate_openers
from compressor.measure.graph_evaluator import graph_evaluator
from compressor.quantize.precision import Source
from compressor.report.report import latency_to_dict
from compressor.settings import Settings
from compressor.target.availability import check_target
from compressor.target.opener import Opener
from compressor.target.torch_eager import Module
from compressor.workspace.environment import environment
from compressor.workspace.output_folder import engine_bytes
from compressor.workspace.progress import Steps
from runtimes.base.protocols import RuntimesError
from runtimes.base.registry import runtime, targets
from runtimes.base.timing import interleave

RESULTS = Path(__file__).parent / "results" / "targets.json"
REFERENCE = "onnxruntime fp32"


@dataclass(frozen=True)
class Case:
    """A model of the table, with the number of images (calibration only, for random weights) and timed bursts."""

    name: str
    model: str
    samples: int
    rounds: int
    random_weights: bool = True


CASES = (
    Case("DeiT-Tiny", "deit", 1000, 10, random_weights=False),
    Case("ViT-B/16, random weights", "vit_base_patch16_224", 24, 5),
    Case("SwinV2-T, random weights", "swinv2_tiny_window8_256", 24, 5),
)


@dataclass(frozen=True)
class Built:
    """A built engine: its opener, file size in bytes, quantization tool (`by`), and build time in seconds."""

    opener: Opener
    bytes: int | None
    by: str | None
    seconds: float


def built(case: Case, settings: Settings, scratch: Path) -> tuple[Any, dict[str, Built], dict[str, str], Any]:
    """Build the engines of every target and precision for one model.

    Returns:
        The traced model, the engines by name, the reasons for missing ones by name, and the inputs of the timed calls.
    """
    subject, engines, refused, feeds = None, dict[str, Built](), dict[str, str](), None
    for target in targets():
        if (reason := runtime(target).missing()) is not None:
            refused[target] = reason
            continue
        if runtime(target).source == ".gguf":
            refused[target] = "its files hold language models alone; see llama_cpp.py"
            continue
        available, options = check_target(replace(settings, target=target))
        if subject is None:
            subject = load(settings, Steps(None))
        folder = scratch / target
        folder.mkdir()
        evaluator = graph_evaluator(subject, available, options, settings, folder)
        builder = evaluator.builder
        feeds = evaluator.timer.inputs
        with index_errors_as_data_errors(subject):
            path = builder.lower(subject.graph, "model")
            for precision in available.precisions[options.device]:
                name = f"{target} {precision}"
                click.echo(f"  {name}", err=True)
                steps = Steps(None)
                try:
                    with steps.step(name) as tick:
                        source, by = None, None
                        if precision != "fp32":
                            source, facts = evaluator.converter.convert(path, precision, tick)
                            by = facts.by
                        engine = builder.build(source or Source(path))
                except (CompressorError, RuntimesError) as error:
                    refused[name] = str(error)
                    continue
                opener = Opener(available.load, builder.options, engine)
                engines[name] = Built(opener, engine_bytes(engine), by, steps.done[-1].seconds)
    return subject, engines, refused, feeds


def measure(case: Case, where: dict[str, str]) -> dict[str, Any]:
    """Measure one model on every target: quality if it has trained weights, and latency at batch 1."""
    settings = Settings(
        model=where.get(case.model, case.model),
        data=where["images"],
        drop="none",
        samples=case.samples,
        random_weights=case.random_weights,
    )
    with tempfile.TemporaryDirectory() as scratch:
        subject, engines, refused, feeds = built(case, settings, Path(scratch))
        for name, compiles in (("torch eager", False), ("torch.compile", True)):
            module, options = Module(subject.model, compiles=compiles), check_target(settings)[1]
            engines[name] = Built(Opener(module.open, options), None, None, 0.0)
        openers = {name: each.opener for name, each in engines.items()}
        evaluation = None
        if subject.no_quality_because is None:
            judged = {name: opener for name, opener in openers.items() if name != "torch.compile"}
            evaluation = evaluate_openers(judged, subject, subject.data.test, REFERENCE, lambda *_: None)
        latency = interleave(openers, feeds, rounds=case.rounds)
    rows = {}
    for name, each in engines.items():
        row: dict[str, Any] = {"bytes": each.bytes, "by": each.by, "seconds": each.seconds}
        row["latency"] = {key: value for key, value in latency_to_dict(latency[name]).items() if key != "samples_ms"}
        same = f"{name.split()[0]} fp32"
        for key, over in (("speedup", REFERENCE), ("speedup_same", same)):
            row[key] = latency[name].speedup_over(latency[over])._asdict() if over in latency else None
        if evaluation is not None and name in evaluation.columns:
            row["figure"] = vars(evaluation.figure(name))
            row["loss"] = vars(evaluation.loss(REFERENCE, name))
        rows[name] = row
    metric = None if evaluation is None else evaluation.metric
    tested = len(subject.data.test)
    return {"engines": rows, "refused": refused, "metric": metric, "test": tested, "environment": environment()}


@click.command()
@click.option("--data-root", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True)
@click.option(
    "--model",
    "chosen",
    multiple=True,
    type=click.Choice([case.name for case in CASES]),
    help="Model to measure; repeatable.  [default: all]",
)
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), default=RESULTS, show_default=True)
def main(data_root: Path, chosen: tuple[str, ...], output: Path) -> None:
    """Measure the models and write results/targets.json; results of other models are kept."""
    where = sources(data_root)
    results: dict[str, Any] = json.loads(output.read_text()) if output.exists() else {}
    for case in CASES:
        if not chosen or case.name in chosen:
            click.echo(case.name, err=True)
            results[case.name] = measure(case, where)
            ordered = {each.name: results[each.name] for each in CASES if each.name in results}
            output.write_text(json.dumps(ordered, indent=1) + "\n")


if __name__ == "__main__":
    main()
