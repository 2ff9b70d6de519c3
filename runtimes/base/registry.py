"""Target registry: every module and package of runtimes/ except `base`, by name."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from importlib import metadata
from pathlib import Path
from typing import cast

from runtimes.base.protocols import BuildOptions, Runtime, RuntimesError, RuntimeUnavailable

RUNTIMES = Path(__file__).parents[1]
PORTABLE = "tensorrt"  # the only target that builds an engine for several GPUs and versions


def targets() -> tuple[str, ...]:
    """Return the names of all targets in alphabetical order, including those that cannot run on this machine.

    >>> "onnxruntime" in targets()
    True
    """
    names = (module.name for module in pkgutil.iter_modules([str(RUNTIMES)]))
    return tuple(sorted(name for name in names if name != "base"))


def runtime(name: str) -> Runtime:
    """Return the target called `name`.

    Raises:
        RuntimesError: No target has this name; the message lists all targets.
    """
    names = targets()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise RuntimesError(f"Unknown target {name!r}; {hint}The targets are: {', '.join(names)}.")
    module = f"runtimes.{name}.target" if (RUNTIMES / name).is_dir() else f"runtimes.{name}"
    return cast(Runtime, importlib.import_module(module))


def check_available(name: str, missing: str | None, devices: tuple[str, ...], options: BuildOptions) -> None:
    """Raise RuntimeUnavailable unless a target can run on this machine and on the device of `options`.

    Args:
        name: The target's name.
        missing: The result of the target's missing().
        devices: The devices that the target supports.
        options: The build options; only `device` and `portable` are read.
    """
    if missing is not None:
        raise RuntimeUnavailable(f"Target {name} cannot be used here: {missing}.")
    check_device(name, devices, options)


def is_installed(distribution: str) -> bool:
    """Return whether a distribution is installed, by its name on PyPI, which can differ from the module name."""
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def check_device(name: str, devices: tuple[str, ...], options: BuildOptions) -> None:
    """Raise RuntimeUnavailable if a target does not support the device or the portability of `options`."""
    if options.portable and name != PORTABLE:
        raise RuntimeUnavailable(
            f"Target {name} has no portable engines; only {PORTABLE} builds one for several GPUs and versions: omit "
            "this option."
        )
    if options.device not in devices:
        raise RuntimeUnavailable(f"Target {name} runs on {' or '.join(devices)}; found device {options.device!r}.")
