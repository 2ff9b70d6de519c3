"""Detection of the inputs that a module takes, by calling it on a short text.

The signature of `forward` is not reliable. It changes between releases (``past_key_values`` became ``cache`` in
transformers 5.24), wrappers hide it, and ``**kwargs`` accepts any name and may ignore it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from passes.execute.offloaded_weights import is_offloaded
from passes.torch_internals import FakeTensorMode

TOKENS = 3  # of the text; with one token less, two remain, which do not broadcast


def text(tokens: int = TOKENS) -> dict[str, torch.Tensor]:
    """Return a text that repeats the token 0, [1, tokens], without padding."""
    ones = torch.ones(1, tokens, dtype=torch.int64)
    return {"input_ids": torch.zeros_like(ones), "attention_mask": ones}


@contextlib.contextmanager
def calling(module: torch.nn.Module) -> Iterator[None]:
    """Disable gradients for calls of a module; propagate only shapes if its weights stay on disk."""
    shapes_only = any(map(is_offloaded, module.parameters()))
    mode = FakeTensorMode(allow_non_fake_inputs=True) if shapes_only else contextlib.nullcontext()
    with torch.inference_mode(), mode:
        yield


def accepts(module: Any, inputs: Mapping[str, torch.Tensor], name: str, value: torch.Tensor) -> bool:
    """Return whether a module can be called with an input of this name.

    Args:
        module: the module to call.
        inputs: the other inputs.
        name: name of the input.
        value: value of the input.
    """
    try:
        module(**inputs, **{name: value})
    except TypeError:
        return False
    return True


def computes_with(module: Any, inputs: Mapping[str, torch.Tensor], name: str, value: torch.Tensor) -> bool:
    """Return whether a module uses an input of this name.

    A module that uses it accepts one value per token and fails with one value less. A module that accepts and ignores
    any keyword argument does not fail.

    Args:
        module: the module to call.
        inputs: the other inputs.
        name: name of the input.
        value: value of the input, [1, tokens].
    """
    if not accepts(module, inputs, name, value):
        return False
    try:
        module(**inputs, **{name: value[:, 1:]})
    except (RuntimeError, IndexError, ValueError):
        return True
    return False
