"""The targets by name: every module and package of runtimes/ but `base`."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from importlib import metadata
from pathlib import Path
from typing import cast

from runtimes.base.protocols import BuildOptions, Runtime, RuntimesError, RuntimeUnavailable

RUNTIMES = Path(__file__).parents[1]
PORTABLE = "tensorrt"  # the target whose engines are tied to a GPU and a version unless asked not to be


def targets() -> tuple[str, ...]:
    """Return the names of all targets, whether or not they can run here, in alphabetical order.

    >>> "onnxruntime" in targets()
    True
    """
    found = (module.name for module in pkgutil.iter_modules([str(RUNTIMES)]))
    return tuple(sorted(name for name in found if name != "base"))


def runtime(name: str) -> Runtime:
    """Return the target of that name.

    Raises:
        RuntimesError: There is no such target; the message lists those there are.
    """
    known = targets()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise RuntimesError(f"Unknown target {name!r}; {hint}The targets are: {', '.join(known)}.")
    module = f"runtimes.{name}.target" if (RUNTIMES / name).is_dir() else f"runtimes.{name}"
    return cast(Runtime, importlib.import_module(module))


def need(name: str, missing: str | None, devices: tuple[str, ...], options: BuildOptions) -> None:
    """Raise RuntimeUnavailable unless a target can be used on this machine and on the device asked for.

    Args:
        name: The target.
        missing: What its missing() returned.
        devices: Those it runs on.
        options: Name the device.
    """
    if missing is not None:
        raise RuntimeUnavailable(f"Target {name} cannot be used here: {missing}.")
    check_device(name, devices, options)


def installed(distribution: str) -> bool:
    """Return whether pip knows the distribution, whose name is not always that of the module."""
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def check_device(name: str, devices: tuple[str, ...], options: BuildOptions) -> None:
    """Raise RuntimeUnavailable if a target does not run on the device asked for, or in the way."""
    if options.portable and name != PORTABLE:
        raise RuntimeUnavailable(
            f"Target {name} has no portable engines; only those of {PORTABLE} are tied to one GPU and version: leave "
            "that option out."
        )
    if options.device not in devices:
        raise RuntimeUnavailable(f"Target {name} runs on {' or '.join(devices)}; found device {options.device!r}.")
