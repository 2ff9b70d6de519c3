"""Find out which inputs a module takes by calling it on a short text, not by reading the signature of its forward pass.

Signatures change with releases (``past_key_values`` became ``cache`` in transformers 5.24), wrappers hide them, and
``**kwargs`` take any name and may use none of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from passes.execute.offloaded_weights import is_offloaded
from passes.torch_internals import FakeTensorMode

TOKENS = 3  # of the text: two are left where one is taken away, so that nothing broadcasts


def text(tokens: int = TOKENS) -> dict[str, torch.Tensor]:
    """A text of the token 0, [1, tokens], nothing of it padding."""
    ones = torch.ones(1, tokens, dtype=torch.int64)
    return {"input_ids": torch.zeros_like(ones), "attention_mask": ones}


@contextlib.contextmanager
def calling(module: torch.nn.Module) -> Iterator[None]:
    """Call a module without gradients; by shapes alone where its weights stay on disk."""
    shapes_only = any(map(is_offloaded, module.parameters()))
    mode = FakeTensorMode(allow_non_fake_inputs=True) if shapes_only else contextlib.nullcontext()
    with torch.inference_mode(), mode:
        yield


def accepts(module: Any, inputs: Mapping[str, torch.Tensor], name: str, value: torch.Tensor) -> bool:
    """Whether a module can be called with an input of this name.

    Args:
        module: any module.
        inputs: that it is called with besides.
        name: of the input.
        value: of the input.
    """
    try:
        module(**inputs, **{name: value})
    except TypeError:
        return False
    return True


def computes_with(module: Any, inputs: Mapping[str, torch.Tensor], name: str, value: torch.Tensor) -> bool:
    """Whether a module computes with an input of this name: it takes a value for each token, and fails on one less.

    Further keyword arguments that a module takes and ignores do not count.

    Args:
        module: any module.
        inputs: that it is called with besides.
        name: of the input.
        value: [1, tokens].
    """
    if not accepts(module, inputs, name, value):
        return False
    try:
        module(**inputs, **{name: value[:, 1:]})
    except (RuntimeError, IndexError, ValueError):
        return True
    return False
