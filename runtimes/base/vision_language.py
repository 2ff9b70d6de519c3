"""Vision-language models as three files, named as Optimum and transformers.js name them, opened as one engine.

The vision encoder runs once for an image, and its features stand in the places of placeholders among the embeddings of
the tokens. The first call of the decoder reads them all, with an empty cache; every later call reads one more token.

In models with grids of patches, such as Qwen2-VL, the vision encoder takes the patches of all images behind each other,
and most decoders take positions ``[3, rows, tokens]``. The engine takes a row for each image, as the graph of the whole
model does: patches ``[rows, patches, values]``, padded behind, and positions ``[rows, tokens, 3]``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter

from runtimes.base.grid_positions import AXES, grid_positions, next_positions
from runtimes.base.json_text import JsonTextError, parse
from runtimes.base.protocols import DTypes, Engine, Feeds, RuntimesError, Shapes

VISION, EMBED, DECODER = STEMS = ("vision_encoder", "embed_tokens", "decoder_model_merged")
IDS, MASK, POSITIONS = "input_ids", "attention_mask", "position_ids"
FLATTENED = "flattened_patches"  # row and column of each patch before its values, from 1; 0 for padding
PIXELS = "pixel_values"
# Frames, height and width of each image in patches; Qwen2-VL's own files have the shorter name in transformers.js.
GRID, SHORT_GRID = "image_grid_thw", "grid_thw"
SIZES = "image_sizes"  # height and width of each image in pixels, before it was cut into tiles
SHAPES = "spatial_shapes"  # height and width of each image in patches
PLACES = "image_position_ids"  # column and row of each patch, -1 at padding
# The tokens of the text that the queries of a Q-Former read with the image, as in InstructBLIP.
QUERY_IDS, QUERY_MASK = "qformer_input_ids", "qformer_attention_mask"
LAYOUTS = (GRID, SIZES, SHAPES, PLACES)  # inputs that tell how the pixels of an image lie
# Values at which the graph of a whole model is cut; in the files, the embeddings of tokens are inputs_embeds too.
FEATURES, TEXT_EMBEDS, EMBEDS = "image_features", "text_embeds", "inputs_embeds"
FACTS, IMAGE_TOKEN = "vision_language.json", "image_token_id"  # a file beside the others, and its entry
MERGE = "spatial_merge_size"  # its entry for models with grids of patches
READS_IDS = "decoder_reads_input_ids"  # its entry, 1, for decoders that ask which tokens are of an image

Array = npt.NDArray[Any]


def is_image(name: str) -> bool:
    """Return whether an input of the whole model is one of the vision encoder, such as ``pixel_attention_mask``."""
    return name.startswith("pixel_") or name in (*LAYOUTS, QUERY_IDS, QUERY_MASK)


def grid_input(model_type: str) -> str:
    """Return the name of the input of the grids in the vision encoder's file, given the type in the model's config."""
    return SHORT_GRID if model_type == "qwen2_vl" else GRID


def past_of(present: str) -> str:
    """Return the input that an output becomes in the next call.

    >>> past_of("present.0.key"), past_of("present_tokens.8")
    ('past_key_values.0.key', 'past_tokens.8')
    """
    return present.replace("present.", "past_key_values.", 1).replace("present_", "past_", 1)


def is_past(name: str) -> bool:
    """Return whether an input is state of an earlier call: the cache, or what else the language model keeps."""
    return name.startswith("past_")


def is_present(name: str) -> bool:
    """Return whether an output is the state of the next call."""
    return name.startswith(("present.", "present_"))


def parts_of(path: Path) -> tuple[Path, Path, Path] | None:
    """Return the three files of a vision-language model, given that of its vision encoder; None for other files."""
    prefix = path.stem.removesuffix(VISION)
    if not path.stem.endswith(VISION):
        return None
    vision, embed, decoder = (path.with_name(f"{prefix}{stem}{path.suffix}") for stem in STEMS)
    return (vision, embed, decoder) if embed.is_file() and decoder.is_file() else None


def merge(features: Array, text: Array, is_image: npt.NDArray[np.bool_]) -> Array:
    """Return the embeddings in which the placeholders are replaced by the features of images, in order.

    Embeddings may be wider: what stands behind the width of the features is that of the placeholder.

    Args:
        features: features of all images, [images, image tokens, width]; those of a row stand behind each other.
        text: embeddings of all tokens, [rows, tokens, width].
        is_image: whether a token is a placeholder, bool [rows, tokens].

    Raises:
        RuntimesError: there are more placeholders in a row than features.

    >>> merge(np.ones((1, 1, 2)), np.zeros((1, 2, 2)), np.array([[False, True]])).tolist()
    [[[0.0, 0.0], [1.0, 1.0]]]
    """
    merged = text.copy()
    by_row = features.reshape(len(text), -1, features.shape[-1])
    for row, wanted in enumerate(is_image.sum(1).tolist()):
        if wanted > by_row.shape[1]:
            raise RuntimesError(
                f"row {row} of input_ids has {wanted} placeholders of image tokens, but its images have "
                f"{by_row.shape[1]} features; expected a placeholder for each feature."
            )
        merged[row, is_image[row], : features.shape[-1]] = by_row[row, :wanted]
    return merged


def in_rows(features: Array, counts: Array, longest: int) -> Array:
    """Return the features of images that stand behind each other in a row each, padded with zeros behind.

    Args:
        features: those of all images, [features, width].
        counts: number of features of each image, [images].
        longest: number of features of a row.

    >>> in_rows(np.ones((3, 1)), np.array([1, 2]), 2)[..., 0].tolist()
    [[1.0, 0.0], [1.0, 1.0]]
    """
    rows = np.zeros((len(counts), longest, features.shape[-1]), features.dtype)
    rows[np.arange(longest) < counts[:, None]] = features
    return rows


class VisionLanguageEngine:
    """The engines of a vision encoder, the embeddings and a decoder as one engine.

    Feeds with images run all three. Feeds with ``image_features`` leave the vision encoder out, and feeds with images
    alone leave the two others out; without both, the tokens are text alone, as every further token is.

    Attributes:
        image_token: token id of the placeholders.
        merge: side of the square of patches that an image token stands for; None for images in other forms.
        has_axes: the decoder takes positions on three axes.
    """

    def __init__(
        self, vision: Engine, embed: Engine, decoder: Engine, image_token: int, merge: int | None = None
    ) -> None:
        self._vision, self._embed, self._decoder, self.image_token = vision, embed, decoder, image_token
        self.merge = merge
        positions = decoder.input_shapes[POSITIONS] if POSITIONS in decoder.inputs else None
        self.has_axes = positions is not None and len(positions) == AXES
        others = tuple(name for name in decoder.inputs if name not in (EMBEDS, IDS))
        self._images = {GRID if name == SHORT_GRID else name: name for name in vision.inputs}
        self.inputs: tuple[str, ...] = (*self._images, IDS, *others)
        self.outputs: tuple[str, ...] = (*decoder.outputs, FEATURES, TEXT_EMBEDS, EMBEDS)
        self.input_dtypes: DTypes = {name: self._fact("input_dtypes", name) for name in self.inputs}
        shapes: Shapes = {name: self._fact("input_shapes", name) for name in self.inputs}
        self.input_shapes: Shapes = shapes if merge is None else {**shapes, **self._row_shapes(shapes)}

    def _fact(self, fact: str, name: str) -> Any:
        owner = self._vision if name in self._images else self._embed if name == IDS else self._decoder
        return getattr(owner, fact)[self._images.get(name, name)]

    def _row_shapes(self, shapes: Shapes) -> Shapes:
        """Return the shapes of patches and positions with an axis of rows in front."""
        own: dict[str, tuple[int | None, ...] | None] = {}
        if (patches := shapes.get(PIXELS)) is not None:
            own[PIXELS] = (None, *patches)
        if self.has_axes:
            own[POSITIONS] = (None, None, AXES)
        return own

    def run(self, feeds: Feeds) -> dict[str, Array]:
        """Run one inference from host memory to host memory; what the feeds leave out is not returned."""
        outputs: dict[str, Array] = {}
        if self._has_images(feeds):
            outputs[FEATURES] = self._features(feeds)
        if IDS not in feeds:
            return outputs
        outputs[TEXT_EMBEDS] = self._embed.run({IDS: feeds[IDS]})[EMBEDS]
        outputs[EMBEDS] = self._merged({**feeds, **outputs}, outputs[TEXT_EMBEDS])
        outputs |= self._decoder.run(self._of_decoder(feeds, outputs[EMBEDS]))
        return {name: outputs[name] for name in self.outputs if name in outputs}

    def bind(self, feeds: Feeds) -> Callable[[], None]:
        """Copy the feeds to the device and return a function that runs one inference on them.

        Features and embeddings are computed once and stay on the device: the decoder runs on the same ones.
        """
        calls = []
        if self._has_images(feeds):
            calls.append(self._vision.bind(self._of_vision(feeds)))
        if IDS in feeds:
            calls.append(self._embed.bind({IDS: feeds[IDS]}))
            calls.append(self._decoder.bind(self._of_decoder(feeds, self._embedded(feeds))))

        def call() -> None:
            for each in calls:
                each()

        return call

    def _embedded(self, feeds: Feeds) -> Array:
        features = {FEATURES: self._features(feeds)} if self._has_images(feeds) else {}
        return self._merged({**feeds, **features}, self._embed.run({IDS: feeds[IDS]})[EMBEDS])

    def _features(self, feeds: Feeds) -> Array:
        """Return the features of images, [rows, image tokens, width]."""
        found = self._vision.run(self._of_vision(feeds))[FEATURES]
        if self.merge is None:
            return found
        counts = feeds[GRID].prod(1) // self.merge**2
        return in_rows(found, counts, feeds[PIXELS].shape[1] // self.merge**2)

    def _merged(self, feeds: Mapping[str, Array], text: Array) -> Array:
        features = feeds.get(FEATURES)
        return text if features is None else merge(features, text, feeds[IDS] == self.image_token)

    def _has_images(self, feeds: Feeds) -> bool:
        return all(name in feeds for name in self._images)

    def _of_vision(self, feeds: Feeds) -> dict[str, Array]:
        own = {file: feeds[name] for name, file in self._images.items()}
        if self.merge is not None:
            own[PIXELS] = np.concatenate(
                [patches[:count] for patches, count in zip(own[PIXELS], feeds[GRID].prod(1).tolist(), strict=True)]
            )
        return own

    def _of_decoder(self, feeds: Feeds, embedded: Array) -> dict[str, Array]:
        own = {name: embedded if name == EMBEDS else feeds[name] for name in self._decoder.inputs}
        if self.has_axes:
            own[POSITIONS] = np.ascontiguousarray(own[POSITIONS].transpose(2, 0, 1))
        return own

    def close(self) -> None:
        """Free threads and memory of the three engines. Closing twice is allowed."""
        for engine in (self._vision, self._embed, self._decoder):
            engine.close()

    def __enter__(self) -> VisionLanguageEngine:
        """Return the engine itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the engines."""
        self.close()


def opened(parts: tuple[Path, Path, Path], load: Callable[[Path], Engine]) -> VisionLanguageEngine:
    """Open the three files of a vision-language model; close what was opened if one fails.

    Raises:
        RuntimesError: the file that notes the placeholder is missing or damaged.
    """
    facts = parts[0].with_name(FACTS)
    if not facts.is_file():
        raise RuntimesError(f"There is no {FACTS} beside {parts[0].name}; copy the whole folder of the export.")
    found = read_facts(facts)
    with contextlib.ExitStack() as stack:
        vision, embed, decoder = (stack.enter_context(load(part)) for part in parts)
        stack.pop_all()
    return VisionLanguageEngine(vision, embed, decoder, found[IMAGE_TOKEN], found.get(MERGE))


def read_facts(facts: Path) -> dict[str, int]:
    """Return what the file `FACTS` holds: the id of the image token, and the entries above.

    Raises:
        RuntimesError: the file does not hold the id.
    """
    try:
        found = parse(facts.read_bytes(), TypeAdapter(dict[str, int]))
    except JsonTextError as error:
        raise RuntimesError(f"{FACTS} cannot be read ({error}); export the model again.") from error
    if IMAGE_TOKEN not in found:
        raise RuntimesError(f"{FACTS} holds {', '.join(found) or 'nothing'}; expected {IMAGE_TOKEN}, a token id.")
    return found


def greedy(engine: VisionLanguageEngine, prompt: Feeds, new: int, *, first_position: int = 0) -> npt.NDArray[np.int64]:
    """Generate tokens greedily with the cache.

    Args:
        engine: an open engine.
        prompt: inputs of the processor: images if there are any, ``input_ids`` and ``attention_mask``; rows that are
            padded on the left generate together.
        new: number of tokens to generate; an end token does not stop it.
        first_position: position of the first token, 0 in most models; those of three axes begin at 0.

    Returns:
        The prompt and the new tokens, int64 [rows, tokens].
    """
    tokens, mask = prompt[IDS], prompt[MASK]
    feeds: dict[str, Array] = dict(prompt) | {
        name: _empty(engine, name, len(tokens)) for name in engine.inputs if is_past(name)
    }
    positions = np.zeros(0, np.int64)
    for _ in range(new):
        if engine.merge is None or not engine.has_axes:
            positions = (mask.cumsum(1) - 1).clip(min=0)[:, -feeds[IDS].shape[1] :] + first_position
        elif len(positions):
            positions = next_positions(positions)
        else:
            positions = grid_positions(tokens, mask, feeds.get(GRID), engine.image_token, engine.merge)
        outputs = engine.run({**feeds, MASK: mask, POSITIONS: positions.astype(np.int64)})
        tokens = np.concatenate([tokens, outputs["logits"][:, -1:].argmax(-1)], 1)
        mask = np.concatenate([mask, np.ones_like(mask[:, :1])], 1)
        feeds = {past_of(name): value for name, value in outputs.items() if is_present(name)}
        feeds[IDS] = tokens[:, -1:]
    return tokens


def _empty(engine: VisionLanguageEngine, name: str, rows: int) -> Array:
    """Return the state before the first token: no entries on the axes that grow."""
    shape = engine.input_shapes[name]
    assert shape is not None
    return np.zeros((rows, *(size or 0 for size in shape[1:])), engine.input_dtypes[name])
