"""Prepared samples kept on disk, so that a second sweep decodes nothing and memory does not grow."""

from __future__ import annotations

import shutil
import tempfile
import threading
import weakref
from collections.abc import Sequence
from typing import IO

import numpy as np
import numpy.typing as npt

from compressor.data.readers.base import Array

LIMIT = (
    2 * 1024**3
)  # bytes: about 3,500 float32 pictures of 3 x 224 x 224, all of calibration and validation several times


class Store:
    """Arrays of one shape and dtype by number, in a temporary file without a name.

    The system frees the file when the process ends, however it ends. A store that is full, because of `limit` bytes,
    half of the free disk space or an error while writing, forgets what comes next: callers prepare it again.
    """

    def __init__(self, shape: Sequence[int], dtype: npt.DTypeLike, *, limit: int = LIMIT) -> None:
        self._shape, self._dtype = tuple(shape), np.dtype(dtype)
        self._bytes = max(1, int(np.prod(self._shape, dtype=np.int64)) * self._dtype.itemsize)
        self._limit = limit
        self._slots: dict[int, int] = {}
        self._room = 0
        self._file: IO[bytes] | None = None
        self._lock = threading.Lock()

    def __contains__(self, number: int) -> bool:
        return number in self._slots

    def put(self, number: int, value: Array) -> None:
        """Keep an array if there is room for it."""
        content = np.ascontiguousarray(value, dtype=self._dtype)
        if content.shape != self._shape:
            raise ValueError(f"found an array of shape {content.shape}, expected {self._shape}")
        with self._lock:
            file = self._opened()
            slot = len(self._slots)
            if number not in self._slots and slot < self._room and self._write(file, slot, content):
                self._slots[number] = slot

    def get(self, number: int) -> Array:
        """A fresh copy of the array with this number; KeyError where it was not kept."""
        value = np.empty(self._shape, self._dtype)
        with self._lock:
            file = self._opened()
            file.seek(self._slots[number] * self._bytes)
            # Plain reads and not a mapping: a mapping of a file on a full or failing disk ends the process with SIGBUS.
            found = file.readinto(value.reshape(-1).view(np.uint8))  # type: ignore[attr-defined]
        if found != value.nbytes:
            raise OSError(f"found {found} of {value.nbytes} bytes of a prepared sample in the temporary file")
        return value

    def _opened(self) -> IO[bytes]:
        if self._file is None:
            self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115  (it lives as long as the store)
            weakref.finalize(self, self._file.close)
            free = shutil.disk_usage(tempfile.gettempdir()).free
            self._room = min(self._limit, free // 2) // self._bytes
        return self._file

    def _write(self, file: IO[bytes], slot: int, content: Array) -> bool:
        try:
            file.seek(slot * self._bytes)
            written = file.write(content.reshape(-1).view(np.uint8).data)
        except OSError:
            written = -1
        if written != content.nbytes:
            self._room = 0  # a full disk is no reason to stop: what is not kept is prepared again
        return written == content.nbytes
