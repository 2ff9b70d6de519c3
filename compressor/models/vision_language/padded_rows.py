"""Vision models alone whose images vary in size and are padded: rows of patches of SigLIP 2, pixels of Pixtral's tower.

Each row is an image. What the model computes for padding stands behind the features of a smaller image.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from compressor.models.vision_language.padded_images import TOWER, PaddedImages, compact, encoded
from runtimes.base.vision_language import PIXELS, SHAPES, SIZES

PATCH_MASK, HIDDEN = "pixel_attention_mask", "last_hidden_state"
SIDES = ((4, 6), (3, 2))  # height and width of the images of the example, in patches
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


def padded_rows(module: Any) -> PaddedPatches | PaddedTower | None:
    """Return the images of a vision model that takes them padded, with their sizes; None for other models."""
    taken = inspect.signature(module.forward).parameters
    if PIXELS not in taken or "input_ids" in taken:
        return None
    config = getattr(module.config, "vision_config", module.config)
    if SHAPES in taken and PATCH_MASK in taken:
        return PaddedPatches(config.num_channels * config.patch_size**2)
    if SIZES in taken and all(hasattr(module, name) for name in TOWER):
        images = PaddedTower(config.patch_size, config.num_channels)
        return images if _agrees(module, images) else None
    return None


def own_states(module: Any, example: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the hidden states of a tower's own forward for the patches of all images, [patches, width]."""
    with torch.inference_mode():
        return module(**example)[HIDDEN].flatten(0, -2)  # type: ignore[no-any-return]


def _agrees(module: Any, images: PaddedTower) -> bool:
    """Return whether the states of a tower are those of its own forward."""
    example = images.example()
    counts = (example[SIZES] // images.side).prod(1).tolist()
    with torch.inference_mode():
        (found,) = images.states(module, *example.values())
    kept = torch.cat([row[:count] for row, count in zip(found, counts, strict=True)])
    expected = own_states(module, example)
    return kept.shape == expected.shape and bool((kept - expected).abs().max() <= CLOSE * expected.abs().max())
