"""The features of images: what the vision tower and the projector compute, one row for each row of text."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

MASK = "pixel_attention_mask"


class _OneTensor(TorchFunctionMode):
    """Iterates over a tensor with a dynamic number of rows as if it were one item.

    `get_image_features` of transformers returns ``list(features)``, one item for each image. Under torch.export that
    would fix the number of images.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.Tensor.__len__, torch.Tensor.unbind) and not isinstance(args[0].shape[0], int):
            return 1 if func is torch.Tensor.__len__ else (args[0],)
        return func(*args, **({} if kwargs is None else kwargs))


def source_of(module: Any) -> Any:
    """Return the part of a model that computes the features of images: the model, or the one below its head."""
    return module if hasattr(module, "get_image_features") else getattr(module, "model", module)


def sees_clips_alone(module: Any) -> bool:
    """Return whether a model computes features of clips, ``get_video_features``, and none of images."""
    source = source_of(module)
    return hasattr(source, "get_video_features") and not hasattr(source, "get_image_features")


def takes_tiles(module: Any) -> bool:
    """Return whether images are cut into tiles, as in Idefics3: [rows, tiles, channels, height, width] with a mask."""
    return MASK in inspect.signature(source_of(module).get_image_features).parameters


def image_features(module: Any, pixel_values: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Return the features of images, [rows, image tokens, hidden size of the language model].

    Args:
        module: a vision-language model of transformers.
        pixel_values: [rows, channels, height, width]; with tiles, [rows, tiles, channels, height, width].
        mask: pixels of the tiles that are no padding, bool [rows, tiles, height, width]; None without tiles.
    """
    if mask is not None:
        return _of_tiles(module, pixel_values, mask)
    with _OneTensor():
        features = source_of(module).get_image_features(pixel_values, return_dict=True).get("pooler_output")
    if features is None:
        raise TypeError("get_image_features returns no pooler_output")
    if isinstance(features, torch.Tensor):
        return features
    return features[0] if len(features) == 1 and features[0].ndim == 3 else torch.stack(list(features))


def _of_tiles(module: Any, pixel_values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the features of tiles, as `get_image_features` does, without leaving out the tiles that are padding.

    They stand behind the tiles of their row, so that no token reads them. A tile of padding has a mask of zeros, for
    which every patch would be hidden; it counts as whole.
    """
    model, rows, tiles = module.model, pixel_values.shape[0], pixel_values.shape[1]
    side = module.config.vision_config.patch_size
    flat = mask.flatten(0, 1)
    patches = flat.unfold(1, side, side).unfold(2, side, side).sum((-1, -2)) > 0
    patches = patches | ~patches.flatten(1).any(1)[:, None, None]
    hidden = model.vision_model(
        pixel_values=pixel_values.flatten(0, 1), patch_attention_mask=patches, return_dict=True
    ).last_hidden_state
    found: torch.Tensor = model.connector(hidden)
    return found.reshape(rows, tiles * found.shape[1], found.shape[2])
