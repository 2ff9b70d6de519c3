"""Seeded random inputs, for measuring speed without data."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from compressor.data.readers.base import Array, Feeds, Samples
from compressor.models.preprocess import Preprocess
from runtimes.base.vision_language import FLATTENED, LAYOUTS

ROWS = 256


def random_samples(preprocess: Preprocess, seed: int) -> Samples:
    """Return random inputs with the shapes and dtypes of the example; a sample does not depend on its batch.

    Floats are standard normal. Integers are uniform in [0, maximum of the example]. Masks are those of the example,
    because a random attention mask could hide whole rows. Placeholders of images stand where they do in the example,
    whose images also give the sizes.
    """

    def feeds(indices: Sequence[int]) -> Feeds:
        rows = [_row(preprocess, seed, index) for index in indices]
        return {name: np.stack([row[name] for row in rows]) for name in preprocess.inputs}

    return Samples(tuple(str(row) for row in range(ROWS)), feeds, "random inputs")


def _row(preprocess: Preprocess, seed: int, index: int) -> Feeds:
    generator = np.random.default_rng([seed, index])
    token, example = preprocess.image_token, preprocess.example
    if token is None:
        return {name: _values(generator, name, example[name], index) for name in preprocess.inputs}
    is_image = example["input_ids"] == token  # the placeholder may have the largest id, behind the vocabulary
    texts = {**example, "input_ids": np.where(is_image, 0, example["input_ids"])}
    row = {name: _values(generator, name, texts[name], index) for name in preprocess.inputs}
    row["input_ids"] = _with_images(row["input_ids"], is_image[index % len(is_image)], token)
    return row


def _with_images(ids: Array, is_image: Array, token: int) -> Array:
    """Return tokens with placeholders where `is_image` is true; others are replaced by the token before them."""
    others = np.where(ids == token, ids - 1 if token else ids + 1, ids)
    return np.where(is_image, token, others)


def _values(generator: np.random.Generator, name: str, example: Array, index: int) -> Array:
    if name.endswith("mask") or name in LAYOUTS or example.dtype.kind == "b":
        return np.array(example[index % len(example)])
    if example.dtype.kind in "iu":
        integers = generator.integers(0, int(example.max()) + 1, size=example.shape[1:], dtype=np.int64)
        return np.asarray(integers, dtype=example.dtype)
    values = np.asarray(generator.standard_normal(example.shape[1:], dtype=np.float32), dtype=example.dtype)
    return _placed(values, example[index % len(example)]) if name == FLATTENED else values


def _placed(values: Array, patches: Array) -> Array:
    """Return values of patches with the places of others, the first two numbers of each; 0 for padding."""
    places = patches[:, :2]
    return np.concatenate([places, values[:, 2:] * places.any(-1, keepdims=True)], -1)
