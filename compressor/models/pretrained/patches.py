"""Vision models alone whose images vary in size: grids of patches (Qwen2.5-VL), padded patches (SigLIP 2) or pixels."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from compressor.limitations import Limitation
from compressor.models.base import Model, as_numpy
from compressor.models.one_size import one_grid
from compressor.models.preprocess import Preprocess
from compressor.models.pretrained.loaded import Loaded
from compressor.models.pretrained.processors import image_processor, save
from compressor.models.pretrained.signature import HIDDEN, Signature, other_features, signature_of, with_own_output
from compressor.models.vision_language.padded_grids import has_windows, padded_grids
from compressor.models.vision_language.padded_rows import PaddedPatches, PaddedTower, PlacedTower
from compressor.models.vision_language.patch_grids import STACKED, in_rows, shaped
from runtimes.base.vision_language import GRID, PIXELS, SHORT_GRID

POOLED = "pooler_output"
ARRAYS = Limitation(
    "preprocessing", "the data must be arrays of patches or pixels and the sizes of images, as the image processor has"
)


def grid_argument(module: Any) -> str | None:
    """Return the argument of a vision encoder that takes the grids of its images; None for other models."""
    taken = inspect.signature(module.forward).parameters
    return next((name for name in (SHORT_GRID, GRID) if name in taken and "input_ids" not in taken), None)


def wrap(loaded: Loaded) -> Model:
    """Return the model: its output is one feature for each square of patches, padded with zeros behind.

    An encoder that cannot read images of several sizes as rows takes those of one size.

    Raises:
        ModelError: the encoder cannot read images of one size either.
    """
    module, names = loaded.module, list[str]()

    def encode(pixels: torch.Tensor, grids: torch.Tensor) -> list[torch.Tensor]:
        name, features = encoded(module, pixels, grids)
        names[:] = [name]
        return [features]

    images = shaped(module.config, encode)
    if isinstance(images, str):
        return one_grid.wrap(loaded, images)
    example, inputs = images.example(), tuple(images.dynamic_axes)
    return Model(
        **loaded.fields,
        call=partial(_features, merge=images.merge),
        inputs=inputs,
        outputs=tuple(names),
        answer=names[0],
        example=example,
        dynamic_axes=images.dynamic_axes,
        preprocess=Preprocess(inputs, "tensor", as_numpy(example), varying={PIXELS: (1,)}),
        save=partial(save, module, None, {}),
        limitations=tuple(_limitations(module)),
    )


def wrap_padded(loaded: Loaded, images: PaddedPatches | PaddedTower | PlacedTower) -> Model:
    """Return a model whose images are padded, with their sizes.

    Raises:
        ModelError: the module fails on images of two sizes.
    """
    module, axes, example = loaded.module, images.dynamic_axes, images.example()
    inputs = tuple(axes)
    if isinstance(images, PaddedTower | PlacedTower):
        signature = Signature((HIDDEN,), HIDDEN, images.states)
    else:
        signature = with_own_output(signature_of(loaded.task, inputs), module, example)
    varying = {name: tuple(axis for axis in sizes if axis) for name, sizes in axes.items()}
    return Model(
        **loaded.fields,
        call=signature.call,
        inputs=inputs,
        outputs=signature.outputs,
        answer=signature.answer,
        example=example,
        dynamic_axes=axes,
        preprocess=Preprocess(inputs, "tensor", as_numpy(example), varying=varying),
        save=partial(save, module, image_processor(loaded.location, loaded.options), {}),
        limitations=(ARRAYS, *other_features(signature)),
        class_names=loaded.class_names,
    )


def encoded(module: Any, pixels: torch.Tensor, grids: torch.Tensor) -> tuple[str, torch.Tensor]:
    """Return the name of the features of an encoder and their values as one row, [all of them, width].

    They are the output for a language model, if the encoder returns one for each square of patches, else the last
    hidden states.
    """
    with padded_grids(module, pixels.shape[1]):
        return features_of(module(pixels.flatten(0, 1), **{str(grid_argument(module)): grids}))


def features_of(found: Any) -> tuple[str, torch.Tensor]:
    """Return the name and the values, [all of them, width], of the features in what an encoder returns."""
    name = POOLED if getattr(found, POOLED, None) is not None and found[POOLED].shape[0] > 1 else HIDDEN
    return name, found[name].reshape(-1, found[name].shape[-1])


def _features(module: Any, pixels: torch.Tensor, grids: torch.Tensor, *, merge: int) -> tuple[torch.Tensor, ...]:
    torch._check(pixels.shape[0] == grids.shape[0])
    return (in_rows(encoded(module, pixels, grids)[1], pixels, grids, merge),)


def _limitations(module: Any) -> Iterator[Limitation]:
    """Yield what data must be, what windows cost, and what is left out."""
    yield Limitation("preprocessing", "the data must be arrays of patches and their grids, as the image processor has")
    if has_windows(module):
        yield Limitation(
            "windows of the vision tower",
            "computed by masks, so a block with windows takes the time of one whose patches all attend to each other",
        )
    if hasattr(module, "deepstack_merger_list"):
        yield Limitation(STACKED, "the export has the features of the last block, none of those before")
