"""The table of benchmarks/coverage.py: what becomes of a small random model of each architecture of transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]

RESULTS = Path(__file__).parent / "results" / "coverage.json"
TIMM = RESULTS.with_name("coverage_timm.json")
# Kinds of refusals, by a part of their sentences; the first that fits counts.
KINDS = {
    "a head that is not supported": "has a head that is not supported",
    "Unrecognized configuration class": "has a head that is not supported",
    "reads sound beside its text": "is a language model that reads sound",
    "beside the pixels": "reads images of varying size",
    "expected a model such as LLaVA": "reads images and texts in another way",
    "of token ids alone": "needs other inputs than texts",
    "a file takes tensors alone": "takes a session of a video, which is no tensor",
    "decides by a value that it computes": "decides by a value that it computes what to compute next",
    "outputs are no features": "returns codes alone",
    "fails on every shape": "needs other inputs than sound or a time series",
    "does not compute features of": "needs other inputs than images",
    "cannot be told apart by their caches": "is an encoder-decoder without the caches of transformers",
    "fails on its example inputs": "needs other inputs than images",
    "could not be traced": "cannot be traced by torch.export",
    "cannot be written as ONNX": "has an operator without an ONNX form",
    "KV cache": "keeps a cache of another kind than keys and values",
    "has no forward of its own": "joins models that are exported one by one",
    "and no forward": "has methods and no forward",
    "no residual branch": "has no residual branch",
    "draws random numbers": "draws random numbers",
    "leaves out the mask of texts without padding": "attends to later tokens where no text is padded",
    "does not give features of images alone": "reads videos and texts in another way than CLIP",
    "transformers could not load": "cannot be loaded by transformers from its own checkpoint",
    "": "other",
}


def coverage() -> str | None:
    """Return the table, or None without results."""
    return coverage_table(json.loads(RESULTS.read_text())) if RESULTS.exists() else None


def coverage_timm() -> str | None:
    """Return the table of timm's families, or None without results."""
    return timm_table(json.loads(TIMM.read_text())) if TIMM.exists() else None


def timm_table(found: Row) -> str:
    """Return a row with the families of each outcome, and the largest difference."""
    groups: dict[str, list[str]] = {}
    for name, row in sorted(found["families"].items()):
        groups.setdefault(_group(row), []).append(name)
    lines = [f"| timm {found['timm']} | families | names |", "|---|---|---|"]
    for group, names in sorted(groups.items(), key=lambda each: (_rank(each[0]), " with " in each[0], -len(each[1]))):
        lines.append(f"| {group} | {len(names)} | {', '.join(names)} |")
    rows = found["families"].values()
    largest = max((row["difference"] for row in rows if row["outcome"] == "passes"), default=0.0)
    lines += ["", f"The largest difference of a file that passes is {largest:.1e}."]
    faults = {name: row for name, row in found["families"].items() if row["outcome"] == "fault"}
    lines += [f"- fault, {name}: {row['detail']}" for name, row in faults.items()]
    return "\n".join(lines)


def coverage_table(found: Row) -> str:
    """Return a row with the architectures of each outcome, refusals by kind."""
    judged = {name: row for name, row in found["architectures"].items() if row["outcome"] != "not built"}
    groups: dict[str, list[str]] = {}
    for name, row in sorted(judged.items()):
        groups.setdefault(_group(row), []).append(name)
    count = len(judged)
    lines = [f"| transformers {found['transformers']} | architectures | names |", "|---|---|---|"]
    for group, names in sorted(groups.items(), key=lambda each: (_rank(each[0]), " with " in each[0], -len(each[1]))):
        lines.append(f"| {group} | {len(names)} ({len(names) / count:.0%}) | {', '.join(names)} |")
    largest = max((row["difference"] for row in judged.values() if row["outcome"] == "passes"), default=0.0)
    left = len(found["architectures"]) - count
    lines += [
        "",
        f"{count} architectures were judged; {left} others could not be made small by the names of their fields, or "
        f"are parts of another model. The largest difference of a file that passes is {largest:.1e}.",
    ]
    prepared = sum("preprocessor" in row and row["outcome"] == "passes" for row in judged.values())
    if prepared:
        lines[-1] += (
            f" {prepared} of those that pass read files by the default preprocessor of their class or a tokenizer."
        )
    lines += [f"- fault, {name}: {row['detail']}" for name, row in judged.items() if row["outcome"] == "fault"]
    return "\n".join(lines)


def _group(row: Row) -> str:
    if row["outcome"] != "refused":
        return f"{row['outcome']} with {row['option']}" if "option" in row else str(row["outcome"])
    return f"refused: {next(kind for part, kind in KINDS.items() if part in row['detail'])}"


def _rank(group: str) -> int:
    return next(place for place, start in enumerate(("passes", "fault", "")) if group.startswith(start))
