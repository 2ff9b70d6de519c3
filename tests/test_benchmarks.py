"""The tables of the READMEs are those of the committed results."""

import importlib.util
from pathlib import Path

import pytest

TABLES = Path(__file__).parents[1] / "benchmarks" / "tables.py"


@pytest.fixture(scope="module")
def tables():
    spec = importlib.util.spec_from_file_location("benchmark_tables", TABLES)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pages_agree_with_the_results(tables):
    for page in tables.PAGES:
        assert page.read_text() == tables.filled(page.read_text()), "run python benchmarks/tables.py"


def test_every_table_is_shown_and_states_figures(tables):
    pages = "".join(page.read_text() for page in tables.PAGES)
    for name, table in tables.TABLES.items():
        assert f"<!-- {name} -->\n{table()}\n<!-- /{name} -->" in pages


def test_the_plain_check_agrees_with_the_report(tables):
    checked = [row for row in tables.rows() if row["top1_plain_onnxruntime"] is not None]
    assert checked
    for row in checked:  # points of top-1; what the issue allows
        assert row["top1_plain_onnxruntime"] == pytest.approx(row["quality"]["figures"]["result"]["value"], abs=0.2)
