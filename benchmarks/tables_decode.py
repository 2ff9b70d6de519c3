"""The table of benchmarks/decode.py: generation latency of a model of real size, and the factorial of its gains."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tables_matrix import shown

Row = dict[str, Any]

RESULTS = Path(__file__).parent / "results" / "decode.json"
# The precision of the headline: int8-dynamic is faster on a prompt, but costs a real model far more (smollm2.json).
HEADLINE = "int8-weight-only"
WHOLE = "compression"  # the interaction of all changes of the model with the precision
FOLDERS = {"export": "", "fused": "fused, "}  # of benchmarks/decode.py
CALLS = {"first": "first token", "token": "each further token"}


def decode() -> str | None:
    """Return the table of generation, or None without results."""
    return decode_table(json.loads(RESULTS.read_text())) if RESULTS.exists() else None


def headline() -> str:
    """Return a sentence on the fastest engine at the longest context, compared with the dense float engine."""
    run = json.loads(RESULTS.read_text())[HEADLINE]
    rows = run["generation"]["measurements"]
    longest = [row for row in rows if row["context"] == max(row["context"] for row in rows)]
    dense = next(row for row in longest if row["engine"].endswith("dense float"))
    eager = next(row for row in longest if "eager" in row["engine"])
    best = max(longest, key=_ratio)
    in_place = _ratio(next(row for row in longest if row["engine"] == "fused/dense float"))
    speed, rate = best["token"]["speedup"], "tokens_per_second"
    before, after = (run["sizes"][name]["cache"] for name in ("original", "result"))
    return (
        f"**{speed['ratio']:.2f}x faster generation ({speed['low']:.2f}–{speed['high']:.2f})**: Qwen3-0.6B's shapes "
        f"(random weights, speed alone), half of the attention layers dropped, {HEADLINE}, the cache written in "
        f"place (alone {in_place:.2f}x); behind {dense['context']:,} tokens {dense[rate]:.1f} → {best[rate]:.1f} "
        f"tokens a second (torch eager {eager[rate]:.1f}), with {after / before:.0%} of the cache."
    )


def _ratio(row: Row) -> float:
    return float(row["token"]["speedup"]["ratio"])


def decode_table(found: Mapping[str, Row]) -> str:
    """Return the table of every engine at every context length, then the interactions.

    Args:
        found: the results by precision.
    """
    lines = [
        "| precision, context | engine | first token | each further token | tokens/s | cache |",
        "|---|---|---|---|---|---|",
    ]
    for kind, run in found.items():
        for each in run["generation"]["measurements"]:
            lines.append(
                f"| {kind}, {each['context']} | {_engine(each['engine'])} | {_time(each['first'])} | "
                f"{_time(each['token'])} | {each['tokens_per_second']:.1f} | {each['cache_bytes'] / 1e6:.1f} MB |"
            )
    return "\n".join([*lines, "", *_interactions(found), *_facts(found)])


def _engine(name: str) -> str:
    """Return the display name of an engine.

    >>> _engine("fused/dense float"), _engine("export/dense float")
    ('fused, dense float', 'Compressor, dense float')
    """
    return shown(name).replace("fused/", "fused, ")


def _time(part: Row) -> str:
    speed = part["speedup"]
    return f"{part['latency']['median']:.1f} ms, {speed['ratio']:.2f}x ({speed['low']:.2f}–{speed['high']:.2f})"


def _interactions(found: Mapping[str, Row]) -> Iterator[str]:
    for kind, run in found.items():
        for each in run["generation"]["factorials"]:
            whole = next(one for one in each["interactions"] if one["change"] == WHOLE)
            speed = " x ".join(f"{whole['speedup'][part]['ratio']:.2f}" for part in ("change", whole["precision"]))
            ratio = whole["ratio"]
            yield (
                f"- {kind}, {FOLDERS[each['folder']]}{each['context']} tokens, {CALLS[each['part']]}: {speed} alone, "
                f"{whole['speedup']['both']['ratio']:.2f} together; both / product {ratio['ratio']:.3f} "
                f"({ratio['low']:.3f}–{ratio['high']:.3f}) {whole['verdict']}."
            )


def _facts(found: Mapping[str, Row]) -> Iterator[str]:
    for kind, run in found.items():
        before, after = (run["sizes"][name]["cache"] for name in ("original", "result"))
        worst = max(each["difference_from_whole_text"] for each in run["generation"]["measurements"])
        yield (
            f"- {kind}: {len(run['plan'])} of {run['layers']} attention layers dropped, {before:,} → {after:,} "
            "bytes of KV cache per token; logits with a cache differ from those of the whole text by at most "
            f"{worst:.1e} of their spread; {run['environment']['cores']} cores."
        )
