"""What `compressor inspect` shows: a table of sites, a JSON file, a heat map of the trunk's states."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from rich.table import Table

    from passes.cost import Costs
    from passes.graph import Site
    from passes.score import Scores


@dataclass(frozen=True)
class Inspection:
    """Scores and costs of every site. `effects` is each site's output divergence when dropped alone, if measured."""

    model: str
    sites: tuple[Site, ...]
    scores: Scores
    costs: Costs
    data: dict[str, Any]
    effects: Sequence[float] | None = None

    def rows(self) -> list[dict[str, Any]]:
        """One plain dict per site, in order."""
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
        """Everything as indented JSON; NaN (states of different shape) as null."""
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
            "similarity": _nested(self.scores.similarity_matrix().tolist()),
            "angular_distance": _nested(self.scores.angular_matrix().tolist()),
        }
        return json.dumps(_finite(content), indent=2) + "\n"

    def state_names(self) -> tuple[str, ...]:
        """A readable name per trunk state: the site it enters, then the output of the last."""
        entered: dict[str, str] = {}
        for site in self.sites:
            entered.setdefault(site.trunk, site.name)
        return tuple(entered.get(state, "output") for state in self.scores.states)

    def table(self) -> Table:
        """The sites for a terminal; the most redundant by cosine in each kind stand out."""
        from rich.table import Table

        total = self.costs.total
        title = f"{self.model}: {len(self.sites)} sites, {total.parameters / 1e6:.2f} M parameters, "
        table = Table(title=f"{title}{total.multiply_adds / 1e9:.3f} G multiply-adds", title_justify="left")
        table.add_column("site", no_wrap=True)
        table.add_column("kind")
        for heading in (
            "cosine",
            "angular",
            "update",
            *(("effect",) if self.effects is not None else ()),
            "parameters",
        ):
            table.add_column(heading, justify="right")
        table.add_column("multiply-adds", justify="right")
        for row in self.rows():
            effect = () if row["effect"] is None else (f"{row['effect']:.4f}",)
            share = row["multiply_adds"] / max(total.multiply_adds, 1)
            numbers = (f"{row['cosine']:.4f}", f"{row['angular']:.4f}", f"{row['update']:.3f}", *effect)
            cost = (f"{row['parameters'] / 1e3:.0f} k", f"{row['multiply_adds'] / 1e6:.1f} M ({share:.1%})")
            table.add_row(row["name"], row["kind"], *numbers, *cost)
        return table

    def save(self, folder: Path) -> tuple[Path, Path]:
        """Write inspect.json and similarity.png into a folder; returns their paths."""
        folder.mkdir(parents=True, exist_ok=True)
        report, picture = folder / "inspect.json", folder / "similarity.png"
        report.write_text(self.to_json())
        self.heat_map(picture)
        return report, picture

    def heat_map(self, path: Path) -> None:
        """Draw the cosine similarity of every pair of trunk states."""
        from matplotlib.figure import Figure

        names = self.state_names()
        size = min(max(4.0, 0.28 * len(names)), 24.0)
        figure = Figure(figsize=(size + 1.5, size), layout="constrained")
        axes = figure.add_subplot()
        matrix = self.scores.similarity_matrix().numpy()
        lowest = min(0.0, float(np.nanmin(matrix)))
        image = axes.imshow(matrix, vmin=lowest, vmax=1.0, cmap="viridis")
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
        axes.set_yticks(range(len(names)), names, fontsize=7)
        axes.set_title(f"{self.model}: cosine similarity of trunk states")
        figure.colorbar(image, ax=axes, shrink=0.8)
        figure.savefig(path, dpi=120)


def _nested(rows: list[list[float]]) -> list[list[float | None]]:
    return [[None if math.isnan(value) else value for value in row] for row in rows]


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
