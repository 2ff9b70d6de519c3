"""Regions under autocast that is off are traced like plain code; other graphs in a graph are refused."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

from compressor import models
from compressor.lower.trace import TraceError, trace
from passes.execute.interpreter import run
from passes.graph.sites import find_sites

WIDTH = 16
Call = Callable[[nn.Module, torch.Tensor], torch.Tensor]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.project = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))

    def forward(self, x: torch.Tensor, attend: Any = scaled_dot_product_attention) -> torch.Tensor:
        query, key, value = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        x = x + self.project(attend(query, key, value).transpose(1, 2).flatten(2))
        return x + self.mlp(x)


class Network(nn.Module):
    """Two blocks, each of which is called by a given function."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.call = call

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = self.call(block, x)
        return x


def plain(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return block(x)


def within(context: Callable[[], contextlib.AbstractContextManager[Any]]) -> Call:
    def call(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        with context():
            return block(x)

    return call


def switch(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return torch.cond(x.sum() > 0, lambda y: block(y) + 1, lambda y: -block(y), (x,))


def cast(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    weight = next(block.parameters()).new_ones(WIDTH, WIDTH).to(torch.float16)
    return block(x) + nn.functional.linear(x.half(), weight).float()


def wrapped(call: Call) -> models.Model:
    return models.load(Network(call), example_inputs=torch.rand(2, 5, WIDTH))


@pytest.mark.parametrize(
    "context",
    [lambda: torch.autocast("cpu", enabled=False), torch.no_grad, torch.enable_grad],
    ids=["autocast", "no_grad", "enable_grad"],
)
def test_region_is_traced_like_plain_code(context: Callable[[], contextlib.AbstractContextManager[Any]]) -> None:
    graph, expected = trace(wrapped(within(context))), trace(wrapped(plain))
    assert [site.name for site in find_sites(graph)] == [site.name for site in find_sites(expected)]
    assert len(find_sites(graph)) == 4
    x = torch.rand(3, 5, WIDTH)
    found, wanted = (run(each, {each.inputs[0]: x})[0] for each in (graph, expected))
    torch.testing.assert_close(found, wanted)


def test_gradients_that_stay_switched_on_are_traced() -> None:
    def switching(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        torch.set_grad_enabled(True)
        return block(x)

    with torch.no_grad():  # which restores the mode
        graph, expected = trace(wrapped(switching)), trace(wrapped(plain))
    assert [site.name for site in find_sites(graph)] == [site.name for site in find_sites(expected)]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (within(lambda: torch.autocast("cpu", torch.bfloat16)), r"computes aten\.linear.* in torch\.bfloat16 by"),
        (cast, r"computes aten\.linear.* in torch\.float16 by torch\.autocast or a cast of its own"),
        (switch, r"calls cond, which runs graphs of its own"),
        (lambda block, x: block(x, flex_attention), r"calls flex_attention in blocks\.0, which runs graphs of its own"),
    ],
    ids=["autocast", "cast", "cond", "flex_attention"],
)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_refused_operators(call: Call, message: str) -> None:
    with pytest.raises(TraceError, match=message) as caught:
        trace(wrapped(call))
    assert re.match(r"^Network (computes|calls) .*\.$", str(caught.value))
