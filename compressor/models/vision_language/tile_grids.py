"""Images as a grid of tiles with an overview, as in LLaVA-NeXT: each image has its own number of tiles and of tokens.

The features of the tiles form one large picture. transformers cuts the padding of the image off it, and puts a learned
vector behind each line; both depend on the height and width of the image, ``image_sizes``, and are computed in Python
for each image. Here one gather does it for all rows: for each image token, the graph computes which feature it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from runtimes.base.vision_language import PIXELS, SIZES

Tensors = dict[str, torch.Tensor]
ROUNDING = 5e-8  # transformers rounds a length to 7 decimals before it cuts them off


@dataclass(frozen=True)
class TileGrids:
    """One image for each row: ``pixel_values`` [rows, tiles, channels, side, side], ``image_sizes`` [rows, 2].

    The first tile is the overview, the others are the image, line by line. ``image_sizes`` holds height and width in
    pixels.

    Attributes:
        side: height and width of a tile in pixels.
        channels: number of channels.
        patches: height and width of a tile in features.
        resolutions: heights and widths to which an image may be resized, multiples of `side`.
    """

    side: int
    channels: int
    patches: int
    resolutions: tuple[tuple[int, int], ...]

    @property
    def dynamic_axes(self) -> dict[str, dict[int, str]]:
        """Return the inputs in order with their dynamic axes."""
        return {PIXELS: {0: "batch", 1: "tiles"}, SIZES: {0: "batch"}}

    def example(self) -> Tensors:
        """Return two images of random pixels: one of the largest resolution, and one that is padded at both sides."""
        largest = max(self.resolutions, key=lambda each: each[0] * each[1])
        height, width = self.resolutions[0]
        sizes = torch.tensor([largest, (height, max(1, width * 3 // 4))])
        grids = self._layout(sizes)
        tiles = (1 + grids.lines * grids.columns).squeeze(1)
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randn(2, int(tiles.max()), self.channels, self.side, self.side, generator=generator)
        known = torch.arange(pixels.shape[1]) < tiles[:, None]
        return {PIXELS: pixels * known[..., None, None, None], SIZES: sizes}

    def features(self, module: Any, *images: torch.Tensor) -> torch.Tensor:
        """Return the features of images, [rows, image tokens, width]; those behind a smaller image are zero."""
        pixels, sizes = images
        rows, tiles = pixels.shape[:2]
        found = _of_tiles(module, pixels.flatten(0, 1))
        width = found.shape[-1]
        newline = module.model.image_newline.expand(rows, 1, width)
        table = torch.cat([found.reshape(rows, tiles * self.patches**2, width), newline], 1)
        places, known = self._layout(sizes).places(tiles)
        return table.gather(1, places[..., None].expand(-1, -1, width)) * known[..., None]

    def of_length(self, features: int) -> TileGrids:
        """Return the same: the sizes tell the number of features."""
        return self

    def tokens(self, row: Mapping[str, Any]) -> int:
        """Return the number of features of the image of a row."""
        return int(self._layout(torch.from_numpy(np.asarray(row[SIZES]))[None]).tokens)

    def row(self, found: Mapping[str, Any], name: str) -> Any:
        """Return an input of the only row."""
        return found[name][0]

    def arguments(self, example: Tensors, is_image: torch.Tensor) -> Tensors:
        """Return the example: the module takes the same inputs."""
        return example

    def _layout(self, sizes: torch.Tensor) -> Layout:
        """Return how images of sizes [rows, 2] lie in their tiles."""
        heights, widths = sizes.unsqueeze(-1).unbind(1)
        lines, columns = best_grid(heights, widths, self.resolutions, self.side)
        high, wide = lines * self.patches, columns * self.patches
        ratio = heights.double() / widths
        flat = 1 / ratio > wide.double() / high  # the image is padded above and below, not left and right
        rest_high = high - _length(heights * (wide.double() / widths))
        rest_wide = wide - _length(widths * (high.double() / heights))
        above = torch.where(flat, rest_high // 2, 0)
        left = torch.where(flat, 0, rest_wide // 2)
        return Layout(self.patches, lines, columns, above, left)


@dataclass(frozen=True)
class Layout:
    """How the image of each row lies in its tiles, in features; each int64 [rows, 1].

    Attributes:
        patches: height and width of a tile.
        lines: lines of tiles.
        columns: columns of tiles.
        above: lines of padding above the image, and as many below.
        left: columns of padding left of the image, and as many to the right.
    """

    patches: int
    lines: torch.Tensor
    columns: torch.Tensor
    above: torch.Tensor
    left: torch.Tensor

    @property
    def tokens(self) -> torch.Tensor:
        """Return the number of features of each image, with those of the overview and of the ends of lines."""
        height = self.lines * self.patches - 2 * self.above
        return self.patches**2 + height * (self._width + 1)

    @property
    def _width(self) -> torch.Tensor:
        return self.columns * self.patches - 2 * self.left

    def places(self, tiles: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return which feature of the tiles each image token is, int64 [rows, image tokens], and whether it is one.

        The feature behind those of all tiles is that of the end of a line.
        """
        side, area = self.patches, self.patches**2
        token = torch.arange(tiles * (area + side))[None]
        line, column = (token - area) // (self._width + 1), (token - area) % (self._width + 1)
        high, wide = line + self.above, column + self.left
        tile = 1 + high // side * self.columns + wide // side
        place = tile * area + high % side * side + wide % side
        place = torch.where(column == self._width, tiles * area, place)
        place = torch.where(token < area, token, place)
        return place.clamp(min=0, max=tiles * area), token < self.tokens


def best_grid(
    heights: torch.Tensor, widths: torch.Tensor, resolutions: Sequence[tuple[int, int]], side: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the lines and columns of tiles of images, each int64 like `heights`.

    An image gets the resolution in which most of its pixels remain and, of several, the one with least padding
    (`select_best_resolution` of transformers, with its arithmetic in float64).
    """
    most, least = torch.zeros_like(heights), torch.full_like(heights, torch.iinfo(torch.int64).max)
    lines, columns = torch.zeros_like(heights), torch.zeros_like(heights)
    for height, width in resolutions:
        scale = torch.minimum(width / widths.double(), height / heights.double())
        kept = torch.minimum((widths * scale).long() * (heights * scale).long(), widths * heights)
        wasted = height * width - kept
        better = (kept > most) | ((kept == most) & (wasted < least))
        most, least = torch.where(better, kept, most), torch.where(better, wasted, least)
        lines, columns = torch.where(better, height // side, lines), torch.where(better, width // side, columns)
    return lines, columns


def _length(length: torch.Tensor) -> torch.Tensor:
    """Return lengths in whole features, rounded as transformers does."""
    return (length + ROUNDING).long()


def _of_tiles(module: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Return the features of tiles [tiles, channels, side, side] as `get_image_features` computes them."""
    config, model = module.config, module.model
    found = model.vision_tower(pixels, output_hidden_states=True, return_dict=True).hidden_states
    layers = config.vision_feature_layer
    chosen = found[layers] if isinstance(layers, int) else torch.cat([found[layer] for layer in layers], -1)
    if config.vision_feature_select_strategy == "default":
        chosen = chosen[:, 1:]
    projected: torch.Tensor = model.multi_modal_projector(chosen)
    return projected


def tile_grids(module: Any) -> TileGrids | str:
    """Return the images of a model of the form of LLaVA-NeXT, or what it lacks, a clause without a full stop."""
    missing = [name for name in ("image_newline", "vision_tower", "multi_modal_projector") if not _has(module, name)]
    if missing:
        return f"takes image_sizes beside the pixels, but has no {' and '.join(missing)}, as LLaVA-NeXT has"
    config = module.config
    pinpoints = getattr(config, "image_grid_pinpoints", None)
    side, patch = config.vision_config.image_size, config.vision_config.patch_size
    if not pinpoints or not isinstance(side, int):
        return "has no image_grid_pinpoints in its config, or tiles that are no squares"
    channels = getattr(config.vision_config, "num_channels", 3)
    return TileGrids(side, channels, side // patch, tuple((height, width) for height, width in pinpoints))


def _has(module: Any, name: str) -> bool:
    return getattr(getattr(module, "model", None), name, None) is not None
