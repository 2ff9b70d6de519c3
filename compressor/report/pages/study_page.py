"""The page of a study, study.html, with its charts and tables."""

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

BINS = 64  # maximum number of positions or bins of positions in the heat map
HEIGHT = 260  # px, height of a line chart


def page(study: Study, *, command: str = "") -> Page:
    """Return the page of a study.

    Args:
        study: the study.
        command: the command line that was run.
    """
    sites, blocks, states = study.site_rows(), study.block_rows(), study.state_rows()
    return Page(
        title=f"Redundancy study: {study.model}",
        lead=[
            f"{len(sites)} residual branches, measured on {study.samples} calibration samples "
            f"({study.data['reading']}). Cosine: similarity of a token's state before and after a branch; 1 means "
            "unchanged."
        ],
        tiles=list(_tiles(study, sites)),
        sections=[
            Section("Summary", [Points(study.summary())]),
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
    ranked = sorted((row for row in sites if row["cosine"] is not None), key=lambda row: row["cosine"])
    if ranked:
        yield Tile("branch with the smallest change", cosine(ranked[-1]["cosine"]), ranked[-1]["name"])
        yield Tile("branch with the largest change", cosine(ranked[0]["cosine"]), ranked[0]["name"])
    if study.stability is not None:
        half = study.stability.halves
        yield Tile("agreement of halves (Spearman)", f"{half.spearman:.3f}", f"{half.low:.3f} to {half.high:.3f}")
    ratios = [row["ratio_most"] for row in study.state_rows()]
    yield Tile("largest activation", f"{max(ratios):.0f}x", "times the median of its sample")


def _depth(study: Study, sites: Sequence[Row], blocks: Sequence[Row]) -> Iterator[Section]:
    rows = [
        {"place": index, "name": row["name"], "of": row["kind"], "cosine": row["cosine"], "update": row["update"]}
        for index, row in enumerate(sites)
        if row["cosine"] is not None
    ]
    last = {row["block"]: index for index, row in enumerate(sites)}
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
    chart = _lines(rows, "place", "branch, in order of depth", "cosine", "cosine of input and output", "of", "part")
    yield Section(
        "Over depth: attention, MLP and block",
        [Chart(chart, f"Cosine of input and output of {len(rows)} branches and blocks of {study.model} over depth.")],
    )


def _tokens(study: Study, sites: Sequence[Row]) -> Iterator[Section]:
    kinds = [kind for kind in study.found.kinds if any(kind in row["kinds"] for row in sites)]
    parts: list[Any] = []
    if len(kinds) > 1:
        rows = [
            {"place": index, "name": row["name"], "of": kind, "cosine": row["kinds"][kind]["cosine"]}
            for index, row in enumerate(sites)
            for kind in kinds
            if kind in row["kinds"]
        ]
        chart = _lines(
            rows, "place", "branch, in order of depth", "cosine", "cosine of input and output", "of", "token"
        )
        parts.append(Chart(chart, f"Cosine by kind of token ({', '.join(kinds)}) over depth."))
        means = [mean_by_kind(sites, kinds, name) for name in ("cosine", "update", "norm")]
        table = [[kind, *(f"{mean[kind]:.4g}" for mean in means)] for kind in kinds]
        headings = ("token", "cosine", "relative update", "norm of update")
        parts.append(Table(headings, table, "Means over all branches."))
    cells = list(_cells(sites))
    if len({cell["position"] for cell in cells}) > 2:
        parts.append(Chart(_heat(cells), "Cosine by position and branch.", _caption(sites)))
    if parts:
        yield Section("By token: kind and position", parts)


def _caption(sites: Sequence[Row]) -> str:
    longest = max(len(row["positions"]["tokens"]) for row in sites)
    bins = f" in bins of {-(-longest // BINS)}" if longest > BINS else ""
    return f"{len(mean_by_position(sites))} positions{bins}. Position 0 is the first token. Dark cells change more."


def _cells(sites: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """Yield the cells of the heat map: mean cosine of each branch over a bin of positions."""
    longest = max(len(row["positions"]["tokens"]) for row in sites)
    width = -(-longest // BINS)
    for row in sites:
        tokens, cosines = row["positions"]["tokens"], row["positions"]["cosine"]
        starts = [0, *range(1, len(tokens), width)]  # the first token has its own bin, as it is of another kind
        for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
            count = sum(tokens[start:end])
            if count:
                pairs = zip(tokens[start:end], cosines[start:end], strict=True)
                total = sum(number * value for number, value in pairs if value is not None)
                yield {"name": row["name"], "position": start, "cosine": total / count}


def _norms(sites: Sequence[Row], states: Sequence[Row]) -> Iterator[Section]:
    kinds = sorted({kind for row in states for kind in row["kinds"]})
    trunk = [
        {"place": index, "name": f"before {row['name']}", "of": kind, "norm": row["kinds"][kind]}
        for index, row in enumerate(states)
        for kind in kinds
        if row["kinds"].get(kind)
    ]
    branch = [
        {"place": index, "name": row["name"], "of": row["kind"], "update": row["update"]}
        for index, row in enumerate(sites)
        if row["update"] is not None
    ]
    largest = [
        {"place": index, "name": f"before {row['name']}", "of": name, "ratio": max(row[key], 1.0)}
        for index, row in enumerate(states)
        for key, name in (("ratio", "median sample"), ("ratio_most", "largest sample"))
    ]
    yield Section(
        "Norms and massive activations",
        [
            Chart(
                _lines(trunk, "place", "trunk state, in order of depth", "norm", "mean norm", "of", "token", log=True),
                "Mean norm of the trunk states over depth, by kind of token.",
            ),
            Chart(
                _lines(
                    branch, "place", "branch, in order of depth", "update", "|f(x)| / |x|", "of", "branch", log=True
                ),
                "Norm of each branch's update relative to the trunk state.",
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
                "Ratio of the largest activation to the median of its sample, over depth.",
                "Massive activations (Sun et al. 2024) are above 100 and above 1,000 times the median.",
            ),
        ],
    )


def _stability(study: Study) -> Iterator[Section]:
    stability = study.stability
    if stability is None:
        yield Section(
            "Stability of the ranking", [Prose("Not computed: too few samples or branches, or equal scores.")]
        )
        return
    rows = [
        [
            f"{part.samples} against all",
            f"{part.spearman:.3f}",
            f"{part.low:.3f} to {part.high:.3f}",
            f"{part.kendall:.3f}",
        ]
        for part in stability.sizes
    ]
    half = stability.halves
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
        for site, (rank, low, high) in zip(study.sites, stability.ranks, strict=True)
    ]
    yield Section(
        "Stability of the ranking",
        [
            Table(
                ("samples", "Spearman", "5 to 95 %", "Kendall"),
                rows,
                "Rankings by mean cosine. Smaller draws are subsets of all samples; the two halves are disjoint.",
            ),
            Chart(
                _ranks(ranks),
                "Rank of each branch with its range over bootstrap draws.",
                f"The branch of rank 1 changes the residual stream least. Bars span 5 to 95 % of bootstrap draws; "
                f"{stability.kept:.0%} of them have the same set of {stability.top} most redundant branches.",
            ),
        ],
    )


def _agreements(study: Study) -> Iterator[Section]:
    rows = [
        [
            f"{short(pair.first)} and {short(pair.second)}",
            f"{pair.spearman:.3f}",
            f"{pair.low:.3f} to {pair.high:.3f}",
            f"{pair.kendall:.3f}",
            f"{pair.mixed:.3f}, 95 % above {pair.floor:.3f}",
            ", ".join(f"{same} of {count}" for count, same in pair.shared.items()),
        ]
        for pair in study.agreements
    ]
    if rows:
        headings = ("data", "Spearman", "5 to 95 %", "Kendall", "mixtures", "shared most redundant")
        note = "Rankings by mean cosine. Mixtures: Spearman of two random mixtures of the samples of both data sets."
        yield Section("Agreement between data sets", [Table(headings, rows, note)])


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
    return Table(("branch", "kind", "cosine", "relative update", "norm of update", "rank"), rows, words=("kind",))


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
    """Draw a line with points for each value of `colour`; tooltips name the branch."""
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
    """Draw the heat map of cosines: positions in columns, branches in rows, in order of depth."""
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
    """Draw the rank of each branch as a point and its range as a bar, in order of depth."""
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
