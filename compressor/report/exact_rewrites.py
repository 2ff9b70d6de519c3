"""The share of exact rewrites in what a result saves; the baseline lacks them, so they are stated on their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Json = Mapping[str, Any]

LABEL = "  exact rewrites alone"


def share(content: Json) -> float:
    """Return the share of the baseline's multiply-adds that exact rewrites save without any change of the plan."""
    whole = content["sizes"]["baseline"]["multiply_adds"]
    exact = content.get("exact")
    return 1.0 - exact["multiply_adds"] / whole if exact is not None and whole else 0.0


def cells(content: Json, names: Sequence[str]) -> list[str] | None:
    """Return a row below the multiply-adds: those of the unchanged model after exact rewrites; None if they save none.

    >>> sizes = {"baseline": {"multiply_adds": 4000000000}, "result": {"multiply_adds": 3000000000}}
    >>> cells({"sizes": sizes, "exact": {"multiply_adds": 3600000000}}, ["baseline", "result"])
    ['', '3.600 (-10%)']
    """
    if share(content) <= 0.0:
        return None
    text = f"{content['exact']['multiply_adds'] / 1e9:.3f} ({-share(content):.0%})"
    return [text if name == "result" else "" for name in names]


def sentence(content: Json) -> str | None:
    """Return what exact rewrites save, and what the plan saves beyond them; None if they save nothing.

    >>> sizes = {"baseline": {"multiply_adds": 4000000000}, "result": {"multiply_adds": 3000000000}}
    >>> print(sentence({"sizes": sizes, "exact": {"multiply_adds": 3600000000}, "plan": {"changes": {"a": "drop"}}}))
    Exact rewrites, which change no output and which the baseline lacks, save 10.0 % of its multiply-adds; the plan saves a further 15.0 %.
    """  # noqa: E501
    saved = share(content)
    if saved <= 0.0:
        return None
    start = (
        f"Exact rewrites, which change no output and which the baseline lacks, save {saved:.1%} of its multiply-adds"
    ).replace("%", " %")
    if not content["plan"]["changes"]:
        return f"{start}; the plan changes nothing."
    sizes = content["sizes"]
    further = 1.0 - sizes["result"]["multiply_adds"] / sizes["baseline"]["multiply_adds"] - saved
    return f"{start}; the plan saves a further {further * 100:.1f} %."
