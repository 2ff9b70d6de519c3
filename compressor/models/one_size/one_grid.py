"""Vision encoders that read the sizes of their images in Python, for images of one size.

Encoders such as those of HunyuanVL and LFM3-VL loop over images, and reshape the patches of each to its height and
width. Those of Qwen2-VL do so in functions of transformers alone, which are computed for images of any size (see
`compressor.models.vision_language.padded_grids`). Here the encoder is traced for one image of one size, in which all
that depends on the size is known, and that graph is computed for any number of images.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from compressor.limitations import Limitation
from compressor.models.base import Model, ModelError, as_numpy, first_line
from compressor.models.preprocess import Preprocess
from compressor.models.pretrained.loaded import Loaded
from compressor.models.pretrained.processors import save
from compressor.models.pretrained.signature import HIDDEN
from compressor.models.vision_language.patch_grids import CHANNELS, FRAMES, SIDES, first_of
from passes.execute.rows import OneRow, run_rows, trace_one_row
from runtimes.base.vision_language import GRID, PIXELS, SHORT_GRID

POOLED = "pooler_output"
TARGETS, MERGES = "target_sizes", "merge_sizes"
SIZES = (SHORT_GRID, GRID, TARGETS, MERGES)  # arguments that hold the sizes of images
MERGE = ("spatial_merge_size", "merge_size")
CLOSE = 1e-4  # of the largest value; the same products in another order
MOST = 2  # features for each patch: an encoder has some beside those of patches, such as one at the end of each line
Size = tuple[int, int]
Numbers = dict[str, list[Any]]


@dataclass(frozen=True)
class OneGrid:
    """Images of one size, each a row.

    Attributes:
        size: height and width in patches.
        arguments: the arguments of the encoder that hold the size of an image, as lists with one entry for it.
        shape: shape of the pixels of an image.
        name: name of the features.
        program: the graph of the encoder for one image.
    """

    size: Size
    arguments: Numbers
    shape: tuple[int, ...]
    name: str
    program: OneRow

    def __call__(self, module: Any, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the features of images, [images, features, width]."""
        return (run_rows(self.program, module, pixels),)


def reads_sizes(module: Any) -> bool:
    """Return whether a vision encoder takes the sizes of its images beside the pixels."""
    taken = inspect.signature(module.forward).parameters
    return PIXELS in taken and "input_ids" not in taken and any(name in taken for name in (SHORT_GRID, GRID, TARGETS))


def wrap(loaded: Loaded, reason: str) -> Model:
    """Return an encoder for images of one size.

    Args:
        loaded: the encoder.
        reason: why it cannot take images of any size, a clause without a full stop.

    Raises:
        ModelError: it cannot take images of this size either, or not several of them.
    """
    module = loaded.module
    images = _one_grid(loaded, reason)
    example = {PIXELS: _noise(2, images.shape)}
    return Model(
        **loaded.fields,
        call=images,
        inputs=(PIXELS,),
        outputs=(images.name,),
        answer=images.name,
        example=example,
        dynamic_axes={PIXELS: {0: "batch"}},
        preprocess=Preprocess((PIXELS,), "tensor", as_numpy(example), sized=True),
        save=partial(save, module, None, {}),
        limitations=tuple(_limitations(module, images)),
    )


def _one_grid(loaded: Loaded, reason: str) -> OneGrid:
    """Return the images that an encoder takes, by the first shape of their pixels with which it succeeds.

    Raises:
        ModelError: it takes none.
    """
    module, size = loaded.module, _size(loaded)
    reasons = [reason]
    for shape, arguments in _forms(module, size):
        pixels = _noise(2, shape)
        try:
            with torch.inference_mode():
                name, first = _features(module, pixels[0], arguments)
                wanted = torch.stack([first, _features(module, pixels[1], arguments)[1]])
            if len(first) >= MOST * math.prod(size):  # pixels of another form, which were broadcast
                raise ValueError(f"{len(first)} features of {math.prod(size)} patches")
        except Exception as error:  # modules raise errors of all kinds
            reasons.append(f"pixels {list(shape)}: {first_line(error)}")
            continue
        try:
            program = trace_one_row(module, lambda own, row, given=arguments: _features(own, row, given)[1], pixels[0])
            with torch.inference_mode():
                found = run_rows(program, module, pixels)
        except Exception as error:  # of torch.export, and of operators that are not known
            reasons.append(f"several images of {list(shape)}: {first_line(error)}")
            continue
        if found.shape == wanted.shape and (found - wanted).abs().max() <= CLOSE * wanted.abs().max():
            return OneGrid(size, arguments, shape, name, program)
        reasons.append(f"several images of {list(shape)} have other features than each alone")
    raise ModelError(
        f"{loaded.location} is a {type(module).__name__}, which {'; '.join(reasons)}; pass it as a module of your own, "
        "package.module:factory, with example inputs."
    )


def _forms(module: Any, size: Size) -> Iterator[tuple[tuple[int, ...], Numbers]]:
    """Yield shapes of the pixels of an image, with the arguments that hold its size.

    They are patches, or pixels in a row of patches (MiniCPM-V). Some encoders count squares of patches (Inkling 2).
    """
    config, (high, wide) = module.config, size
    channels, side = first_of(config, CHANNELS, 3), first_of(config, ("patch_size",), 0)
    merge, frames = first_of(config, MERGE, 1), first_of(config, FRAMES, 1)
    patches = high * wide
    shapes = (
        (patches, channels * frames * side**2),
        (patches, channels, side, side),
        (1, channels, side, patches * side),
    )
    for shape in shapes:
        yield shape, _arguments(module, (1, high, wide), merge)
    square = (patches // merge**2, merge * side, merge * side, channels)
    yield square, _arguments(module, (1, high // merge, wide // merge), merge)


def _arguments(module: Any, grid: tuple[int, int, int], merge: int) -> Numbers:
    values: Numbers = {SHORT_GRID: [list(grid)], GRID: [list(grid)], TARGETS: [list(grid[1:])], MERGES: [merge]}
    taken = inspect.signature(module.forward).parameters
    return {name: values[name] for name in SIZES if name in taken}


def _features(module: Any, pixels: torch.Tensor, arguments: dict[str, Any]) -> tuple[str, torch.Tensor]:
    """Return the name and the values, [features, width], of what an encoder computes for an image.

    They are the output for a language model, if the encoder has one, else the last hidden states.
    """
    found = module(pixels, **{name: torch.tensor(value) for name, value in arguments.items()})
    pooled = found.get(POOLED)
    name = POOLED if pooled is not None and pooled.ndim > 1 and pooled.flatten(0, -2).shape[0] > 1 else HIDDEN
    return name, found[name].flatten(0, -2)


def _size(loaded: Loaded) -> Size:
    """Return height and width of the images in patches: those asked for, or those of the example of other encoders.

    Raises:
        ModelError: they are no multiples of a patch, or any size is asked for.
    """
    asked, side = loaded.image_size, first_of(loaded.module.config, ("patch_size",), 0)
    if not side:
        raise ModelError(
            f"{loaded.location} is a {type(loaded.module).__name__}, whose config has no patch_size; pass it as a "
            "module of your own, package.module:factory, with example inputs."
        )
    if asked is None:
        return SIDES[1]
    if asked == "dynamic" or any(each % side for each in asked):
        raise ModelError(
            f"--image-size {asked}, but {loaded.location} takes images of one size, whose sides are multiples of a "
            f"patch of {side} pixels; give another size, or leave --image-size out."
        )
    return asked[0] // side, asked[1] // side


def _noise(rows: int, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(rows, *shape, generator=torch.Generator().manual_seed(0))


def _limitations(module: Any, images: OneGrid) -> Iterator[Limitation]:
    side = first_of(module.config, ("patch_size",), 0)
    high, wide = (count * side for count in images.size)
    yield Limitation("preprocessing", "the data must be arrays of patches, as the image processor has for one image")
    yield Limitation(
        "image size",
        f"the encoder reads it in Python, so the export takes only images of {high} x {wide} pixels, "
        f"{images.size[0]} x {images.size[1]} patches; --image-size chooses another size",
    )
