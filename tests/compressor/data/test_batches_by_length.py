"""Texts of similar length share a batch, and the memory of a batch does not grow with the length of the texts."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from compressor.data.readers.base import Samples
from compressor.data.sliding_windows import TOKENS
from compressor.data.splits import Split, load
from tests.compressor.data.test_unknown_tokens import words


def texts(path):
    rng = np.random.default_rng(3)
    lengths = rng.integers(2, 30, size=80)
    path.write_text("\n".join(" ".join(["w3"] * length) for length in lengths))
    return str(path)


def sizes(split):
    return [int((batch.feeds["input_ids"] == 3).sum()) for batch in split.batches(1)]


def test_every_split_has_its_texts_sorted_by_length_and_no_others(tmp_path):
    source = texts(tmp_path / "texts.txt")
    preprocess = replace(words(), unknown=None)
    data = load(source, preprocess, task="feature-extraction")
    unsorted = load(source, replace(preprocess, lengths=None), task="feature-extraction")
    for part, other in zip(data.parts, unsorted.parts, strict=True):
        assert sorted(part.ids) == sorted(other.ids)
        assert sizes(part) == sorted(sizes(other), reverse=True)


def test_the_middle_of_a_split_has_texts_of_the_median_length(tmp_path):
    data = load(texts(tmp_path / "texts.txt"), replace(words(), unknown=None), task="feature-extraction")
    ranked = sorted(sizes(data.test), reverse=True)
    assert sizes(data.test.middle(1)) == [ranked[(len(ranked) - 1) // 2]]
    assert sizes(data.test.middle(4)) == ranked[(len(ranked) - 4) // 2 :][:4]
    assert data.test.middle(1000).ids == data.test.ids


def test_the_middle_has_fewer_texts_if_they_are_long_but_at_least_three(tmp_path):
    data = load(texts(tmp_path / "texts.txt"), replace(words(), unknown=None), task="feature-extraction")
    median = data.test.tokens[data.test.indices[len(data.test) // 2]]
    assert len(data.test.middle(8, tokens=5 * median)) == 5
    assert len(data.test.middle(8, tokens=9 * median)) == 8
    assert len(data.test.middle(8, tokens=1)) == 3
    assert len(data.test.middle(2, tokens=1)) == 2
    assert len(replace(data.test, tokens={}).middle(8, tokens=1)) == 8  # not texts


@given(
    st.lists(st.integers(1, TOKENS + 100), min_size=1, max_size=60),
    st.integers(1, 8),
    st.integers(1, 2),
    st.sampled_from([TOKENS, 100]),
)
def test_bounded_batches_are_as_large_as_their_bounds_allow(lengths, most, rows, tokens):
    lengths = sorted(lengths, reverse=True)

    def feeds(indices):
        return {"x": np.zeros((len(indices) * rows, max(lengths[index] for index in indices)))}

    samples = Samples(tuple(map(str, range(len(lengths)))), feeds, "", rows_per_sample=rows)
    split = Split("test", samples, tuple(range(len(lengths))), tokens=dict(enumerate(lengths)), most_tokens=tokens)
    batches = list(split.bounded_batches(most))
    assert [name for batch in batches for name in batch.ids] == list(samples.ids)
    for batch in batches:
        assert len(batch.ids) <= most
        assert batch.feeds["x"].size <= tokens or len(batch.ids) == 1
    for batch, following in pairwise(batches):
        joined = (len(batch.ids) + 1) * rows * batch.feeds["x"].shape[1]
        assert following.ids
        assert len(batch.ids) == most or joined > tokens


def test_samples_without_lengths_are_batched_by_number_alone():
    samples = Samples(tuple("abcde"), lambda indices: {"x": np.zeros((len(indices), TOKENS + 1))}, "")
    split = Split("test", samples, (4, 3, 2, 1, 0))
    assert [batch.ids for batch in split.bounded_batches(2)] == [("e", "d"), ("c", "b"), ("a",)]


def test_a_sparse_subset_has_about_the_wished_tokens_of_all_lengths(tmp_path):
    data = load(texts(tmp_path / "texts.txt"), replace(words(), unknown=None), task="feature-extraction")
    every = [count + 1 for count in sizes(data.test)]  # with the start token
    part = data.test.sparse(-(-sum(every) // 4), 1)
    kept = [count + 1 for count in sizes(part)]
    assert len(part) == len(every) // 4
    assert abs(sum(kept) - sum(every) / 4) < max(every)
    assert set(part.ids) < set(data.test.ids)
    assert max(kept) == max(every)
    assert min(kept) <= min(every) + 8
    assert len(data.test.sparse(1, 7)) == 7
    assert data.test.sparse(10**9, 1).ids == data.test.ids


def test_samples_without_lengths_are_not_thinned():
    split = Split("test", Samples(tuple("abc"), lambda indices: {}, ""), (2, 1, 0))
    assert split.sparse(1, 1) is split
