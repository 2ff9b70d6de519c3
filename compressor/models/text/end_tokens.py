"""Encoder-decoders that classify a text by the hidden state of its last end token, such as BART and T5.

Transformers selects the hidden states of all end tokens with a mask, and divides them among the rows. torch.export
cannot trace that, because it does not know their number. Here the position of the last end token of each row is
computed, and one hidden state is read there, which is the same value.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from compressor.limitations import Limitation
from compressor.models.base import Model
from compressor.models.text.probe import calling
from passes.execute.offloaded_weights import is_offloaded

TASK = "text-classification"
TOKEN_AXES = 2  # of a mask of tokens, [rows, tokens]


class _LastOfMask(TorchFunctionMode):
    """Reads, for ``values[mask, :]`` with a mask of tokens, the value at the last true position of each row."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.__getitem__ and _selects_tokens(args[1]):
            self.reads += 1
            return at_last(args[0], args[1][0])
        if func is torch.unique_consecutive and args[0].ndim == 1:  # of the counts: rows may have different ones
            return args[0][:1]
        return func(*args, **({} if kwargs is None else kwargs))


def _selects_tokens(index: Any) -> bool:
    if not (isinstance(index, tuple) and len(index) == TOKEN_AXES and isinstance(index[1], slice)):
        return False
    mask = index[0]
    return isinstance(mask, torch.Tensor) and mask.dtype == torch.bool and mask.ndim == TOKEN_AXES


def at_last(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the value of each row at the last true position of its mask, or at the first position without one.

    Args:
        values: [rows, tokens, width].
        mask: bools, [rows, tokens].

    Returns:
        Values, [rows, width].
    """
    rows, tokens = (torch.arange(size, device=values.device) for size in mask.shape)
    return values[rows, (tokens.int() * mask).argmax(-1)]  # ONNX Runtime has no ArgMax of int64


def reads_end_token(module: Any, task: str) -> bool:
    """Return whether a classifier of texts reads the last end token, and has the same logits if it is read by index.

    The texts of this check have two end tokens each, at different positions. Weights that are on disk are not read;
    then the logits are not compared.
    """
    end = getattr(module.config, "eos_token_id", None)
    if task != TASK or not getattr(module.config, "is_encoder_decoder", False) or not isinstance(end, int):
        return False
    other = int(end == 0)
    ids = torch.tensor([[other, end, end], [end, end, other]])
    mode = _LastOfMask()
    try:
        with calling(module):
            with mode:
                found = module(input_ids=ids)["logits"]
            if mode.reads != 1 or any(map(is_offloaded, module.parameters())):
                return mode.reads == 1
            return bool(torch.equal(found, module(input_ids=ids)["logits"]))
    except Exception:  # modules raise errors of all kinds; the check of the text model states them
        return False


@contextlib.contextmanager
def at_end_token(module: Any, task: str) -> Iterator[bool]:
    """Have such a classifier read the last end token by index, and yield whether it is one."""
    found = reads_end_token(module, task)
    with _LastOfMask() if found else contextlib.nullcontext():
        yield found


def with_end_token(model: Model) -> Model:
    """Return the model of such a classifier, whose call reads the last end token by index."""
    module: Any = model.module
    said = _limitations(module.config.eos_token_id, model.tokenizer)
    return replace(model, call=partial(_at_end_token, call=model.call), limitations=(*model.limitations, *said))


def _at_end_token(
    module: Any, *tensors: torch.Tensor, call: Callable[..., tuple[torch.Tensor, ...]]
) -> tuple[torch.Tensor, ...]:
    with _LastOfMask():
        return call(module, *tensors)


def _limitations(end: int, tokenizer: Any) -> Iterator[Limitation]:
    """Yield that rows need an end token, unless the tokenizer ends every text with it."""
    if tokenizer is None or tokenizer("a")["input_ids"][-1] != end:
        yield Limitation(
            "end token",
            f"a text is classified at its last token id {end}; one without it is classified at its first token, "
            "where transformers raises an error",
        )
