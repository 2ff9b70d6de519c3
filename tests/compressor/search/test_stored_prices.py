"""Prices of an earlier search: its timings, and refusals of those of other engines."""

import copy
import json

import pytest

import compressor
from compressor.errors import CompressorError
from compressor.measure.workload import Call
from compressor.search.stored_prices import PricesError, price_notes, stored_timings
from compressor.settings import Settings, SettingsError
from compressor.workspace.environment import environment

SETTINGS = Settings(batch=2, threads=1)
CALLS = {"prompt": Call(1, {}, {"ids": (2, 6)}), "token": Call(4, {}, {"ids": (2, 1)})}
DESIGNS = {"as it is": None, "linear": None}
CONTENT = {
    "settings": SETTINGS.to_dict(),
    "model": {"name": "sample"},
    "search": {
        "prices": {
            "unit": "ms",
            "sites": "a" * 16,
            "calls": {
                "prompt": {
                    "times": 1,
                    "shapes": {"ids": [2, 6]},
                    "timings": {"as it is": 5.0, "linear": 3.0, "without mlp": 2.0},
                },
                "token": {
                    "times": 4,
                    "shapes": {"ids": [2, 1]},
                    "timings": {"as it is": 8.0, "linear": 4.0, "without mlp": 2.0},
                },
            },
        }
    },
}


def written(folder, change=lambda content: None, name="report.json"):
    content = copy.deepcopy(CONTENT)
    change(content)
    (folder / name).write_text(json.dumps(content))
    return folder


def timings(path, **changed):
    given = {"name": "sample", "sites": "a" * 16, "settings": SETTINGS, "calls": CALLS, "designs": DESIGNS} | changed
    return stored_timings(path, *given.values())


@pytest.mark.parametrize("name", ["report.json", "sweep.json"])
def test_timings_are_those_of_one_call(tmp_path, name):
    """The report states all calls of a kind together."""
    expected = {"as it is": {"prompt": 5.0, "token": 2.0}, "linear": {"prompt": 3.0, "token": 1.0}}
    assert timings(written(tmp_path, name=name)) == expected
    assert timings(tmp_path / name) == expected


def test_a_sweep_names_its_model_alone(tmp_path):
    assert timings(written(tmp_path, lambda content: content.update(model="sample"), "sweep.json"))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"name": "other"}, "the model sample, but this search needs the model other"),
        ({"sites": "b" * 16}, "are those of another model named sample, with other branches or widths; give a"),
        ({"settings": Settings(batch=8, threads=1)}, "--batch 2, but this search needs --batch 8"),
        ({"settings": Settings(batch=2)}, "--threads 1, but this search needs --threads None"),
        ({"settings": Settings(batch=2, threads=1, target="openvino")}, "--target onnxruntime, but"),
        ({"settings": Settings(batch=2, threads=1, int8="static")}, "--precision fp32, but"),
        ({"settings": Settings(batch=2, threads=1, defer_build=True)}, "--defer-build False, but"),
        (
            {"calls": CALLS | {"prompt": Call(1, {}, {"ids": (2, 9)})}},
            "the inputs of prompt {'ids': [2, 6]}, but this search needs the inputs of prompt {'ids': [2, 9]}",
        ),
        ({"calls": {"prompt": CALLS["prompt"]}}, "the calls {'prompt': 1, 'token': 4}"),
        ({"calls": CALLS | {"token": Call(5, {}, {})}}, "the calls"),
        ({"designs": DESIGNS | {"without attention": None}}, "needs the designs of prompt without attention"),
    ],
)
def test_prices_of_other_engines_are_refused(tmp_path, changed, words):
    with pytest.raises(PricesError) as caught:
        timings(written(tmp_path), **changed)
    assert words in str(caught.value)
    assert "or leave out --prices" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: content["search"].clear(), "has no timings of a search by latency"),
        (lambda content: content["search"]["prices"].update(unit="multiply-adds"), "has no timings"),
        (lambda content: content["search"]["prices"]["calls"]["token"]["timings"].update(linear=-1.0), "other values"),
        (lambda content: content["search"]["prices"]["calls"]["token"].update(times="x"), "other values"),
        (lambda content: content.pop("settings"), "other values"),
        (lambda content: content.update(model=[]), "other values"),
    ],
)
def test_a_report_without_usable_timings_is_refused(tmp_path, change, words):
    with pytest.raises(CompressorError, match=words):
        timings(written(tmp_path, change))


def test_a_missing_folder_is_named(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(PricesError, match=r"is no folder with a report\.json or sweep\.json"):
            timings(path)


@pytest.mark.parametrize("run", [compressor.export, compressor.sweep])
def test_prices_are_checked_before_the_model_is_loaded(tmp_path, run):
    with pytest.raises(PricesError, match="is no folder with a report"):
        run("no_such_model", data="absent.npy", prices=tmp_path / "nowhere", output=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_prices_need_a_search_by_latency():
    with pytest.raises(SettingsError, match="which needs no timings"):
        Settings(prices="out", cost="macs")


def test_the_source_is_a_note():
    assert price_notes({}) == price_notes({"prices": {"unit": "ms", "source": None}}) == ()
    assert price_notes({"prices": {"source": "out"}}) == (
        "The search took its prices from out; nothing was timed for them.",
    )


def test_prices_of_another_machine_or_release_are_named(tmp_path):
    """Which branch is worth its time differs between machines, so the plan is not that of this one."""
    own = environment()
    same = {"environment": own}
    facts = {"prices": {"source": str(written(tmp_path, lambda content: content.update(same)))}}
    assert price_notes(facts) == (f"The search took its prices from {tmp_path}; nothing was timed for them.",)
    other = own | {"processor": "Z80", "packages": own["packages"] | {"torch": "1.0", "timm": "0.1"}}
    written(tmp_path, lambda content: content.update(environment=other))
    (sentence,) = price_notes(facts)
    wanted = f"processor Z80 (here {own['processor']}), torch 1.0 (here {own['packages']['torch']})."
    assert sentence.endswith(f" They were timed on another machine or release: {wanted}")
