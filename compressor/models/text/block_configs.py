"""The entries of `block_configs` in a checkpoint whose blocks differ, see `compressor.models.text.nemotron_nas`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

MODEL_TYPE = "nemotron-nas"
ARCHITECTURE = "DeciLMForCausalLM"
MULTIPLE = 256  # the width of an MLP by `ffn_mult` is rounded up to a multiple of it
DIGITS = 6  # NVIDIA's config rounds `ffn_mult` to them


@dataclass(frozen=True)
class BlockShape:
    """What one block of a checkpoint holds.

    Attributes:
        key_value_heads: number of heads of keys and values; None for a block without attention.
        width: number of inner features of the MLP; None for a block without MLP.
    """

    key_value_heads: int | None
    width: int | None

    def to_config(self, heads: int, hidden_size: int) -> dict[str, Any]:
        """Return the entry of `block_configs`, with all keys that readers look up.

        The width is given as `ffn_mult`, which every reader takes, or else as `intermediate_size`, which only vLLM
        takes.

        Args:
            heads: number of heads of queries.
            hidden_size: width of the trunk.
        """
        group = None if self.key_value_heads is None else heads // self.key_value_heads
        multiple = None if self.width is None else ffn_mult(self.width, hidden_size)
        given = self.width is not None and multiple is None
        width = {"intermediate_size": self.width} if given else {"ffn_mult": multiple}
        return {
            "attention": {"no_op": group is None, "replace_with_linear": False, "n_heads_in_group": group},
            "ffn": {"no_op": self.width is None, "replace_with_linear": False, **width},
        }


def mlp_width(multiple: float, hidden_size: int) -> int:
    """Return the width of an MLP by its `ffn_mult`: two thirds of the product, rounded up to a multiple of 256.

    The rule is that of DeciLM's code, which all readers share.

    >>> mlp_width(5.25, 4096), mlp_width(4.0, 576), mlp_width(3.9, 576)
    (14336, 1536, 1536)
    """
    exact = int(2 * multiple * hidden_size / 3)
    return exact + -exact % MULTIPLE


def ffn_mult(width: int, hidden_size: int) -> float | None:
    """Return an `ffn_mult` that gives this width, also after it was rounded to six digits; None if there is none.

    >>> ffn_mult(14336, 4096), ffn_mult(1536, 576), ffn_mult(172, 64)
    (5.25, 4.0, None)
    """
    for exact in (width, width - MULTIPLE / 2):
        multiple = 3 * exact / (2 * hidden_size)
        if {mlp_width(multiple, hidden_size), mlp_width(round(multiple, DIGITS), hidden_size)} == {width}:
            return multiple
    return None
