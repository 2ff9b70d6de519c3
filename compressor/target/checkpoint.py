"""Target `transformers`: a checkpoint for `from_pretrained` or for serving engines, run in torch eager."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from compressor.choices import TRANSFORMERS
from compressor.errors import CompressorError
from compressor.lower.checkpoint import ADVICE, CONFIG
from runtimes.base.protocols import BuildError, BuildOptions, Engine, Int8Style, LayerCounts
from runtimes.base.registry import is_installed

if TYPE_CHECKING:
    from compressor.target.torch_eager import Module


@dataclass(frozen=True)
class Transformers:
    """A target that opens checkpoints in torch eager, as `from_pretrained` does; see `runtimes.base.protocols.Runtime`.

    Attributes:
        task: the task that the model was loaded for; None for the task of the checkpoint.
        cache: whether a language model is called with its KV cache.
        opened: the loaded models by path. They are kept because a timing opens an engine for each burst.
    """

    task: str | None = None
    cache: bool = True
    name: str = TRANSFORMERS
    description: str = "a checkpoint without the dropped blocks or branches; timed in torch eager"
    devices: tuple[str, ...] = ("cpu",)
    source: Literal["/config.json"] = CONFIG
    precisions: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: {"cpu": ("fp32",)})
    own: tuple[str, ...] = ()
    int8: Int8Style = field(default_factory=lambda: Int8Style("int8", convolutions=False))
    opened: dict[Path, Module] = field(default_factory=dict, repr=False)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle without the loaded models, which other processes load themselves."""
        return Transformers, (self.task, self.cache)

    def missing(self) -> str | None:
        """Return None if transformers is installed, else what to install."""
        return None if is_installed("transformers") else "transformers is not installed: pip install transformers"

    def build(self, source: Path, out: Path, options: BuildOptions) -> Path:
        """Return `source`: the checkpoint is the engine."""
        return source

    def load(self, path: Path, options: BuildOptions) -> Engine:
        """Open the checkpoint in the folder of a ``config.json``.

        Raises:
            BuildError: the checkpoint cannot be loaded.
        """
        from compressor import models
        from compressor.target.torch_eager import Module

        if path not in self.opened:
            try:
                model = models.load(path.parent, task=self.task, cache=self.cache)
            except CompressorError as error:
                raise BuildError(f"The written checkpoint cannot be loaded ({error}): {ADVICE}.") from error
            self.opened[path] = Module(model)
        return self.opened[path].open(options)

    def layers(self, path: Path, options: BuildOptions) -> LayerCounts | None:
        """Return None: torch eager runs the layers of the model unchanged."""
