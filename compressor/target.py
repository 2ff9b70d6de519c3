"""Everything that `--target` takes: the runtimes, and the checkpoint of transformers, which only this package knows."""

from __future__ import annotations

from compressor import checkpoint
from runtimes import base


def targets() -> tuple[str, ...]:
    """The names of all targets, whether or not they can run here, in alphabetical order."""
    return tuple(sorted((*base.targets(), checkpoint.NAME)))


def target_named(name: str, *, task: str | None = None, cache: bool = True) -> base.Runtime:
    """The target of that name.

    Args:
        name: what `--target` takes.
        task: by which the model was loaded, if not by its own; a checkpoint is loaded by it again.
        cache: whether a language model is called with its KV cache; a checkpoint is called likewise.

    Raises:
        RuntimesError: there is no such target; the message lists those there are.
    """
    if name == checkpoint.NAME:
        return checkpoint.Transformers(task, cache)
    try:
        return base.runtime(name)
    except base.RuntimesError as error:
        raise base.RuntimesError(f"{error} A checkpoint is written by {checkpoint.NAME}.") from error
