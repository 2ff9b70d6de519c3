"""One class per pixel: semantic segmentation."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np

from compressor.errors import DataError
from compressor.quality.heads.base import SCALES, Head, Metrics, regret, relative_entropy, row_means
from compressor.quality.intervals import Array, Columns

if TYPE_CHECKING:
    import torch

    from compressor.data.splits import Batch

IGNORED = 255  # label of pixels that are not scored, as in ADE20K and Cityscapes


class PixelClasses(Head):
    """Logits [rows, classes, height, width]; their size may be a fraction of that of the image and of its labels."""

    metrics: ClassVar[Metrics] = {"pixels": "mean_iou", None: "pixel_agreement"}
    scales = SCALES
    class_axis = 1

    def divergence(
        self, answer: torch.Tensor, original: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Compute KL(original || answer) in nats, averaged over the pixels, [rows]."""
        return row_means(relative_entropy(answer.movedim(1, -1), original.movedim(1, -1)), None)

    def columns(self, metric: str, batch: Batch, answer: Array, original: Array | None) -> Columns:
        """Return intersections and unions by class, and ``agreement`` and ``regret`` as means over the pixels."""
        columns: Columns = {}
        if metric == "mean_iou":
            assert batch.labels is not None
            columns |= _overlaps(resized(answer, batch.labels.shape[-2:]).argmax(1), batch.labels, answer.shape[1])
        if original is not None:
            same = answer.argmax(1) == original.argmax(1)
            columns["agreement"] = same.reshape(len(same), -1).mean(-1)
            columns["pixel_agreement"] = columns["agreement"]
            lost = regret(np.moveaxis(answer, 1, -1), np.moveaxis(original, 1, -1))
            columns["regret"] = lost.reshape(len(lost), -1).mean(-1)
        return columns

    def decisions(self, output: Array) -> Array:
        """Return the class of each pixel, [rows, height, width]."""
        classes: Array = output.argmax(1)
        return classes


def resized(logits: Array, size: tuple[int, ...]) -> Array:
    """Resize logits [rows, classes, height, width] bilinearly, as `post_process_semantic_segmentation` does."""
    if logits.shape[-2:] == size:
        return logits
    import torch

    larger = torch.nn.functional.interpolate(torch.from_numpy(logits), size=size, mode="bilinear", align_corners=False)
    values: Array = larger.numpy()
    return values


def _overlaps(chosen: Array, labels: Array, classes: int) -> Columns:
    """Return the pixels of intersection (``both``) and of union of prediction and label, by class, [rows] each."""
    scored = labels != IGNORED
    largest = int(labels[scored].max(initial=0))
    if largest >= classes:
        raise DataError(
            f"a mask holds the class {largest}, but the model has {classes} classes, from 0; {IGNORED} marks pixels "
            "that do not count"
        )
    columns = {}
    for index in range(classes):
        predicted, labelled = (chosen == index) & scored, labels == index
        columns[f"both {index}"] = (predicted & labelled).sum((1, 2)).astype(np.float64)
        columns[f"union {index}"] = (predicted | labelled).sum((1, 2)).astype(np.float64)
    return columns
