"""The tables of benchmarks/llama_cpp.py: GGUF files in llama.cpp, and generation held to torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tables_tokens import interval

Row = dict[str, Any]

RESULTS = Path(__file__).parent / "results" / "llama_cpp.json"
TYPES = {"fp32": "F32", "fp16": "F16", "int8": "Q8_0", "int4": "Q4_0"}


def llama_cpp() -> str | None:
    """Return the tables, or None without results."""
    return llama_cpp_table(json.loads(RESULTS.read_text())) if RESULTS.exists() else None


def llama_cpp_table(found: Row) -> str:
    """Return the table of files, that of generation, and the conditions.

    Args:
        found: the results.
    """
    return "\n".join(
        [
            "| file | attentions dropped | size | perplexity | lost over F32, % | lost over dense of the type, % | "
            "prompt, over dense | further token, over dense | cache per token |",
            "|---|---|---|---|---|---|---|---|---|",
            *map(_row, found["rows"]),
            "",
            "| F16 file | texts equal to torch's | next tokens equal along torch's texts | torch's logits of the two "
            "tokens elsewhere |",
            "|---|---|---|---|",
            *map(_generation, found["generation"]),
            "",
            *_facts(found),
        ]
    )


def _row(row: Row) -> str:
    cells = (
        TYPES[row["precision"]],
        str(row["dropped"]),
        f"{row['bytes'] / 1e6:.1f} MB",
        f"{row['figure']['value']:.2f}",
        *(interval(row["loss"][over]) if over in row["loss"] else "–" for over in ("float", "dense")),
        *(f"{row[part]['median']:.1f} ms, {_times(row[part]['speedup']['dense'])}" for part in ("prompt", "token")),
        f"{row['cache_bytes_per_token']:,} B",
    )
    return f"| {' | '.join(cells)} |"


def _times(speedup: Mapping[str, float]) -> str:
    return f"{speedup['ratio']:.2f}x ({speedup['low']:.2f}–{speedup['high']:.2f})"


def _generation(made: Row) -> str:
    cells = (
        f"{made['dropped']} attentions dropped" if made["dropped"] else "dense",
        f"{made['equal_texts']} of {made['prompts']} (greedy, {made['new']} tokens)",
        f"{made['same_next_token']} of {made['tokens']}",
        f"at most {made['largest_gap']:.3f} apart; their spread over the vocabulary is {made['spread']:.1f}"
        if made["largest_gap"]
        else "–",
    )
    return f"| {' | '.join(cells)} |"


def _facts(found: Row) -> Iterator[str]:
    calls, packages = found["calls"], found["environment"]["packages"]
    yield (
        f"{found['model']} on {found['samples']} windows of {found['length']} tokens ({found['data']}); a prompt of "
        f"{calls['prompt']} tokens, a further token behind {calls['behind']}, {found['threads']} thread; xllamacpp "
        f"{packages['xllamacpp']} on {found['environment']['processor']}, which other processes used too."
    )
    yield ""
    yield f"Dropped: {', '.join(found['changes'])}."
