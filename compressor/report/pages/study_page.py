"""study.html: the charts and tables of a study, on the page that `compressor.report.pages.html_page` makes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from compressor.report.pages.html_page import CATEGORIES, WIDTH, Chart, Page, Points, Prose, Section, Table, Tile
from compressor.study.dataset_agreement import short
from compressor.study.findings import cosine, mean_by_kind, mean_by_position

if TYPE_CHECKING:
    import altair

    from compressor.study.study import Study

Row = Mapping[str, Any]

BINS = 64  # most positions that the heat map shows apart
HEIGHT = 260  # px


def page(study: Study, *, command: str = "") -> Page:
    """The page of a study.

    Args:
        study: what was found.
        command: what made it.
    """
    sites, blocks, states = study.site_rows(), study.block_rows(), study.state_rows()
    return Page(
        title=f"Redundancy study: {study.model}",
        lead=[
            f"{len(sites)} residual branches, measured on {study.samples} calibration samples "
            f"({study.data['reading']}). Cosine: of a token's state before a branch and after it; 1 means unchanged."
        ],
        tiles=list(_tiles(study, sites)),
        sections=[
            Section("In short", [Points(study.summary())]),
            *_depth(study, sites, blocks),
            *_tokens(study, sites),
            *_norms(sites, states),
            *_stability(study),
            *_agreements(study),
            Section("All branches", [_table(sites)]),
        ],
        command=command,
    )


def _tiles(study: Study, sites: Sequence[Row]) -> Iterator[Tile]:
    known = sorted((row for row in sites if row["cosine"] is not None), key=lambda row: row["cosine"])
    if known:
        yield Tile("least changing branch", cosine(known[-1]["cosine"]), known[-1]["name"])
        yield Tile("most changing branch", cosine(known[0]["cosine"]), known[0]["name"])
    if study.stability is not None:
        half = study.stability.halves
        yield Tile("halves agree (Spearman)", f"{half.spearman:.3f}", f"{half.low:.3f} to {half.high:.3f}")
    ratios = [row["ratio_most"] for row in study.state_rows()]
    yield Tile("largest activation", f"{max(ratios):.0f}x", "times the median of its sample")


def _depth(study: Study, sites: Sequence[Row], blocks: Sequence[Row]) -> Iterator[Section]:
    rows = [
        {"place": place, "name": row["name"], "of": row["kind"], "cosine": row["cosine"], "update": row["update"]}
        for place, row in enumerate(sites)
        if row["cosine"] is not None
    ]
    last = {row["block"]: place for place, row in enumerate(sites)}
    rows += [
        {
            "place": last[row["name"]],
            "name": row["name"],
            "of": "block",
            "cosine": row["cosine"],
            "update": row["update"],
        }
        for row in blocks
        if row["cosine"] is not None
    ]
    if not rows:
        return
    chart = _lines(rows, "place", "branch, in order of depth", "cosine", "cosine of before and after", "of", "what")
    yield Section(
        "Over depth: attention, MLP and block",
        [Chart(chart, f"Cosine of before and after for {len(rows)} branches and blocks of {study.model} over depth.")],
    )


def _tokens(study: Study, sites: Sequence[Row]) -> Iterator[Section]:
    kinds = [kind for kind in study.found.kinds if any(kind in row["kinds"] for row in sites)]
    parts: list[Any] = []
    if len(kinds) > 1:
        rows = [
            {"place": place, "name": row["name"], "of": kind, "cosine": row["kinds"][kind]["cosine"]}
            for place, row in enumerate(sites)
            for kind in kinds
            if kind in row["kinds"]
        ]
        chart = _lines(
            rows, "place", "branch, in order of depth", "cosine", "cosine of before and after", "of", "token"
        )
        parts.append(Chart(chart, f"Cosine by kind of token ({', '.join(kinds)}) over depth."))
        means = [mean_by_kind(sites, kinds, name) for name in ("cosine", "update", "norm")]
        table = [[kind, *(f"{each[kind]:.4g}" for each in means)] for kind in kinds]
        headings = ("token", "cosine", "relative update", "norm of the update")
        parts.append(Table(headings, table, "Means over all branches."))
    cells = list(_cells(sites))
    if len({cell["position"] for cell in cells}) > 2:
        parts.append(Chart(_heat(cells), "Cosine by position and branch.", _said(sites)))
    if parts:
        yield Section("Per token: kind and position", parts)


def _said(sites: Sequence[Row]) -> str:
    longest = max(len(row["positions"]["tokens"]) for row in sites)
    shown = f"in bins of {-(-longest // BINS)}" if longest > BINS else "one by one"
    return f"{len(mean_by_position(sites))} positions, {shown}; position 0 is the first token. Darker: changed more."


def _cells(sites: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """The heat map's cells: mean cosine of each branch over a bin of positions."""
    longest = max(len(row["positions"]["tokens"]) for row in sites)
    width = -(-longest // BINS)
    for row in sites:
        tokens, cosines = row["positions"]["tokens"], row["positions"]["cosine"]
        starts = [0, *range(1, len(tokens), width)]  # the first token stands apart: it is another kind
        for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
            count = sum(tokens[start:end])
            if count:
                pairs = zip(tokens[start:end], cosines[start:end], strict=True)
                total = sum(many * value for many, value in pairs if value is not None)
                yield {"name": row["name"], "position": start, "cosine": total / count}


def _norms(sites: Sequence[Row], states: Sequence[Row]) -> Iterator[Section]:
    kinds = sorted({kind for row in states for kind in row["kinds"]})
    trunk = [
        {"place": place, "name": f"before {row['name']}", "of": kind, "norm": row["kinds"][kind]}
        for place, row in enumerate(states)
        for kind in kinds
        if row["kinds"].get(kind)
    ]
    branch = [
        {"place": place, "name": row["name"], "of": row["kind"], "update": row["update"]}
        for place, row in enumerate(sites)
        if row["update"] is not None
    ]
    largest = [
        {"place": place, "name": f"before {row['name']}", "of": name, "ratio": max(row[key], 1.0)}
        for place, row in enumerate(states)
        for key, name in (("ratio", "median sample"), ("ratio_most", "largest sample"))
    ]
    yield Section(
        "Norms and massive activations",
        [
            Chart(
                _lines(trunk, "place", "trunk state, in order of depth", "norm", "mean norm", "of", "token", log=True),
                "Mean norm of the trunk over depth, by kind of token.",
            ),
            Chart(
                _lines(
                    branch, "place", "branch, in order of depth", "update", "|f(x)| / |x|", "of", "branch", log=True
                ),
                "Norm of each branch's update, relative to the trunk.",
            ),
            Chart(
                _lines(
                    largest,
                    "place",
                    "trunk state, in order of depth",
                    "ratio",
                    "largest / median",
                    "of",
                    "over",
                    log=True,
                ),
                "Largest activation over the median of its sample, over depth.",
                "Massive activations (Sun et al. 2024) are above 100 and a thousand times the median.",
            ),
        ],
    )


def _stability(study: Study) -> Iterator[Section]:
    found = study.stability
    if found is None:
        yield Section("How stable the ranking is", [Prose("Too few samples or branches to tell.")])
        return
    rows = [
        [
            f"{each.samples} against all",
            f"{each.spearman:.3f}",
            f"{each.low:.3f} to {each.high:.3f}",
            f"{each.kendall:.3f}",
        ]
        for each in found.sizes
    ]
    half = found.halves
    rows.insert(
        0,
        [
            f"{half.samples} against {half.samples} others",
            f"{half.spearman:.3f}",
            f"{half.low:.3f} to {half.high:.3f}",
            f"{half.kendall:.3f}",
        ],
    )
    ranks = [
        {"name": site.name, "rank": rank, "low": low, "high": high, "of": site.kind}
        for site, (rank, low, high) in zip(study.sites, found.ranks, strict=True)
    ]
    yield Section(
        "How stable the ranking is",
        [
            Table(
                ("samples", "Spearman", "5 to 95 %", "Kendall"),
                rows,
                "Rankings by mean cosine. Smaller draws are part of all samples, halves share none.",
            ),
            Chart(
                _ranks(ranks),
                "Rank of each branch with its range over bootstrap draws.",
                f"Rank 1 changes the stream least; bars span 5 to 95 % of bootstrap draws, of which {found.kept:.0%} "
                f"have the same {found.top} in front.",
            ),
        ],
    )


def _agreements(study: Study) -> Iterator[Section]:
    rows = [
        [
            f"{short(each.first)} and {short(each.second)}",
            f"{each.spearman:.3f}",
            f"{each.low:.3f} to {each.high:.3f}",
            f"{each.kendall:.3f}",
            f"{each.mixed:.3f}, 95 % above {each.floor:.3f}",
            ", ".join(f"{same} of {count}" for count, same in each.shared.items()),
        ]
        for each in study.agreements
    ]
    if rows:
        headings = ("data", "Spearman", "5 to 95 %", "Kendall", "mixed", "most redundant the same")
        note = "Rankings by mean cosine. Mixed: Spearman of two heaps, with samples of both in each."
        yield Section("Whether other data rank alike", [Table(headings, rows, note)])


def _table(sites: Sequence[Row]) -> Table:
    rows = [
        [
            row["name"],
            row["kind"],
            *("–" if row[name] is None else f"{row[name]:.4g}" for name in ("cosine", "update", "norm")),
            "–" if row["rank"] is None else (str(row["rank"]["value"]), f"{row['rank']['low']}–{row['rank']['high']}"),
        ]
        for row in sites
    ]
    return Table(("branch", "kind", "cosine", "relative update", "norm of the update", "rank"), rows, words=("kind",))


def _lines(
    rows: Sequence[Row],
    x: str,
    x_title: str,
    y: str,
    y_title: str,
    colour: str,
    colour_title: str,
    *,
    log: bool = False,
) -> altair.TopLevelMixin:
    """A line with points for each colour; hovering names the branch."""
    import altair as alt

    data = alt.InlineData(list(rows))
    scale = alt.Scale(type="log", nice=False) if log else alt.Scale(zero=False)
    chart: altair.TopLevelMixin = (
        alt.Chart(data)
        .mark_line(point=True)
        .encode(
            x=alt.X(f"{x}:Q", title=x_title, axis=alt.Axis(format="d", tickMinStep=1)),
            y=alt.Y(f"{y}:Q", title=y_title, scale=scale),
            color=alt.Color(f"{colour}:N", title=colour_title, scale=alt.Scale(range=list(CATEGORIES))),
            tooltip=[alt.Tooltip("name:N"), alt.Tooltip(f"{colour}:N"), alt.Tooltip(f"{y}:Q", format=".4f")],
        )
        .properties(width=WIDTH - 220, height=HEIGHT)
    )
    return chart


def _heat(cells: Sequence[Row]) -> altair.TopLevelMixin:
    """Positions across, branches down, in order of depth."""
    import altair as alt

    names = list(dict.fromkeys(cell["name"] for cell in cells))
    chart: altair.TopLevelMixin = (
        alt.Chart(alt.InlineData(list(cells)))
        .mark_rect()
        .encode(
            x=alt.X("position:O", title="position", axis=alt.Axis(labelOverlap=True, labelAngle=0)),
            y=alt.Y("name:N", sort=names, title=None),
            color=alt.Color("cosine:Q", title="cosine", scale=alt.Scale(scheme="viridis")),
            tooltip=[alt.Tooltip("name:N"), alt.Tooltip("position:O"), alt.Tooltip("cosine:Q", format=".4f")],
        )
        .properties(width=WIDTH - 300, height=max(120, 14 * len(names)))
    )
    return chart


def _ranks(rows: Sequence[Row]) -> altair.TopLevelMixin:
    """A point for each branch's rank and a bar for its range, in order of depth."""
    import altair as alt

    names = [row["name"] for row in rows]
    base = alt.Chart(alt.InlineData(list(rows))).encode(
        y=alt.Y("name:N", sort=names, title=None),
        color=alt.Color("of:N", title="branch", scale=alt.Scale(range=list(CATEGORIES))),
        tooltip=[
            alt.Tooltip(f"{name}:{kind}") for name, kind in (("name", "N"), ("rank", "Q"), ("low", "Q"), ("high", "Q"))
        ],
    )
    bars = base.mark_bar(height=4, opacity=0.5).encode(
        x=alt.X("low:Q", title="rank", axis=alt.Axis(format="d", tickMinStep=1)), x2="high:Q"
    )
    chart: altair.TopLevelMixin = (bars + base.mark_circle(size=60, opacity=1).encode(x="rank:Q")).properties(
        width=WIDTH - 300, height=max(120, 14 * len(names))
    )
    return chart
