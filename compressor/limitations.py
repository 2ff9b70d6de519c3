"""Limitations of an export: features that it lacks and properties that were assumed, each with the reason.

They are listed in the terminal, in report.json under ``limitations``, in report.html and in the model card.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Limitation:
    """A feature that an export lacks, or a property that was assumed because it is not specified.

    Attributes:
        feature: a noun, such as ``KV cache`` or ``tokenizer``.
        reason: the cause and its consequence, as a clause without a full stop.
    """

    feature: str
    reason: str

    def __str__(self) -> str:
        """Return the limitation as a sentence.

        >>> str(Limitation("tokenizer", "none was found, so the data must be token ids"))
        'tokenizer: none was found, so the data must be token ids.'
        """
        return f"{self.feature}: {self.reason}."


def format_limitations(limitations: Sequence[Limitation]) -> list[str]:
    """Return a heading and one line per limitation for the terminal, or an empty list if there are no limitations."""
    return ["Limitations:", *(f"- {limitation}" for limitation in limitations)] if limitations else []
