"""Reader of folders and tables of sound files, and their preprocessing."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import starmap
from pathlib import Path

import numpy as np

from compressor.choices import CTC
from compressor.data.class_folders import FilesOf, find_files
from compressor.data.readers.audio.decode import (
    OTHERS,
    WAV,
    BrokenClipError,
    Wave,
    decode,
    has_soundfile,
    limitations_of,
)
from compressor.data.readers.base import Array, Feeds, LabelKind, Progress, Samples, Skipped, Targets
from compressor.data.readers.records import read_records, table_of
from compressor.data.readers.tables import CLASSES, NAMES, Table, parse
from compressor.data.readers.texts import text_of
from compressor.data.sample_cache import digest
from compressor.errors import DataError
from compressor.limitations import Limitation
from compressor.models.base import first_line
from compressor.models.preprocess import Preprocess
from compressor.workspace.special_files import special_kind

CHUNK = 64  # clips decoded between two reports of progress
KEPT = 512 * 1024**2  # bytes of decoded clips in memory; others are decoded again
STEP = 0.02  # seconds in a frame, the usual unit of speech models: batches are bounded by their number
PATHS = ("file", "path", "file_name", "filename", "audio", "wav")
TRANSCRIPTS = ("transcription", "transcript", "text", "sentence", "normalized_text", "target")
FRAMEWISE = (CTC, "audio-frame-classification")
# The files in which the package datasets keeps what it knows of the clips of a folder (its "audiofolder").
METADATA = ("metadata.csv", "metadata.jsonl")


@dataclass
class Clips:
    """Sound files by position, decoded once as long as there is memory for them.

    Attributes:
        name: name of the data in messages.
        ids: one id per clip.
        paths: their files.
        preprocess: preprocessing of the model.
        found: rate and channels of each file that was decoded.
        seconds: length of each clip that was decoded.
        digests: hash of each clip that was decoded.
    """

    name: str
    ids: tuple[str, ...]
    paths: tuple[Path, ...]
    preprocess: Preprocess
    found: dict[int, tuple[int, int]] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)
    digests: dict[int, bytes] = field(default_factory=dict)
    _kept: dict[int, Wave] = field(default_factory=dict, repr=False)
    _bytes: int = 0

    def feeds(self, indices: Sequence[int]) -> Feeds:
        """Return the model's inputs for clips, padded to the longest of them."""
        assert self.preprocess.audio is not None
        clips = [self._usable(index) for index in indices]
        try:
            return self.preprocess.audio(clips)
        except (RuntimeError, TypeError, ValueError) as error:
            raise DataError(
                f"the model's feature extractor fails for a clip of {self.name} ({first_line(error)}); check the "
                "model's preprocessor_config.json"
            ) from error

    def targets(self, indices: Sequence[int]) -> Targets:
        """Return the mask of the frames that are no padding, bool [rows, frames]."""
        assert self.preprocess.frames is not None
        longest = self._most_samples()
        counts = self.preprocess.frames([min(len(self._usable(index)), longest) for index in indices])
        return Targets(None, np.arange(counts.max()) < counts[:, None])

    def lengths(self, indices: Sequence[int]) -> list[list[int]]:
        """Return the number of frames of `STEP` of each clip that was decoded, once it is cut; 1 for a broken one."""
        seconds = (min(self.seconds.get(index, STEP), self.preprocess.seconds) for index in indices)
        return [[math.ceil(each / STEP)] for each in seconds]

    def faults(self, indices: Sequence[int], progress: Progress | None) -> Mapping[int, str]:
        """Decode clips; return the reasons of those that cannot be used, by position."""
        broken: dict[int, str] = {}
        for done, index in enumerate(indices, start=1):
            try:
                self._decode(index)
            except BrokenClipError as fault:
                broken[index] = str(fault)
            if progress is not None and (done % CHUNK == 0 or done == len(indices)):
                progress(done, len(indices))
        return broken

    def content(self, index: int) -> bytes:
        """Return the hash of a clip."""
        self._usable(index)
        return self.digests[index]

    def findings(self) -> tuple[Limitation, ...]:
        """Return the limitations of the clips that were decoded so far."""
        converted = limitations_of(tuple(self.found.values()), self.preprocess.rate)
        return (*converted, *_cut(tuple(self.seconds.values()), self.preprocess.seconds))

    def _most_samples(self) -> int:
        return round(self.preprocess.seconds * self.preprocess.rate)

    def _usable(self, index: int) -> Wave:
        try:
            return self._decode(index)
        except BrokenClipError as fault:
            raise DataError(
                f"{self.ids[index]} in {self.name} can no longer be decoded ({fault}); run again"
            ) from fault

    def _decode(self, index: int) -> Wave:
        if index in self._kept:
            return self._kept[index]
        if (kind := special_kind(self.paths[index])) is not None:
            raise BrokenClipError(f"{kind}, not a file")
        clip = decode(self.paths[index], self.preprocess.rate)
        self.found[index] = (clip.rate, clip.channels)
        self.digests[index] = digest(clip.samples)
        self.seconds[index] = len(clip.samples) / self.preprocess.rate
        if self._bytes + clip.samples.nbytes <= KEPT:
            self._kept[index] = clip.samples
            self._bytes += clip.samples.nbytes
        return clip.samples


def read_clips(path: Path, name: str, preprocess: Preprocess, task: str) -> Samples:
    """Read a folder of sound files, by its metadata file if it has one.

    Without metadata, sorted class folders are the class names, and a flat folder has no labels.

    Raises:
        DataError: the folder holds no sound files, or the model has no feature extractor.
    """
    if (metadata := _metadata(path, name)) is not None:
        return read_clip_table(metadata, f"{name}/{metadata.name}", preprocess, task)
    kind = _kind()
    unread = next(
        (file for file in path.rglob("*") if file.suffix.lower() in OTHERS and not kind.holds(file.name)), None
    )
    if unread is not None:
        raise DataError(
            f"{name} holds {unread.suffix} files, which the package soundfile decodes; pip install soundfile, or "
            "convert them to .wav"
        )
    found = find_files(path, name, kind)
    source = _clips(name, found.ids, tuple(path / file for file in found.ids), preprocess)
    skipped, limits = tuple(starmap(Skipped, found.skipped)), found.limitations
    return _samples(source, found.reading(kind), found.labels, found.classes, task, skipped, limits)


def read_clip_table(path: Path, name: str, preprocess: Preprocess, task: str) -> Samples:
    """Read a table with a column of sound files, relative to it, and optionally one of classes or of transcripts.

    A .jsonl file is a table whose columns are the fields of its objects.

    Raises:
        DataError: the table has no column of files, or the model has no feature extractor.
    """
    table, skipped, nested = _table(path, name)
    column = next((table.header.index(title) for title in PATHS if title in table.header), None)
    if column is None:
        titles = ", ".join(table.header) or "none"
        raise DataError(
            f"{name} has the columns {titles}; expected a header with a column of sound files, {' or '.join(PATHS[:3])}"
        )
    if preprocess.decoder is not None:
        return _transcribed(table, column, path.parent, name, preprocess, skipped, nested)
    files = tuple(path.parent / cell.strip() for cell in table.column(column))
    label = next((table.header.index(title) for title in CLASSES if title in table.header), None)
    cells = None if label is None else [cell.strip() for cell in table.column(label)]
    names = None if cells is None else tuple(sorted(set(cells)))
    labels = None if cells is None else np.unique(cells, return_inverse=True)[1].astype(np.int64).reshape(-1)
    source = _clips(name, table.ids, files, preprocess)
    reading = f"table of sound files {table.title(column)}" + ("" if label is None else f", class {table.title(label)}")
    limitations = tuple(_unread(table, (column, label), nested))
    return _samples(source, reading, labels, names, task, skipped, limitations)


def _metadata(path: Path, name: str) -> Path | None:
    """Return the metadata file of a folder; None if it has none.

    Raises:
        DataError: the metadata files are in folders below, or in a format that is not read.
    """
    found = next((path / file for file in METADATA if (path / file).is_file()), None)
    if found is not None:
        return found
    if (path / "metadata.parquet").is_file():
        raise DataError(f"{name} holds metadata.parquet, which is not read; convert it to metadata.csv")
    below = next((file for entry in METADATA for file in path.glob(f"*/{entry}")), None)
    if below is not None:
        raise DataError(
            f"{name} holds {below.relative_to(path)}, which describes a folder of its own; pass {name}/"
            f"{below.parent.name}"
        )
    return None


def _table(path: Path, name: str) -> tuple[Table, tuple[Skipped, ...], list[str]]:
    """Return a table, its rows that cannot be read, and its fields that are lists or objects."""
    if path.suffix.lower() == ".jsonl":
        table, nested = table_of(*read_records(path, name))
        return table, (), nested
    table, ragged = parse(text_of(path, name), name, NAMES | {*PATHS, *TRANSCRIPTS})
    return table, tuple(ragged), []


def _transcribed(
    table: Table,
    column: int,
    folder: Path,
    name: str,
    preprocess: Preprocess,
    skipped: tuple[Skipped, ...],
    nested: Sequence[str],
) -> Samples:
    """Return clips with the texts that the decoder is to write; rows without a text are skipped."""
    spoken = next((table.header.index(title) for title in TRANSCRIPTS if title in table.header), None)
    texts = [None if spoken is None else row[spoken].strip() for row in table.rows]
    kept = [number for number, text in enumerate(texts) if text != ""]
    empty = (Skipped(id, "its transcript is empty") for id, text in zip(table.ids, texts, strict=True) if text == "")
    files = tuple(folder / table.rows[number][column].strip() for number in kept)
    source = _clips(name, tuple(table.ids[number] for number in kept), files, preprocess)
    reading = f"table of sound files {table.title(column)}"
    limitations = tuple(_unread(table, (column, spoken), nested))
    if spoken is None:
        return _samples(source, reading, None, None, "", skipped, limitations)
    samples = _samples(source, f"{reading}, transcript {table.title(spoken)}", None, None, "", skipped, limitations)
    return replace(
        samples, skipped=(*samples.skipped, *empty), target_texts=tuple(str(texts[number]) for number in kept)
    )


def _unread(table: Table, read: Sequence[int | None], nested: Sequence[str]) -> Iterator[Limitation]:
    titles = [table.title(index) for index in range(len(table.header)) if index not in read]
    titles += map(repr, nested)
    if titles:
        yield Limitation("columns of the data", f"{', '.join(titles)} not read")


def _samples(
    source: Clips,
    reading: str,
    labels: Array | None,
    classes: tuple[str, ...] | None,
    task: str,
    skipped: tuple[Skipped, ...],
    limitations: tuple[Limitation, ...],
) -> Samples:
    """Return the samples of clips; classes of clips are no labels of their frames."""
    framewise, decoded = task in FRAMEWISE, source.preprocess.decoder is not None
    if (framewise or decoded) and labels is not None:
        reason = "classes of clips are no transcripts" if decoded else f"classes of clips are no labels for {task}"
        limit = Limitation("labels of the data", f"{reason}; they are not read")
        labels, classes, limitations = None, None, (*limitations, limit)
    kind: LabelKind | None = None if labels is None else "class"
    counts = framewise and source.preprocess.frames is not None
    if framewise and not counts:
        limit = Limitation("padding of the clips", "frames of padding cannot be told apart, so they are evaluated too")
        limitations = (*limitations, limit)
    return Samples(
        source.ids,
        source.feeds,
        reading,
        labels=labels,
        label_kind=kind,
        class_names=classes,
        skipped=skipped,
        faults=source.faults,
        content=source.content,
        targets=source.targets if counts else None,
        limitations=limitations,
        findings=source.findings,
        lengths=source.lengths,
    )


def _clips(name: str, ids: tuple[str, ...], paths: tuple[Path, ...], preprocess: Preprocess) -> Clips:
    if preprocess.audio is None:
        reason = preprocess.no_audio or "the model has no feature extractor"
        raise DataError(
            f"{name} holds sound, but {reason}; add its own preprocessor_config.json, or pass preprocessed model "
            "inputs as .npy"
        )
    return Clips(name, ids, paths, preprocess)


def _kind() -> FilesOf:
    """Return the sound files that can be decoded here."""
    return FilesOf("sound", frozenset((WAV, *(OTHERS if has_soundfile() else ()))))


def _cut(seconds: Sequence[float], longest: float) -> Iterator[Limitation]:
    longer = sum(each > longest for each in seconds)
    if longer:
        yield Limitation(
            "length of the clips", f"{longer} of {len(seconds)} last longer than {longest:.3g} s and are cut"
        )
