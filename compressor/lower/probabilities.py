"""Models that return probabilities, such as a module of one's own that ends with a softmax or a sigmoid.

Quality is measured on logits: the softmax of probabilities is nearly the same for all classes, so that no change of a
prediction would seem to cost anything, and as logits of labels all of them would be positive.
"""

from __future__ import annotations

import dataclasses

import torch

from compressor.data.splits import Data
from compressor.limitations import Limitation
from compressor.models import Model
from compressor.quality.evaluate import tensor_batches
from compressor.quality.heads.base import Head
from compressor.quality.heads.registry import head_for
from passes.analysis.redundancy import output_mask

SAMPLES = 16  # of the data, on which the output is looked at
LEAST_VALUES = 8  # numbers that must lie between 0 and 1, if they do not sum to 1
SLACK = 1e-3  # of a sum of probabilities, which half precision rounds


def with_logits(model: Model, data: Data) -> Model:
    """Return a module of one's own with the way from its probabilities to logits, and a limitation that says so.

    The output is that of probabilities if its values for samples of the data lie between 0 and 1. Models of libraries
    return logits, and stay as they are.
    """
    head = head_for(model.task, model.problem_type)
    if model.source != "module" or head.class_axis is None:
        return model
    feeds = next(tensor_batches(data.calibration.head(SAMPLES), SAMPLES))
    with torch.inference_mode():
        values = model.evaluated_in(model.call(model.module, *(feeds[name] for name in model.inputs)))
    kind = _kind(values, head, output_mask(feeds))
    if kind is None:
        return model
    found = Limitation(
        "probabilities",
        f"{model.answer} holds {kind}, as behind a softmax or a sigmoid, so quality is measured on their logarithms; "
        "if they are none, return the logits instead",
    )
    return dataclasses.replace(model, to_logits=head.logits, limitations=(*model.limitations, found))


def _kind(values: torch.Tensor, head: Head, mask: torch.Tensor | None) -> str | None:
    """Return what probabilities an output holds; None if it holds other numbers.

    Args:
        values: the output.
        head: how it is evaluated.
        mask: [rows, tokens], 0 at padding, where an output per token may be anything.
    """
    assert head.class_axis is not None
    if not values.is_floating_point():
        return None
    values = values.float().movedim(head.class_axis, -1)
    if mask is not None and values.shape[:-1] == mask.shape:
        values = values[mask.bool()]
    if not bool(((values >= 0) & (values <= 1 + SLACK)).all()):
        return None
    if values.shape[-1] > 1 and float((values.sum(-1) - 1).abs().max()) <= SLACK:
        return "probabilities that sum to 1"
    return "values from 0 to 1" if values.numel() >= LEAST_VALUES else None
