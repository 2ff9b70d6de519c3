"""Limitations: what a model could have had and an export does not give it, each with the reason.

They are stated in the table, in report.json under ``limitations``, in report.html and in the card.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Limitation:
    """One thing that an export lacks, or that was assumed because nothing said it.

    Attributes:
        feature: a noun, such as ``KV cache`` or ``tokenizer``.
        reason: what was found and what follows from it, a clause without a full stop.
    """

    feature: str
    reason: str

    def __str__(self) -> str:
        """The limitation as a sentence.

        >>> str(Limitation("tokenizer", "none was found, so the data must be token ids"))
        'tokenizer: none was found, so the data must be token ids.'
        """
        return f"{self.feature}: {self.reason}."


def listed(limitations: Sequence[Limitation]) -> list[str]:
    """Lines for a terminal: a heading and a line for each; none where there are none."""
    return ["Limitations:", *(f"- {each}" for each in limitations)] if limitations else []
