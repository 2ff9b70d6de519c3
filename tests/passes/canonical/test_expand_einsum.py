"""Einstein sums become products of matrices: equal outputs, and weights and tokens that other passes see."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from compressor import models
from compressor.lower.trace import trace
from passes.base import apply
from passes.canonical.clean import Clean
from passes.canonical.expand_einsum import EINSUM, ExpandEinsum
from passes.execute.interpreter import run
from passes.graph.graph import Graph, aten
from passes.graph.sites import find_sites
from passes.merge_tokens.token_merging import ReduceTokens

SIZES = {"b": 2, "i": 5, "j": 7, "h": 3, "d": 4, "e": 6}
PRODUCTS = (
    "bihd,bjhd->bhij",  # scores of attention
    "bhid,bhjd->bhij",
    "bhij,bjhd->bihd",
    "bhij,bhjd->bihd",
    "bid,bjd->bij",
    "bhid,hde->bhie",  # a matrix for each head
    "hde,bihd->bihe",
    "b i d, b d j -> b j i",
)
MAPS = ("bid,de->bie", "bid,ed->bie", "bihd,de->bihe", "bid,ed->bei", "ed,bid->bie")
OTHERS = (
    "bihd,bjhd->bij",
    "bid,hde->bihe",
    "...id,de->...ie",
    "bid,bie->bde",
    "bihd,hde->bie",
    "bid,d->bi",
    "bid->bdi",
)


class Sum(nn.Module):
    def __init__(self, equation: str) -> None:
        super().__init__()
        self.equation = equation

    def forward(self, *factors: torch.Tensor) -> torch.Tensor:
        return torch.einsum(self.equation, *factors) * 1.0


def exported(equation: str) -> tuple[Graph, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    letters = equation.replace(" ", "").split("->")[0].split(",")
    values = [torch.randn([SIZES[each] for each in own.replace("...", "b")], generator=generator) for own in letters]
    program = torch.export.export(Sum(equation), tuple(values), strict=False)
    names = tuple(f"x{number}" for number in range(len(values)))
    graph = Graph(program.module(check_guards=False), names, ("y",))
    apply(Clean(), graph)
    return graph, dict(zip(names, values, strict=True))


@pytest.mark.parametrize("equation", [*PRODUCTS, *MAPS, *OTHERS])
def test_outputs_are_equal(equation: str) -> None:
    graph, feeds = exported(equation)
    fork = graph.fork()
    apply(ExpandEinsum(), fork)
    fork.check()
    torch.testing.assert_close(run(fork, feeds)[0], run(graph, feeds)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("equation", [*PRODUCTS, *MAPS])
def test_sums_over_one_index_are_products(equation: str) -> None:
    graph, _ = exported(equation)
    assert any(node.target is EINSUM for node in graph.nodes())
    assert len(apply(ExpandEinsum(), graph).changed) == 1
    targets = {node.target for node in graph.nodes()}
    assert EINSUM not in targets
    assert (aten.linear.default in targets) is (equation in MAPS)


@pytest.mark.parametrize("sizes", [(1, 3), (3, 1)])
def test_a_repeated_index_of_size_one_stays(sizes: tuple[int, int]) -> None:
    values = tuple(torch.randn(2, heads, 5, 4) for heads in sizes)
    program = torch.export.export(Sum("bhid,bhjd->bhij"), values, strict=False)
    graph = Graph(program.module(check_guards=False), ("q", "k"), ("y",))
    assert apply(ExpandEinsum(), graph).changed == ()


class Attention(nn.Module):
    """Attention as it is written with einsum in many repositories."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.out = nn.Parameter(torch.randn(48, 16) / 4), nn.Parameter(torch.randn(16, 16) / 4)
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = torch.einsum("bnd,ed->bne", x, self.qkv).unflatten(-1, (3, 4, 4)).unbind(2)
        scores = torch.einsum("bihd,bjhd->bhij", q, k) / 2
        heads = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)
        return self.head((x + torch.einsum("bnd,ed->bne", heads.flatten(2), self.out)).mean(1))


def test_tokens_behind_attention_of_einsums_are_merged() -> None:
    graph = trace(models.load(Attention(), example_inputs=torch.randn(2, 6, 16)))
    (site,) = find_sites(graph)
    assert site.kind == "attention"
    x = torch.randn(3, 6, 16)
    torch.testing.assert_close(run(graph, {graph.inputs[0]: x})[0], Attention()(x).detach(), rtol=1e-5, atol=1e-5)
    apply(ReduceTokens(((site.name, 0.34),)), graph)
    assert run(graph, {graph.inputs[0]: x})[0].shape == (3, 3)
