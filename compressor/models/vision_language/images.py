"""The images of a vision-language model: its inputs for them, their features, and how many tokens stand for one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy.typing as npt
import torch

from compressor.models.vision_language.image_features import MASK, image_features, source_of
from runtimes.base.vision_language import PIXELS, QUERY_IDS, QUERY_MASK

WORDS = (8, 5)  # tokens of the texts of the example that a Q-Former reads
Rows = dict[str, npt.NDArray[Any]]
Tensors = dict[str, torch.Tensor]


class Images(Protocol):
    """One image for each row of text, in the form that a family of models takes."""

    @property
    def dynamic_axes(self) -> dict[str, dict[int, str]]:
        """Return the inputs in order, ``pixel_values`` first, with their dynamic axes."""

    def example(self) -> Tensors:
        """Return the inputs of two rows of random images."""

    def features(self, module: Any, *images: torch.Tensor) -> torch.Tensor:
        """Return the features of images, [rows, image tokens, width]; those behind a smaller image are zero."""

    def of_length(self, features: int) -> Images:
        """Return the images, with the number of features of a row of the example."""

    def tokens(self, row: Mapping[str, Any]) -> int:
        """Return the number of features of the image of a row, given its inputs without the axis of rows."""

    def row(self, found: Mapping[str, Any], name: str) -> Any:
        """Return an input of the only row from what the processor returns for one image."""

    def arguments(self, example: Tensors, is_image: torch.Tensor) -> Tensors:
        """Return the arguments of the module's own forward for an example; `is_image` marks the image tokens."""


@dataclass(frozen=True)
class OneSize:
    """Images of one size, as in LLaVA: ``pixel_values`` [rows, channels, height, width].

    With tiles, as in Idefics3, images are cut into tiles of that size: [rows, tiles, channels, height, width], and
    ``pixel_attention_mask`` tells the pixels of a tile that are no padding.

    Attributes:
        shape: channels, height and width.
        tiled: whether images are cut into tiles.
        each: number of features of an image, or of a tile; 0 before it is known.
    """

    shape: tuple[int, int, int]
    tiled: bool
    each: int = 0

    @property
    def dynamic_axes(self) -> dict[str, dict[int, str]]:
        """Return the inputs in order with their dynamic axes."""
        if not self.tiled:
            return {PIXELS: {0: "batch"}}
        return {name: {0: "batch", 1: "tiles"} for name in (PIXELS, MASK)}

    def example(self) -> Tensors:
        """Return two rows of random images, two tiles each if the model cuts images."""
        generator = torch.Generator().manual_seed(0)
        if not self.tiled:
            return {PIXELS: torch.randn(2, *self.shape, generator=generator)}
        pixels = torch.randn(2, 2, *self.shape, generator=generator)
        return {PIXELS: pixels, MASK: torch.ones(2, 2, *self.shape[1:], dtype=torch.bool)}

    def features(self, module: Any, *images: torch.Tensor) -> torch.Tensor:
        """Return the features of images, [rows, image tokens, width]."""
        return image_features(module, *images)

    def of_length(self, features: int) -> OneSize:
        """Return the images, with the number of features of a row of the example."""
        return replace(self, each=features // 2 if self.tiled else features)

    def tokens(self, row: Mapping[str, Any]) -> int:
        """Return the number of features of the image of a row."""
        return len(row[PIXELS]) * self.each if self.tiled else self.each

    def row(self, found: Mapping[str, Any], name: str) -> Any:
        """Return an input of the only row."""
        return found[name][0]

    def arguments(self, example: Tensors, is_image: torch.Tensor) -> Tensors:
        """Return the example: the module takes the same inputs."""
        return example


@dataclass(frozen=True)
class Instructed(OneSize):
    """Images of one size, of which queries read what a text asks for, as in InstructBLIP.

    The text is in the tokens of the Q-Former: ``qformer_input_ids`` and ``qformer_attention_mask``, [rows, tokens].
    Clips are ``pixel_values`` [rows, frames, channels, height, width], whose features stand behind each other.

    Attributes:
        vocabulary: number of tokens that the Q-Former knows.
        frames: number of frames of a clip, of a model that sees clips; 0 for images.
    """

    vocabulary: int = 0
    frames: int = 0

    @property
    def dynamic_axes(self) -> dict[str, dict[int, str]]:
        """Return the inputs in order with their dynamic axes."""
        text = {0: "batch", 1: "instruction"}
        return super().dynamic_axes | {QUERY_IDS: text, QUERY_MASK: text}

    def example(self) -> Tensors:
        """Return two rows of random images, with random texts of which the second is shorter."""
        size = (len(WORDS), max(WORDS))
        ids = torch.randint(0, self.vocabulary, size, generator=torch.Generator().manual_seed(0))
        mask = (torch.arange(max(WORDS)) < torch.tensor(WORDS)[:, None]).long()
        frames = (self.frames,) if self.frames else ()
        pixels = torch.randn(len(WORDS), *frames, *self.shape, generator=torch.Generator().manual_seed(0))
        return {PIXELS: pixels, QUERY_IDS: ids, QUERY_MASK: mask}

    def features(self, module: Any, *images: torch.Tensor) -> torch.Tensor:
        """Return the features of images or of all frames of clips, [rows, image tokens, width]."""
        pixels, ids, mask = images
        torch._check(pixels.shape[0] == ids.shape[0])
        source = source_of(module)
        compute = source.get_video_features if self.frames else source.get_image_features
        found = compute(pixels, ids, mask, return_dict=True)
        return found.pooler_output  # type: ignore[no-any-return]
