"""Readers, one module per data format: from the --data argument to samples that are prepared on demand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from compressor.choices import ZERO_SHOT
from compressor.data.readers.arrays import read_arrays
from compressor.data.readers.audio.clips import read_clip_table, read_clips
from compressor.data.readers.audio.decode import WAV
from compressor.data.readers.base import Samples, other_kind
from compressor.data.readers.dataset.hub import looks_like, read_hub
from compressor.data.readers.dataset.stored import PARQUET, is_stored, read_stored
from compressor.data.readers.image_text.captions import read_captions, read_written
from compressor.data.readers.image_text.pairs import metadata_of
from compressor.data.readers.image_text.prompts import read_prompts
from compressor.data.readers.images import read_folder
from compressor.data.readers.masks import COMPARED, images_beside, mask_folders, read_images_alone, read_masks
from compressor.data.readers.random_inputs import random_samples
from compressor.data.readers.records import read_conll, read_json, read_jsonl
from compressor.data.readers.tables import read_table
from compressor.data.readers.texts import read_lines
from compressor.data.readers.video.frame_folders import read_videos
from compressor.errors import DataError
from compressor.models.preprocess import Preprocess
from compressor.workspace.special_files import first_special

FILES = (".npy", ".npz", ".txt", ".csv", ".tsv", ".jsonl", ".json", ".conll", ".iob", ".bio", PARQUET)
FORMS = (
    "a folder of images, sound or frames, a .npy, .npz, .txt, .csv, .tsv, .jsonl, .json, .conll or .parquet file, a "
    "hub dataset as owner/name, or random"
)


def read(spec: str, preprocess: Preprocess, *, task: str, seed: int, revision: str | None) -> Samples:
    """Read the samples of a --data argument.

    Raises:
        DataError: the argument names no readable data.
    """
    if spec == "random":
        return random_samples(preprocess, seed)
    path = Path(spec).expanduser()
    if (fault := first_special([path])) is not None:
        raise DataError(f"{fault}; expected {FORMS}")
    try:
        if path.is_dir():
            return _read_folder(path, spec, preprocess, task, seed)
        if path.is_file():
            return _read_file(path, spec, preprocess, task, seed)
    except OSError as error:
        raise DataError(
            f"{spec} cannot be read ({error.strerror or error}); check the path and its permissions"
        ) from error
    if looks_like(spec) and path.suffix.lower() not in FILES:
        return read_hub(spec, preprocess, task, revision, seed)
    raise DataError(f"there is no file or folder {spec!r}; expected {FORMS}")


def _read_folder(path: Path, spec: str, preprocess: Preprocess, task: str, seed: int) -> Samples:
    if preprocess.kind in ("image", "text") and is_stored(path):
        return read_stored(path, spec, preprocess, task, seed)
    if preprocess.kind == "image-text":
        return read_prompts(path, spec, preprocess)
    if preprocess.kind == "video":
        return read_videos(path, spec, preprocess)
    if preprocess.kind == "audio":
        return read_clips(path, spec, preprocess, task)
    if task in COMPARED and (images := images_beside(path)) is not None:
        return read_images_alone(images, spec, preprocess, COMPARED[task])
    if task == ZERO_SHOT and (metadata := metadata_of(path)) is not None:
        return read_captions(metadata, spec, preprocess)
    if preprocess.decoder is not None and (metadata := metadata_of(path)) is not None:
        return read_written(metadata, spec, preprocess)
    folders = mask_folders(path) if task == "image-segmentation" else None
    try:
        return read_folder(path, spec, preprocess) if folders is None else read_masks(*folders, spec, preprocess)
    except DataError:
        _check_no_sound(path, spec, preprocess)
        raise


def _check_no_sound(path: Path, spec: str, preprocess: Preprocess) -> None:
    clip = next(path.rglob(f"*{WAV}"), None)
    if clip is None:
        return
    if preprocess.kind == "tensor":
        raise other_kind(spec, f"sound ({clip.name})", preprocess.kind, preprocess.inputs)
    raise DataError(
        f"{spec} holds sound ({clip.name}), but this model has the inputs {', '.join(preprocess.inputs)} and no "
        "reader of sound; expected its inputs in a .npy or .npz file, made by its feature extractor"
    )


def _read_file(path: Path, spec: str, preprocess: Preprocess, task: str, seed: int) -> Samples:
    suffix = path.suffix.lower()
    if suffix in (".npy", ".npz"):
        samples = read_arrays(path, spec, preprocess, task)
        return replace(samples, has_texts=True) if task == ZERO_SHOT else samples
    if suffix == ".txt":
        return read_lines(path, spec, preprocess, task, seed)
    if suffix in (".csv", ".tsv", ".jsonl") and preprocess.kind == "audio":
        return read_clip_table(path, spec, preprocess, task)
    if suffix in (".csv", ".tsv"):
        return read_table(path, spec, preprocess, task, seed)
    if suffix == ".jsonl":
        return read_jsonl(path, spec, preprocess, task, seed)
    if suffix == ".json":
        return read_json(path, spec, preprocess, task, seed)
    if suffix == PARQUET:
        return read_stored(path, spec, preprocess, task, seed)
    if suffix in (".conll", ".iob", ".bio"):
        return read_conll(path, spec, preprocess, task)
    raise DataError(f"the file {spec} has the extension {suffix or 'none'}; expected {FORMS}")
