"""Greedy generation of the float engines of benchmarks/smollm2.py, held to the rewritten graph in torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
from llama_cpp import greedy
from smollm2_engines import FUSED, PLAIN, Cell, Files, opened_builder
from smollm2_subject import DENSE, NEW, Design, Ids, Row, Subject

from compressor.measure.workload import empty_cache, feeds_with_cache
from compressor.models import Model
from compressor.quantize.precision import Source
from runtimes.base.protocols import BuildOptions, Engine
from runtimes.base.registry import runtime

OPENVINO, LLAMA_CPP = "openvino", "gguf"
PROMPTS = 10
PLANS = (DENSE, Design("attention", 25), Design("attention", 50))


def generation(subject: Subject) -> dict[str, Callable[[], Row]]:
    """Return the measurements by name of the cell; the files of the engines must have been exported."""
    cells = [Cell(engine, design, "fp32") for design in PLANS for engine in (PLAIN, FUSED, OPENVINO, LLAMA_CPP)]
    return {cell.name: partial(_row, subject, cell) for cell in cells}


def _row(subject: Subject, cell: Cell) -> Row:
    """Return the equal texts, and where others first differ, how far apart torch's logits of the two tokens are."""
    logits, ids = _of_torch(subject, cell.design), subject.prompts[:PROMPTS]
    theirs = logits.argmax(-1)
    with runtime(cell.engine).load(_file(subject, cell), BuildOptions(threads=2)) as engine:
        if cell.engine == LLAMA_CPP:
            ours = np.array([engine.generate(row, NEW) for row in ids])  # type: ignore[attr-defined]
        else:
            ours = _generated(engine, subject.traced.model, ids)
    first = {row: int(np.argmax(differ)) for row, differ in enumerate(ours != theirs) if differ.any()}
    gaps = [float(logits[row, at, theirs[row, at]] - logits[row, at, ours[row, at]]) for row, at in first.items()]
    return {
        "engine": cell.engine,
        "plan": cell.design.name if cell.design.percent else "dense",
        "prompts": len(ids),
        "new": NEW,
        "equal_texts": len(ids) - len(first),
        "first_differences": list(first.values()),
        "gaps": gaps,
        "spread": float(logits.std(-1).mean()),
    }


def _file(subject: Subject, cell: Cell) -> Path:
    """Return the file of an engine; that of OpenVINO is built from the float file of ONNX Runtime."""
    files = Files(subject.work)
    if cell.engine != OPENVINO:
        return files.path(cell)
    builder = opened_builder(subject, OPENVINO)
    return builder.build(Source(files.path(Cell(PLAIN, cell.design, "fp32")), "fp32"))


def _of_torch(subject: Subject, design: Design) -> npt.NDArray[np.float32]:
    """Return torch's logits [prompts, new tokens, vocabulary] of a greedy generation, kept in the work folder."""
    path = subject.work / f"greedy-{design.percent}.npy"
    if not path.exists():
        np.save(path, greedy(subject.graph(design), subject.traced.model, subject.prompts[:PROMPTS], NEW))
    found: npt.NDArray[np.float32] = np.load(path, mmap_mode="r")
    return found


def _generated(engine: Engine, model: Model, ids: Ids) -> Ids:
    """Return the `NEW` tokens [rows, new tokens] that an engine generates behind tokens with its cache."""
    names = {now: past for now, past in model.state.items() if past in engine.inputs}
    cache, whole, start = dict(empty_cache(engine, model, len(ids))), ids, 0
    while whole.shape[1] < ids.shape[1] + NEW:
        feeds = {name: value for name, value in feeds_with_cache(whole, start).items() if name in engine.inputs}
        outputs = engine.run(feeds | cache)
        start, token = whole.shape[1], outputs[model.answer][:, -1].argmax(-1)[:, None]
        whole = np.concatenate([whole, token], 1)
        cache = {past: outputs[now] for now, past in names.items()}
    return whole[:, ids.shape[1] :]
