"""Export the smallest model of every family of timm with random weights, and hold each file to timm itself.

    python benchmarks/coverage_timm.py [--only FAMILY ...] [--seconds 300]

A family is a module of timm.models, and its smallest model is that with the fewest parameters. It is loaded, traced
and written as `compressor export MODEL --random-weights --data random` does. The ONNX file is run at two other batch
sizes than that of the trace, and compared with timm's module. Then the first site is dropped, and the file of that
graph is compared with the graph. The outcomes are those of coverage.py.

Results are in benchmarks/results/coverage_timm.json; `python benchmarks/tables.py` writes the table.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import click
import numpy as np
from coverage import CLOSE, judge_all, refusal

RESULTS = Path(__file__).parent / "results" / "coverage_timm.json"
BATCHES = (3, 1)


def smallest(family: str) -> tuple[str, int]:
    """Return the model of a family with the fewest parameters, and their number."""
    import timm
    import torch

    sizes = {}
    with torch.device("meta"):
        for name in timm.list_models(module=family):
            sizes[name] = sum(each.numel() for each in timm.create_model(name).parameters())
    name = min(sizes, key=sizes.__getitem__)
    return name, sizes[name]


def judged(family: str, folder: Path) -> dict[str, Any]:
    """Return the outcome of one family."""
    try:
        name, parameters = smallest(family)
    except Exception as error:  # timm's own errors, such as those of a model that cannot be made on the device meta
        return {"outcome": "not built", "detail": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
    found = {"model": name, "parameters": parameters}
    try:
        return found | _exported(name, folder)
    except Exception as error:
        return found | refusal(error)


def _exported(name: str, folder: Path) -> dict[str, Any]:
    """Load, trace and write a model as an export does, and compare its file and that without its first site."""
    import torch

    from compressor.lower.fold_graph import fold_graph
    from compressor.lower.traced_model import load, without_sites
    from compressor.lower.write_onnx import lower
    from compressor.settings import Settings
    from compressor.workspace.progress import Steps
    from passes.base import apply
    from passes.canonical.clean import Clean
    from passes.execute.interpreter import run
    from passes.rewrite.drop import Drop

    settings = Settings(model=name, data="random", samples=12, drop="none", tokens="none", random_weights=True)
    subject = load(settings, Steps(None))
    found = {"sites": len(subject.sites), "kinds": dict(Counter(site.kind for site in subject.sites))}
    if not subject.sites:
        return found | {"outcome": "refused", "detail": without_sites(subject.graph, subject.model, "pass --drop none")}
    (example,) = subject.model.example.values()
    images = [torch.randn(rows, *example.shape[1:], generator=torch.Generator().manual_seed(rows)) for rows in BATCHES]
    with torch.inference_mode():
        expected = [subject.model.call(subject.model.module, each)[0].numpy() for each in images]
    dropped = subject.graph.fork()
    apply(Drop((subject.sites[0].name,)), dropped)
    apply(Clean(), dropped)
    (input_name,) = dropped.inputs
    with torch.inference_mode():
        expected_dropped = [run(dropped, {input_name: each})[0].numpy() for each in images]
    worst = 0.0
    for graph, wanted in ((subject.graph, expected), (dropped, expected_dropped)):
        path = lower(fold_graph(graph), subject.model, folder / f"{len(list(folder.iterdir()))}.onnx")
        worst = max(worst, _difference(path, images, wanted))
    found["difference"] = worst
    if not worst <= CLOSE:
        return found | {"outcome": "fault", "detail": f"differs from timm by {worst:.1e}"}
    return found | {"outcome": "passes", "detail": ""}


def _difference(path: Path, images: list[Any], expected: list[Any]) -> float:
    """Return the largest difference of the output, relative to its largest value."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (name,) = [each.name for each in session.get_inputs()]
    worst = 0.0
    for image, wanted in zip(images, expected, strict=True):
        value = session.run(None, {name: image.numpy()})[0]
        if value.shape != wanted.shape:
            raise ValueError(f"the output has shape {value.shape}, expected {wanted.shape}")
        worst = max(worst, float(np.abs(value - wanted).max() / np.abs(wanted).max().clip(1e-6)))
    return worst


@click.command()
@click.option("--only", multiple=True, help="Name of a family, repeatable.  [default: all]")
@click.option("--again", is_flag=True, help="Also judge families that are in the results already.")
@click.option("--seconds", default=300.0, show_default=True, help="Time limit of one family.")
def main(only: tuple[str, ...], again: bool, seconds: float) -> None:
    """Judge the families and write the results."""
    import timm

    import compressor.api  # imported before the processes start, so that each does not import it again  # noqa: F401
    from compressor.data.splits import shuffled
    from compressor.models import timm as loader  # noqa: F401

    warnings.simplefilter("ignore")
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"families": {}}
    found["timm"] = timm.__version__
    names = sorted({timm.models.model_entrypoint(name).__module__.rpartition(".")[2] for name in timm.list_models()})
    drawn = only or [names[place] for place in shuffled(names, 0)]
    for _ in judge_all(drawn, judged, found["families"], seconds, again=again or bool(only)):
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
