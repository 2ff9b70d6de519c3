"""The inputs that a vision-language model has beside its own once image tokens are dropped from its prompt."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from compressor.models.base import Model
from compressor.models.text.kv_cache import PAST_TOKENS

Feeds = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class _WithIndices:
    """Adds the indices of the tokens in the caches, of which there are none before the first call."""

    complete: Callable[[Feeds], Feeds]
    names: tuple[str, ...]

    def __call__(self, feeds: Feeds) -> Feeds:
        rows = len(feeds["input_ids"])
        return self.complete(feeds) | {name: np.zeros((rows, 0), np.int64) for name in self.names}


def with_indices(model: Model, depths: Collection[int]) -> Model:
    """Return a model whose feeds and example have the inputs of stages; its own inputs and outputs stay.

    Args:
        model: a vision-language model.
        depths: depths of the stages, see `passes.image_tokens.image_tokens.DropImageTokens`.
    """
    complete = model.preprocess.complete
    assert complete is not None
    state = {f"present.{depth}.tokens": f"past_key_values.{depth}.tokens" for depth in depths}
    names = tuple(state.values())
    rows = len(model.example["input_ids"])
    return replace(
        model,
        example=model.example | {name: torch.arange(PAST_TOKENS).repeat(rows, 1) for name in names},
        dynamic_axes=model.dynamic_axes | {name: {0: "batch", 1: "past_sequence"} for name in names},
        preprocess=replace(model.preprocess, complete=_WithIndices(complete, names)),
    )


def with_state(model: Model, depths: Collection[int]) -> Model:
    """Return a model whose state has the indices of the tokens in the caches behind stages.

    Those of the last stage tell which tokens the logits are of.
    """
    state = {f"present.{depth}.tokens": f"past_key_values.{depth}.tokens" for depth in depths}
    return replace(model, state={**model.state, **state}, places=tuple(state))
