"""Images as grids of patches, as in Qwen2-VL and Qwen2.5-VL: each image has its own height and width.

Their vision tower reads the patches of all images behind each other and cuts them by lengths that it computes in Python
from ``image_grid_thw``, which no graph can hold. Here each image is a row, padded behind, and masks keep its patches
from attending to padding, to other frames and, in Qwen2.5-VL, to other windows. Masks and rotary positions are computed
from the grid in the graph.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision

from runtimes.base.vision_language import GRID, PIXELS

Tensors = dict[str, torch.Tensor]
# Parts of a vision tower and of its attentions that are called here one after the other.
TOWER = ("patch_embed", "rotary_pos_emb", "blocks", "merger", "spatial_merge_size")
ATTENTION = ("qkv", "proj", "num_heads", "scaling")
SIDES = ((8, 8), (4, 6))  # height and width of the images of the example, in tokens


@dataclass(frozen=True)
class PatchGrids:
    """One image for each row: ``pixel_values`` [rows, patches, values of a patch], ``image_grid_thw`` [rows, 3].

    The grid holds the number of frames, and height and width in patches. The patches of a square of `merge` x `merge`
    stand behind each other; together they give one feature.

    Attributes:
        merge: side of that square, in patches.
        values: number of values of a patch.
    """

    merge: int
    values: int

    @property
    def dynamic_axes(self) -> dict[str, dict[int, str]]:
        """Return the inputs in order with their dynamic axes."""
        return {PIXELS: {0: "batch", 1: "patches"}, GRID: {0: "batch"}}

    def example(self) -> Tensors:
        """Return two images of random pixels, of which the second is smaller."""
        grids = torch.tensor([[1, height * self.merge, width * self.merge] for height, width in SIDES])
        patches = grids.prod(1)
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randn(len(SIDES), int(patches.max()), self.values, generator=generator)
        known = torch.arange(pixels.shape[1]) < patches[:, None]
        return {PIXELS: pixels * known[..., None], GRID: grids}

    def features(self, module: Any, *images: torch.Tensor) -> torch.Tensor:
        """Return the features of images, [rows, image tokens, width]; those behind a smaller image are zero."""
        pixels, grids = images
        rows, patches = pixels.shape[:2]
        tower = module.model.visual
        places = Places.of(grids, patches, self.merge)
        masks = [places.mask(size) for size in window_sizes(tower)]
        hidden = tower.patch_embed(pixels.flatten(0, 1))
        rotary = tower.rotary_pos_emb(hidden, torch.stack([places.row, places.column], -1).flatten(0, 1))
        with attending_by_row(tower):
            for block, mask in zip(tower.blocks, masks, strict=True):
                hidden = block(hidden, cu_seqlens=mask, position_embeddings=rotary)
        found = tower.merger(hidden)
        known = places.known.reshape(rows, -1, self.merge**2)[..., 0]
        placed: torch.Tensor = found.reshape(rows, -1, found.shape[-1]) * known[..., None]
        return placed

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
        images = zip(example[PIXELS], example[GRID].prod(1).tolist(), strict=True)
        flat = torch.cat([pixels[:count] for pixels, count in images])
        return {**example, PIXELS: flat, "mm_token_type_ids": is_image.int()}


@dataclass(frozen=True)
class Places:
    """Where the patches of each row lie in their image, each int64 [rows, patches].

    Attributes:
        known: whether a patch is one of the image, not padding behind it; bool.
        frame: its frame.
        row: its row of patches in the frame.
        column: its column.
        widths: width of the image in patches, [rows, 1].
        heights: height of the image in patches, [rows, 1].
    """

    known: torch.Tensor
    frame: torch.Tensor
    row: torch.Tensor
    column: torch.Tensor
    widths: torch.Tensor
    heights: torch.Tensor

    @classmethod
    def of(cls, grids: torch.Tensor, patches: int, merge: int) -> Places:
        """Return the places of patches that stand in squares of `merge` x `merge`, for grids [rows, 3]."""
        frames, heights, widths = grids.unsqueeze(-1).unbind(1)
        number = torch.arange(patches)[None]
        within = number % (heights * widths)
        square, inside = within // merge**2, within % merge**2
        return cls(
            number < frames * heights * widths,
            number // (heights * widths),
            square // (widths // merge) * merge + inside // merge,
            square % (widths // merge) * merge + inside % merge,
            widths,
            heights,
        )

    def mask(self, size: int | None) -> torch.Tensor:
        """Return which patches attend to which, bool [rows, 1, patches, patches].

        Those of a frame attend to each other, or those of a window of `size` x `size` patches in it. Padding attends to
        padding, so that no patch attends to nothing.
        """
        part = self.frame
        if size is not None:
            part = (self.frame * self.heights + self.row // size) * self.widths + self.column // size
        part = torch.where(self.known, part, -1)
        return part[:, None, :, None] == part[:, None, None, :]


def window_sizes(tower: Any) -> list[int | None]:
    """Return the side of the windows of each block in patches; None for a block whose patches attend to all.

    Windows hold whole squares of patches, as in Qwen2.5-VL (`get_vision_window_index` of transformers).
    """
    if not hasattr(tower, "fullatt_block_indexes"):
        return [None] * len(tower.blocks)
    merge = tower.spatial_merge_size
    size = tower.window_size // merge // tower.patch_size * merge
    return [None if number in tower.fullatt_block_indexes else size for number in range(len(tower.blocks))]


@contextlib.contextmanager
def attending_by_row(tower: Any) -> Iterator[None]:
    """Let the attentions of a vision tower attend within rows by a mask, which they get as ``cu_seqlens``."""
    attentions = [block.attn for block in tower.blocks]
    for attention in attentions:
        attention.forward = partial(_attend, attention)
    try:
        yield
    finally:
        for attention in attentions:
            del attention.forward


def _attend(
    attention: Any,
    hidden: torch.Tensor,
    cu_seqlens: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """Return the attention of patches [rows * patches, width], as its own forward computes it for each row alone.

    Args:
        attention: an attention of Qwen2-VL's vision tower.
        hidden: the normalised hidden states.
        cu_seqlens: the mask, bool [rows, 1, patches, patches].
        position_embeddings: cosines and sines, [rows * patches, head dimension].
    """
    rows, _, patches, _ = cu_seqlens.shape
    heads = attention.qkv(hidden).reshape(rows * patches, 3, attention.num_heads, -1)
    query, key, value = heads.unbind(1)
    query, key = apply_rotary_pos_emb_vision(query, key, *position_embeddings)
    query, key, value = (
        each.reshape(rows, patches, attention.num_heads, -1).transpose(1, 2) for each in (query, key, value)
    )
    found = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=cu_seqlens, scale=attention.scaling
    )
    projected: torch.Tensor = attention.proj(found.transpose(1, 2).reshape(rows * patches, -1))
    return projected


def patch_grids(module: Any) -> PatchGrids | str:
    """Return the images of a model of the form of Qwen2-VL, or what it lacks, a clause without a full stop."""
    tower: Any = getattr(getattr(module, "model", None), "visual", None)
    missing = [name for name in TOWER if not hasattr(tower, name)]
    if missing:
        return f"takes image_grid_thw beside the pixels, but has a vision tower without {' and '.join(missing)}"
    others = sorted({name for name, _ in tower.named_children()} - set(TOWER))
    if others:
        return f"takes image_grid_thw beside the pixels, and has a vision tower with {' and '.join(others)} besides"
    attention = getattr(tower.blocks[0], "attn", None)
    missing = [name for name in ATTENTION if not hasattr(attention, name)]
    if missing:
        return f"has attentions in its vision tower without {' and '.join(missing)}"
    vision = module.config.vision_config
    frames, side = (_side(getattr(vision, name)) for name in ("temporal_patch_size", "patch_size"))
    return PatchGrids(vision.spatial_merge_size, vision.in_channels * frames * side**2)


def _side(size: int | list[int] | tuple[int, ...]) -> int:
    return size if isinstance(size, int) else size[0]
