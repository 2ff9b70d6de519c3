"""The preprocessing of a model: its inputs, and the functions that convert images and texts to inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from PIL import Image

Kind = Literal["image", "text", "tensor"]
Tokenise = Callable[[list[str], list[str] | None], dict[str, npt.NDArray[Any]]]


@dataclass(frozen=True)
class Preprocess:
    """The preprocessing that belongs to a model.

    Attributes:
        inputs: input names of the model, in order.
        kind: kind of the data that the model takes.
        example: one batch of inputs, batch axis first, for shapes and dtypes.
        image: converts an image of mode `image_mode` to float32 [C, H, W]; must be thread-safe.
        text: tokenizes a batch of texts, optionally with second texts, to int64 [rows, tokens] by input name, padded
            to the longest row of the batch.
        image_mode: PIL mode of the images.
        class_first: the tokenizer puts a class token in front of every text.
        complete: adds the inputs that are derived from the others: position ids and an empty KV cache.
        whole: tokenizes one text without padding or truncation, [tokens] by input name.
        cut: returns a `text` function that truncates texts to a number of tokens.
        longest: maximum number of tokens that the model takes; None if it is unknown.
        lengths: returns the number of tokens of each text, optionally with second texts, without truncation.
        limit: number of tokens to which `text` truncates; None if it does not truncate.
    """

    inputs: tuple[str, ...]
    kind: Kind
    example: Mapping[str, npt.NDArray[Any]]
    image: Callable[[Image.Image], npt.NDArray[np.float32]] | None = None
    text: Tokenise | None = None
    image_mode: str = "RGB"
    class_first: bool = False
    complete: Callable[[dict[str, npt.NDArray[Any]]], dict[str, npt.NDArray[Any]]] | None = None
    whole: Callable[[str], dict[str, npt.NDArray[Any]]] | None = None
    cut: Callable[[int], Tokenise] | None = None
    longest: int | None = None
    lengths: Callable[[list[str], list[str] | None], list[int]] | None = None
    limit: int | None = None

    def limited(self, length: int) -> Preprocess:
        """Return a copy that truncates texts to `length` tokens."""
        return self if self.cut is None else replace(self, text=self.cut(length), limit=length)
