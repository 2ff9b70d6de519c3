"""The targets that `--target` accepts: the runtimes and the checkpoint of transformers."""

from __future__ import annotations

from compressor.choices import TRANSFORMERS
from compressor.target.checkpoint import Transformers
from runtimes.base import registry
from runtimes.base.protocols import Runtime


def targets() -> tuple[str, ...]:
    """Return the names of all targets in alphabetical order, including those that cannot run here."""
    return tuple(sorted((*registry.targets(), TRANSFORMERS)))


def target_named(name: str, *, task: str | None = None, cache: bool = True) -> Runtime:
    """Return the target of this name.

    Args:
        name: a value of `--target`.
        task: the task that a checkpoint is loaded for; None for its own task.
        cache: whether a language model in a checkpoint is called with its KV cache.

    Raises:
        RuntimesError: there is no such target; the message lists all targets.
    """
    if name == TRANSFORMERS:
        return Transformers(task, cache)
    return registry.runtime(name)
