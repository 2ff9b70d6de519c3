"""A disk cache of prepared samples, so that every sample is decoded once and memory use stays constant."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import IO, Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


DIGEST = 16  # bytes of a hash
LIMIT = 2 * 1024**3  # bytes: about 3,500 float32 images of 3 x 224 x 224, more than calibration and validation have


class Store:
    """Arrays of one shape and dtype by number, in an unnamed temporary file.

    The operating system frees the file when the process ends, even after a crash. The store is full after `limit`
    bytes, half of the free disk space or a failed write. Further arrays are then not stored, and callers prepare them
    again.
    """

    def __init__(self, shape: Sequence[int], dtype: npt.DTypeLike, *, limit: int = LIMIT) -> None:
        self._shape, self._dtype = tuple(shape), np.dtype(dtype)
        self._bytes = max(1, int(np.prod(self._shape, dtype=np.int64)) * self._dtype.itemsize)
        self._limit = limit
        self._slots: dict[int, int] = {}
        self._capacity = 0
        self._file: IO[bytes] | None = None
        self._lock = threading.Lock()

    def __contains__(self, number: int) -> bool:
        return number in self._slots

    def put(self, number: int, value: Array) -> None:
        """Store an array if there is space for it."""
        content = np.ascontiguousarray(value, dtype=self._dtype)
        if content.shape != self._shape:
            raise ValueError(f"found an array of shape {content.shape}; expected {self._shape}")
        with self._lock:
            file = self._open()
            slot = len(self._slots)
            if number not in self._slots and slot < self._capacity and self._write(file, slot, content):
                self._slots[number] = slot

    def get(self, number: int) -> Array:
        """Return a copy of the array with this number.

        Raises:
            KeyError: the array is not stored.
            OSError: the file cannot be read.
        """
        value = np.empty(self._shape, self._dtype)
        with self._lock:
            file = self._open()
            file.seek(self._slots[number] * self._bytes)
            # A memory-mapped file on a full or failing disk would kill the process with SIGBUS; a read raises an error.
            count = file.readinto(value.reshape(-1).view(np.uint8))  # type: ignore[attr-defined]
        if count != value.nbytes:
            raise OSError(f"read {count} of {value.nbytes} bytes of a prepared sample from the temporary file")
        return value

    def _open(self) -> IO[bytes]:
        if self._file is None:
            self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115  (closed with the store)
            weakref.finalize(self, self._file.close)
            free = shutil.disk_usage(tempfile.gettempdir()).free
            self._capacity = min(self._limit, free // 2) // self._bytes
        return self._file

    def _write(self, file: IO[bytes], slot: int, content: Array) -> bool:
        try:
            file.seek(slot * self._bytes)
            written = file.write(content.reshape(-1).view(np.uint8).data)
        except OSError:
            written = -1
        if written != content.nbytes:
            self._capacity = 0  # a full disk is not an error, because samples that are not stored are prepared again
        return written == content.nbytes


def digest(content: Array | str) -> bytes:
    """Return a hash of a text, or of the shape, the type and the values of an array."""
    if isinstance(content, str):
        return hashlib.blake2b(content.encode(errors="surrogateescape"), digest_size=DIGEST).digest()
    values = np.ascontiguousarray(content)
    found = hashlib.blake2b(f"{values.dtype.str}{values.shape}".encode(), digest_size=DIGEST)
    found.update(values.data)
    return found.digest()


def digest_of_feeds(feeds: Mapping[str, Array]) -> bytes:
    """Return a hash of the names and the values of model inputs."""
    return b"".join(name.encode() + digest(feeds[name]) for name in sorted(feeds))
