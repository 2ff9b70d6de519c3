"""Entities: spans of tokens whose tags say where an entity begins (``B-PER``) and continues (``I-PER``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from compressor.quality.heads.tokens import IGNORED, TokenClasses
from compressor.quality.intervals import Array, Columns

if TYPE_CHECKING:
    from compressor.data.splits import Batch


@dataclass(frozen=True)
class Entities(TokenClasses):
    """Logits of the tags of tokens; beside the accuracy of tokens, the F1 of whole entities is reported.

    Attributes:
        tags: the tag of each class.
    """

    tags: tuple[str, ...]

    def further(self, metric: str) -> tuple[str, ...]:
        """Return the F1 of entities beside the accuracy of tokens."""
        return ("entity_f1",) if metric == "token_accuracy" else ()

    def columns(self, metric: str, batch: Batch, answer: Array, original: Array | None) -> Columns:
        """Add the numbers of entities of a row: ``hits``, ``predicted``, and ``positive`` for those of the labels."""
        columns = super().columns(metric, batch, answer, original)
        if metric != "token_accuracy":
            return columns
        assert batch.labels is not None
        counts = []
        for gold, chosen in zip(batch.labels, answer.argmax(-1), strict=True):
            scored = gold != IGNORED
            found, wanted = (entities([self.tags[each] for each in side[scored]]) for side in (chosen, gold))
            counts.append((len(found & wanted), len(found), len(wanted)))
        return columns | dict(zip(("hits", "predicted", "positive"), np.array(counts, np.float64).T, strict=True))


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """Return type, first position and position behind the last of each entity, as conlleval of CoNLL-2000 finds them.

    An entity begins at a tag B, and at a tag I that follows no tag of its type.

    >>> sorted(entities(["B-PER", "I-PER", "O", "I-LOC", "B-LOC", "I-PER"]))
    [('LOC', 3, 4), ('LOC', 4, 5), ('PER', 0, 2), ('PER', 5, 6)]
    """
    found, start = set(), 0
    for place, (tag, following) in enumerate(zip(tags, [*tags[1:], "O"], strict=False)):
        kind = tag[2:]
        if tag.startswith("B-") or place == 0 or tags[place - 1][2:] != kind:
            start = place
        if tag != "O" and following != f"I-{kind}":
            found.add((kind, start, place + 1))
    return found


def tags_of(names: Sequence[str]) -> tuple[str, ...] | None:
    """Return the names of the classes if they are tags: B- and I- with a type, and O for tokens outside.

    >>> tags_of(["O", "B-PER", "I-PER"]), tags_of(["NOUN", "VERB"]), tags_of(["O"])
    (('O', 'B-PER', 'I-PER'), None, None)
    """
    tagged = [name for name in names if name.startswith(("B-", "I-")) and len(name) > 2]
    return tuple(names) if tagged and len(tagged) == len([name for name in names if name != "O"]) else None
