"""Draw docs/images/imports.svg: which package imports which, from the imports themselves.

    python docs/scripts/imports_picture.py

An arrow that follows from others is left out: where a imports b and b imports c, a may import c as well. `layout`
places packages in rows (each above those it imports) and orders the rows by barycentres (Sugiyama et al. 1981); an
arrow that spans several rows passes each of them at a bend of its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path

import grimp

PICTURE = Path(__file__).parents[1] / "images" / "imports.svg"
# Package: title, left edge, top edge and width of its panel, all in px.
PANELS = {
    "compressor": ("compressor: what a user touches", 20, 20, 520),
    "passes": ("passes: an fx graph in, an fx graph out", 590, 20, 420),
    "runtimes": ("runtimes: an ONNX file in, an engine out", 590, 447, 420),
}
ROW, BOX, BAND, BEND = 46, 24, 16, 12  # px: row to row, height of a box, around a panel's contents, width of a bend
SWEEPS = 12

Node = tuple[str, ...]  # a package, or (importing, imported, row) for a bend
Edges = Mapping[str, set[str]]


def imports_between_packages() -> dict[str, set[str]]:
    """Return the sub-packages (and modules beside them) that each one imports, type-checking imports included."""
    graph = grimp.build_graph(*PANELS, cache_dir=None)
    edges: dict[str, set[str]] = {}
    for module in sorted(graph.modules):
        package = _package(module)
        for imported in graph.find_modules_directly_imported_by(module):
            if package != _package(imported):
                edges.setdefault(package, set()).add(_package(imported))
    return edges


def _package(module: str) -> str:
    return ".".join(module.split(".")[:2])


def within(edges: Edges, top: str) -> dict[str, set[str]]:
    """Return the imports between the sub-packages of one package, without those that follow from others."""
    inner = {
        name: {other for other in found if other.startswith(f"{top}.")}
        for name, found in edges.items()
        if name.startswith(f"{top}.") and not name.endswith("__main__")
    }
    return {
        name: {
            other
            for other in found
            if not any(other in reachable(inner, between) for between in found if between != other)
        }
        for name, found in inner.items()
    }


def reachable(edges: Edges, start: str) -> set[str]:
    """Return all that `start` imports, directly or not."""
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        new = edges.get(waiting.pop(), set()) - seen
        seen |= new
        waiting += sorted(new)
    return seen


def rows_of(edges: Edges) -> dict[str, int]:
    """Return the row of each package, counted from below: one above the highest that it imports."""
    names = sorted({*edges, *(name for found in edges.values() for name in found)})
    rows: dict[str, int] = {}

    def row(name: str) -> int:
        if name not in rows:
            rows[name] = 1 + max((row(other) for other in edges.get(name, ())), default=-1)
        return rows[name]

    return {name: row(name) for name in names}


def layout(edges: Edges) -> tuple[list[list[Node]], list[tuple[Node, Node]]]:
    """Return the rows from below, each with its packages and bends in order, and the pieces of the arrows."""
    row = rows_of(edges)
    levels: list[list[Node]] = [[] for _ in range(max(row.values()) + 1)]
    for name in sorted(row):
        levels[row[name]].append((name,))
    pieces: list[tuple[Node, Node]] = []
    for name in sorted(edges):
        for other in sorted(edges[name]):
            bends: list[Node] = [(name, other, str(level)) for level in range(row[other] + 1, row[name])]
            for level, bend in enumerate(bends, start=row[other] + 1):
                levels[level].append(bend)
            path = [(other,), *bends, (name,)]
            pieces += [(upper, lower) for lower, upper in itertools.pairwise(path)]
    for sweep in range(SWEEPS):
        for number in range(len(levels)) if sweep % 2 else reversed(range(len(levels))):
            places = {node: place / len(level) for level in levels for place, node in enumerate(level)}
            around = {node: [*_neighbours(node, pieces)] for node in levels[number]}
            levels[number].sort(
                key=lambda node: sum(places[other] for other in around[node]) / max(len(around[node]), 1)
            )
    return levels, pieces


def _neighbours(node: Node, pieces: Iterable[tuple[Node, Node]]) -> Iterable[Node]:
    for upper, lower in pieces:
        if node in (upper, lower):
            yield lower if node == upper else upper


def panel(edges: Edges, top: str) -> tuple[list[str], int]:
    """Return the lines of SVG of one package, and the height of its panel in px."""
    title, left, upper, width = PANELS[top]
    levels, pieces = layout(within(edges, top))
    height = ROW * len(levels) + 3 * BAND
    spots: dict[Node, tuple[float, float]] = {}
    boxes: list[str] = []
    for number, level in enumerate(levels):
        y = upper + 3 * BAND + ROW * (len(levels) - 1 - number) + BOX / 2
        sizes = [_width(node) for node in level]
        gap = (width - 2 * BAND - sum(sizes)) / (len(level) + 1)
        x = left + BAND + gap
        for node, size in zip(level, sizes, strict=True):
            spots[node] = (x + size / 2, y)
            if len(node) == 1:
                boxes.append(
                    f'<rect class="box" x="{x:.0f}" y="{y - BOX / 2:.0f}" width="{size}" height="{BOX}" rx="4"/>'
                )
                boxes.append(f'<text x="{x + size / 2:.0f}" y="{y + 4:.0f}">{escape(node[0].partition(".")[2])}</text>')
            x += size + gap
    arrows = [
        f'<line x1="{spots[a][0]:.0f}" y1="{spots[a][1] + _half(a):.0f}" x2="{spots[b][0]:.0f}" '
        f'y2="{spots[b][1] - _half(b):.0f}"{" marker-end=" + chr(34) + "url(#tip)" + chr(34) if len(b) == 1 else ""}/>'
        for a, b in pieces
    ]
    frame = f'<rect class="panel" x="{left}" y="{upper}" width="{width}" height="{height}" rx="8"/>'
    heading = f'<text class="title" x="{left + width / 2:.0f}" y="{upper + 24}">{escape(title)}</text>'
    return [frame, heading, *arrows, *boxes], height


def _width(node: Node) -> int:
    return 18 + 7 * len(node[0].partition(".")[2]) if len(node) == 1 else BEND


def _half(node: Node) -> float:
    return BOX / 2 if len(node) == 1 else 0.0


def picture(edges: Edges) -> str:
    """Return the picture as SVG."""
    panels = {top: panel(edges, top) for top in PANELS}
    bottom = max(PANELS[top][2] + height for top, (_, height) in panels.items())
    right = max(left + width for _, left, _, width in PANELS.values())
    crossing = [_crossing(edges, top) for top in ("passes", "runtimes")]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {right + 20} {bottom + 20}" role="img">',
            "<title>Which package imports which; an arrow points to what is imported</title>",
            "<style>text{font:12px sans-serif;text-anchor:middle;fill:#1f2328}.title{font-weight:bold;font-size:13px}"
            ".box{fill:#fff;stroke:#57606a}.panel{fill:#f6f8fa;stroke:#d0d7de}line{stroke:#8c959f}"
            ".wide{stroke:#0969da;stroke-width:3}</style>",
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="9" markerHeight="9" '
            'markerUnits="userSpaceOnUse" orient="auto"><path d="M0 0 8 4 0 8z" fill="#57606a"/></marker></defs>',
            f'<rect width="{right + 20}" height="{bottom + 20}" fill="#fff"/>',
            *(line for lines, _ in panels.values() for line in lines),
            *crossing,
            "</svg>\n",
        ]
    )


def _crossing(edges: Edges, top: str) -> str:
    """Return the arrow from compressor to another package; there must be none back, and none between those two."""
    backwards = {name for name in edges if name.startswith(top) for other in edges[name] if not other.startswith(top)}
    if backwards:
        raise SystemExit(f"{min(backwards)} imports another package than its own; expected {top} to import none.")
    _, left, upper, _ = PANELS[top]
    _, start, _, width = PANELS["compressor"]
    ends = f'x1="{start + width}" y1="{upper + 60}" x2="{left}" y2="{upper + 60}"'
    return f'<line class="wide" {ends} marker-end="url(#tip)"/>'


if __name__ == "__main__":
    PICTURE.write_text(picture(imports_between_packages()))
