"""Files that calls read on machines that do not have them."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compressor.executor.packed import Bytes


@dataclass(frozen=True)
class SharedFiles:
    """Files of one machine, of which the calls on another get copies for as long as they run.

    Attributes:
        paths: where the files are, by the paths that calls know them by.
        machine: the machine that has them.
        contents: handle of their bytes, in order; None if all calls run on that machine.
    """

    paths: Mapping[Path, Path]
    machine: str
    contents: Any = None

    @contextlib.contextmanager
    def on(self, machine: str, arrays_of: Callable[[Any], Sequence[Bytes]]) -> Iterator[Mapping[Path, Path]]:
        """Yield where the files lie on a machine, by their paths; copies are removed at the end.

        Args:
            machine: the machine that this process runs on.
            arrays_of: returns the arrays of a handle.
        """
        if machine == self.machine or self.contents is None:
            yield self.paths
            return
        with tempfile.TemporaryDirectory(prefix="compressor-") as folder:
            folders = list(dict.fromkeys(path.parent for path in self.paths))
            copies = {path: Path(folder, str(folders.index(path.parent)), path.name) for path in self.paths}
            for copy, content in zip(copies.values(), arrays_of(self.contents), strict=True):
                copy.parent.mkdir(exist_ok=True)
                content.tofile(copy)
            yield copies


def bytes_of(path: Path) -> Bytes:
    """Return the bytes of a file, which are read as they are used."""
    return np.memmap(path, np.uint8, "r") if path.stat().st_size else np.zeros(0, np.uint8)
