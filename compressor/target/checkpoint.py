"""Target `transformers`: a checkpoint for `from_pretrained`, run in torch eager."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from compressor.choices import TRANSFORMERS
from compressor.errors import CompressorError
from compressor.lower.checkpoint import ADVICE, CONFIG
from runtimes.base.protocols import BuildError, BuildOptions, Engine, Int8Style, Layers
from runtimes.base.registry import installed

if TYPE_CHECKING:
    from compressor.target.torch_eager import Module


@dataclass(frozen=True)
class Transformers:
    """Opens checkpoints in torch eager, as whoever calls `from_pretrained` has them; see runtimes.base.Runtime.

    `task` is what the model was loaded for, if not its own, `cache` whether a language model is called with its KV
    cache. `opened` keeps the models that were loaded: an engine is opened anew for each burst of a timing.
    """

    task: str | None = None
    cache: bool = True
    name: str = TRANSFORMERS
    description: str = "a checkpoint without whole blocks, for from_pretrained; timed in torch eager"
    devices: tuple[str, ...] = ("cpu",)
    source: Literal["/config.json"] = CONFIG
    precisions: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: {"cpu": ("fp32",)})
    own: tuple[str, ...] = ()
    int8: Int8Style = field(default_factory=lambda: Int8Style("int8", convolutions=False))
    opened: dict[Path, Module] = field(default_factory=dict, repr=False)

    def missing(self) -> str | None:
        """None where transformers is installed."""
        return None if installed("transformers") else "transformers is not installed: pip install transformers"

    def build(self, source: Path, out: Path, options: BuildOptions) -> Path:
        """Nothing is built: the checkpoint is what is shipped."""
        return source

    def load(self, path: Path, options: BuildOptions) -> Engine:
        """Open the checkpoint that a config belongs to, as any model of transformers is opened.

        Raises:
            BuildError: it cannot be opened.
        """
        from compressor import models
        from compressor.target.torch_eager import Module

        if path not in self.opened:
            try:
                model = models.load(path.parent, task=self.task, cache=self.cache)
            except CompressorError as error:
                raise BuildError(f"The checkpoint cannot be opened again ({error}): {ADVICE}.") from error
            self.opened[path] = Module(model)
        return self.opened[path].open(options)

    def layers(self, path: Path, options: BuildOptions) -> Layers | None:
        """Nothing: torch eager runs the layers as the model has them."""
