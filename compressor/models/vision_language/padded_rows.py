"""Images that vary in size, as rows of patches that are padded behind: SigLIP 2, Gemma 4; and Pixtral's tower alone.

Each row is an image. What a vision model alone computes for padding stands behind the features of a smaller image.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from compressor.models.vision_language.padded_images import TOWER, PaddedImages, compact, encoded
from runtimes.base.vision_language import PIXELS, PLACES, SHAPES, SIZES

TOWER_PLACES = "pixel_position_ids"
PLACED = ("patch_embedder", "encoder", "pooler")  # of a tower of the form of Gemma 4
PATCH_MASK, HIDDEN = "pixel_attention_mask", "last_hidden_state"
SIDES = ((4, 6), (3, 2))  # height and width of the images of the example, in patches
SQUARES = ((3, 4), (2, 3))  # the same in image tokens
CLOSE = 1e-4  # of the largest value; sums in another order
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class PaddedPatches:
    """Patches of images, padded behind, as SigLIP 2 takes them.

    The inputs are ``pixel_values`` [rows, patches, values], ``pixel_attention_mask`` [rows, patches], which is 0 at
    padding, and ``spatial_shapes`` [rows, 2], height and width in patches.

    Attributes:
        values: number of values of a patch.
    """

    values: int

    @property
    def dynamic_axes(self) -> dict[str, dict[int, str]]:
        """Return the inputs in order with their dynamic axes."""
        rows = {0: "batch", 1: "patches"}
        return {PIXELS: rows, PATCH_MASK: rows, SHAPES: {0: "batch"}}

    def example(self) -> Tensors:
        """Return two images of random pixels, of which the second is smaller."""
        shapes = torch.tensor(SIDES)
        counts = shapes.prod(1, keepdim=True)
        mask = (torch.arange(int(counts.max()))[None] < counts).long()
        pixels = torch.randn(*mask.shape, self.values, generator=torch.Generator().manual_seed(0))
        return {PIXELS: pixels * mask[..., None], PATCH_MASK: mask, SHAPES: shapes}


@dataclass(frozen=True)
class PlacedPatches:
    """Patches of images with their places, as Gemma 4 takes them.

    The inputs are ``pixel_values`` [rows, patches, values] and ``image_position_ids`` [rows, patches, 2], column and
    row of each patch, -1 at padding. The patches of a square of `merge` x `merge` together give one feature.

    Attributes:
        values: number of values of a patch.
        merge: side of that square, in patches.
    """

    values: int
    merge: int

    @property
    def dynamic_axes(self) -> dict[str, dict[int, str]]:
        """Return the inputs in order with their dynamic axes."""
        rows = {0: "batch", 1: "patches"}
        return {PIXELS: rows, PLACES: rows}

    def example(self) -> Tensors:
        """Return two images of random pixels, of which the second is smaller."""
        sides = torch.tensor(SQUARES) * self.merge
        counts = sides.prod(1, keepdim=True)
        number = torch.arange(int(counts.max()))[None]
        known = (number < counts)[..., None]
        places = torch.stack([number % sides[:, 1:], number // sides[:, 1:]], -1)
        pixels = torch.rand(*known.shape[:2], self.values, generator=torch.Generator().manual_seed(0))
        return {PIXELS: pixels * known, PLACES: torch.where(known, places, -1)}

    def features(self, module: Any, *images: torch.Tensor) -> torch.Tensor:
        """Return the features of images, [rows, image tokens, width]; those behind a smaller image are zero."""
        pixels, places = images
        torch._check(pixels.shape[1] == places.shape[1])
        model = getattr(module, "model", module)
        padding = (places == -1).all(-1)
        if getattr(model, "vision_tower", None) is None:  # patches are embedded one by one
            found = model.embed_vision(pixels, places, return_dict=True).pooler_output
        else:
            found = model.embed_vision(self._pooled(model.vision_tower, pixels, places, padding))
        count = (~padding).sum(1, keepdim=True) // self.merge**2
        known: torch.Tensor = torch.arange(found.shape[1])[None] < count
        return torch.where(known[..., None], found, 0.0)

    def _pooled(self, tower: Any, *inputs: torch.Tensor) -> torch.Tensor:
        """Return the states of squares of patches, [rows, squares, width], those of the image first."""
        pixels, places, padding = inputs
        embeds = tower.patch_embedder(pixels, places, padding)
        states = tower.encoder(
            inputs_embeds=embeds, attention_mask=~padding, pixel_position_ids=places
        ).last_hidden_state
        columns = (places[..., 0].amax(1, keepdim=True) + 1) // self.merge
        square = places[..., 0] // self.merge + columns * (places[..., 1] // self.merge)
        numbers = torch.arange(pixels.shape[1] // self.merge**2)[None, :, None]
        inside = (square[:, None] == numbers) & ~padding[:, None]
        pooled = inside.to(states.dtype) @ states * (tower.pooler.root_hidden_size / self.merge**2)
        return (pooled - tower.std_bias) * tower.std_scale if tower.config.standardize else pooled  # type: ignore[no-any-return]

    def of_length(self, features: int) -> PlacedPatches:
        """Return the same: the places tell the number of features."""
        return self

    def tokens(self, row: Mapping[str, Any]) -> int:
        """Return the number of features of the image of a row."""
        return int((np.asarray(row[PLACES]) != -1).all(-1).sum()) // self.merge**2

    def row(self, found: Mapping[str, Any], name: str) -> Any:
        """Return an input of the only row."""
        return found[name][0]

    def arguments(self, example: Tensors, is_image: torch.Tensor) -> Tensors:
        """Return the example: the module takes the same inputs."""
        return example


class PlacedTower(PlacedPatches):
    """Patches with their places, ``pixel_position_ids``, for a vision tower of the form of Gemma 4 alone."""

    @property
    def dynamic_axes(self) -> dict[str, dict[int, str]]:
        """Return the inputs in order with their dynamic axes."""
        return {PIXELS: {0: "batch", 1: "patches"}, TOWER_PLACES: {0: "batch", 1: "patches"}}

    def example(self) -> Tensors:
        """Return two images of random pixels, of which the second is smaller."""
        found = super().example()
        return {PIXELS: found[PIXELS], TOWER_PLACES: found[PLACES]}

    def states(self, module: Any, pixels: torch.Tensor, places: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the states of squares of patches [rows, squares, width], with zeros behind those of an image."""
        torch._check(pixels.shape[1] == places.shape[1])
        padding = (places == -1).all(-1)
        found = self._pooled(module, pixels, places, padding)
        known = torch.arange(found.shape[1])[None] < (~padding).sum(1, keepdim=True) // self.merge**2
        return (torch.where(known[..., None], found, 0.0),)

    def counts(self, example: Mapping[str, torch.Tensor]) -> list[int]:
        """Return the number of states of each image."""
        found: list[int] = ((example[TOWER_PLACES] != -1).all(-1).sum(1) // self.merge**2).tolist()
        return found


def placed_patches(module: Any) -> PlacedPatches | str:
    """Return the images of a model of the form of Gemma 4, or what it lacks, a clause without a full stop."""
    model, config = getattr(module, "model", module), module.config.vision_config
    tower = getattr(model, "vision_tower", None)
    missing = [name for name in PLACED if tower is not None and not hasattr(tower, name)]
    missing += [] if hasattr(model, "embed_vision") else ["embed_vision"]
    if missing:
        return f"takes {PLACES} beside the pixels, but has no {' and '.join(missing)}, as Gemma 4 has"
    side = config.patch_size if tower is not None else config.model_patch_size
    return PlacedPatches(3 * side**2, config.pooling_kernel_size if tower is not None else 1)


@dataclass(frozen=True)
class PaddedTower(PaddedImages):
    """Pixels of images, padded below and on the right, and their sizes, for a vision tower of the form of Pixtral.

    Attributes:
        side: side of a patch in pixels.
        channels: number of channels.
    """

    def states(self, module: Any, pixels: torch.Tensor, sizes: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the hidden states of the patches [rows, patches, width], with zeros behind those of an image."""
        torch._check(pixels.shape[0] == sizes.shape[0])
        hidden, _, wide = encoded(module, pixels, sizes, len(module.transformer.layers))
        return (compact(hidden, sizes // self.side, wide),)

    def counts(self, example: Mapping[str, torch.Tensor]) -> list[int]:
        """Return the number of states of each image."""
        found: list[int] = (example[SIZES] // self.side).prod(1).tolist()
        return found


def padded_rows(module: Any) -> PaddedPatches | PaddedTower | PlacedTower | None:
    """Return the images of a vision model that takes them padded, with their sizes; None for other models."""
    taken = inspect.signature(module.forward).parameters
    if PIXELS not in taken or "input_ids" in taken:
        return None
    config = getattr(module.config, "vision_config", module.config)
    if SHAPES in taken and PATCH_MASK in taken:
        return PaddedPatches(config.num_channels * config.patch_size**2)
    if TOWER_PLACES in taken and all(hasattr(module, name) for name in PLACED):
        placed = PlacedTower(3 * config.patch_size**2, config.pooling_kernel_size)
        return placed if _agrees(module, placed) else None
    if SIZES in taken and all(hasattr(module, name) for name in TOWER):
        images = PaddedTower(config.patch_size, config.num_channels)
        return images if _agrees(module, images) else None
    return None


def own_states(module: Any, example: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the hidden states of a tower's own forward for the patches of all images, [patches, width]."""
    with torch.inference_mode():
        return module(**example)[HIDDEN].flatten(0, -2)  # type: ignore[no-any-return]


def _agrees(module: Any, images: PaddedTower | PlacedTower) -> bool:
    """Return whether the states of a tower are those of its own forward."""
    example = images.example()
    counts = images.counts(example)
    with torch.inference_mode():
        (found,) = images.states(module, *example.values())
    kept = torch.cat([row[:count] for row, count in zip(found, counts, strict=True)])
    expected = own_states(module, example)
    return kept.shape == expected.shape and bool((kept - expected).abs().max() <= CLOSE * expected.abs().max())
