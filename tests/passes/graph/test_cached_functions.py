"""Functions under `functools.lru_cache` keep no tensors without elements."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch
import transformers

from passes.graph.cached_functions import forget_results
from passes.torch_internals import FakeTensor, FakeTensorMode


@functools.lru_cache(maxsize=4)
def positions(tokens: int) -> torch.Tensor:
    return torch.arange(tokens)


@functools.lru_cache(maxsize=4)
def other(tokens: int) -> torch.Tensor:
    return torch.ones(tokens)


class Positions(torch.nn.Module):
    """A module whose file has cached functions."""

    @staticmethod
    @functools.lru_cache(maxsize=4)
    def own(tokens: int) -> torch.Tensor:
        return torch.arange(tokens)


@pytest.fixture(autouse=True)
def cleared() -> Iterator[None]:
    yield
    positions.cache_clear()
    other.cache_clear()


def test_a_result_without_elements_is_forgotten() -> None:
    with FakeTensorMode():
        positions(3)
    assert type(positions(3)) is not torch.Tensor  # without the block, real calls get it
    positions.cache_clear()
    with forget_results(Positions()), FakeTensorMode():
        positions(3)
    assert positions(3).tolist() == [0, 1, 2]


def test_it_is_forgotten_also_after_an_error() -> None:
    def fails() -> None:
        with forget_results(Positions()), FakeTensorMode():
            positions(3)
            raise ValueError("of the model")

    with pytest.raises(ValueError, match="of the model"):
        fails()
    assert positions(3).tolist() == [0, 1, 2]


def test_functions_that_only_looked_up_keep_their_results() -> None:
    kept = positions(5)
    with forget_results(Positions()):
        positions(5)
        other(2)
    assert positions(5) is kept
    assert other.cache_info().currsize == 0


def test_methods_and_wrapped_functions_are_found() -> None:
    """transformers wraps its cached methods in a function that holds the cached one."""
    cached = transformers.models.rt_detr.modeling_rt_detr.RTDetrSinePositionEmbedding
    with forget_results(cached(embed_dim=8)), forget_results(Positions()), FakeTensorMode():
        Positions.own(3)
        found = cached(embed_dim=8)(width=2, height=2, device=torch.device("cpu"), dtype=torch.float32)
    assert Positions.own(3).tolist() == [0, 1, 2]
    again = cached(embed_dim=8)(width=2, height=2, device=torch.device("cpu"), dtype=torch.float32)
    assert (type(found), type(again)) == (FakeTensor, torch.Tensor)
