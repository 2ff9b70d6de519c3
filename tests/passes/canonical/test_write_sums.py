"""Residual sums in other spellings than ``x + f(x)`` make sites, and a dropped branch leaves what a person expects."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from compressor import models
from compressor.lower.trace import trace
from passes.base import apply
from passes.execute.interpreter import run
from passes.graph.graph import Graph, aten
from passes.graph.sites import find_sites
from passes.rewrite.drop import Drop

Rule = Callable[["Spelled", torch.Tensor, torch.Tensor], torch.Tensor]


class Spelled(nn.Module):
    """Model that adds an MLP to its state by `rule`; `without` is what is left when the MLP is dropped."""

    def __init__(self, rule: Rule) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.gate = nn.Parameter(torch.rand(8) + 0.5)
        self.rule = rule

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.head(self.rule(self, x, self.mlp(self.norm(x))))


RULES: dict[str, tuple[Rule, Rule]] = {
    "alpha": (lambda m, x, f: torch.add(x, f, alpha=0.5), lambda m, x, f: x),
    "alpha of the trunk": (lambda m, x, f: torch.add(f, x, alpha=2), lambda m, x, f: 2 * x),
    "in place": (lambda m, x, f: x.clone().add_(f, alpha=0.1), lambda m, x, f: x),
    "difference": (lambda m, x, f: x - f, lambda m, x, f: x),
    "difference with alpha": (lambda m, x, f: torch.sub(x, f, alpha=0.3), lambda m, x, f: x),
    "branch less trunk": (lambda m, x, f: f - x, lambda m, x, f: -x),
    "lerp": (lambda m, x, f: x.lerp(f, 0.3), lambda m, x, f: x),
    "lerp by a weight": (lambda m, x, f: torch.lerp(x, f, m.gate), lambda m, x, f: x),
    "addcmul": (lambda m, x, f: torch.addcmul(x, m.gate, f), lambda m, x, f: x),
    "addcmul with a value": (lambda m, x, f: x.addcmul(f, m.gate, value=0.5), lambda m, x, f: x),
    "addcdiv": (lambda m, x, f: torch.addcdiv(x, f, m.gate), lambda m, x, f: x),
    "sum of Python": (lambda m, x, f: sum((x, f)), lambda m, x, f: x),  # type: ignore[arg-type,return-value]
    "stack and sum": (lambda m, x, f: torch.stack([x, f]).sum(0), lambda m, x, f: x),
    "stack and mean": (lambda m, x, f: torch.stack([f, x], dim=-1).mean(-1), lambda m, x, f: x / 2),
    "scaled trunk": (lambda m, x, f: 0.7 * x + 0.3 * f, lambda m, x, f: 0.7 * x),
    "trunk scaled by weights": (
        lambda m, x, f: x * torch.sigmoid(m.gate) + f,
        lambda m, x, f: x * torch.sigmoid(m.gate),
    ),
    "divided trunk": (lambda m, x, f: f + x / m.gate, lambda m, x, f: x / m.gate),
    "DeepNorm": (lambda m, x, f: m.norm(x * 1.7 + f), lambda m, x, f: m.norm(x * 1.7)),
    "branch in the branch": (lambda m, x, f: x + (f + torch.sigmoid(f)), lambda m, x, f: x),
}


def traced(rule: Rule) -> tuple[Graph, torch.Tensor]:
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))
    return trace(models.load(Spelled(rule), example_inputs=x)), x


@pytest.mark.parametrize("name", RULES)
def test_a_dropped_branch_leaves_the_trunk(name: str) -> None:
    spelled, without = RULES[name]
    graph, x = traced(spelled)
    expected = Spelled(spelled).eval()(x)
    torch.testing.assert_close(run(graph, {"x": x})[0], expected, rtol=1e-5, atol=1e-5)
    (site,) = find_sites(graph)
    assert (site.name, site.kind) == ("mlp", "mlp")
    apply(Drop((site.name,)), graph)
    left = Spelled(without).eval()(x)
    assert (left - expected).abs().max() > 1e-2  # the branch matters
    torch.testing.assert_close(run(graph, {"x": x})[0], left, rtol=1e-5, atol=1e-5)
    assert not any("mlp" in name for name, _ in graph.module.named_parameters())


def test_operators_that_make_no_site_stay() -> None:
    def rule(m: Spelled, x: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
        return x.sigmoid().lerp(x - x.tanh(), 0.5) + f

    graph, _ = traced(rule)
    targets = {node.target for node in graph.nodes()}
    assert {aten.sub.Tensor, aten.lerp.Scalar} <= targets


def test_a_difference_from_a_value_that_is_computed_one_by_one_stays() -> None:
    """The step of a recurrence subtracts the largest value so far, as RWKV's does."""

    def rule(m: Spelled, x: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
        return (x - torch.maximum(x + m.gate, x.tanh())).exp() + f

    graph, _ = traced(rule)
    assert aten.sub.Tensor in {node.target for node in graph.nodes()}
    assert find_sites(graph) == ()


@pytest.mark.parametrize("rule", [lambda m, x, f: x * f.sigmoid() + f, lambda m, x, f: 2 / x + f])
def test_a_trunk_that_no_constant_scales_makes_no_site(rule: Rule) -> None:
    graph, _ = traced(rule)
    assert find_sites(graph) == ()
