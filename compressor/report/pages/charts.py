"""The charts of an export's page, each from plain values of report.json."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import altair as alt
import numpy as np

from compressor.report.pages.html_page import ACCENT, BAD, CATEGORIES, GOOD, INK, MUTED, QUIET, WIDTH

Json = dict[str, Any]
Row = dict[str, Any]

BAR = 30  # px, height of a bar and the gap below it
BINS = 80
NARROW = 44  # px; a block of the site map that is at least this wide shows its action as text
MOST_STATES = 72  # maximum side of the heat map; more states are subsampled, as their cells would be too small
# Actions in the order of the legend. Kept sites are grey.
COLOURS = {
    "kept": QUIET,
    "dropped": CATEGORIES[0],
    "linear": CATEGORIES[1],
    "low-rank": CATEGORIES[2],
    "fused": GOOD,
    "constant": CATEGORIES[4],
    "scale": CATEGORIES[5],
    "tokens merged": CATEGORIES[3],
}


def table(rows: Sequence[Row]) -> alt.InlineData:
    """Convert rows to inline data of a chart."""
    return alt.InlineData(values=list(rows))


def bars(rows: Sequence[Row], *, title: str, form: str, expected: str = "") -> alt.TopLevelMixin:
    """Draw horizontal bars with their intervals and values.

    Args:
        rows: ``name``, ``value``, ``low``, ``high``, ``text`` and ``group`` (shown as colour); optionally ``expected``.
        title: title of the axis.
        form: format of the values, in d3's syntax.
        expected: meaning of the mark at ``expected``.
    """
    values = [row | {"start": 0.0} for row in rows]
    names = [row["name"] for row in rows]
    low, high = min(0.0, *(row["low"] for row in rows)), max(0.0, *(row["high"] for row in rows))
    domain = [low, high + 0.12 * (high - low)]  # room for the values to the right of the bars
    tips = [alt.Tooltip("name:N", title="cell"), *_interval(title, form)]
    base = alt.Chart(table(values)).encode(y=alt.Y("name:N", sort=names, title=None, axis=alt.Axis(ticks=False)))
    groups = sorted({row["group"] for row in rows}, key=lambda group: group != "float")
    colour = alt.Color("group:N", title=None, scale=alt.Scale(domain=groups, range=[QUIET, ACCENT]), legend=_above())
    x = alt.X(
        "value:Q", title=title, axis=alt.Axis(format=".2~f", tickCount=6), scale=alt.Scale(domain=domain, nice=False)
    )
    layers = [
        base.mark_bar(height=18, cornerRadius=2).encode(x=x, x2="start:Q", color=colour, tooltip=tips),
        base.mark_rule(strokeWidth=1.5, color=INK).encode(x="low:Q", x2="high:Q"),
        base.mark_text(align="left", dx=6, color=INK).encode(x="high:Q", text="text:N"),
    ]
    if any("expected" in row for row in rows):
        tip = alt.Tooltip("expected:Q", title=expected, format=form)
        mark = base.transform_filter("isValid(datum.expected)").mark_point(
            shape="diamond", size=60, fill="var(--page)", stroke=INK, strokeWidth=1.5, opacity=1
        )
        layers.append(mark.encode(x="expected:Q", tooltip=["name:N", tip]))
    return alt.layer(*layers).properties(height=BAR * len(rows))


def site_map(rows: Sequence[Row], blocks: Sequence[str], tokens: Mapping[str, int]) -> alt.TopLevelMixin:
    """Draw the branches of each block over depth, coloured by action, and below them the numbers of tokens.

    Args:
        rows: ``block``, ``place`` (row of the map), ``done``, ``action``, ``label``, ``site`` and ``reason``, by site.
        blocks: the blocks in order.
        tokens: the number of tokens that enter each block; empty if no tokens are merged.
    """
    width = WIDTH - 100
    wide = width / len(blocks) >= NARROW
    lanes = list(dict.fromkeys(row["place"] for row in rows))
    present = [name for name in COLOURS if any(row["done"] == name for row in rows)]
    others = sorted({row["done"] for row in rows} - set(present))
    colours = [COLOURS[name] for name in present] + [CATEGORIES[3 + index % 3] for index in range(len(others))]
    axis = alt.Axis(title="block", orient="bottom", labelAngle=0 if wide else -90, labelOverlap="greedy", ticks=False)
    x = alt.X("block:N", sort=list(blocks), scale=alt.Scale(paddingInner=0.08), axis=axis)
    y = alt.Y("place:N", sort=lanes, title=None, scale=alt.Scale(paddingInner=0.08), axis=alt.Axis(ticks=False))
    base = alt.Chart(table(rows)).encode(x=x, y=y)
    cells = base.mark_rect(cornerRadius=3).encode(
        color=alt.Color(
            "done:N", title=None, scale=alt.Scale(domain=[*present, *others], range=colours), legend=_above()
        ),
        tooltip=[alt.Tooltip(f"{name}:N") for name in ("site", "action", "reason")],
    )
    layers: list[alt.Chart] = [cells]
    if wide:
        layers.append(
            base.transform_filter("datum.label != ''")
            .mark_text(color="var(--page)", fontSize=10.5, fontWeight=600)
            .encode(text="label:N")
        )
    sites = alt.layer(*layers).properties(width=width, height=46 * len(lanes))
    return sites if not tokens else alt.vconcat(sites, _tokens(x, tokens, width)).resolve_scale(color="independent")


def _tokens(x: alt.X, tokens: Mapping[str, int], width: float) -> Any:
    """Draw the number of tokens that enter each block as bars, on the axis `x` of the site map."""
    rows = [{"block": block, "tokens": count} for block, count in tokens.items()]
    y = alt.Y("tokens:Q", title="tokens", axis=alt.Axis(tickCount=3), scale=alt.Scale(zero=True))
    base = alt.Chart(table(rows)).encode(
        x=x, y=y, tooltip=["block:N", alt.Tooltip("tokens:Q", title="tokens at the input")]
    )
    text = base.mark_text(dy=-7, color=MUTED, fontSize=10.5).encode(text="tokens:Q")
    bar = base.mark_bar(color=COLOURS["tokens merged"], opacity=0.75, cornerRadius=2)
    return alt.layer(*([bar, text] if width / len(rows) >= NARROW / 1.5 else [bar])).properties(width=width, height=80)


def front(points: Sequence[Row], measured: Row | None, *, metric: str) -> alt.TopLevelMixin:
    """Draw loss against speed-up of all plans of a search, with the chosen plan and the measured result.

    Args:
        points: ``number``, ``change``, ``loss``, ``predicted`` and ``kind`` (``plan of the search`` or ``chosen plan``)
            of each plan.
        measured: ``predicted``, ``low``, ``high``, ``loss``, ``loss_low`` and ``loss_high`` of the result; None without
            quality.
        metric: name of the metric.
    """
    kinds = ["plan of the search", "chosen plan", *(["measured result"] if measured is not None else [])]
    scale = alt.Scale(domain=kinds, range=[QUIET, ACCENT, BAD][: len(kinds)])
    x = alt.X("predicted:Q", title="speed-up", scale=alt.Scale(zero=False, nice=True), axis=alt.Axis(tickCount=8))
    y = alt.Y("loss:Q", title=f"loss of {metric}, %", scale=alt.Scale(zero=False, nice=True))
    base = alt.Chart(table(points)).encode(x=x, y=y)
    tips = [
        alt.Tooltip("number:Q", title="changes"),
        alt.Tooltip("change:N", title="last change"),
        alt.Tooltip("predicted:Q", title="predicted speed-up", format=".3f"),
        alt.Tooltip("loss:Q", title="loss on validation data, %", format="+.2f"),
    ]
    size = alt.condition("datum.kind == 'chosen plan'", alt.value(170), alt.value(55))
    layers = [
        base.mark_line(color=QUIET, strokeWidth=1.5).encode(order="number:Q"),
        base.mark_point(filled=True, opacity=1).encode(
            color=alt.Color("kind:N", title=None, scale=scale, legend=_above()), size=size, tooltip=tips
        ),
    ]
    if measured is not None:
        end = alt.Chart(table([measured | {"kind": kinds[2]}])).encode(x=x, y=y)
        layers += [
            end.mark_rule(color=BAD, strokeWidth=1.5).encode(x="low:Q", x2="high:Q"),
            end.mark_rule(color=BAD, strokeWidth=1.5).encode(y="loss_low:Q", y2="loss_high:Q"),
            end.mark_point(filled=True, opacity=1, shape="diamond", size=150).encode(
                color=alt.Color("kind:N", scale=scale),
                tooltip=[
                    alt.Tooltip("predicted:Q", title="measured speed-up", format=".3f"),
                    alt.Tooltip("loss:Q", title="loss on test data, %", format="+.2f"),
                ],
            ),
        ]
    return alt.layer(*layers).properties(height=320)


def scatter(rows: Sequence[Row]) -> alt.TopLevelMixin:
    """Draw the measured effect of each site against its score; rows: ``site``, ``kind``, ``cosine``, ``effect``."""
    effects = [row["effect"] for row in rows]
    scale, axis = alt.Scale(type="symlog"), alt.Axis(tickCount=6)
    if min(effects) > 0.0:  # a logarithmic axis cannot show an effect of zero or below
        powers = range(math.floor(math.log10(min(effects))), math.ceil(math.log10(max(effects))) + 1)
        scale = alt.Scale(type="log", nice=False, padding=12)
        axis = alt.Axis(values=[part * 10.0**power for power in powers for part in (1, 3)], format="~g")
    title = "score: cosine similarity of the branch's input and output"
    x = alt.X("cosine:Q", title=title, scale=alt.Scale(zero=False))
    y = alt.Y("effect:Q", title="effect: output divergence without the branch", scale=scale, axis=axis)
    chart: alt.Chart = (
        alt.Chart(table(rows), height=320)
        .mark_point(filled=True, size=70, opacity=0.9)
        .encode(
            x=x,
            y=y,
            color=alt.Color("kind:N", title=None, legend=_above()),
            shape=alt.Shape("kind:N", title=None, legend=_above()),
            tooltip=[
                "site:N",
                "kind:N",
                alt.Tooltip("cosine:Q", format=".4f"),
                alt.Tooltip("effect:Q", format=".4g"),
            ],
        )
    )
    return chart


def heat_map(names: Sequence[str], matrix: Sequence[Sequence[float | None]]) -> alt.TopLevelMixin:
    """Draw the cosine similarity of every pair of trunk states; pairs of different shapes are left out."""
    step = -(-len(names) // MOST_STATES)
    kept = [*range(0, len(names) - 1, step), len(names) - 1]
    rows = [
        {"a": row, "b": column, "v": round(value, 4)}
        for row in kept
        for column in kept
        if (value := matrix[row][column]) is not None
    ]
    listed = json.dumps(list(names))
    side = min(560, max(220, 26 * len(kept)))
    lowest = min(0.0, *(row["v"] for row in rows)) if rows else 0.0

    def axis(angle: float) -> alt.Axis:
        return alt.Axis(
            labelExpr=f"{listed}[datum.value]",
            labelAngle=angle,
            labelOverlap="greedy",
            labelFontSize=10.5,
            ticks=False,
            title=None,
        )

    legend = alt.Legend(title="cosine", gradientLength=min(side, 240))
    chart: alt.Chart = (
        alt.Chart(table(rows), width=side, height=side)
        .transform_calculate(one=f"{listed}[datum.a]", other=f"{listed}[datum.b]")
        .mark_rect()
        .encode(
            x=alt.X("b:O", axis=axis(-90)),
            y=alt.Y("a:O", axis=axis(0)),
            color=alt.Color("v:Q", scale=alt.Scale(scheme="viridis", domain=[lowest, 1.0]), legend=legend),
            tooltip=[
                alt.Tooltip("one:N", title="state before"),
                alt.Tooltip("other:N", title="other state before"),
                alt.Tooltip("v:Q", title="cosine", format=".4f"),
            ],
        )
    )
    return chart


def distributions(samples: Mapping[str, Sequence[float]], end: float) -> alt.TopLevelMixin:
    """Draw the distribution of each variant's latency, one below the other on the same axis.

    Args:
        samples: latencies in milliseconds, by variant.
        end: upper end of the axis in milliseconds; slower samples are not drawn.
    """
    start = min(min(values) for values in samples.values())
    edges = np.linspace(start, end, BINS + 1)
    width = WIDTH - 130
    panels = [
        _distribution(name, values, edges, width, index == len(samples) - 1)
        for index, (name, values) in enumerate(samples.items())
    ]
    return alt.vconcat(*panels, spacing=10)


def _distribution(
    name: str, values: Sequence[float], edges: np.ndarray[Any, np.dtype[Any]], width: float, last: bool
) -> Any:
    counts, _ = np.histogram(values, edges)
    rows = [
        {"from": round(left, 5), "to": round(right, 5), "n": int(count)}
        for left, right, count in zip(edges[:-1].tolist(), edges[1:].tolist(), counts.tolist(), strict=True)
        if count
    ]
    axis = alt.Axis(title="ms" if last else None, labels=last, ticks=last, domain=last, tickCount=10)
    x = alt.X(
        "from:Q", bin="binned", scale=alt.Scale(domain=[float(edges[0]), float(edges[-1])], nice=False), axis=axis
    )
    bare = alt.Axis(labels=False, ticks=False, grid=False, domain=False, titleAngle=0, titleAlign="right", titleY=32)
    y = alt.Y("n:Q", title=name, axis=bare)
    tips = [
        alt.Tooltip("from:Q", title="from, ms", format=".3f"),
        alt.Tooltip("to:Q", title="to, ms", format=".3f"),
        alt.Tooltip("n:Q", title="runs"),
    ]
    middle = [{"median": float(np.median(values)), "name": name}]
    rule = alt.Chart(table(middle)).encode(x="median:Q", tooltip=["name:N", alt.Tooltip("median:Q", format=".3f")])
    text = rule.mark_text(align="left", dx=5, y=8, color=INK, fontWeight=600, fontSize=11.5)
    return alt.layer(
        alt.Chart(table(rows)).mark_bar(color=ACCENT, opacity=0.8).encode(x=x, x2="to:Q", y=y, tooltip=tips),
        rule.mark_rule(color=INK, strokeWidth=1.5),
        text.encode(text=alt.Text("median:Q", format=".2f")),
    ).properties(width=width, height=56)


def _interval(title: str, form: str) -> Iterator[alt.Tooltip]:
    yield alt.Tooltip("value:Q", title=title, format=form)
    yield alt.Tooltip("low:Q", title="95 % from", format=form)
    yield alt.Tooltip("high:Q", title="95 % to", format=form)


def _above() -> alt.Legend:
    """Return a legend in one line above the chart."""
    return alt.Legend(orient="top", direction="horizontal", symbolType="square", offset=12)
