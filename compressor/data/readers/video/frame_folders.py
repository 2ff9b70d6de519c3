"""Reader of videos as folders: one folder of frames for each clip, in a folder for each class or without classes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from compressor.data.class_folders import FilesOf
from compressor.data.readers.base import Array, Feeds, Progress, Samples
from compressor.data.readers.decode_image import BrokenImageError, decode
from compressor.data.readers.images import SUFFIXES
from compressor.data.sample_cache import Store, digest
from compressor.errors import DataError
from compressor.limitations import Limitation
from compressor.models.base import first_line
from compressor.models.preprocess import Preprocess
from compressor.workspace.special_files import special_kind

FRAMES = FilesOf("frame", SUFFIXES - {".npy"})
COLOURS = 3  # video processors take frames in RGB


@dataclass(frozen=True)
class Clips:
    """Clips by position, preprocessed for the model; each clip once, as long as the store has space.

    Attributes:
        name: name of the data in messages.
        ids: one id per clip.
        frames: the files of the frames of each clip, in order.
        preprocess: preprocessing of the model.
        store: the preprocessed clips.
        short: positions of the clips with fewer frames than the model takes.
    """

    name: str
    ids: tuple[str, ...]
    frames: tuple[tuple[Path, ...], ...]
    preprocess: Preprocess
    store: Store
    short: set[int] = field(default_factory=set)

    def feeds(self, indices: Sequence[int]) -> Feeds:
        """Return the preprocessed clips as the model's input, [rows, frames, channels, height, width]."""
        try:
            return {self.preprocess.inputs[0]: np.stack([self._prepared(index) for index in indices])}
        except BrokenImageError as fault:
            raise DataError(f"a clip in {self.name} can no longer be decoded ({fault}); run again") from fault

    def faults(self, indices: Sequence[int], progress: Progress | None) -> Mapping[int, str]:
        """Decode and store clips; return the reasons of those that cannot be decoded, by position."""
        broken: dict[int, str] = {}
        for done, index in enumerate(indices, start=1):
            try:
                self._prepared(index)
            except BrokenImageError as fault:
                broken[index] = str(fault)
            if progress is not None:
                progress(done, len(indices))
        return broken

    def findings(self) -> tuple[Limitation, ...]:
        """Return the limitation of clips that have too few frames."""
        if not self.short:
            return ()
        reason = f"{len(self.short)} clips have fewer than {self.preprocess.clip}, so that some of theirs are repeated"
        return (Limitation("frames of the clips", reason),)

    def shown(self, index: int) -> Image.Image:
        """Return the frame in the middle of a clip."""
        frames = self.frames[index]
        return _frame(frames[len(frames) // 2])

    def content(self, index: int) -> bytes:
        """Return a hash of a preprocessed clip."""
        return digest(self._prepared(index))

    def _prepared(self, index: int) -> Array:
        if index in self.store:
            return self.store.get(index)
        assert self.preprocess.video is not None
        files, count = self.frames[index], self.preprocess.clip
        if len(files) < count:
            self.short.add(index)
        chosen = [files[place] for place in np.linspace(0, len(files) - 1, count).round().astype(int)]
        images = [_frame(path) for path in chosen]
        try:
            value = self.preprocess.video(images)
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            raise DataError(
                f"the model's processor fails for {self.ids[index]} ({first_line(error)}); check its config"
            ) from error
        self.store.put(index, value)
        return value


def read_videos(path: Path, name: str, preprocess: Preprocess) -> Samples:
    """Read folders of frames: ``clip/0.png`` without classes, or ``class/clip/0.png``. Frames are sorted by name.

    Of each clip, as many evenly spaced frames are taken as the model takes.

    Raises:
        DataError: there are no such folders, clips lie at several depths, or the model has no video processor.
    """
    if preprocess.video is None:
        raise DataError(
            f"{name} holds videos, but the model has no video processor; add its preprocessor config, or pass "
            "preprocessed model inputs as .npy"
        )
    clips = {folder.relative_to(path).as_posix(): tuple(_frames_in(folder)) for folder in _folders(path)}
    clips = {clip: files for clip, files in sorted(clips.items()) if files}
    depths = {clip.count("/") for clip in clips}
    if len(depths) != 1 or not depths <= {0, 1}:
        raise DataError(
            f"the folder {name} holds no videos; expected a folder of frames for each clip, or a folder of such "
            "folders for each class; take the frames out of video files with ffmpeg -i clip.mp4 clip/%05d.png"
        )
    classes = tuple(sorted({clip.split("/")[0] for clip in clips})) if depths == {1} else None
    example = preprocess.example[preprocess.inputs[0]]
    source = Clips(name, tuple(clips), tuple(clips.values()), preprocess, Store(example.shape[1:], example.dtype))
    labels = None if classes is None else np.array([classes.index(clip.split("/")[0]) for clip in clips], np.int64)
    return Samples(
        source.ids,
        source.feeds,
        "folders of frames" + ("" if classes is None else f", {len(classes)} class folders"),
        labels=labels,
        label_kind=None if labels is None else "class",
        class_names=classes,
        faults=source.faults,
        shown=source.shown,
        content=source.content,
        findings=source.findings,
    )


def _folders(path: Path) -> Iterator[Path]:
    """Yield the folders below a folder, at most three deep."""
    for depth in ("*", "*/*", "*/*/*"):
        for each in path.glob(depth):
            hidden = any(part.startswith(".") for part in each.relative_to(path).parts)
            if each.is_dir() and not hidden:
                yield each


def _frames_in(folder: Path) -> list[Path]:
    return sorted(each for each in folder.iterdir() if FRAMES.holds(each.name) and not each.is_dir())


def _frame(path: Path) -> Image.Image:
    """Decode a frame in RGB.

    Raises:
        BrokenImageError: it cannot be decoded.
    """
    kind = special_kind(path)
    if kind is not None:
        raise BrokenImageError(f"{path.name}: {kind}, not a file")
    try:
        return decode(lambda: Image.open(path), COLOURS).shown().convert("RGB")
    except BrokenImageError as error:
        raise BrokenImageError(f"{path.name}: {error}") from error
