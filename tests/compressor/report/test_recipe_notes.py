"""Recipes that lose more than a point say what to try instead."""

from types import SimpleNamespace

import pytest

from compressor.quality.intervals import Figure
from compressor.report.recipe_notes import MOST, recipe_notes
from compressor.report.report import Quality


def report(drop, lost, *, metric="cosine", tokens="auto", changes=None, judged=True):
    changes = {"blocks.1.attn": "drop"} if changes is None else changes
    quality = Quality("accuracy", {}, {"baseline": Figure(lost, lost - 1.0, lost + 1.0, 100)}, {})
    return SimpleNamespace(
        settings={"drop": drop, "metric": metric, "tokens": tokens},
        quality=quality if judged else None,
        plan=SimpleNamespace(changes=changes, decisions=[SimpleNamespace(site="blocks.1.attn")]),
    )


@pytest.mark.parametrize("drop", ["block:1", "attention:2", "25%", "4"])
def test_a_ranking_names_the_search_and_the_other_ranking(drop):
    (note,) = recipe_notes(report(drop, 16.0))
    assert note.startswith(f"--drop {drop} loses 16.00 ")
    assert "--drop auto" in note
    assert "--metric output" in note


def test_names_and_schedules_of_tokens_name_the_search():
    (note,) = recipe_notes(report("blocks.1.attn", 3.0))
    assert "--drop auto" in note
    assert "--metric output" not in note
    (note,) = recipe_notes(report("none", 3.0, tokens="8", changes={"blocks.1.attn": "merge:8"}))
    assert note.startswith("--tokens 8 loses 3.00 ")
    assert "--metric output" not in note
    (note,) = recipe_notes(report("4", 3.0, metric="output"))
    assert "--metric output" not in note


@pytest.mark.parametrize(
    "harmless",
    [
        report("block:1", MOST),
        report("auto", 16.0),
        report("plan.json", 16.0),
        report("none", 16.0, changes={}),
        report("block:1", 16.0, judged=False),
    ],
)
def test_other_plans_have_no_such_note(harmless):
    assert not list(recipe_notes(harmless))
