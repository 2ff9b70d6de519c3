"""Reader of hub datasets; needs the optional `datasets` library."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from compressor.choices import HUB_READING
from compressor.data.readers.base import Samples
from compressor.data.readers.dataset.columns import dataset_samples
from compressor.data.readers.dataset.library import datasets_library, described, preferred_split
from compressor.errors import DataError
from compressor.models.base import first_line
from compressor.models.preprocess import Preprocess

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./+-]+)?(:[\w.+-]+){0,2}")


def looks_like(spec: str) -> bool:
    """Return whether a string names a hub dataset.

    The form is owner/name or owner/name@revision, optionally followed by :config, :split or :config:split.

    >>> looks_like("nyu-mll/glue:sst2"), looks_like("nyu-mll/glue@main:sst2"), looks_like("./folder/images")
    (True, True, False)
    """
    return NAME.fullmatch(spec) is not None


def read_hub(spec: str, preprocess: Preprocess, task: str, revision: str | None, seed: int = 0) -> Samples:
    """Read a hub dataset at the revision after the @ in `spec`, or else at `revision`.

    Code in a dataset repository is never run, because datasets 4 and later do not support it.
    """
    library = datasets_library(f"{spec} is not a local file or folder; to read it as a hub dataset")
    repository, *parts = spec.split(":")
    name, _, own_revision = repository.partition("@")
    revision = own_revision or revision
    try:
        config, split = _part(library, name, parts, revision)
        dataset = library.load_dataset(name, config, split=split, revision=revision)
    # The library raises its own errors and those of the hub client, the network and pyarrow
    except Exception as error:
        raise DataError(
            f"{spec} is not a local file or folder and cannot be loaded as a hub dataset "
            f"({first_line(error)}); check the path, or the name and the network"
        ) from error
    return described(dataset_samples(dataset, spec, preprocess, task, seed), HUB_READING, split)


def _part(library: Any, name: str, parts: Sequence[str], revision: str | None) -> tuple[str | None, str]:
    """Return config and split; a single part is a config if one of that name exists, and a split otherwise."""
    if len(parts) == 2:
        return parts[0], parts[1]
    configs = library.get_dataset_config_names(name, revision=revision)
    if parts and parts[0] not in configs:
        return None, parts[0]
    config = parts[0] if parts else None
    splits = library.get_dataset_split_names(name, config, revision=revision)
    return config, preferred_split(splits)
