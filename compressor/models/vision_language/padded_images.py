"""Images of any size, padded to the largest, as in Pixtral and Mistral 3: each has its own number of patches.

Their vision tower cuts the padding off each image in a loop and puts the patches of all images behind each other. Here
each image is a row of the patches of the padded image, and a mask keeps those of the image from attending to padding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from runtimes.base.vision_language import PIXELS, SIZES

Tensors = dict[str, torch.Tensor]
# The vision tower and the projector by their names in Mistral 3 and in LightOn OCR, and the parts that are called here.
TOWERS = (("vision_tower", "multi_modal_projector"), ("vision_encoder", "vision_projection"))
TOWER = ("patch_conv", "ln_pre", "transformer", "patch_positional_embedding")
PROJECTOR = ("norm", "patch_merger", "linear_1", "act", "linear_2")
SIDES = ((6, 6), (2, 4))  # height and width of the images of the example, in image tokens


@dataclass(frozen=True)
class PaddedImages:
    """One image for each row: ``pixel_values`` [rows, channels, height, width], ``image_sizes`` [rows, 2].

    ``image_sizes`` holds height and width in pixels, before images were padded below and on the right.

    Attributes:
        side: side of the square of pixels that an image token stands for.
        channels: number of channels.
    """

    side: int
    channels: int

    @property
    def dynamic_axes(self) -> dict[str, dict[int, str]]:
        """Return the inputs in order with their dynamic axes."""
        return {PIXELS: {0: "batch", 2: "height", 3: "width"}, SIZES: {0: "batch"}}

    def example(self) -> Tensors:
        """Return two images of random pixels, of which the second is smaller."""
        sizes = torch.tensor(SIDES) * self.side
        high, wide = (int(size) for size in sizes.amax(0))
        pixels = torch.randn(len(SIDES), self.channels, high, wide, generator=torch.Generator().manual_seed(0))
        known = _within(sizes, high, wide)
        return {PIXELS: pixels * known[:, None], SIZES: sizes}

    def features(self, module: Any, *images: torch.Tensor) -> torch.Tensor:
        """Return the features of images, [rows, image tokens, width]; those behind a smaller image are zero."""
        pixels, sizes = images
        tower, projector = towers(module)
        hidden, high, wide = encoded(tower, pixels, sizes, _layers(module, tower))
        merge = module.config.spatial_merge_size
        grid = projector.norm(hidden).transpose(1, 2).unflatten(2, (high, wide))
        squares = torch.nn.functional.unfold(grid, kernel_size=merge, stride=merge).transpose(1, 2)
        found = projector.linear_1(projector.patch_merger.merging_layer(squares))
        found = projector.linear_2(projector.act(found))
        return compact(found, sizes // self.side, wide // merge)

    def of_length(self, features: int) -> PaddedImages:
        """Return the same: the sizes tell the number of features."""
        return self

    def tokens(self, row: Mapping[str, Any]) -> int:
        """Return the number of features of the image of a row."""
        height, width = row[SIZES]
        return int(height // self.side) * int(width // self.side)

    def row(self, found: Mapping[str, Any], name: str) -> Any:
        """Return an input of the only row."""
        return found[name][0]

    def arguments(self, example: Tensors, is_image: torch.Tensor) -> Tensors:
        """Return the example: the module takes the same inputs."""
        return example


def encoded(tower: Any, pixels: torch.Tensor, sizes: torch.Tensor, layers: int) -> tuple[torch.Tensor, int, int]:
    """Return the states of the patches of padded images, [rows, patches, width], and how many lie on each side.

    Args:
        tower: a vision tower of the form of Pixtral.
        pixels: [rows, channels, height, width].
        sizes: height and width in pixels before images were padded, [rows, 2].
        layers: number of layers that are computed.
    """
    patches = tower.patch_conv(pixels)
    high, wide = patches.shape[2:]
    hidden = tower.ln_pre(patches.flatten(2).transpose(1, 2))
    places = torch.stack(torch.meshgrid(torch.arange(high), torch.arange(wide), indexing="ij"), -1).flatten(0, 1)
    rotary = tower.patch_positional_embedding(hidden, places)
    known = _within(sizes // tower.patch_size, high, wide).flatten(1)
    mask = known[:, None, None, :] == known[:, None, :, None]  # padding attends to padding
    for layer in tower.transformer.layers[:layers]:
        hidden = layer(hidden, mask, position_embeddings=rotary)
    return hidden, high, wide


def compact(found: torch.Tensor, sizes: torch.Tensor, wide: int) -> torch.Tensor:
    """Return features of padded images, [rows, features, width], those of the image first, and zeros behind.

    Args:
        found: features of padded images, line by line.
        sizes: height and width of each image in features, [rows, 2].
        wide: width of the padded images in features.
    """
    number = torch.arange(found.shape[1])[None]
    columns, count = sizes[:, 1:], sizes.prod(1, keepdim=True)
    place = torch.where(number < count, number // columns * wide + number % columns, 0)
    return found.gather(1, place[..., None].expand(-1, -1, found.shape[2])) * (number < count)[..., None]


def towers(module: Any) -> tuple[Any, Any]:
    """Return the vision tower and the projector of a model; None for those that it lacks."""
    model = getattr(module, "model", None)
    found = [[getattr(model, name, None) for name in names] for names in TOWERS]
    tower, projector = next((pair for pair in found if None not in pair), (None, None))
    return tower, projector


def padded_images(module: Any) -> PaddedImages | str:
    """Return the images of a model of the form of Mistral 3, or what it lacks, a clause without a full stop."""
    tower, projector = towers(module)
    missing = [name for name in TOWER if not hasattr(tower, name)]
    missing += [name for name in PROJECTOR if not hasattr(projector, name)]
    if missing:
        return f"takes image_sizes beside the pixels, but has no {' and '.join(missing)}, as Mistral 3 has"
    if not isinstance(getattr(module.config, "vision_feature_layer", -1), int):
        return "takes features of several layers of its vision tower"
    vision = module.config.vision_config
    return PaddedImages(vision.patch_size * module.config.spatial_merge_size, vision.num_channels)


def _layers(module: Any, tower: Any) -> int:
    """Return the number of layers of the tower behind which its states are taken."""
    layer, every = getattr(module.config, "vision_feature_layer", -1), len(tower.transformer.layers)
    return int(layer if layer >= 0 else every + 1 + layer)


def _within(sizes: torch.Tensor, high: int, wide: int) -> torch.Tensor:
    """Return which places of padded images are in the image, bool [rows, high, wide], for sizes [rows, 2]."""
    heights, widths = sizes[:, :1, None], sizes[:, 1:, None]
    return (torch.arange(high)[None, :, None] < heights) & (torch.arange(wide)[None, None, :] < widths)
