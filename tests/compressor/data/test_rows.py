"""Feeds of language models are cut to a number of tokens."""

import numpy as np
import pytest

from compressor.data.rows import bounded_texts

AXES = {
    "input_ids": {0: "batch", 1: "sequence"},
    "attention_mask": {0: "batch", 1: "total_sequence"},
    "past.0.key": {0: "batch", 2: "past_sequence"},
}


def feeds(mask):
    ids = np.arange(10).reshape(2, 5)
    return {"input_ids": ids, "attention_mask": np.array(mask), "past.0.key": np.zeros((2, 3, 0, 4))}


@pytest.mark.parametrize(("most", "kept"), [(100, 5), (9, 4), (1, 1)])
def test_the_first_tokens_of_texts_are_kept_and_the_last_of_those_padded_on_the_left(most, kept):
    right, left = [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], [[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]
    for mask, ids in ((right, [0, 5]), (left, [5 - kept, 10 - kept])):
        found = bounded_texts(feeds(mask), AXES, most)
        assert found["input_ids"].shape == found["attention_mask"].shape == (2, kept)
        assert found["input_ids"][:, 0].tolist() == ids
        assert found["attention_mask"].any(1).all()
        assert found["past.0.key"].shape == (2, 3, 0, 4)
