"""Compare an exported file with its class of transformers on images, clips and texts, each by its own preprocessor.

The data is read as an export reads it, in batches whose rows have several lengths. The class gets what the preprocessor
of transformers makes of the same files.
"""

from __future__ import annotations

import contextlib
import inspect
import wave
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from preprocessors import Preprocessor

ROWS = 3
SAME_PIXELS = 1e-4  # of values of about 1
DECODER_IDS = "decoder_input_ids"


class OtherInputsError(ValueError):
    """Inputs that are not those of the preprocessor of transformers."""


def pairs_of(
    module: Any, path: Path, subject: Any, preprocessor: Preprocessor, source: Path
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the answer of the file and that of the class for each batch, or each row of texts, of the test split.

    Raises:
        OtherInputsError: the data was prepared otherwise than the preprocessor of transformers does.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    compared = {"image": _of_images, "video": _of_videos, "sound": _of_clips, "text": _of_texts}[preprocessor.kind]
    names = [each.name for each in session.get_inputs()]
    answer = session.get_outputs()[0].name
    for batch in subject.data.test.batches(ROWS):
        (value,) = session.run([answer], {name: batch.feeds[name] for name in names})
        yield from compared(module, value, answer, batch, subject, preprocessor.parts, source)


def _called(module: Any, answer: str, inputs: dict[str, Any]) -> np.ndarray:
    """Return an output of the class for inputs of which it gets those that it takes."""
    import torch

    from compressor.models.text.probe import call_without_cache

    taken = set(inspect.signature(module.forward).parameters)
    tensors = {name: torch.as_tensor(value) for name, value in inputs.items() if name in taken}
    with torch.inference_mode():
        found, _ = call_without_cache(module, **tensors)
    expected = found[answer] if answer in found else next(iter(found.values()))
    return np.asarray(expected.float())


def _of_images(
    module: Any, value: np.ndarray, answer: str, batch: Any, _: Any, parts: Any, source: Path
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the answers for the images of a batch; the processor of an export has one size for all of them."""
    from PIL import Image

    feeds = batch.feeds
    for row, name in enumerate(batch.ids):
        own = parts["image"](images=Image.open(source / name).convert("RGB"), return_tensors="np")
        pixels = feeds["pixel_values"][row]
        if own["pixel_values"].shape[1:] == pixels.shape:
            off = float(np.abs(own["pixel_values"][0] - pixels).max())
            if off > SAME_PIXELS:
                raise OtherInputsError(f"the pixels of {name} differ from those of the image processor by {off:.1e}")
    inputs = {name: feeds[name] for name in ("pixel_values", DECODER_IDS) if name in feeds}
    yield value, _called(module, answer, inputs)


def _of_videos(
    module: Any, value: np.ndarray, answer: str, batch: Any, subject: Any, parts: Any, source: Path
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the answers for the frames of a batch of clips."""
    from PIL import Image

    (name,) = subject.model.inputs
    clips = [[Image.open(file).convert("RGB") for file in sorted((source / each).iterdir())] for each in batch.ids]
    options = {"do_sample_frames": False} if "Video" in type(parts["image"]).__name__ else {}
    rows = [parts["image"]([clip], return_tensors="np", **options) for clip in clips]
    own = np.concatenate([row.get(name, next(iter(row.values()))) for row in rows])
    yield value, _called(module, answer, {name: own})


def _of_clips(
    module: Any, value: np.ndarray, answer: str, batch: Any, subject: Any, parts: Any, source: Path
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the answers for the clips of a batch, with the mask that the extractor returns unless an export says so.

    Clips are padded and cut for a file of one number of samples (``--sequence-length``).
    """
    said = {each.feature for each in subject.model.limitations}
    clips = [_clip(source / name) for name in batch.ids]
    samples = subject.model.preprocess.padded if "input_values" in batch.feeds else None
    if samples is not None:
        clips = [np.pad(clip[:samples], (0, max(0, samples - len(clip)))) for clip in clips]
    own = _extracted(parts["sound"], clips)
    if samples is not None:  # the extractor pads to a multiple of the samples of a code
        own = {name: each[..., :samples] for name, each in own.items()}
    if "padding of the clips" in said:
        own = {name: each for name, each in own.items() if not name.endswith("mask")}
    inputs = dict(own) | {name: each for name, each in batch.feeds.items() if name == DECODER_IDS}
    yield value, _called(module, answer, inputs)


def _extracted(extractor: Any, clips: Sequence[np.ndarray]) -> dict[str, Any]:
    """Return what an extractor makes of clips, padded to the longest where it does not pad by itself."""

    def arrays(**options: Any) -> dict[str, Any]:
        options = {"return_tensors": "np", "sampling_rate": extractor.sampling_rate} | options
        found = extractor(list(clips), **options)
        return {
            name: np.asarray(each, np.int64 if name.endswith("mask") else np.float32) for name, each in found.items()
        }

    for options in ({}, {"padding": True}, {"padding": True, "return_tensors": "pt"}):
        with contextlib.suppress(ValueError, TypeError):  # rows of several lengths are no array; some give tensors only
            return arrays(**options)
    raise OtherInputsError(f"{type(extractor).__name__} does not take clips of several lengths")


def _clip(path: Path) -> np.ndarray:
    """Return the samples of a clip of 16 bits, float32 [samples] in -1 to 1."""
    with wave.open(str(path), "rb") as file:
        values = np.frombuffer(file.readframes(file.getnframes()), "<i2")
    return values.astype(np.float32) / 2**15


def _of_texts(
    module: Any, value: np.ndarray, answer: str, batch: Any, subject: Any, parts: Any, source: Path
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the answers for the tokens of each text, which the class reads alone and without padding.

    A file without a mask, or whose export says that its outputs depend on the padding, is compared with padding.
    """
    feeds, lines = batch.feeds, source.read_text().splitlines()
    ids, mask = feeds["input_ids"], feeds.get("attention_mask")
    said = {each.feature for each in subject.model.limitations}
    longest = ids.shape[1] if "length of texts" in said else None  # of a file of one number of tokens
    for row, line in enumerate(batch.ids):
        real = np.ones(ids.shape[1], bool) if mask is None else mask[row].astype(bool)
        kept = np.ones(ids.shape[1], bool) if "padding" in said else real
        _check_tokens(ids[row, real], lines[int(line)], parts["text"], longest)
        inputs = {"input_ids": ids[row : row + 1, kept]}
        if mask is not None:
            inputs["attention_mask"] = mask[row : row + 1, kept]
        if DECODER_IDS in feeds:
            inputs[DECODER_IDS] = feeds[DECODER_IDS][row : row + 1]
        expected, found = _called(module, answer, inputs), value[row : row + 1]
        of_tokens = found.shape[1:2] == ids.shape[1:] and expected.shape[1:2] == (int(kept.sum()),)
        by_token = DECODER_IDS not in feeds and of_tokens
        yield (found[:, kept] if by_token else found), expected


def _check_tokens(found: np.ndarray, text: str, tokenizer: Any, longest: int | None) -> None:
    """Check that tokens are those of a text, of which some may be masked; a text of more than `longest` is cut.

    Raises:
        OtherInputsError: they are not.
    """
    own = np.array(tokenizer(text, truncation=longest is not None, max_length=longest)["input_ids"])
    found = found[: len(own)]
    if len(found) != len(own) or ((found != own) & (found != tokenizer.mask_token_id)).any():
        raise OtherInputsError(f"the tokens of {text!r} are {found.tolist()}, expected {own.tolist()}")
