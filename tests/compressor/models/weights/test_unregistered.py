"""Weights in plain lists, dicts and functions are named; the graph would hold them as constants without a branch."""

import functools
import json
import re

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from compressor.models import ModelError, load
from compressor.models.user_module import wrap
from compressor.models.weights.unregistered import read_by, unregistered_weights

WIDTH = 8


class Net(nn.Module):
    """Two blocks; how they are kept depends on the class that derives from it."""

    def __init__(self):
        super().__init__()
        self.keep([nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5)) for _ in range(2)])

    def forward(self, x):
        for block in self.blocks():
            x = x + block(x)
        return x


class InModuleList(Net):
    def keep(self, blocks):
        self.inner = nn.ModuleList(blocks)
        self.ordered = list(reversed(blocks))  # names of registered modules

    def blocks(self):
        return self.inner


class InList(Net):
    def keep(self, blocks):
        self.inner = blocks

    def blocks(self):
        return self.inner


class InDict(Net):
    def keep(self, blocks):
        self.stages = {"first": (blocks[0],), "second": [blocks[1]]}

    def blocks(self):
        return [*self.stages["first"], *self.stages["second"]]


class InFunctions(Net):
    def keep(self, blocks):
        first, second = blocks
        self.first, self.second = lambda x: first(x) + 0, functools.partial(second.forward)

    def blocks(self):
        return self.first, self.second


class Weights(Net):
    def keep(self, blocks):
        self.matrices = [nn.Parameter(torch.randn(WIDTH, WIDTH)) for _ in blocks]

    def blocks(self):
        return [lambda x, matrix=matrix: x @ matrix for matrix in self.matrices]


class Unread(InModuleList):
    """A teacher that training reads alone is kept in a list, so that it is not saved."""

    def keep(self, blocks):
        super().keep(blocks)
        self.teacher = [nn.Linear(WIDTH, WIDTH)]


def test_registered_modules_in_another_list_and_weights_that_are_not_read_are_accepted():
    torch.manual_seed(0)
    assert not list(unregistered_weights(InModuleList()))
    model = wrap(Unread(), torch.randn(4, WIDTH), task=None)
    assert [name for name, _ in unregistered_weights(model.module)] == ["teacher", "teacher"]


@pytest.mark.parametrize(
    ("kind", "names"),
    [(InList, "inner"), (InDict, "stages"), (InFunctions, "first, second"), (Weights, "matrices")],
)
def test_weights_in_plain_attributes_are_refused_by_name(kind, names):
    with pytest.raises(ModelError, match=rf"^{kind.__name__} computes with weights in plain attributes \({names}\)"):
        wrap(kind(), torch.randn(4, WIDTH), task=None)


def test_the_path_of_an_inner_module_is_named():
    outer = nn.Sequential(InModuleList(), InList())
    assert read_by(lambda: outer(torch.randn(2, WIDTH)), outer) == ("1.inner",)
    assert read_by(lambda: outer[0](torch.randn(2, WIDTH)), outer) == ()


CODE = """
import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


class PlainConfig(PretrainedConfig):
    model_type = "plain"


class PlainForImageClassification(PreTrainedModel):
    config_class = PlainConfig

    def __init__(self, config):
        super().__init__(config)
        self.blocks = [torch.nn.Linear(3, 3)]
        self.head = torch.nn.Linear(3, 2)
        self.post_init()

    def forward(self, pixel_values=None):
        return SequenceClassifierOutput(logits=self.head(self.blocks[0](pixel_values.mean((2, 3)))))
"""


def test_a_class_of_a_checkpoint_that_keeps_its_blocks_in_a_list_is_refused(tmp_path):
    """transformers makes the modules without values, and fills those it finds."""
    (tmp_path / "plain.py").write_text(CODE)
    kept = {
        "AutoConfig": "plain.PlainConfig",
        "AutoModelForImageClassification": "plain.PlainForImageClassification",
    }
    config = {"model_type": "plain", "architectures": ["PlainForImageClassification"], "auto_map": kept}
    (tmp_path / "config.json").write_text(json.dumps(config | {"image_size": 8, "num_channels": 3}))
    weights = {"head.weight": torch.zeros(2, 3), "head.bias": torch.zeros(2)}
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=re.escape("keeps weights in plain attributes (blocks)")):
        load(tmp_path, trust_remote_code=True)
