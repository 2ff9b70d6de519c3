"""The results of `compressor inspect`: a table of sites, a JSON file and a heat map of the trunk states."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compressor.limitations import Limitation
from compressor.quality.intervals import format_count
from compressor.search.site_evidence import nested, state_names
from compressor.workspace.json_files import json_text
from compressor.workspace.output_folder import write_files

if TYPE_CHECKING:
    from rich.table import Table

    from compressor.study.study import Study
    from passes.analysis.counted_cost import SiteCosts
    from passes.analysis.redundancy import Scores
    from passes.graph.graph import Site


@dataclass(frozen=True)
class Inspection:
    """The scores and costs of every site.

    Attributes:
        effects: the output divergence when each site is dropped alone; None if not measured.
        study: redundancy by depth, position and kind of token; None if not measured.
        at_ends: whether pairs of states were compared only at the last token of each text. Sites and blocks are always
            compared at all tokens.
        limitations: those of the model and the data.
    """

    model: str
    sites: tuple[Site, ...]
    scores: Scores
    costs: SiteCosts
    data: dict[str, Any]
    effects: Sequence[float] | None = None
    study: Study | None = None
    at_ends: bool = False
    limitations: tuple[Limitation, ...] = ()

    def __repr__(self) -> str:
        """Return one line; the scores are matrices."""
        return f"Inspection(model={self.model!r}, sites={len(self.sites)}, samples={self.scores.samples})"

    def rows(self) -> list[dict[str, Any]]:
        """Return one plain dict per site, in order."""
        rows = []
        for index, site in enumerate(self.sites):
            saved = self.costs.saved(site)
            rows.append(
                {
                    "name": site.name,
                    "kind": site.kind,
                    "block": site.block,
                    "width": site.width,
                    "cosine": self.scores.cosine(site.name),
                    "angular": self.scores.sites[site.name].mean("angular"),
                    "update": self.scores.update(site.name),
                    "effect": None if self.effects is None else self.effects[index],
                    "parameters": saved.parameters,
                    "multiply_adds": saved.multiply_adds,
                }
            )
        return rows

    def to_json(self) -> str:
        """Return the inspection as indented JSON; NaN (states of different shapes) becomes null."""
        total = self.costs.total
        content = {
            "model": self.model,
            "data": self.data,
            "samples": self.scores.samples,
            "parameters": total.parameters,
            "multiply_adds": total.multiply_adds,
            "sites": self.rows(),
            "blocks": {
                name: {"influence": self.scores.influence(name), "update": self.scores.update(name)}
                for name in self.scores.blocks
            },
            "states": list(self.state_names()),
            "limitations": [asdict(limitation) for limitation in self.limitations],
            "similarity_over": "last tokens of texts" if self.at_ends else "all tokens",
            "similarity": nested(self.scores.similarity_matrix().tolist()),
            "angular_distance": nested(self.scores.angular_matrix().tolist()),
        }
        return json_text(_finite(content))

    def state_names(self) -> tuple[str, ...]:
        """Return a readable name per trunk state: the site it enters, or the output for the last state."""
        return state_names(self.sites, self.scores)

    def table(self) -> Table:
        """Return the sites as a table: scores, parameters, multiply-adds (MACs) per sample and their share."""
        from rich.box import SIMPLE_HEAD
        from rich.markup import escape
        from rich.table import Table

        total = self.costs.total
        title = f"{escape(self.model)}: {len(self.sites)} sites, {format_count(total.parameters)} parameters, "
        table = Table(
            title=f"{title}{format_count(total.multiply_adds)} multiply-adds per sample",
            title_justify="left",
            caption=f"scores are means over {self.scores.samples} calibration samples",
            caption_justify="left",
            box=SIMPLE_HEAD,
            padding=0,
            pad_edge=False,
        )
        table.add_column("site", overflow="fold", min_width=16)
        table.add_column("kind", no_wrap=True)
        effects = ("effect",) if self.effects is not None else ()
        for heading in ("cosine", "angular", "update", *effects, "params", "MACs", "share"):
            table.add_column(heading, justify="right", no_wrap=True)
        for row in self.rows():
            effect = () if row["effect"] is None else (f"{row['effect']:.4f}",)
            share = f"{row['multiply_adds'] / max(total.multiply_adds, 1):.1%}"
            numbers = (_number(row["cosine"], 4), _number(row["angular"], 4), _number(row["update"], 3), *effect)
            table.add_row(
                escape(row["name"]),
                row["kind"],
                *numbers,
                format_count(row["parameters"]),
                format_count(row["multiply_adds"]),
                share,
            )
        return table

    def save(self, folder: Path, *, command: str = "") -> tuple[Path, ...]:
        """Write inspect.json and similarity.png, and study.json and study.html if there is a study; return the paths.

        Args:
            folder: the output folder; created if it does not exist.
            command: the command line, shown on the page of the study.

        Raises:
            FolderError: the folder cannot be written, or the disk is full; no file is written then.
        """
        files = {"inspect.json": self.to_json().encode(), "similarity.png": self.heat_map()}
        if self.study is not None:
            from compressor.report.pages.study_page import page

            files["study.json"] = self.study.to_json().encode()
            files["study.html"] = page(self.study, command=command).to_html().encode(errors="backslashreplace")
        return write_files(folder, files)

    def heat_map(self) -> bytes:
        """Return the cosine similarity of every pair of trunk states as a PNG heat map."""
        from matplotlib.figure import Figure

        names = self.state_names()
        size = min(max(4.0, 0.28 * len(names)), 24.0)
        figure = Figure(figsize=(size + 1.5, size), layout="constrained")
        axes = figure.add_subplot()
        matrix = self.scores.similarity_matrix().numpy()
        measured = matrix[np.isfinite(matrix)]
        lowest = min(0.0, float(measured.min())) if measured.size else 0.0
        image = axes.imshow(matrix, vmin=lowest, vmax=1.0, cmap="viridis")
        plain: dict[str, Any] = {"fontsize": 7, "parse_math": False}  # a name may hold $
        axes.set_xticks(range(len(names)), names, rotation=90, **plain)
        axes.set_yticks(range(len(names)), names, **plain)
        where = ", at last tokens" if self.at_ends else ""
        title = f"{self.model}\ncosine similarity of trunk states{where}"
        axes.set_title(title, fontsize=9, parse_math=False)
        figure.colorbar(image, ax=axes, shrink=0.8)
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=120)
        return picture.getvalue()


def _number(value: float, digits: int) -> str:
    """Format a number; a dash for NaN, the score of a site whose states have different shapes."""
    return f"{value:.{digits}f}" if math.isfinite(value) else "-"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
