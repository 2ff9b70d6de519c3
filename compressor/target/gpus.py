"""The GPUs that an export builds engines for ahead of time, because they are asked for or none is present."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from compressor.errors import SettingsError
from compressor.settings import Settings
from compressor.target.registry import target_named
from runtimes.base.ahead_of_time import AheadOfTime, ahead_of_time
from runtimes.base.protocols import RuntimeUnavailable


@dataclass(frozen=True)
class Gpus:
    """GPUs to build for without running the engines.

    Attributes:
        target: builds the engines.
        names: compute capabilities, such as ``sm89``, or several that share an engine, such as ``sm86+sm89``.
        named: whether ``--gpu`` names them. One that refuses the model then stops the export; of all that the release
            knows, such a one is left out and reported.
    """

    target: AheadOfTime
    names: tuple[str, ...]
    named: bool


def gpus_ahead(settings: Settings) -> Gpus | None:
    """Return the GPUs to build for ahead of time; None if the engine is built for the present device, or deferred.

    Raises:
        SettingsError: ``--gpu`` names no compute capability, or an option needs an engine that runs here.
        RuntimeUnavailable: the builder is not installed, or its release lacks a GPU.
    """
    runtime = target_named(settings.target)
    target = ahead_of_time(runtime)
    if target is None or settings.defer_build or settings.max_memory is not None:
        return None
    named = None if settings.gpu is None else _names(settings.gpu)
    if named is None and (runtime.missing() is None or target.missing_builder() is not None):
        return None  # the engine is built for the present GPU, or the check of the target says what to install
    known = target.gpus()
    lacking = [name for names in named or () for name in names.split("+") if name not in known]
    if lacking:
        raise RuntimeUnavailable(
            f"Found --gpu {lacking[0]}, which {target.builder_version()} does not build for; expected some of: "
            f"{', '.join(known)}."
        )
    _check_measurable(settings)
    return Gpus(target, known if named is None else named, named is not None)


def measured_by_stand_in(settings: Settings) -> Settings:
    """Return the settings of an export whose engines do not run here: it measures as with ``--defer-build``."""
    return replace(settings, defer_build=True)


def _names(text: str) -> tuple[str, ...]:
    """Return the names in a value of ``--gpu``, each once."""
    names = tuple(dict.fromkeys(re.sub(r"\s", "", part).lower() for part in text.split(",")))
    wrong = [name for name in names if not re.fullmatch(r"sm\d{2,3}(\+sm\d{2,3})*", name)]
    if wrong:
        raise SettingsError(
            f"found --gpu {wrong[0]!r}; expected compute capabilities separated by commas, such as sm86,sm89, or by + "
            "for those that share an engine."
        )
    return names


def _check_measurable(settings: Settings) -> None:
    """Refuse goals and workloads that need an engine which runs here."""
    reason = f"the engines of {settings.target} are built here but run elsewhere"
    if settings.latency is not None:
        raise SettingsError(f"found --latency, but {reason}; give --speedup instead.")
    if settings.generated is not None and settings.generated[1]:
        raise SettingsError(
            f"found --generate {settings.generate}, but {reason}, and the device times the prompt only; give "
            f"--generate {settings.generated[0]}:0, or leave out --generate."
        )
