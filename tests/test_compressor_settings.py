"""Settings: what can be refused before anything is loaded, and their JSON form."""

import json

import pytest
import torch

from compressor import CompressorError, Settings
from compressor.errors import SettingsError


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model": ""}, "model is empty"),
        ({"data": " "}, "data is empty"),
        ({"output": ""}, "output is empty"),
        ({"drop": ""}, "drop is empty"),
        ({"drop": "150%"}, "at most 100%"),
        ({"drop": "foo:2"}, "unknown kind 'foo'"),
        ({"drop": "attention:"}, "no count and no site name"),
        ({"drop": "-3"}, "no count and no site name"),
        ({"drop": "attention:4,mlp:2"}, "no count and no site name"),
        ({"drop": "25 %"}, "no count and no site name"),
        ({"metric": "size"}, "cosine or influence"),
        ({"int8": "static8"}, "static or dynamic"),
        ({"device": "tpu"}, "cpu or cuda"),
        ({"task": "flying"}, "image-classification"),
        ({"target": "onnxruntim"}, "did you mean onnxruntime"),
        ({"max_loss": float("nan")}, "max-loss is nan"),
        ({"max_int8_loss": 101.0}, "expected 0 to 100"),
        ({"threads": 0}, "threads is 0; expected at least 1"),
        ({"batch": 0}, "batch is 0"),
        ({"samples": 2}, "expected at least 3"),
        ({"rounds": 0}, "rounds is 0"),
        ({"search_samples": 0}, "search-samples is 0"),
        ({"model": "vit_tiny_patch16_224"}, "no data given"),
        ({"data": "random"}, "--drop auto needs real data"),
        ({"random_weights": True}, "--drop auto needs trained weights"),
    ],
)
def test_an_option_that_cannot_work_is_refused_in_a_sentence(options: dict[str, object], words: str) -> None:
    with pytest.raises(SettingsError) as caught:
        Settings(**options)  # type: ignore[arg-type]
    assert words in str(caught.value)
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, CompressorError)


@pytest.mark.parametrize("drop", ["none", "auto", "4", "25%", "attention:4", "block:3", "a.0.attn,b.mlp", "p.json"])
def test_every_documented_form_of_drop_is_taken(drop: str) -> None:
    assert Settings(drop=drop).drop == drop


def test_the_settings_survive_json(tmp_path: object) -> None:
    module = torch.nn.Linear(2, 2)
    settings = Settings(model=module, data="random", drop="1", example_inputs=torch.zeros(2, 2), output=str(tmp_path))
    plain = json.loads(json.dumps(settings.to_dict()))
    assert plain["model"] == "Linear"
    assert plain["output"] == str(tmp_path)
    assert set(plain) == set(Settings.__dataclass_fields__) - {"example_inputs"}


def test_settings_without_a_module_are_made_again_from_their_json() -> None:
    settings = Settings(drop="attention:2", int8="static", samples=60, seed=3)
    assert Settings(**json.loads(json.dumps(settings.to_dict()))) == settings
