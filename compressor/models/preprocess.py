"""The preprocessing of a model: its inputs, and the functions that convert images and texts to inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from PIL import Image

    from compressor.models.class_names import ClassNames

Kind = Literal["image", "text", "audio", "video", "image-text", "tensor"]
# Clips, each float32 [samples], to the inputs of a batch.
Listen = Callable[[Sequence[npt.NDArray[np.float32]]], dict[str, npt.NDArray[Any]]]
Tokenise = Callable[[list[str], list[str] | None], dict[str, npt.NDArray[Any]]]


@dataclass(frozen=True)
class Aligned:
    """Tokens of a batch, with their places in the texts.

    Attributes:
        feeds: token arrays by input name, [rows, tokens].
        words: index of the word of each token within its text, -1 for special tokens and padding.
        offsets: first and last character (exclusive) of each token in its text, [rows, tokens, 2].
        texts: the text that a token comes from: 0 for the first, 1 for the second, -1 for special tokens and padding.
    """

    feeds: dict[str, npt.NDArray[Any]]
    words: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]
    texts: npt.NDArray[np.int64]


@dataclass(frozen=True)
class DecoderSide:
    """How the inputs of the decoder of an encoder-decoder are made.

    Attributes:
        encode: tokenizes target texts, without padding; None without a tokenizer.
        shift: returns the decoder inputs for labels, both int64 [rows, tokens].
        generate: returns the tokens that the original generates greedily from each row of encoder inputs, the start
            token first.
        generated: maximum number of tokens that it generates.
        start: the token with which the decoder starts.
        longest: maximum number of tokens of a target.
        prompt: the tokens behind the start token that the decoder is given, not asked for: those of language and task.
    """

    encode: Callable[[list[str]], list[list[int]]] | None
    shift: Callable[[npt.NDArray[Any]], npt.NDArray[Any]]
    generate: Callable[[dict[str, npt.NDArray[Any]]], list[list[int]]]
    generated: int
    start: int
    longest: int
    prompt: tuple[int, ...] = ()


@dataclass(frozen=True)
class GridInput:
    """How a vision encoder takes images as grids of patches.

    Attributes:
        merge: side of the square of patches that an image token stands for.
        file_input: name of the input of the grids in its file.
    """

    merge: int
    file_input: str


@dataclass(frozen=True)
class Preprocess:
    """The preprocessing that belongs to a model.

    Attributes:
        inputs: input names of the model, in order.
        kind: kind of the data that the model takes.
        example: one batch of inputs, batch axis first, for shapes and dtypes.
        image: converts a PIL image with `channels` channels, or an array [C, H, W] with values in 0 to 1, to float32
            [C, H, W]; must be thread-safe.
        reduces_labels: 0 in the masks of segmentation is no class, and class k of the model is k + 1 in them.
        no_image: reason why `image` is None and the remedy; empty if the model has no image preprocessing.
        text: tokenizes a batch of texts, optionally with second texts, to int64 [rows, tokens] by input name, padded
            to the longest row of the batch.
        class_first: the tokenizer puts a class token in front of every text.
        complete: adds the inputs that are derived from the others: position ids and an empty KV cache.
        whole: tokenizes one text without padding or truncation, [tokens] by input name.
        cut: returns a `text` function that truncates texts to a number of tokens.
        longest: maximum number of tokens that the model takes; None if it is unknown.
        align: tokenizes texts with the places of the tokens in them; None without a fast tokenizer.
        special: token ids that are not text, such as those of padding and of the start.
        unknown: the token id of words that the tokenizer does not know; None if it knows all, or marks something else
            with the same token.
        tokenizer: name of the tokenizer, for messages.
        mask_token: the token id that hides a token of a masked language model.
        problem_type: the problem type of a classifier.
        classes: number of classes or labels; None if it is unknown before the model runs.
        class_names: names of the classes; None if the model does not name them.
        lengths: returns the number of tokens of each text, optionally with second texts, without truncation.
        limit: number of tokens to which `text` truncates; None if it does not truncate.
        audio: converts mono clips at `rate` samples per second, each float32 [samples], to the inputs of a batch,
            padded to the longest clip; None without a feature extractor.
        no_audio: the reason why the model's feature extractor cannot be used; empty without one, or if it can.
        rate: samples per second of the clips.
        seconds: length to which longer clips are cut.
        frames: numbers of frames of the output for clips of some numbers of samples; None if they are unknown.
        video: converts the `clip` frames of a clip, PIL images, to float32 [frames, channels, height, width]; None
            without a video processor.
        clip: number of frames of a clip.
        varying: axes of each input, besides the first, whose sizes vary from batch to batch.
        decoder: how the inputs of the decoder are made; None for models without an encoder and a decoder.
        padded: number of tokens to which every text is padded, or of samples or frames to which every clip is padded
            and cut; None for the longest of the batch.
        sized: --image-size chooses the size of the images that arrays hold.
        template: makes a prompt of the name of a class, with ``{}`` in its place; empty for models whose classes are
            no texts.
        image_text: converts an image and its text to the inputs of one row; None without a processor.
        placeholder: what stands for an image in a text.
        padding: token id with which texts beside images are padded.
        image_token: token id of the placeholders of an image in a text; None for models of one of the two.
        image_tokens: number of placeholders of the image of a row, given its inputs without the axis of rows.
        grid: how the vision encoder takes grids of patches; None for images of one size.
        left_padding: token id with which texts are padded on the left; None for those that are padded on the right.
        bidirectional: each token of a text reads all others, so that it predicts none of them.
    """

    inputs: tuple[str, ...]
    kind: Kind
    example: Mapping[str, npt.NDArray[Any]]
    image: Callable[[Image.Image | npt.NDArray[Any]], npt.NDArray[np.float32]] | None = None
    no_image: str = ""
    reduces_labels: bool = False
    text: Tokenise | None = None
    class_first: bool = False
    complete: Callable[[dict[str, npt.NDArray[Any]]], dict[str, npt.NDArray[Any]]] | None = None
    whole: Callable[[str], dict[str, npt.NDArray[Any]]] | None = None
    cut: Callable[[int], Tokenise] | None = None
    longest: int | None = None
    align: Callable[[list[Any], list[str] | None], Aligned] | None = None
    special: frozenset[int] = frozenset()
    unknown: int | None = None
    tokenizer: str = ""
    mask_token: int | None = None
    problem_type: str | None = None
    classes: int | None = None
    class_names: ClassNames | None = None

    @property
    def channels(self) -> int:
        """Return the number of channels of an image model, by its example [rows, C, H, W]."""
        return int(self.example[self.inputs[0]].shape[1])

    lengths: Callable[[list[str], list[str] | None], list[int]] | None = None
    limit: int | None = None
    audio: Listen | None = None
    no_audio: str = ""
    rate: int = 0
    seconds: float = 0.0
    frames: Callable[[Sequence[int]], npt.NDArray[Any]] | None = None
    video: Callable[[Sequence[Image.Image]], npt.NDArray[np.float32]] | None = None
    clip: int = 0
    varying: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    decoder: DecoderSide | None = None
    padded: int | None = None
    sized: bool = False
    template: str = ""
    image_text: Callable[[Image.Image, str], dict[str, npt.NDArray[Any]]] | None = None
    placeholder: str = ""
    padding: int = 0
    image_token: int | None = None
    image_tokens: Callable[[Mapping[str, npt.NDArray[Any]]], int] | None = None
    grid: GridInput | None = None
    left_padding: int | None = None
    bidirectional: bool = False

    def limited(self, length: int) -> Preprocess:
        """Return a copy that truncates texts to `length` tokens."""
        return self if self.cut is None else replace(self, text=self.cut(length), limit=length)
