"""Images that vary in size: their features and positions are those of transformers, whatever the size."""

import functools
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor import models
from compressor.models.vision_language.padded_grids import Places
from compressor.models.vision_language.parts import parts_of
from runtimes.base.grid_positions import grid_positions, next_positions
from tests.varying_images import GRIDS, KINDS, TOKEN, build, inputs, picture, rows, saved, text

CLOSE = 1e-5  # relative; sums in another order
SIZES = ((8, 8), (8, 40), (40, 8), (24, 40), (29, 17), (17, 29), (64, 12), (33, 33), (5, 60))


@functools.cache
def module_and_images(kind):
    module = build(kind)
    return module, parts_of(module, "m").call.images


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_those_of_transformers_for_any_size_and_next_to_a_larger_image(kind):
    module, images = module_and_images(kind)
    names = tuple(images.dynamic_axes)
    large = rows(kind, inputs(kind, 2, (48, 48)))
    for size in SIZES[kind == "mistral3" :]:  # transformers fails for an image of a single token there
        found = inputs(kind, 2, size)
        tensors = {name: torch.as_tensor(found[name]) for name in names}
        with torch.inference_mode():
            own = module.get_image_features(**tensors, return_dict=True)
            parts = (own.pooler_output, *(getattr(own, "deepstack_features", None) or ()))
            expected = torch.cat([part for (part,) in parts], -1)
            row = {name: torch.as_tensor(rows(kind, found)[name]) for name in names}
            alone = images.features(module, *row.values())
            both = images.features(module, *[padded(row[name], torch.as_tensor(large[name])) for name in names])
        count = images.tokens({name: value[0].numpy() for name, value in row.items()})
        assert count == len(expected) == (found["input_ids"] == TOKEN).sum()
        for features in (alone, both):
            assert torch.allclose(features[0, :count], expected, rtol=CLOSE, atol=CLOSE * expected.abs().max())
            assert not features[0, count:].any()


def padded(small, large):
    """Two rows, of which the first is followed by zeros, or the second."""
    both = small.new_zeros(2, *map(max, zip(small.shape[1:], large.shape[1:], strict=True)))
    for target, each in zip(both, (small[0], large[0]), strict=True):
        target[tuple(map(slice, each.shape))] = each
    return both


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(0, 4), st.integers(0, 4)), min_size=1))
def test_positions_are_those_of_transformers(rows_of):
    module, _ = module_and_images("qwen2_vl")
    longest = max(before + high * wide + behind for high, wide, before, behind in rows_of)
    ids, mask = np.full((len(rows_of), longest), 5), np.zeros((len(rows_of), longest), np.int64)
    for row, (high, wide, before, behind) in enumerate(rows_of):
        start = longest - before - high * wide - behind if row % 2 else 0  # padded on the left, or on the right
        mask[row, start : start + before + high * wide + behind] = 1
        ids[row, start + before : start + before + high * wide] = TOKEN
    grids = np.array([[1, 2 * high, 2 * wide] for high, wide, _, _ in rows_of])
    expected, deltas = module.model.get_rope_index(
        torch.from_numpy(ids), torch.from_numpy((ids == TOKEN).astype(int)), torch.from_numpy(grids),
        attention_mask=torch.from_numpy(mask),
    )  # fmt: skip
    found = grid_positions(ids, mask, grids, TOKEN, 2)
    assert np.array_equal(found.transpose(2, 0, 1), expected.numpy())
    assert np.array_equal(next_positions(found)[:, 0, 0], deltas[:, 0].numpy() + mask.sum(1))


def test_windows_and_frames_are_told_apart():
    """Patches of a frame of 4 x 6 in squares of 2 x 2, of which two frames; windows of 4 x 4."""
    places = Places.of(torch.tensor([[2, 4, 6]]), 50, 2)
    full, windows = places.mask(places.frame)[0, 0], places.mask(places.windows(4))[0, 0]
    pairs = itertools.product(range(50), repeat=2)
    frame, row, column = (each[0].tolist() for each in (places.frame, places.row, places.column))
    for left, right in pairs:
        known = left < 48, right < 48
        same = frame[left] == frame[right] if all(known) else not any(known)
        assert full[left, right] == same
        window = (row[left] // 4, column[left] // 4) == (row[right] // 4, column[right] // 4)
        assert windows[left, right] == (same and (window or not all(known)))
    assert sorted(zip(frame[:48], row[:48], column[:48], strict=True)) == list(
        itertools.product(range(2), range(4), range(6))
    )


# transformers opens the tokenizer of HyperCLOVAX by a class of its own, which the test's is not.
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "hyperclovax"])
def test_the_processor_gives_the_inputs_and_the_tokens_that_enclose_an_image(kind, tmp_path_factory):
    model = models.load(str(saved(kind, tmp_path_factory.mktemp("varying"))))
    found = inputs(kind, 2, (24, 40))
    prepared = model.preprocess.image_text(picture(0, (24, 40)), text(kind, 2))
    bare = model.preprocess.image_text(picture(0, (24, 40)), text(kind, 2).split(" ", 1)[1])
    expected = rows(kind, found)
    assert set(prepared) == set(model.preprocess.inputs)
    for name, value in prepared.items():
        assert np.array_equal(value, expected[name][0])
        assert np.array_equal(bare[name], value)
    assert model.preprocess.image_tokens(prepared) == (found["input_ids"] == TOKEN).sum()
    assert (model.preprocess.grid is not None) == (kind in GRIDS)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_timed_and_what_is_not_taken_is_said(kind, tmp_path_factory):
    model = models.load(str(saved(kind, tmp_path_factory.getbasetemp())))
    stated = {each.feature: each.reason for each in model.limitations}
    tokens = int((model.example["input_ids"][0] == TOKEN).sum())
    assert stated.pop("size of the timed image") == f"images vary in size, and one of {tokens} image tokens is timed"
    windows = {"videos", "windows of the vision tower"}
    expected = {"qwen2_5_vl": windows, "hyperclovax": windows, "llava_next": set(), "mistral3": set()}
    expected["gemma4_vision"] = {"videos", "mixture of experts"}
    assert set(stated) == expected.get(kind, {"videos"})
