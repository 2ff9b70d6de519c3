"""Read the arrays of an .npz file from a folder that is not trusted, without taking more memory than the file has."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
SUFFIX = ".npy"
KINDS = "fiub"  # floats, integers and truth values


def read_arrays(path: Path) -> dict[str, Array]:
    """Return the arrays of a file that `numpy.savez` wrote, by name.

    Each member is stored uncompressed, and its header must describe exactly the bytes that follow it. A small file thus
    cannot unpack to a large one, nor claim a large array.

    Raises:
        OSError, ValueError, zipfile.BadZipFile: the file cannot be read, or is no such file.
    """
    try:
        return _read_members(path)
    except (OSError, ValueError, zipfile.BadZipFile):
        raise
    except Exception as error:  # zipfile, tokenize and NumPy raise further types, as for an encrypted file
        raise ValueError(f"it is damaged ({type(error).__name__})") from error


def _read_members(path: Path) -> dict[str, Array]:
    """Return the array of each member of a file."""
    arrays = {}
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
                raise ValueError(f"{member.filename!r} is compressed")
            if member.file_size > path.stat().st_size or not member.filename.endswith(SUFFIX):
                raise ValueError(f"{member.filename!r} is no array")
            with archive.open(member) as file:
                arrays[member.filename.removesuffix(SUFFIX)] = _read_array(file, member.file_size)
    return arrays


def _read_array(file: IO[bytes], size: int) -> Array:
    """Return the array of an .npy file of `size` bytes (https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html)."""
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"found version {version} of the format; expected 1.0 or 2.0")
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read_header(file)
    count = 1
    for length in shape:
        count *= length
    if dtype.kind not in KINDS or any(length < 0 for length in shape) or file.tell() + count * dtype.itemsize != size:
        raise ValueError(f"an array of shape {shape} and type {dtype} does not fit its {size} bytes")
    flat = np.frombuffer(bytearray(file.read(count * dtype.itemsize)), dtype=dtype)
    return flat.reshape(shape, order="F" if fortran else "C")
