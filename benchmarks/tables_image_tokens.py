"""The table of benchmarks/image_tokens.py: time of prompt and token, and cache, with image tokens dropped in stages."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]

RESULTS = Path(__file__).parent / "results" / "image_tokens.json"


def image_tokens() -> str | None:
    """Return the table, or None without results."""
    return image_tokens_table(json.loads(RESULTS.read_text())) if RESULTS.exists() else None


def image_tokens_table(found: Row) -> str:
    """Return the table of every form at every number of image tokens, then the interactions and the conditions.

    Args:
        found: the results.
    """
    lines = [
        "| image tokens | form | prompt | each further token | cache behind the prompt |",
        "|---|---|---|---|---|",
    ]
    for images, forms in found["prompts"].items():
        for name, row in forms.items():
            if name != "interactions":
                dense = forms["dense fp32"]["cache_bytes"]
                lines.append(
                    f"| {int(images):,} | {name.replace(' ', ', ')} | {_time(row['prompt'])} | {_time(row['token'])} | "
                    f"{row['cache_bytes'] / 1e6:.2f} MB ({row['cache_bytes'] / dense:.0%}) |"
                )
    return "\n".join([*lines, "", *_interactions(found), *_facts(found)])


def _time(part: Row) -> str:
    each = part["ratio"]
    return f"{part['median_ms']:.1f} ms, {each['ratio']:.2f}x ({each['low']:.2f}–{each['high']:.2f})"


def _interactions(found: Row) -> Iterator[str]:
    words = {"prompt": "the prompt", "token": "each further token"}
    for images, forms in found["prompts"].items():
        for call, precisions in forms["interactions"].items():
            texts = [
                f"{precision} {each['ratio']:.3f} ({each['low']:.3f}–{each['high']:.3f})"
                for precision, each in precisions.items()
            ]
            yield f"- {int(images):,} image tokens, {words[call]}: both gains / their product: {', '.join(texts)}."


def _facts(found: Row) -> Iterator[str]:
    kept = ", ".join(f"{share:.1%} behind block {depth}" for depth, share in found["stages"])
    floats = [row for forms in found["prompts"].values() for name, row in forms.items() if name.endswith("fp32")]
    same = min(row["same_tokens"] for row in floats)
    equal = [row["difference"] for row in floats if row["same_tokens"] == 1]
    noise = "nothing else ran" if found["quiet"] else "**other work ran on the machine**"
    yield (
        f"- {found['layers']} blocks of width {found['width']}, random weights, {found['text']} tokens of text; kept: "
        f"{kept}. Processor time of one thread, {found['runs']} runs in turns; {noise}; "
        f"{found['environment']['cores']} cores."
    )
    yield (
        f"- Float files against torch: at least {same:.1%} of the kept tokens are the same at every stage; where all "
        f"are, logits differ by at most {max(equal, default=0):.1e} of the largest."
    )
