"""Settings: options refused before a model is loaded, defaults, and the JSON form."""

import inspect
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import compressor
from compressor import CompressorError, Settings
from compressor.benchmark.bench_settings import BenchSettings
from compressor.choices import AUTO_ACTIONS, CALIBRATIONS, HEAL_METHODS
from compressor.commands import EXPORT, SUBJECT
from compressor.errors import SettingsError
from compressor.settings import API_ONLY, DEFAULT_LOSS
from passes.plan.plan import form_and_rank
from runtimes.base.protocols import PRECISIONS


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model": ""}, "model is empty"),
        ({"model": {"weight": 1}}, "model is of the type dict; expected a name, a path, or a torch.nn.Module with"),
        ({"model": torch.nn.Linear}, "model is of the type type; expected"),
        ({"data": []}, "data is of the type list; expected a path, the name of a hub dataset, or random, so save the"),
        ({"data": np.zeros((4, 2))}, "data is of the type ndarray"),
        ({"drop": 4}, "drop is 4; expected a text"),
        ({"samples": "64"}, "samples is '64'; expected an integer"),
        ({"max_loss": "1%"}, "max-loss is '1%'; expected a number"),
        ({"cache": "no"}, "cache is 'no'; expected True or False"),
        ({"data": " "}, "data is empty"),
        ({"output": ""}, "output is empty"),
        ({"drop": ""}, "drop is empty"),
        ({"drop": "150%"}, "at most 100%"),
        ({"drop": "foo:2"}, "unknown kind 'foo'"),
        ({"drop": "attention:"}, "neither a number nor a site name"),
        ({"drop": "-3"}, "neither a number nor a site name"),
        ({"drop": "attention:4,mlp:2"}, "neither a number nor a site name"),
        ({"drop": "25 %"}, "neither a number nor a site name"),
        ({"metric": "size"}, "cosine or influence"),
        ({"int8": "static8"}, "static or dynamic"),
        ({"precision": "fp4"}, "unknown precision 'fp4'; expected auto or fp32 or fp16 or bf16 or fp8 or int8 or"),
        ({"precision": "fp16", "int8": "static"}, "found --int8 and --precision fp16; give one"),
        ({"precision": "int8", "int8": "dynamic"}, "found --int8 and --precision int8; give one"),
        ({"precision": "auto", "int8": "static"}, "found --int8 and --precision auto; give one"),
        ({"precision": "auto", "factorial": True}, "compares compression with one precision; found --precision auto"),
        ({"calibration": "median"}, "unknown calibration 'median'; expected auto or typical or minmax"),
        ({"device": "tpu"}, "cpu or cuda"),
        ({"task": "flying"}, "image-classification"),
        ({"target": "onnxruntim"}, "did you mean onnxruntime"),
        ({"max_loss": float("nan")}, "max-loss is nan"),
        ({"max_precision_loss": 101.0}, "expected 0 to 100"),
        ({"threads": 0}, "threads is 0; expected at least 1"),
        ({"batch": 0}, "batch is 0"),
        ({"threads": 10**11}, "threads is 100000000000; expected at most 4,096"),
        ({"batch": 10**12}, "batch is 1000000000000; expected at most 65,536"),
        ({"rounds": 10**9}, "rounds is 1000000000; expected at most 10,000"),
        ({"image_size": "99999x8"}, "--image-size 99999x8: expected at most 16,384 pixels a side"),
        ({"samples": 2}, "expected at least 3"),
        ({"rounds": 0}, "rounds is 0"),
        ({"search_samples": 0}, "search-samples is 0"),
        ({"model": "vit_tiny_patch16_224"}, "no data given"),
        ({"data": "random"}, "--drop auto, or sweep) needs real data"),
        ({"random_weights": True}, "--drop auto, or sweep) needs trained weights"),
        ({"max_loss": -0.1}, "max-loss is -0.1"),
        ({"max_loss": math.inf}, "max-loss is inf"),
        ({"generate": "128"}, "--generate 128: expected PROMPT:NEW"),
        ({"generate": "0:5"}, "--generate 0:5: expected PROMPT:NEW"),
        ({"generate": "8:5", "defer_build": True}, "give --generate 8:0, or leave out --generate"),
        ({"speedup": 1.0}, "speedup is 1; expected a finite number above 1"),
        ({"speedup": math.inf}, "speedup is inf"),
        ({"speedup": math.nan}, "speedup is nan"),
        ({"latency": 0.0}, "latency is 0; expected a finite number above 0"),
        ({"latency": math.nan}, "latency is nan"),
        ({"heal_budget": 0.0}, "heal-budget is 0"),
        ({"heal_budget": math.inf}, "heal-budget is inf"),
        ({"cost": "time"}, "latency or macs"),
        ({"heal": "prayer"}, "none or closed-form or distill"),
        ({"actions": "drop,teleport"}, "--actions: unknown action 'teleport'"),
        ({"actions": ""}, "unknown action ''"),
        ({"actions": "drop,"}, "unknown action ''"),
        ({"actions": "keep"}, "unknown action 'keep'"),
        ({"actions": "drop:3"}, "unknown action 'drop:3'"),
        ({"actions": "low-rank:0"}, "unknown action 'low-rank:0'"),
        (
            {"drop": "2", "actions": "drop,linear"},
            "found --actions drop,linear with --drop 2; several actions need --drop auto",
        ),
        ({"drop": "2", "speedup": 1.5}, "--speedup is a goal of the search; found --drop 2. Give --drop auto"),
        ({"drop": "plan.json", "latency": 5.0}, "--latency is a goal"),
        ({"drop": "none", "latency": 5.0}, "--latency is a goal"),
        ({"speedup": 1.5, "latency": 5.0}, "which both set the goal for speed"),
        ({"latency": 5.0, "cost": "macs"}, "leave out --cost macs"),
        ({"tokens": "8,"}, "--tokens 8,: expected auto, none, a number"),
        ({"tokens": "75%"}, "a percentage below 75%"),
    ],
)
def test_an_invalid_option_is_refused_with_one_message(options: dict[str, object], words: str) -> None:
    with pytest.raises(SettingsError) as caught:
        Settings(**options)  # type: ignore[arg-type]
    assert words in str(caught.value)
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, CompressorError)


@pytest.mark.parametrize("drop", ["none", "auto", "4", "25%", "attention:4", "block:3", "a.0.attn,b.mlp", "p.json"])
def test_every_documented_form_of_drop_is_accepted(drop: str) -> None:
    assert Settings(drop=drop).drop == drop


@pytest.mark.parametrize("path", ["~/out", Path("~/out")], ids=["text", "path"])
def test_a_path_may_begin_with_the_home_folder(path: str | Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell leaves it in --output=~/out; a folder named ~ would be written."""
    monkeypatch.setenv("HOME", "/home/someone")
    own = Settings(path, data=path, output=path, drop="~/plan.json", prices=path)
    assert {str(each) for each in (own.model, own.data, own.output, own.prices)} == {"/home/someone/out"}
    assert own.drop == "/home/someone/plan.json"
    assert type(own.output) is type(path)
    compared = BenchSettings((str(path), "a~/b"), output=path)
    assert (compared.what, str(compared.output)) == (("/home/someone/out", "a~/b"), "/home/someone/out")


def test_settings_serialise_to_json(tmp_path: object) -> None:
    module = torch.nn.Linear(2, 2)
    settings = Settings(model=module, data="random", drop="1", example_inputs=torch.zeros(2, 2), output=str(tmp_path))
    plain = json.loads(json.dumps(settings.to_dict()))
    assert plain["model"] == "Linear"
    assert plain["output"] == str(tmp_path)
    assert set(plain) == set(Settings.__dataclass_fields__) - {"example_inputs"}


def test_settings_without_a_module_round_trip_through_json() -> None:
    settings = Settings(drop="attention:2", int8="static", samples=60, seed=3)
    assert Settings(**json.loads(json.dumps(settings.to_dict()))) == settings
    settings = Settings(actions="drop, low-rank:8", speedup=1.5, max_loss=3.0, heal="distill", heal_budget=90.0)
    assert Settings(**json.loads(json.dumps(settings.to_dict()))) == settings


@pytest.mark.parametrize(
    ("options", "limit"),
    [
        ({}, DEFAULT_LOSS),
        ({"max_loss": 0.0}, 0.0),
        ({"speedup": 1.5}, math.inf),
        ({"latency": 5.0}, math.inf),
        ({"speedup": 1.5, "max_loss": 2.0}, 2.0),
    ],
)
def test_a_goal_for_speed_without_max_loss_removes_the_limit_on_loss(options: dict[str, float], limit: float) -> None:
    assert Settings(**options).loss_limit == limit  # type: ignore[arg-type]


def test_actions_have_a_default() -> None:
    assert Settings().chosen_actions == AUTO_ACTIONS
    assert Settings(tokens="none").chosen_actions == tuple(action for action in AUTO_ACTIONS if action != "merge")
    assert Settings(drop="2").chosen_actions == ("drop",)
    assert Settings(drop="2", actions="linear").chosen_actions == ("linear",)
    assert Settings(actions="drop, low-rank:8 ,fuse").chosen_actions == ("drop", "low-rank:8", "fuse")
    forms = [form_and_rank(action)[0] for action in AUTO_ACTIONS if action != "merge"]
    assert len(set(forms)) == len(AUTO_ACTIONS) - 1


def test_heal_implements_every_method_of_the_settings() -> None:
    assert pytest.importorskip("compressor.heal.heal").HEAL_METHODS == HEAL_METHODS


def test_every_field_is_an_option_of_export_or_an_argument_in_python_only() -> None:
    """A field that is added to Settings belongs into a group of options, or into `API_ONLY`."""
    assert sorted((*SUBJECT, *EXPORT, *API_ONLY)) == sorted(Settings.__dataclass_fields__)
    assert API_ONLY == ("example_inputs",)


def test_the_api_takes_every_setting_with_the_same_default() -> None:
    """`export` passes its arguments to Settings; an argument that it lacks would keep its default without notice."""
    fields = inspect.signature(Settings).parameters
    export = inspect.signature(compressor.export).parameters
    assert {name: each.default for name, each in export.items()} == {
        name: each.default for name, each in fields.items()
    }
    assert [name for name, each in export.items() if each.kind is not inspect.Parameter.KEYWORD_ONLY] == ["model"]
    sweep = dict(inspect.signature(compressor.sweep).parameters)
    assert sweep.pop("points").default == 8
    other = {"max_loss": 20.0, "output": "front"}
    assert {name: each.default for name, each in sweep.items()} == {
        name: other.get(name, fields[name].default) for name in sweep
    }
    # A sweep runs one search for all budgets, without a goal, healing or a fixed plan.
    not_in_sweep = {
        "drop",
        "metric",
        "image_tokens",
        "confidence",
        "speedup",
        "latency",
        "heal",
        "heal_budget",
        "calibration",
        "max_precision_loss",
        "max_memory",
        "defer_build",
        "gpu",
        "portable_engine",
        "merge_decoder",
        "factorial",
    }
    assert set(fields) - set(sweep) == not_in_sweep


@pytest.mark.parametrize(
    ("options", "precision"),
    [
        ({}, "fp32"),
        ({"int8": "static"}, "int8"),
        ({"int8": "dynamic"}, "int8-dynamic"),
        ({"int8": "weight-only"}, "int8-weight-only"),
        ({"precision": "int8", "int8": "static"}, "int8"),
        ({"precision": "int8-dynamic", "factorial": True}, "int8-dynamic"),
        ({"precision": "auto"}, "auto"),
        *(({"precision": each}, each) for each in PRECISIONS),
    ],
)
def test_int8_is_a_short_form_of_precision(options: dict[str, Any], precision: str) -> None:
    settings = Settings(**options)
    assert (settings.precision, settings.int8) == (precision, None)
    assert Settings(**settings.to_dict()) == settings


@pytest.mark.parametrize("calibration", ["auto", *CALIBRATIONS])
def test_every_calibration_method_is_accepted(calibration: Any) -> None:
    assert Settings(calibration=calibration).calibration == calibration
