"""Everything that `--target` takes: the runtimes, and the checkpoint of transformers, which only this package knows."""

from __future__ import annotations

from compressor.choices import TRANSFORMERS
from compressor.target.checkpoint import Transformers
from runtimes.base import registry
from runtimes.base.protocols import Runtime


def targets() -> tuple[str, ...]:
    """The names of all targets, whether or not they can run here, in alphabetical order."""
    return tuple(sorted((*registry.targets(), TRANSFORMERS)))


def target_named(name: str, *, task: str | None = None, cache: bool = True) -> Runtime:
    """The target of that name.

    Args:
        name: what `--target` takes.
        task: by which the model was loaded, if not by its own; a checkpoint is loaded by it again.
        cache: whether a language model is called with its KV cache; a checkpoint is called likewise.

    Raises:
        RuntimesError: there is no such target; the message lists those there are.
    """
    if name == TRANSFORMERS:
        return Transformers(task, cache)
    return registry.runtime(name)
