"""Entities in tags: the rules of conlleval, an independent count, and the F1 beside the accuracy of tokens."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressor.data.splits import Batch
from compressor.quality.evaluate import metric_value
from compressor.quality.heads.entities import Entities, entities, tags_of

TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")


def by_pattern(tags: list[str]) -> set[tuple[str, int, int]]:
    """Find entities with a regular expression over one letter per tag: B or I of a type, and then its I."""
    letters = "".join("OPpLl"[TAGS.index(tag)] for tag in tags)
    found = re.finditer(r"(P|(?<![Pp])p)p*|(L|(?<![Ll])l)l*", letters)
    return {("PER" if each[0][0] in "Pp" else "LOC", each.start(), each.end()) for each in found}


@given(st.lists(st.sampled_from(TAGS), max_size=12))
def test_entities_are_those_of_a_pattern(tags: list[str]) -> None:
    assert entities(tags) == by_pattern(tags)


def test_f1_is_that_of_the_example_of_seqeval() -> None:
    """Of two entities, one is found and one has another start: F1 0.5 (https://github.com/chakki-works/seqeval)."""
    head, ignored = Entities(("O", "B-MISC", "I-MISC", "B-PER", "I-PER")), -100
    gold = np.array([[0, 0, 0, 1, 2, 2, 0, ignored], [3, 4, 0, *[ignored] * 5]])
    chosen = np.array([[0, 0, 1, 2, 2, 2, 0, 3], [3, 4, 0, *[1] * 5]])
    batch = Batch({"input_ids": np.ones_like(gold)}, gold, 1, ("a", "b"))
    columns = head.columns("token_accuracy", batch, np.eye(5)[chosen], None)
    assert head.further("token_accuracy") == ("entity_f1",)
    assert head.further("token_agreement") == ()
    assert metric_value("entity_f1", columns) == pytest.approx(50.0)
    assert metric_value("token_accuracy", columns) == pytest.approx(80.0)


@pytest.mark.parametrize("names", [["NOUN", "VERB"], ["O"], ["O", "B-PER", "PER"], ["O", "B-", "I-"], ["", "B-PER"]])
def test_other_class_names_are_no_tags(names: list[str]) -> None:
    assert tags_of(names) is None
