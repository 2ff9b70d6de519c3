"""The cells of a factorial in an export: the engines that it needs beside those of the report, and their files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from compressor.lower.fold_graph import finished
from compressor.measure.workshop import Workshop
from compressor.quality.evaluate import Evaluation
from compressor.quantize.precision import Source
from compressor.report.factorial import Factorial, cells_of, factorial, place, word
from compressor.settings import Settings
from compressor.workspace.output_folder import copy_onnx
from passes.graph.graph import Graph
from passes.plan.plan import Plan, merged_tokens
from runtimes.base.timing import Latency

FOLDER = "factorial"
CHANGES = "changes"


def unmerged(plan: Plan, graph: Graph, workshop: Workshop) -> dict[str, Path]:
    """The ONNX file of a plan's changes without its merging of tokens, where it has both; `graph` is that model."""
    merging = [merged_tokens(action) is not None for action in plan.changes.values()]
    if not any(merging) or all(merging):
        return {}
    made = workshop.lowered(finished(graph), CHANGES)
    workshop.parity(made, graph)
    return {CHANGES: made}


def parted(
    floats: Mapping[str, Path], files: Mapping[str, Source], precision: str
) -> tuple[dict[str, Source], dict[str, Source]]:
    """The sources of the report's variants, and those of the cells that it lacks.

    Args:
        floats: ONNX files in float: ``baseline``, ``result`` and, where tokens are merged, ``changes``.
        files: the same in the precision, with ``original`` for the float baseline.
        precision: below float.
    """
    more = {"compressed float": Source(floats["result"])}
    if CHANGES in floats:
        more |= {f"{CHANGES} float": Source(floats[CHANGES]), f"{CHANGES} {word(precision)}": files[CHANGES]}
    return {name: source for name, source in files.items() if name != CHANGES}, more


def measured(
    latency: Mapping[str, Latency],
    evaluation: Evaluation | None,
    files: Mapping[str, Source],
    settings: Settings,
    folder: Path,
) -> Factorial:
    """The factorial of an export, and every cell's ONNX file in its folder, so that it can be measured again."""
    reduced = word(settings.precision)
    # Those that the report measures anyway, by the name they have there.
    known = {"dense float": "original", f"dense {reduced}": "baseline", f"compressed {reduced}": "result"}
    named = {cell: known.get(cell, cell) for cell in cells_of(reduced) if known.get(cell, cell) in latency}
    (folder / FOLDER).mkdir()
    shipped = {cell: _file(cell, files[name].path, folder) for cell, name in named.items()}
    columns = {} if evaluation is None else {cell: evaluation.columns[name] for cell, name in named.items()}
    return factorial(
        {cell: latency[name] for cell, name in named.items()},
        None if evaluation is None else replace(evaluation, columns=columns),
        shipped,
        place(settings.target, settings.batch, settings.threads),
    )


def _file(cell: str, path: Path, folder: Path) -> str:
    """Where a cell's file lies in the folder; put there unless it is the result itself."""
    if path.parent == folder:
        return path.name
    name = f"{FOLDER}/{cell.replace(' ', '.')}.onnx"
    copy_onnx(path, folder / name)
    return name
