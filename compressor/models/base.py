"""What every source of models returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from compressor.errors import CompressorError

if TYPE_CHECKING:
    from compressor.preprocess import Preprocess

TASKS = (
    "image-classification",
    "image-feature-extraction",
    "text-classification",
    "feature-extraction",
    "sentence-similarity",
    "text-generation",
)


class ModelError(CompressorError):
    """A MODEL argument that cannot be loaded."""


@dataclass(frozen=True)
class Model:
    """A module with everything around it that export and evaluation need.

    Attributes:
        module: the torch module, in evaluation mode.
        call: calls the module with its inputs in order, returns the outputs in order.
        answer: name of the output that quality is judged by.
        example: input name to tensor, two samples.
        dynamic_axes: input name to {axis: name}, e.g. ``{0: "batch", 1: "sequence"}``.
        untrained: parameter names that the checkpoint did not hold; a traced graph must not read them.
        save: writes the model's config and preprocessing into a folder, under the ecosystem's own file names.
        random_weights: no checkpoint was read, so no quality may be stated.
    """

    name: str
    source: str
    task: str
    module: torch.nn.Module
    call: Callable[..., tuple[torch.Tensor, ...]]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    answer: str
    example: dict[str, torch.Tensor]
    dynamic_axes: dict[str, dict[int, str]]
    preprocess: Preprocess
    save: Callable[[Path], None]
    untrained: tuple[str, ...] = ()
    revision: str | None = None
    random_weights: bool = False

    def classes(self) -> int | None:
        """Number of classes of a classifier, by its last weight; None for other tasks."""
        if not self.task.endswith("classification"):
            return None
        with torch.inference_mode():
            return int(self.call(self.module, *self.example.values())[self.outputs.index(self.answer)].shape[-1])


def as_numpy(example: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Example inputs as arrays."""
    return {name: tensor.numpy() for name, tensor in example.items()}


def first_line(error: BaseException) -> str:
    """The first line of an error's text, at most 200 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:200].rstrip(".")
