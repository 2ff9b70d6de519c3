"""What the data side has to know about a model: its inputs, and how a picture or a text becomes them."""

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
    """A model's own preprocessing.

    `inputs` are the model's input names in order. `image` turns one picture of mode `image_mode` into float32
    [C, H, W]; it is called from several threads at once. `text` tokenises a batch of texts, optionally with second
    texts, into int64 [rows, tokens] arrays by input name, padded to the longest row of the batch. `example` is one
    batch of inputs, batch first, that says shapes and dtypes. `class_first`: the tokenizer puts a class token in front
    of every text. `complete` adds what the model takes beyond those and follows from them: positions, an empty cache.
    `whole` tokenises a text without padding or cutting it, [tokens] by input name; `cut` makes a `text` that cuts texts
    at so many tokens; `longest` is how many the model takes, as far as that is known.
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

    def limited(self, length: int) -> Preprocess:
        """The same with texts cut at so many tokens."""
        return self if self.cut is None else replace(self, text=self.cut(length))
