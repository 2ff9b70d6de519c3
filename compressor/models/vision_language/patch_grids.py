"""Images as grids of patches, as in Qwen2-VL, Qwen3-VL and GLM-4V: each image has its own height and width.

Each image is a row of patches, padded behind, see `compressor.models.vision_language.padded_grids`. What the encoder
computes beside the features, to be added behind the first blocks of the language model, stands behind them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from compressor.models.base import first_line
from compressor.models.vision_language.padded_grids import padded_grids
from runtimes.base.vision_language import GRID, PIXELS

Tensors = dict[str, torch.Tensor]
SIDES = ((16, 16), (8, 12))  # height and width of the images of the example, in patches
# Names of sizes in the configs of vision encoders.
CHANNELS = ("in_channels", "num_channels", "in_chans")
FRAMES = ("temporal_patch_size", "patch_temporal")
STACKED = "deepstack_features"  # what is added behind blocks of the language model (Meng et al. 2024)


@dataclass(frozen=True)
class PatchGrids:
    """One image for each row: ``pixel_values`` [rows, patches, *values of a patch], ``image_grid_thw`` [rows, 3].

    The grid holds the number of frames, and height and width in patches. The patches of a square of `merge` x `merge`
    together give one feature.

    Attributes:
        shape: shape of the values of a patch.
        merge: side of that square, in patches.
        stacked: number of features that are added behind blocks of the language model.
    """

    shape: tuple[int, ...]
    merge: int = 1
    stacked: int = 0

    @property
    def dynamic_axes(self) -> dict[str, dict[int, str]]:
        """Return the inputs in order with their dynamic axes."""
        return {PIXELS: {0: "batch", 1: "patches"}, GRID: {0: "batch"}}

    def example(self) -> Tensors:
        """Return two images of random pixels, of which the second is smaller."""
        grids = torch.tensor([[1, *sides] for sides in SIDES])
        patches = grids.prod(1)
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randn(len(SIDES), int(patches.max()), *self.shape, generator=generator)
        pixels[torch.arange(pixels.shape[1]) >= patches[:, None]] = 0
        return {PIXELS: pixels, GRID: grids}

    def features(self, module: Any, *images: torch.Tensor) -> torch.Tensor:
        """Return the features of images, [rows, image tokens, width]; those behind a smaller image are zero."""
        found = torch.cat(encoded(module, *images), -1)
        pixels, grids = images
        return in_rows(found, pixels, grids, self.merge)

    def of_length(self, features: int) -> PatchGrids:
        """Return the same: the grid tells the number of features."""
        return self

    def tokens(self, row: Mapping[str, Any]) -> int:
        """Return the number of features of the image of a row."""
        return int(row[GRID].prod()) // self.merge**2

    def row(self, found: Mapping[str, Any], name: str) -> Any:
        """Return an input of the only row; the patches of all images stand behind each other."""
        return found[name] if name == PIXELS else found[name][0]

    def arguments(self, example: Tensors, is_image: torch.Tensor) -> Tensors:
        """Return the arguments of the module's own forward, which takes the patches of all images as one."""
        return {**example, PIXELS: without_padding(*self.images(example)), "mm_token_type_ids": is_image.int()}

    def images(self, example: Tensors) -> tuple[torch.Tensor, ...]:
        """Return the inputs of the images of an example, in order."""
        return tuple(example[name] for name in self.dynamic_axes)


def without_padding(pixels: torch.Tensor, grids: torch.Tensor) -> torch.Tensor:
    """Return the patches of all images behind each other, [patches, *values], from rows."""
    return torch.cat([row[:count] for row, count in zip(pixels, grids.prod(1).tolist(), strict=True)])


def in_rows(found: torch.Tensor, pixels: torch.Tensor, grids: torch.Tensor, merge: int) -> torch.Tensor:
    """Return features [all of them, width] as [rows, image tokens, width], with zeros behind those of an image."""
    rows = found.reshape(pixels.shape[0], -1, found.shape[-1])
    known = torch.arange(rows.shape[1]) * merge**2 < grids.prod(1)[:, None]
    return rows * known[..., None]


def encoded(module: Any, pixels: torch.Tensor, grids: torch.Tensor) -> list[torch.Tensor]:
    """Return the features of rows of patches as one row, [all of them, width], and those that are added to blocks."""
    with padded_grids(module, pixels.shape[1]):
        found = module.get_image_features(pixels.flatten(0, 1), grids, return_dict=True)
    parts = [found.pooler_output, *(getattr(found, STACKED, None) or ())]
    return [part if isinstance(part, torch.Tensor) else part[0] for part in parts]


def patch_grids(module: Any) -> PatchGrids | str:
    """Return the images of a model of the form of Qwen2-VL, or why it has none, a clause without a full stop."""
    return shaped(module.config.vision_config, lambda *images: encoded(module, *images))


def shaped(config: Any, encode: Callable[[torch.Tensor, torch.Tensor], Sequence[torch.Tensor]]) -> PatchGrids | str:
    """Return the images that a vision encoder takes, by the first shape of a patch with which a call succeeds.

    Args:
        config: config of the encoder.
        encode: returns features of rows of patches, given these and their grids.

    Returns:
        The images, or why the encoder takes none, a clause without a full stop.
    """
    reasons = []
    for shape in _shapes(config):
        images = PatchGrids(shape)
        pixels, grids = images.images(images.example())
        try:
            with torch.inference_mode():
                found, *others = encode(pixels, grids)
        except Exception as error:  # modules raise errors of all kinds
            reasons.append(f"patches of {list(shape)}: {first_line(error)}")
            continue
        area = pixels.shape[0] * pixels.shape[1] / found.shape[0]
        if math.isqrt(int(area)) ** 2 == area:
            return PatchGrids(shape, math.isqrt(int(area)), len(others))
        reasons.append(f"it has {found.shape[0]} features for {pixels.shape[0] * pixels.shape[1]} patches")
    reason = "; ".join(reasons) or "its config tells no size of a patch"
    return f"takes image_grid_thw beside the pixels, but its vision encoder cannot read images as rows ({reason})"


def _shapes(config: Any) -> Iterator[tuple[int, ...]]:
    """Yield shapes of the values of a patch."""
    channels, side = first_of(config, CHANNELS, 3), first_of(config, ("patch_size",), 0)
    if side:
        yield (channels * first_of(config, FRAMES, 1) * side**2,)
        yield (channels, side, side)


def first_of(config: Any, names: Sequence[str], otherwise: int) -> int:
    """Return the first of some sizes that a config has; of a size of several axes, the first."""
    found = next((size for name in names if (size := getattr(config, name, None)) is not None), otherwise)
    return int(found if isinstance(found, int) else found[0])
