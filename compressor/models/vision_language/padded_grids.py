"""What vision encoders of transformers compute from the grids of images, for images in padded rows.

Encoders such as those of Qwen2-VL and GLM-4V read the patches of all images behind each other. Positions, masks and
resampled position tables are computed from the grids by functions of transformers with loops in Python, or with sizes
that depend on data, which no graph can hold. Here each image is a row of as many patches, padded behind, and the same
functions are computed for rows with tensor operators. An encoder's own forward calls them by name, so their names are
replaced in the files of its classes while it runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from compressor.internals.transformers import files_of, interpolation_taps, with_names

Attention = Callable[..., tuple[torch.Tensor, None]]


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
    def of(cls, grids: torch.Tensor, patches: int, merge: int | torch.Tensor = 1) -> Places:
        """Return the places of patches that stand in squares of `merge` x `merge`, for grids [rows, 3]."""
        if isinstance(merge, torch.Tensor):  # one for each image
            merge = merge[:, None]
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

    def mask(self, part: torch.Tensor) -> torch.Tensor:
        """Return which patches attend to which, bool [rows, 1, patches, patches]: those of the same part of an image.

        Padding attends to padding, so that no patch attends to nothing.
        """
        part = torch.where(self.known, part, -1)
        return part[:, None, :, None] == part[:, None, None, :]

    def windows(self, size: int) -> torch.Tensor:
        """Return the number of the window of `size` x `size` patches that each patch lies in."""
        return (self.frame * self.heights + self.row // size) * self.widths + self.column // size


@dataclass
class PaddedGrids:
    """The functions of `transformers.vision_utils`, and those beside some encoders, for rows of `patches` patches.

    All take grids [rows, 3] and return values for ``rows * patches`` patches, with the arguments of transformers.

    Attributes:
        patches: number of patches of a row.
        masks: lengths of sequences as encoders hand them to attentions, and the masks that stand for them.
    """

    patches: int
    masks: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    @property
    def functions(self) -> dict[str, Callable[..., Any]]:
        """Return the functions by their names."""
        return {name: getattr(self, name) for name in dir(self) if name.startswith("get_")} | {
            "is_flash_attention_requested": lambda *_: True,  # attentions then get the lengths, and cut nothing
        }

    def get_max_seqlen(self, *_: Any, **__: Any) -> int:
        """Return the length of the longest sequence, which `attend` does not read."""
        return self.patches

    def get_vision_cu_seqlens(
        self, grid_thw: torch.Tensor, merge_temporal: bool = False, kwargs: Any = None
    ) -> torch.Tensor:
        """Return the sums of the lengths of rows; the patches of a frame, or of a clip, attend to each other."""
        places = Places.of(grid_thw, self.patches)
        return self._lengths(grid_thw, places.mask(places.frame * (not merge_temporal)))

    def get_vision_attention_seqlens(
        self, grid_thw: torch.Tensor, config: Any, merge_temporal: bool = False, kwargs: Any = None
    ) -> tuple[torch.Tensor, int]:
        """Return the sums of the lengths of rows, and the length of the longest."""
        return self.get_vision_cu_seqlens(grid_thw, merge_temporal), self.patches

    def get_vision_window_index(
        self, grid_thw: torch.Tensor, spatial_merge_size: int, window_size: int, patch_size: int, kwargs: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return an order that leaves squares of patches in their places; those of a window attend to each other."""
        places = Places.of(grid_thw, self.patches, spatial_merge_size)
        size = window_size // spatial_merge_size // patch_size * spatial_merge_size
        order = torch.arange(grid_thw.shape[0] * self.patches // spatial_merge_size**2)
        return order, self._lengths(grid_thw, places.mask(places.windows(size)))

    def get_vision_position_ids(
        self,
        grid_thw: torch.Tensor,
        spatial_merge_size: int | torch.Tensor,
        include_temporal: bool = False,
        kwargs: Any = None,
    ) -> torch.Tensor:
        """Return row and column of each patch, behind its frame if asked for, [rows * patches, axes]."""
        places = Places.of(grid_thw, self.patches, spatial_merge_size)
        axes = [places.frame] * include_temporal + [places.row, places.column]
        return torch.stack(axes, -1).flatten(0, 1)

    def get_vision_interpolation_indices_and_weights(
        self,
        grid_thw: torch.Tensor,
        num_grid_per_side: int,
        mode: str = "bilinear",
        align_corners: bool = False,
        spatial_merge_size: int = 1,
        padding: str = "border",
        kwargs: Any = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the entries of a square table of positions that give that of each patch, and their weights."""
        places, side = Places.of(grid_thw, self.patches, spatial_merge_size), num_grid_per_side
        sizes = ((places.row, places.heights), (places.column, places.widths))
        (rows, high), (columns, wide) = (
            interpolation_taps(place.flatten(), size.expand_as(place).flatten(), side, mode, align_corners, padding)
            for place, size in sizes
        )
        indices = rows[:, :, None] * side + columns[:, None, :]
        return indices.flatten(1), (high[:, :, None] * wide[:, None, :]).flatten(1)

    def get_vision_frame_index(self, grid_thw: torch.Tensor, kwargs: Any = None) -> torch.Tensor:
        """Return the number of the frame of each patch, from 1, or 0 in an image (Kimi K2.5)."""
        frame = Places.of(grid_thw, self.patches).frame
        return torch.where(grid_thw[:, :1] > 1, frame + 1, 0).flatten()

    def get_vision_pixel_shuffle_index(
        self, grid_thw: torch.Tensor, merge_size: int, kwargs: Any = None
    ) -> torch.Tensor:
        """Return the patches of rows in the order of squares, for patches that stand line by line (Muse)."""
        places = Places.of(grid_thw, self.patches, merge_size)
        line = (places.frame * places.heights + places.row) * places.widths + places.column
        place: torch.Tensor = torch.where(places.known, line, torch.arange(self.patches))
        return (place + torch.arange(grid_thw.shape[0])[:, None] * self.patches).flatten()

    def get_vision_temporal_merge_index(
        self, grid_thw: torch.Tensor, kernel_height: int, kernel_width: int, kwargs: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Return places of patches in squares, their shares of frames, and the number of squares (Kimi K2.5)."""
        places, area = Places.of(grid_thw, self.patches), kernel_height * kernel_width
        square = places.row // kernel_height * (places.widths // kernel_width) + places.column // kernel_width
        inside = places.row % kernel_height * kernel_width + places.column % kernel_width
        place = (square * area + inside) + torch.arange(grid_thw.shape[0])[:, None] * self.patches
        share = places.known / grid_thw[:, :1]
        return place.flatten(), share.flatten(), grid_thw.shape[0] * self.patches // area

    def attend(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: None,
        *,
        cu_seq_lens_q: torch.Tensor,
        scaling: float | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """Return the attention of patches within rows, as an attention function of transformers.

        Args:
            module: the attention, which is not read.
            query: queries [1, heads, rows * patches, width].
            key: keys, of as many heads or of fewer.
            value: values, of as many heads as the keys.
            attention_mask: none.
            cu_seq_lens_q: lengths that one of the functions above returned.
            scaling: factor of the scores.
        """
        mask = next((mask for lengths, mask in self.masks if lengths is cu_seq_lens_q), None)
        if mask is None:
            raise TypeError("its attention gets other lengths than those of its grids")
        groups = query.shape[1] // key.shape[1]
        rows, length = mask.shape[0], query.shape[2]
        query, key, value = (
            each[0].reshape(each.shape[1], rows, self.patches, -1).transpose(0, 1) for each in (query, key, value)
        )
        if groups > 1:
            key, value = (each.repeat_interleave(groups, 1) for each in (key, value))
        found = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
        return found.transpose(1, 2).reshape(1, length, query.shape[1], -1), None

    def get_interface(self, name: str, default: Any = None) -> Attention:
        """Return `attend`, whatever the config names."""
        return self.attend

    def _lengths(self, grids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        lengths = torch.arange(grids.shape[0] + 1) * self.patches
        self.masks.append((lengths, mask))
        return lengths


class _Size(int):
    """The number of features of an image, which no graph holds as a number of Python."""

    def __iter__(self) -> Iterator[int]:
        """Refuse to be read as the sizes of an image."""
        raise TypeError("it reads the sizes of images in Python")


def _are_sizes(arguments: Sequence[Any]) -> bool:
    """Return whether the first of some arguments is a list of numbers of features of images."""
    return bool(arguments) and isinstance(arguments[0], list) and isinstance(arguments[0][0], _Size)


class _Undivided(TorchFunctionMode):
    """Leaves the features of all images behind each other, which `get_image_features` divides by image.

    Under torch.export, a list of sizes is made by ``unbind`` and ``item``.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.tolist:
            return [_Size()]
        if func is torch.Tensor.item:
            return _Size()
        if func is torch.Tensor.unbind and args[1:] in ((), (0,)) and not isinstance(args[0].shape[0], int):
            return (args[0],)
        if func in (torch.split, torch.Tensor.split) and _are_sizes(args[1:]):
            return (args[0],)
        return func(*args, **({} if kwargs is None else kwargs))


def has_windows(module: Any) -> bool:
    """Return whether a vision encoder has patches that attend to those of a window alone."""
    return any("get_vision_window_index" in vars(file) for file in files_of(module))


@contextlib.contextmanager
def padded_grids(module: Any, patches: int) -> Iterator[None]:
    """Let the vision encoders of a module read images as rows of `patches` patches."""
    grids = PaddedGrids(patches)
    with with_names(module, grids.functions | {"ALL_ATTENTION_FUNCTIONS": grids}), _Undivided():
        yield
