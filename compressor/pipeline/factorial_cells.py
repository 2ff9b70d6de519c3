"""The cells of a factorial in an export: the variants that the report does not need anyway, and their files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from compressor.measure.engine_builder import EngineBuilder
from compressor.measure.variant import Variant, lower_variant
from compressor.quality.evaluate import Evaluation
from compressor.report.factorial import Factorial, cell_precision, cells_of, compute_factorial, conditions
from compressor.search.planner import Choice
from compressor.settings import Settings
from compressor.workspace.output_folder import copy_onnx
from passes.graph.graph import Graph
from passes.plan.plan import merged_tokens
from runtimes.base.encoder_decoder import ENCODER, parts_of
from runtimes.base.timing import Latency

FOLDER = "factorial"
CHANGES = "changes"


def unmerged(choice: Choice, graph: Graph, builder: EngineBuilder) -> list[Variant]:
    """Lower the model with the plan's changes but without merged tokens, if the plan has both.

    Args:
        choice: the plan of the export.
        graph: the changed model before tokens are merged.
        builder: folds and lowers the graph.

    Returns:
        One variant, or none.
    """
    merging = [merged_tokens(action) is not None for action in choice.plan.changes.values()]
    if not any(merging) or all(merging):
        return []
    file = f"{CHANGES}{choice.count or ''}"  # a file of its own for each plan that is tried
    return [lower_variant(CHANGES, graph, builder.fold(graph), builder, file=file)]


def with_cells(variants: Sequence[Variant], precision: str) -> list[Variant]:
    """Add the float variants of the factorial, and rename its own variants to their cells.

    Args:
        variants: converted to `precision`: ``original``, ``baseline``, ``result`` and, with merged tokens, ``changes``.
        precision: a precision below fp32.
    """
    by_name = {variant.name: variant for variant in variants}
    cells = [by_name["result"].as_float().renamed("compressed float")]
    if CHANGES in by_name:
        changes = by_name.pop(CHANGES)
        cells += [
            changes.as_float().renamed(f"{CHANGES} float"),
            changes.renamed(f"{CHANGES} {cell_precision(precision)}"),
        ]
    return [*by_name.values(), *cells]


def measured(
    latency: Mapping[str, Latency],
    evaluation: Evaluation | None,
    variants: Sequence[Variant],
    settings: Settings,
    folder: Path,
) -> Factorial:
    """Return the factorial of an export; write every cell's ONNX or GGUF file so that it can be measured again."""
    reduced = cell_precision(settings.precision)
    files = {variant.name: _measured_again(variant) for variant in variants}
    # Cells that the report measures anyway, with the name of their variant in the report.
    reported = {"dense float": "original", f"dense {reduced}": "baseline", f"compressed {reduced}": "result"}
    named = {cell: reported.get(cell, cell) for cell in cells_of(reduced) if reported.get(cell, cell) in latency}
    (folder / FOLDER).mkdir()
    shipped = {cell: _file(cell, files[name], folder) for cell, name in named.items()}
    columns = {} if evaluation is None else {cell: evaluation.columns[name] for cell, name in named.items()}
    return compute_factorial(
        {cell: latency[name] for cell, name in named.items()},
        None if evaluation is None else replace(evaluation, columns=columns),
        shipped,
        conditions(settings.target, settings.batch, settings.threads),
    )


def _measured_again(variant: Variant) -> Path:
    """Return the file that `bench` measures again: the ONNX file, or the GGUF file, which is made in the precision.

    Of an encoder-decoder it is the ONNX file of the encoder; those of the decoder lie beside it.
    """
    engine = variant.engine
    if engine is not None and parts_of(engine) is not None:
        return engine.with_name(f"{ENCODER}.onnx")
    return engine if engine is not None and engine.suffix == ".gguf" else variant.source.path


def _file(cell: str, path: Path, folder: Path) -> str:
    """Return the name of a cell's file in the folder; copy the file, and those beside it, unless it is the result."""
    if path.parent == folder:
        return path.name
    if (parts := parts_of(path)) is not None:
        own = folder / FOLDER / cell.replace(" ", ".")
        own.mkdir()
        copied = [copy_onnx(part, own / part.name) for part in parts]
        return copied[0].relative_to(folder).as_posix()
    name = f"{FOLDER}/{cell.replace(' ', '.')}{'.gguf' if path.suffix == '.gguf' else '.onnx'}"
    copy_onnx(path, folder / name)
    return name
