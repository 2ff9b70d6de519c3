"""A module that transformers loaded, with what is known of its checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compressor.choices import ImageSize
from compressor.models import class_names
from compressor.workspace.folder_errors import name_of


@dataclass(frozen=True)
class Loaded:
    """A module, where it comes from, and how it is to be exported.

    Attributes:
        module: the module of transformers, in evaluation mode.
        location: a hub id, a folder or a file.
        task: the task of its head.
        options: keyword arguments of ``from_pretrained``: ``revision`` and ``trust_remote_code``.
        sentence_files: the files of sentence-transformers, by their names in the checkpoint.
        random_weights: whether the weights of the checkpoint were not read.
        untrained: the names of the weights that the checkpoint lacks.
        cache: whether a language model keeps its KV cache.
        image_size: the size of images that was asked for, None for that of the image processor.
        sequence_length: the number of tokens, samples or frames that was asked for, None for any.
    """

    module: Any
    location: str
    task: str
    options: dict[str, Any]
    sentence_files: dict[str, Path] = field(default_factory=dict)
    random_weights: bool = False
    untrained: tuple[str, ...] = ()
    cache: bool = True
    image_size: ImageSize = None
    sequence_length: int | None = None

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of a `Model` that do not depend on what it takes."""
        folder = Path(self.location).is_dir()
        return {
            "name": name_of(self.location) if folder else self.location,
            "source": "transformers",
            "task": self.task,
            "module": self.module,
            "untrained": self.untrained,
            "revision": self.options["revision"],
            "hub_id": None if self.random_weights or folder else self.location,
            "random_weights": self.random_weights,
        }

    @property
    def class_names(self) -> class_names.ClassNames | None:
        """The names of the classes in the config; None for a model that is no classifier."""
        if not self.task.endswith("classification"):
            return None
        config = self.module.config
        return class_names.with_synsets(class_names.from_config(config, config.num_labels))
