"""The optional library `datasets`, and what all its data sets have in common."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from compressor.data.readers.base import Samples
from compressor.errors import DataError

SPLITS = ("validation", "test", "train")  # test comes second: its labels are often withheld


def datasets_library(missing: str) -> Any:
    """Return the library.

    Args:
        missing: what needs it, as the first clause of the error.

    Raises:
        DataError: it is not installed, or is a version that may run code of a data set.
    """
    try:
        library = importlib.import_module("datasets")
    except ImportError as error:
        raise DataError(f"{missing}, install the datasets library: pip install datasets") from error
    version = str(getattr(library, "__version__", ""))
    if re.match(r"[0-3]\.", version):
        raise DataError(
            f"found datasets {version}, which may run code of a dataset repository; expected 4 or later: "
            'pip install "datasets>=4"'
        )
    return library


def preferred_split(splits: Iterable[str]) -> str:
    """Return the split to read: the first of `SPLITS` that there is, else the first.

    >>> preferred_split(["train", "test"]), preferred_split(["b", "a"])
    ('test', 'b')
    """
    found = list(splits)
    return next((split for split in SPLITS if split in found), found[0])


def described(samples: Samples, source: str, split: str | None) -> Samples:
    """Return samples whose reading also states the kind of source and the split."""
    part = "" if split is None else f" (split {split!r})"
    return replace(samples, reading=f"{source}{part}: {samples.reading}")
