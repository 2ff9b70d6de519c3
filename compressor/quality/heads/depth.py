"""A depth per pixel: monocular depth estimation."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np

from compressor.quality.heads.base import Head, Metrics
from compressor.quality.intervals import Array, Columns

if TYPE_CHECKING:
    import torch

    from compressor.data.splits import Batch

FACTOR = 1.25  # of the threshold accuracy delta_1 (Eigen et al., arXiv 1406.2283)
SMALLEST = 1e-6  # smallest depth of a ratio; two depths below it agree


class Depth(Head):
    """Depth, or inverse depth up to scale, [rows, height, width].

    Most published models predict depth only up to an unknown scale, so depth is compared with the original's.
    """

    metrics: ClassVar[Metrics] = {None: "depth_agreement"}

    def divergence(
        self, answer: torch.Tensor, original: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Compute the squared error as a share of the variance of the original's depth in the same image, [rows]."""
        after, before = (side.float().flatten(1) for side in (answer, original))
        spread = (before - before.mean(1, keepdim=True)).square().sum(1)
        return (after - before).square().sum(1) / spread.clamp(min=1e-12)

    def columns(self, metric: str, batch: Batch, answer: Array, original: Array | None) -> Columns:
        """Return ``agreement``, the share of pixels with max(a / o, o / a) < 1.25, delta_1 against the original."""
        assert original is not None
        after, before = (
            np.maximum(side.reshape(len(side), -1), SMALLEST).astype(np.float64) for side in (answer, original)
        )
        agreement = (np.maximum(after / before, before / after) < FACTOR).mean(-1)
        return {"agreement": agreement, "depth_agreement": agreement}
