"""Positions of tokens on three axes, frames, rows and columns, as in Qwen2-VL (Wang et al. 2024, section 2.1)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from runtimes.base.protocols import RuntimesError

Array = npt.NDArray[Any]
AXES = 3


def grid_positions(ids: Array, mask: Array, grids: Array | None, image_token: int, merge: int) -> npt.NDArray[np.int64]:
    """Return the positions of the tokens of prompts, [rows, tokens, 3]: frame, row and column.

    A token of text has the same position on all axes, one behind the largest before it. The tokens of an image have the
    place of their square of patches in the image, behind the text before it. Padding has position 0.

    Args:
        ids: tokens, [rows, tokens].
        mask: 0 at padding, [rows, tokens].
        grids: frames, height and width in patches of the image of each row, [rows, 3]; None without images.
        image_token: token id of the placeholders.
        merge: side of the square of patches that a token stands for.

    Raises:
        RuntimesError: a row has another number of placeholders than its image has squares of patches.

    >>> grid_positions(np.array([[5, 9, 9, 5]]), np.ones((1, 4)), np.array([[1, 2, 4]]), 9, 2)[0].T.tolist()
    [[0, 1, 1, 3], [0, 1, 1, 3], [0, 1, 2, 3]]
    """
    positions = np.zeros((*ids.shape, AXES), np.int64)
    for row, kept in enumerate(np.flatnonzero(each) for each in mask):
        is_image = (ids[row, kept] == image_token) & (grids is not None)
        runs = [run for run in np.split(kept, np.flatnonzero(np.diff(is_image)) + 1) if len(run)]
        following = 0
        for run in runs:
            if grids is None or ids[row, run[0]] != image_token:
                places = np.arange(len(run))[:, None]
            else:
                frames, height, width = (int(size) for size in grids[row])
                places = np.indices((frames, height // merge, width // merge)).reshape(AXES, -1).T
                _check(len(run), len(places), row)
            positions[row, run] = following + places
            following += len(run) if places.shape[1] == 1 else max(height, width) // merge
    return positions


def next_positions(positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the positions of the next token of each row, [rows, 1, 3], behind all of its positions so far."""
    behind = positions.max((1, 2)) + 1
    return np.broadcast_to(behind[:, None, None], (len(positions), 1, AXES))


def _check(found: int, expected: int, row: int) -> None:
    if found != expected:
        raise RuntimesError(
            f"row {row} of input_ids has {found} placeholders of image tokens in a row, but its image has {expected}; "
            "expected one image in each row, with a placeholder for each square of patches."
        )
