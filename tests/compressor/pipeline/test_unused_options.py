"""An option that has no effect beside the others is refused before any work."""

from typing import Any

import pytest

import compressor
from compressor.errors import SettingsError
from compressor.pipeline.unused_options import DEFAULTS, refuse_unused
from compressor.settings import Settings

INT8_ONLY = "which sets the ranges of int8, with --precision "
SEARCH_ONLY = "which only a search uses, with --drop "
REFUSED = [
    ({"calibration": "minmax"}, f"found --calibration minmax, {INT8_ONLY}fp32; give --precision int8, or leave --cal"),
    ({"calibration": "mse", "precision": "fp16"}, f"{INT8_ONLY}fp16"),
    ({"calibration": "mse", "int8": "dynamic"}, f"{INT8_ONLY}int8-dynamic"),
    ({"calibration": "mse", "precision": "int4"}, f"{INT8_ONLY}int4"),
    ({"calibration": "mse", "precision": "int8", "target": "torch"}, "target torch sets the ranges of int8 itself"),
    ({"max_precision_loss": 2.0}, "found --max-precision-loss 2, which bounds the loss of a precision below fp32"),
    ({"heal_budget": 60.0}, "found --heal-budget 60, which is the time limit of healing, without healing; give --heal"),
    ({"drop": "2", "max_loss": 2.0}, f"found --max-loss 2, {SEARCH_ONLY}2; give --drop auto, or leave --max-loss out."),
    ({"drop": "none", "cost": "macs"}, f"{SEARCH_ONLY}none"),
    ({"drop": "2", "budget": "agreement"}, f"found --budget agreement, {SEARCH_ONLY}2; give --drop auto"),
    ({"drop": "2", "search_samples": 8}, "found --search-samples 8, on which effects on the output are measured"),
    ({"metric": "angular"}, "found --metric angular, which ranks sites for a number or a share, with --drop auto"),
    ({"drop": "blocks.1.mlp", "metric": "output"}, "with --drop blocks.1.mlp; give --drop such as 4 or 25%"),
    ({"drop": "plan.json", "metric": "random"}, "with --drop plan.json; give --drop such as 4 or 25%"),
    ({"drop": "plan.json", "actions": "linear"}, "found --actions linear, but --drop plan.json chooses no action"),
    (
        {"drop": "none", "workers": 2, "data": "random"},
        "found --workers 2, whose processes choose a plan, fit maps or measure quality, with --drop none and random",
    ),
    (
        {"drop": "blocks.1.mlp", "ray": "auto", "random_weights": True},
        "measure quality, with --drop blocks.1.mlp and random weights; give --drop with a number",
    ),
    ({"target": "openvino", "merge_decoder": True}, "found --merge-decoder, which merges ONNX files of an encoder-"),
    ({"target": "tensorrt", "threads": 2}, "found --threads 2, but engines of tensorrt run on the GPU; choose another"),
]
USED: list[dict[str, Any]] = [
    {},
    {"calibration": "minmax", "int8": "static", "max_precision_loss": 2.0},
    {"calibration": "minmax", "precision": "auto", "max_precision_loss": 2.0},
    {"calibration": "minmax", "factorial": True},
    {"max_precision_loss": 2.0, "precision": "int4"},
    {"heal": "distill", "heal_budget": 60.0},
    {"max_loss": 2.0, "cost": "macs", "search_samples": 8, "actions": "drop"},
    {"drop": "25%", "metric": "output", "search_samples": 8, "actions": "linear"},
    {"drop": "attention:2", "metric": "random"},
    {"drop": "none", "metric": "output", "search_samples": 8},
    {"drop": "blocks.1.mlp", "actions": "linear", "workers": 2},
    {"drop": "4", "ray": "auto", "data": "random"},
    {"drop": "none", "workers": 2},
    {"target": "tensorrt", "threads": 2, "defer_build": True},
    {"merge_decoder": True},
]


@pytest.mark.parametrize(("options", "words"), REFUSED)
def test_an_option_without_effect_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError) as refused:
        refuse_unused(Settings(**options))
    message = str(refused.value)
    assert words in message
    assert message.startswith("found --")
    assert message.endswith(" out.")
    assert ". " not in message


@pytest.mark.parametrize("options", USED)
def test_an_option_with_an_effect_is_taken(options: dict[str, Any]) -> None:
    refuse_unused(Settings(**options))
    assert options.items() <= {name: getattr(Settings(**options), name) for name in DEFAULTS}.items() | {
        ("int8", "static")
    }


def test_every_command_refuses(tmp_path: Any) -> None:
    with pytest.raises(SettingsError, match="found --heal-budget 60"):
        compressor.export(heal_budget=60.0, output=tmp_path / "out")
    with pytest.raises(SettingsError, match="found --threads 2"):
        compressor.sweep(target="tensorrt", threads=2, output=tmp_path / "out")
    with pytest.raises(SettingsError, match="found --search-samples 8"):
        compressor.inspect(search_samples=8)
