"""Vision-language models as three files, named as Optimum and transformers.js name them, opened as one engine.

The vision encoder runs once for an image, and its features stand in the places of placeholders among the embeddings of
the tokens. The first call of the decoder reads them all, with an empty cache; every later call reads one more token.
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

from runtimes.base.json_text import JsonTextError, parse
from runtimes.base.protocols import DTypes, Engine, Feeds, RuntimesError, Shapes

VISION, EMBED, DECODER = STEMS = ("vision_encoder", "embed_tokens", "decoder_model_merged")
IDS, MASK, POSITIONS = "input_ids", "attention_mask", "position_ids"
PIXELS = "pixel_values"
# Values at which the graph of a whole model is cut; in the files, the embeddings of tokens are inputs_embeds too.
FEATURES, TEXT_EMBEDS, EMBEDS = "image_features", "text_embeds", "inputs_embeds"
FACTS, IMAGE_TOKEN = "vision_language.json", "image_token_id"  # a file beside the others, and its entry

Array = npt.NDArray[Any]


def is_image(name: str) -> bool:
    """Return whether an input of the whole model is one of the vision encoder, such as ``pixel_attention_mask``."""
    return name.startswith("pixel_")


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
        merged[row, is_image[row]] = by_row[row, :wanted]
    return merged


class VisionLanguageEngine:
    """The engines of a vision encoder, the embeddings and a decoder as one engine.

    Feeds with images run all three. Feeds with ``image_features`` leave the vision encoder out, and feeds with images
    alone leave the two others out; without both, the tokens are text alone, as every further token is.
    """

    def __init__(self, vision: Engine, embed: Engine, decoder: Engine, image_token: int) -> None:
        self._vision, self._embed, self._decoder, self.image_token = vision, embed, decoder, image_token
        others = tuple(name for name in decoder.inputs if name not in (EMBEDS, IDS))
        self.inputs: tuple[str, ...] = (*vision.inputs, IDS, *others)
        self.outputs: tuple[str, ...] = (*decoder.outputs, FEATURES, TEXT_EMBEDS, EMBEDS)
        self.input_dtypes: DTypes = {name: self._fact("input_dtypes", name) for name in self.inputs}
        self.input_shapes: Shapes = {name: self._fact("input_shapes", name) for name in self.inputs}

    def _fact(self, fact: str, name: str) -> Any:
        owner = self._vision if name in self._vision.inputs else self._embed if name == IDS else self._decoder
        return getattr(owner, fact)[name]

    def run(self, feeds: Feeds) -> dict[str, Array]:
        """Run one inference from host memory to host memory; what the feeds leave out is not returned."""
        outputs: dict[str, Array] = {}
        if self._has_images(feeds):
            outputs[FEATURES] = self._vision.run(self._of_vision(feeds))[FEATURES]
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
        features = self._vision.run(self._of_vision(feeds)) if self._has_images(feeds) else {}
        return self._merged({**feeds, **features}, self._embed.run({IDS: feeds[IDS]})[EMBEDS])

    def _merged(self, feeds: Mapping[str, Array], text: Array) -> Array:
        features = feeds.get(FEATURES)
        return text if features is None else merge(features, text, feeds[IDS] == self.image_token)

    def _has_images(self, feeds: Feeds) -> bool:
        return all(name in feeds for name in self._vision.inputs)

    def _of_vision(self, feeds: Feeds) -> dict[str, Array]:
        return {name: feeds[name] for name in self._vision.inputs}

    def _of_decoder(self, feeds: Feeds, embedded: Array) -> dict[str, Array]:
        return {name: embedded if name == EMBEDS else feeds[name] for name in self._decoder.inputs}

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
    image_token = image_token_of(facts)
    with contextlib.ExitStack() as stack:
        vision, embed, decoder = (stack.enter_context(load(part)) for part in parts)
        stack.pop_all()
    return VisionLanguageEngine(vision, embed, decoder, image_token)


def image_token_of(facts: Path) -> int:
    """Return the id of the image token that the file `FACTS` holds.

    Raises:
        RuntimesError: the file does not hold it.
    """
    try:
        found = parse(facts.read_bytes(), TypeAdapter(dict[str, int]))
    except JsonTextError as error:
        raise RuntimesError(f"{FACTS} cannot be read ({error}); export the model again.") from error
    if IMAGE_TOKEN not in found:
        raise RuntimesError(f"{FACTS} holds {', '.join(found) or 'nothing'}; expected {IMAGE_TOKEN}, a token id.")
    return found[IMAGE_TOKEN]


def greedy(engine: VisionLanguageEngine, prompt: Feeds, new: int, *, first_position: int = 0) -> npt.NDArray[np.int64]:
    """Generate tokens greedily with the cache.

    Args:
        engine: an open engine.
        prompt: inputs of the processor: images if there are any, ``input_ids`` and ``attention_mask``; rows that are
            padded on the left generate together.
        new: number of tokens to generate; an end token does not stop it.
        first_position: position of the first token, 0 in most models.

    Returns:
        The prompt and the new tokens, int64 [rows, tokens].
    """
    tokens, mask = prompt[IDS], prompt[MASK]
    feeds: dict[str, Array] = dict(prompt) | {
        name: _empty(engine, name, len(tokens)) for name in engine.inputs if is_past(name)
    }
    for _ in range(new):
        positions = (mask.cumsum(1) - 1).clip(min=0)[:, -feeds[IDS].shape[1] :] + first_position
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
