"""Reader of .npy and .npz files with raw images, preprocessed model inputs or token ids."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from compressor.data.readers.base import TOO_LARGE, Array, Feeds, LabelKind, Samples, Targets, dims, wrong_class
from compressor.data.readers.decode_image import MODES
from compressor.data.readers.images import pictures
from compressor.data.readers.token_targets import IGNORED
from compressor.data.sample_cache import digest
from compressor.errors import DataError
from compressor.limitations import Limitation
from compressor.models.preprocess import Preprocess

FIRST = ("images", "x")
LABELS = ("labels", "y")
# The kind of labels with several numbers per sample, by task or problem type.
LABELS_OF_ROWS: dict[str, LabelKind] = {
    "multi_label_classification": "labels",
    "token-classification": "token classes",
    "image-segmentation": "pixels",
}
IGNORED_PIXEL = 255  # label of pixels that are not scored
# Axes and values of labels with several numbers per sample.
AXES_OF_ROWS: dict[LabelKind, tuple[tuple[str, ...], str]] = {
    "labels": (("N", "labels"), "0 or 1 for each label of the model"),
    "token classes": (("N", "tokens"), f"class numbers from 0, and {IGNORED} for tokens that are not scored"),
    "pixels": (("N", "height", "width"), f"class numbers from 0, and {IGNORED_PIXEL} for pixels that are not scored"),
}
SLACK = 0.05  # of the values of an image from 0 to 1
CHUNK = 2**22  # values that are checked at a time; 16 MB of float32
FILLED = {"attention_mask": 1, "token_type_ids": 0}  # values that a tokenizer returns for rows without padding


def read_arrays(path: Path, name: str, preprocess: Preprocess, task: str) -> Samples:
    """Read a memory-mapped .npy file, or a .npz file with arrays by input name and optional labels."""
    content = _load_arrays(path, name)
    labels = next((content.pop(key) for key in LABELS if key in content and key not in preprocess.inputs), None)
    arrays = _by_input(content, name, preprocess)
    rows = len(arrays[preprocess.inputs[0]])
    for key, array in arrays.items():
        if len(array) != rows:
            raise DataError(
                f"{name} holds {len(array)} rows for {key} and {rows} for {preprocess.inputs[0]}; expected the same "
                "number"
            )
    samples = _samples(arrays, name, preprocess, task)
    if labels is None or samples.label_kind == "tokens":
        return samples
    return _labelled(samples, labels, arrays[preprocess.inputs[0]], name, preprocess, task)


def _load_arrays(path: Path, name: str) -> dict[str, Array]:
    """Return the arrays of a file by name; that of a .npy file has the empty name."""
    arrays = _read_arrays(path, name)
    if not all(isinstance(array, np.ndarray) for array in arrays.values()):  # another file in the archive, as bytes
        raise DataError(_unreadable(name, ""))
    return {key: _check_axes(array, name) for key, array in arrays.items()}


def _read_arrays(path: Path, name: str) -> dict[str, Array]:
    try:
        content = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(content, np.ndarray):
            return {"": content}
        with content:
            return {key: content[key] for key in content.files}
    except OSError:
        raise
    except Exception as error:  # zipfile, zlib, tokenize and NumPy each raise their own types for a damaged file
        raise DataError(_unreadable(name, str(error))) from error


def _unreadable(name: str, reason: str) -> str:
    if "Python objects" in reason or "Object arrays" in reason:
        return (
            f"{name} holds Python objects, which are refused because reading them can run code; "
            "save arrays of numbers (or of fixed-width strings for labels)"
        )
    return f"{name} is not a readable NumPy file; expected .npy or .npz as numpy.save writes them"


def _check_axes(array: Array, name: str) -> Array:
    if array.ndim == 0 or len(array) == 0:
        raise DataError(f"{name} holds an array of shape {dims(array.shape)}; expected samples along the first axis")
    return array


def _by_input(arrays: Mapping[str, Array], name: str, preprocess: Preprocess) -> dict[str, Array]:
    first = preprocess.inputs[0]
    if first in arrays and set(arrays) <= set(preprocess.inputs):
        return {key: arrays[key] for key in preprocess.inputs if key in arrays}
    if len(arrays) == 1:
        return {first: next(iter(arrays.values()))}
    image_keys = [key for key in FIRST if key in arrays]
    if len(image_keys) == 1:
        others = sorted(set(arrays) - set(image_keys))
        raise DataError(
            f"{name} holds {', '.join(others)} beside {image_keys[0]}; expected labels as {' or '.join(LABELS)}; "
            "rename or remove the other arrays"
        )
    raise DataError(
        f"{name} holds the arrays {', '.join(sorted(arrays)) or 'none'}; expected one array, one named "
        f"{' or '.join(FIRST)}, or the model's inputs {', '.join(preprocess.inputs)}"
    )


def _samples(arrays: dict[str, Array], name: str, preprocess: Preprocess, task: str) -> Samples:
    first = arrays[preprocess.inputs[0]]
    if preprocess.kind == "image" and first.dtype in (np.uint8, np.uint16) and len(arrays) == 1:
        return _raw_images(first, name, preprocess)
    if preprocess.kind == "text":
        defaults = _default_inputs(arrays, preprocess)
        tokens = _tokens(arrays, name, preprocess)
        if task == "text-generation" and first.shape[1] < 2:
            raise DataError(f"{name} has one token in each row; expected at least 2, as the first one is not predicted")
        dtypes = {key: preprocess.example[key].dtype for key in tokens}
        return replace(_token_rows(tokens, task, dtypes), limitations=defaults)
    for key in preprocess.inputs:
        if key not in arrays:
            raise DataError(f"{name} has no array for the model's input {key}; save one under that name in a .npz file")
        _check_model_input(arrays[key], key, name, preprocess)
    dtypes = {key: preprocess.example[key].dtype for key in preprocess.inputs}
    found = _model_input_samples(arrays, "ready model inputs", None, dtypes)
    return replace(found, limitations=tuple(_of_values(first, preprocess)))


def _of_values(array: Array, preprocess: Preprocess) -> Iterator[Limitation]:
    """Yield a limitation if pixels that are ready for the model are not those that its preprocessing gives.

    It gives the values between those of a black and of a white image. Pixels of 0 to 1 or 0 to 255 were not normalized.
    """
    if preprocess.image is None or preprocess.kind != "image" or array.dtype.kind != "f":
        return
    black, white = (preprocess.image(np.full(array.shape[1:], value, dtype=np.float32)) for value in (0.0, 1.0))
    low, high = float(min(black.min(), white.min())), float(max(black.max(), white.max()))
    least, most = _extremes(array)
    beyond = max(low - least, most - high) > (high - low) / 2
    plain = low < -SLACK and least >= 0 and 1 - SLACK <= most <= 1
    if beyond or plain:
        yield Limitation(
            f"values of {preprocess.inputs[0]}",
            f"they lie between {least:.4g} and {most:.4g}, those of the model's preprocessing between {low:.4g} and "
            f"{high:.4g}, so they are probably not normalized and the figures not those of its images; give the "
            "images themselves as uint8, or what the preprocessing returns",
        )


def _extremes(array: Array) -> tuple[float, float]:
    """Return the least and the largest value, chunk by chunk, of a file that may not fit in memory."""
    step = max(1, CHUNK // max(1, array[0].size))
    parts = [array[start : start + step] for start in range(0, len(array), step)]
    return min(float(part.min()) for part in parts), max(float(part.max()) for part in parts)


def _model_input_samples(
    arrays: Mapping[str, Array], reading: str, kind: LabelKind | None, dtypes: Mapping[str, np.dtype] | None = None
) -> Samples:
    def feeds(indices: Sequence[int]) -> Feeds:
        rows = np.asarray(indices, dtype=np.int64)
        return {
            key: np.asarray(array[rows], dtype=dtypes[key] if dtypes else np.int64) for key, array in arrays.items()
        }

    return Samples(_numbers(next(iter(arrays.values()))), feeds, reading, label_kind=kind)


def _token_rows(arrays: Mapping[str, Array], task: str, dtypes: Mapping[str, np.dtype]) -> Samples:
    if task != "text-generation":
        return _model_input_samples(arrays, "token ids", None, dtypes)

    def whole(index: int) -> Feeds:
        mask = np.asarray(arrays.get("attention_mask", arrays["input_ids"] * 0 + 1)[index], dtype=bool)
        return {key: np.asarray(array[index], dtype=dtypes[key])[mask] for key, array in arrays.items()}

    return replace(_model_input_samples(arrays, "token ids", "tokens", dtypes), whole=whole)


def _default_inputs(arrays: Mapping[str, Array], preprocess: Preprocess) -> tuple[Limitation, ...]:
    """Return the limitations for inputs that a file of token ids lacks, each with its default value."""
    return tuple(
        Limitation(
            f"input {key}",
            f"the data does not contain it, so it is set to {FILLED[key]} for every token, padding included",
        )
        for key in preprocess.inputs
        if key not in arrays and key in FILLED
    )


def _raw_images(array: Array, name: str, preprocess: Preprocess) -> Samples:
    channels = preprocess.channels
    if array.ndim == 3 and channels in MODES and array.shape[2] in (3, 4) and array.shape[1] > array.shape[2]:
        raise DataError(
            f"{name} holds {array.dtype} {dims(array.shape)}, which is one image [H, W, C] rather than images of "
            f"{array.shape[2]} pixels in width; expected images as [N, H, W] or [N, H, W, C]"
        )
    if not ((array.ndim == 3 and channels in MODES) or (array.ndim == 4 and _are_channels(array, channels))):
        other = "" if channels in MODES else f", or [N, {channels}, H, W] or [N, H, W, {channels}]"
        raise DataError(
            f"{name} holds {array.dtype} {dims(array.shape)}; "
            f"expected images as [N, H, W] or [N, H, W, C] with 1, 3 or 4 channels{other}"
        )
    pixels = array[..., 0] if array.ndim == 4 and array.shape[3] == 1 else array

    def load(index: int) -> Image.Image | Array:
        pixel = np.ascontiguousarray(pixels[index])
        picture = pixel.ndim == 2 or (pixel.dtype == np.uint8 and pixel.shape[2] in (3, 4) and channels in MODES)
        return Image.fromarray(pixel) if picture else pixel

    source = pictures(name, _numbers(array), load, preprocess)
    return Samples(
        _numbers(array),
        source.feeds,
        f"raw {array.dtype} images in an array",
        shown=source.shown,
        content=lambda index: digest(pixels[index]),
        limitations=tuple(_of_raw_images(array, channels)),
    )


def _are_channels(array: Array, channels: int) -> bool:
    """Return whether images with 3 axes have channels that the model takes, or Pillow converts to them."""
    converted = channels in MODES and (array.dtype == np.uint8 or array.shape[3] == 1)
    return array.shape[3] in MODES if converted else channels in (array.shape[1], array.shape[3])


def _of_raw_images(array: Array, channels: int) -> Iterator[Limitation]:
    """Yield what is converted in raw images, which are decoded later than files are."""
    if array.dtype == np.uint16:
        yield Limitation("depth of the images", "all hold integers of 16 bits; they are scaled, 0 to 65,535")
    if array.ndim == 4 and array.shape[3] == 4 and channels in (1, 3):
        yield Limitation("transparency of the images", "the fourth channel of the array is ignored")
    if array.ndim == 4 and array.shape[3] in (3, 4) and channels == 1:
        yield Limitation("colours of the images", "converted to grey, because the model takes one channel")


def _tokens(arrays: Mapping[str, Array], name: str, preprocess: Preprocess) -> dict[str, Array]:
    first = arrays[preprocess.inputs[0]]
    for key, array in arrays.items():
        if array.ndim != 2 or array.dtype.kind not in "iu":
            raise DataError(
                f"{name} holds {array.dtype} {dims(array.shape)} for {key}; expected integer token ids [N, T]"
            )
        if array.shape != first.shape:
            raise DataError(
                f"{name} holds {dims(array.shape)} for {key}; expected {dims(first.shape)} as for the token ids"
            )
    if preprocess.padded not in (None, first.shape[1]):
        raise DataError(
            f"{name} holds rows of {first.shape[1]} tokens; expected {preprocess.padded}, as --sequence-length has"
        )
    if int(first.min()) < 0:
        raise DataError(
            f"{name} holds the token id {int(first.min())}; expected ids from 0; remove or replace the padding"
        )
    attended = arrays["attention_mask"].any(axis=1) if "attention_mask" in arrays else np.ones(1, dtype=bool)
    if not attended.all():
        raise DataError(
            f"{name} has an attention_mask of 0 for every token of a row (first in row {int(np.argmin(attended))}), so "
            "nothing of it is read; remove such rows"
        )
    return {key: arrays[key] if key in arrays else _default_array(key, first, name) for key in preprocess.inputs}


def _default_array(key: str, first: Array, name: str) -> Array:
    if key not in FILLED:
        raise DataError(f"{name} has no array for the model's input {key}; save one under that name in a .npz file")
    return np.broadcast_to(np.array(FILLED[key], dtype=np.int64), first.shape)


def _check_model_input(array: Array, key: str, name: str, preprocess: Preprocess) -> None:
    example = preprocess.example[key]
    expected = _fixed_axes(example.shape, preprocess.varying.get(key, ()))
    same = array.dtype.kind == example.dtype.kind or (array.dtype.kind in "iub" and example.dtype.kind in "iub")
    if not same or _fixed_axes(array.shape, preprocess.varying.get(key, ())) != expected:
        raw = " or raw uint8 or uint16 images [N, H, W] or [N, H, W, C]" if preprocess.kind == "image" else ""
        raise DataError(
            f"{name} holds {array.dtype} {dims(array.shape)} for {key}; expected {example.dtype} "
            f"{dims(('N', *expected))}{raw}"
        )
    if array.dtype.kind == "f":
        _check_finite(array, name)


def _fixed_axes(shape: Sequence[int], varying: tuple[int, ...]) -> tuple[int | str, ...]:
    """Return the sizes of a sample, with T for each axis that may have any."""
    return tuple("T" if axis in varying else size for axis, size in enumerate(shape) if axis)


def _check_finite(array: Array, name: str) -> None:
    """Check all values chunk by chunk, so that a memory-mapped file is never in memory as a whole."""
    step = max(1, CHUNK // max(1, array[0].size))
    for start in range(0, len(array), step):
        part = np.isfinite(array[start : start + step]).reshape(min(step, len(array) - start), -1).all(axis=1)
        if not part.all():
            row = start + int(np.argmin(part))
            raise DataError(f"{name} holds NaN or infinite values (first in row {row}); expected finite model inputs")


def _labelled(samples: Samples, labels: Array, first: Array, name: str, preprocess: Preprocess, task: str) -> Samples:
    """Return samples with their labels; `first` is the array of the first input."""
    count = len(samples.ids)
    kind_of_rows = LABELS_OF_ROWS.get(task) or LABELS_OF_ROWS.get(preprocess.problem_type or "")
    if kind_of_rows is not None and labels.ndim > 1:
        _check_rows(labels, kind_of_rows, name, first.shape if preprocess.kind == "text" else None)
        return _with_rows(samples, labels, kind_of_rows, name)
    values = labels.reshape(-1) if labels.size == len(labels) else labels
    if values.shape != (count,):
        raise DataError(
            f"{name} holds labels of shape {dims(labels.shape)}; expected {dims((count,))}, one for each sample"
        )
    number = preprocess.problem_type == "regression" and values.dtype.kind in "iufb"
    fraction = values.dtype.kind == "f" and not _is_integral(values)
    kind: LabelKind = "score" if number or fraction else "class"
    parsed = _scores(values, name) if kind == "score" else _classes(values, name)
    named = values.dtype.kind in "US"
    return replace(
        samples,
        labels=parsed,
        label_kind=kind,
        reading=f"{samples.reading} with {kind} labels",
        class_names=tuple(map(str, np.unique(_text(values, name)))) if named else None,
    )


def _check_rows(labels: Array, kind: LabelKind, name: str, tokens: tuple[int, ...] | None) -> None:
    """Check the axes of labels with several numbers for each sample, and that none is below the first class.

    Args:
        labels: the labels.
        kind: their kind.
        name: name of the file in messages.
        tokens: shape of the token ids; None for other inputs.

    Raises:
        DataError: they have other axes, or a number is no class, although it does not mark what is not scored.
    """
    axes, marked = AXES_OF_ROWS[kind]
    expected = dims(tokens if kind == "token classes" and tokens is not None else axes)
    if labels.ndim != len(axes) or (kind == "token classes" and labels.shape != (tokens or labels.shape)):
        raise DataError(f"{name} holds labels of shape {dims(labels.shape)}; expected {expected}")
    wrong = labels[~_are_values(labels, kind)] if labels.dtype.kind in "iub" else labels[:0]
    if wrong.size:
        raise DataError(f"{name} holds the label {wrong.flat[0]}; expected {marked}")


def _are_values(labels: Array, kind: LabelKind) -> Array:
    """Return which labels are classes, or mark what is not scored; bool of the shape of `labels`."""
    if kind == "labels":
        return np.asarray((labels >= 0) & (labels <= 1))
    return np.asarray((labels >= 0) | (labels == IGNORED) if kind == "token classes" else labels >= 0)


def _with_rows(samples: Samples, labels: Array, kind: LabelKind, name: str) -> Samples:
    """Return samples whose labels have several numbers each: label sets, and classes of tokens or pixels."""
    if len(labels) != len(samples.ids) or labels.dtype.kind not in "iub":
        raise DataError(
            f"{name} holds labels {labels.dtype} {dims(labels.shape)}; expected whole numbers, "
            f"{dims((len(samples.ids), *labels.shape[1:]))}"
        )
    reading = f"{samples.reading} with {kind} as labels"
    if kind == "labels":
        return replace(samples, labels=np.asarray(labels, dtype=np.int64), label_kind=kind, reading=reading)

    def targets(indices: Sequence[int]) -> Targets:
        rows = np.asarray(labels[np.asarray(indices)], dtype=np.int64)
        return Targets(rows, rows >= 0)

    scored = labels[labels < IGNORED_PIXEL] if kind == "pixels" else labels
    largest = int(scored.max()) if scored.size else None
    return replace(samples, targets=targets, label_kind=kind, reading=reading, largest_class=largest)


def _is_integral(values: Array) -> bool:
    return bool((np.isfinite(values) & (values == np.round(values))).all())


def _scores(values: Array, name: str) -> Array:
    if not np.isfinite(values).all():
        row = int(np.argmin(np.isfinite(values)))
        raise DataError(
            f"{name} holds the label {values[row]} in row {row}; expected finite scores or whole class numbers"
        )
    return values.astype(np.float64)


def _classes(values: Array, name: str) -> Array:
    if values.dtype.kind in "US":
        return np.unique(_text(values, name), return_inverse=True)[1].astype(np.int64).reshape(-1)
    if values.dtype.kind not in "iufb":
        raise DataError(f"{name} holds labels of type {values.dtype}; expected whole numbers, scores or strings")
    if values.min() < 0:
        raise wrong_class(name, str(int(values.min())))
    if values.max() >= TOO_LARGE:
        raise wrong_class(name, str(values.max()))
    return values.astype(np.int64)


def _text(values: Array, name: str) -> Array:
    """Return strings without surrounding spaces; NumPy stores bytes as text of unknown encoding."""
    try:
        decoded = np.char.decode(values, "utf-8") if values.dtype.kind == "S" else values
    except UnicodeDecodeError as error:
        raise DataError(f"{name} holds labels as bytes that are not UTF-8; save them as strings") from error
    stripped: Array = np.char.strip(decoded)
    return stripped


def _numbers(array: Array) -> tuple[str, ...]:
    return tuple(str(row) for row in range(len(array)))
