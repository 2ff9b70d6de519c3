"""Decoders that do not mask later tokens when they have a cache, since `generate` gives them one token at a time.

FSMT's decoder reads the mask of later tokens as an argument, which its model leaves out with a cache. Several target
tokens in one call, as they are evaluated, would then be predicted from the tokens behind them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

MASK = "decoder_causal_mask"
SAME = 1e-4  # of the largest logit; later tokens may change the order of sums, but nothing else


def mask_later_tokens(module: Any) -> None:
    """Have a decoder that takes a mask of later tokens given one when it has a cache; other decoders stay."""
    decoder = module.get_decoder()
    if MASK in inspect.signature(decoder.forward).parameters:
        decoder.register_forward_pre_hook(_with_mask, with_kwargs=True)


def _with_mask(
    decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Add the mask [tokens, past and tokens] to the arguments, -inf where a later token would be read."""
    cache = kwargs.get("cache")
    if kwargs.get(MASK) is not None or cache is None:
        return None
    ids: torch.Tensor = args[0]
    past, tokens = cache.get_seq_length(), ids.shape[1]
    places = torch.arange(past + tokens, device=ids.device)
    later = places[None] > places[past:, None]
    mask = torch.zeros(later.shape, device=ids.device).masked_fill(later, float("-inf"))
    return args, {**kwargs, MASK: mask}


def reads_ahead(logits: Callable[[torch.Tensor], torch.Tensor], ids: torch.Tensor) -> bool:
    """Return whether the logits of a target's tokens depend on its last token, which is behind all others.

    Args:
        logits: computes [rows, tokens, vocabulary] from decoder tokens [rows, tokens].
        ids: decoder tokens, [rows, tokens].
    """
    other = ids.clone()
    other[:, -1] += 1
    one, two = (logits(each)[:, :-1] for each in (ids, other))
    return not bool((one - two).abs().max() <= SAME * one.abs().max())
