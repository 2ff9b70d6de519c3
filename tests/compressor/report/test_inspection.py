"""Tests of an inspection: rows of scores and costs, JSON without NaN, heat map, and a table of 80 columns."""

import dataclasses
import io
import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

import compressor
from compressor import models
from compressor.quality.intervals import format_count
from compressor.report.inspection import Inspection


class Changing(torch.nn.Module):
    """Two sites of one width and, after a projection, a third of another width, whose states cannot be compared."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8), torch.nn.Linear(4, 4)
        self.narrow = torch.nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + torch.relu(self.a(x))
        x = self.narrow(x + torch.relu(self.b(x)))
        return x + torch.relu(self.c(x))


@pytest.fixture(scope="module")
def inspected() -> Inspection:
    return compressor.inspect(Changing(), example_inputs=torch.zeros(2, 8), data="random", metric="output")


def test_rows_hold_the_analytic_costs(inspected: Inspection) -> None:
    rows = inspected.rows()
    assert [row["parameters"] for row in rows] == [8 * 8 + 8, 8 * 8 + 8, 4 * 4 + 4]
    assert [row["multiply_adds"] for row in rows] == [64, 64, 16]
    assert all(row["effect"] >= 0.0 for row in rows)


def test_the_json_is_strict_and_pairs_of_different_shapes_are_null(inspected: Inspection) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    content = json.loads(inspected.to_json(), parse_constant=refuse)
    matrix = content["similarity"]
    assert len(matrix) == len(content["states"]) == len(matrix[0])
    assert all(row[index] == pytest.approx(1.0, abs=1e-6) for index, row in enumerate(matrix))  # float32 states
    assert matrix[0][-1] is None


def test_the_files_are_written_together(inspected: Inspection, tmp_path: Path) -> None:
    report, picture = inspected.save(tmp_path / "new" / "folder")
    assert json.loads(report.read_text())["sites"]
    with Image.open(picture) as image:
        assert image.format == "PNG"
        assert min(image.size) > 300
    assert sorted(path.name for path in report.parent.iterdir()) == ["inspect.json", "similarity.png"]


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits(inspected: Inspection, width: int) -> None:
    stream = io.StringIO()
    Console(file=stream, width=width).print(inspected.table())
    lines = stream.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert not any("…" in line for line in lines)
    assert all(any(site.name in line for line in lines) for site in inspected.sites)


def test_counts_are_abbreviated() -> None:
    assert [format_count(count) for count in (0, 999, 1_500, 86_000_000, 17_500_000_000)] == [
        "0",
        "999",
        "1.5k",
        "86M",
        "17.5G",
    ]


def test_an_original_at_chance_is_said_and_keeps_its_scores(tmp_path: Path) -> None:
    rows = np.load(models.SAMPLE / "digits.npz")
    wrong = tmp_path / "shifted.npz"
    names = dict(zip(("x", "y"), sorted(rows.files, key=lambda name: -rows[name].ndim), strict=True))
    np.savez(wrong, x=rows[names["x"]], y=(rows[names["y"]] + 1) % 10)
    inspected = compressor.inspect(data=wrong, samples=160)
    (doubt,) = [each for each in inspected.limitations if each.feature == "quality of the original"]
    assert doubt.reason.startswith("sample has an accuracy of ")
    assert doubt.reason.endswith("The scores use no labels; an export or a sweep stops here")
    assert inspected.rows()
    right = compressor.inspect(samples=160)
    assert not [each for each in right.limitations if each.feature == "quality of the original"]


def test_a_name_is_neither_markup_nor_a_formula(inspected: Inspection, monkeypatch: pytest.MonkeyPatch) -> None:
    name = r"[red]x[/red] [/] $\nothing{$"
    named = dataclasses.replace(inspected, model=name)
    states, rows = len(inspected.state_names()), [row | {"name": name} for row in inspected.rows()]
    monkeypatch.setattr(Inspection, "state_names", lambda _: (name,) * states)
    monkeypatch.setattr(Inspection, "rows", lambda _: rows)
    assert named.heat_map().startswith(b"\x89PNG")
    stream = io.StringIO()
    Console(file=stream, width=200).print(named.table())
    assert stream.getvalue().count(name) == 1 + len(inspected.sites)


def test_a_result_is_pickled_and_printed_in_one_line(inspected: Inspection) -> None:
    """A notebook prints it, and a process of a pool returns it; the traced graph is no part of it."""
    again = pickle.loads(pickle.dumps(inspected))
    assert again.rows() == inspected.rows()
    assert again.to_json() == inspected.to_json()
    assert re.fullmatch(r"Inspection\(model='\w+', sites=\d+, samples=\d+\)", repr(again))
