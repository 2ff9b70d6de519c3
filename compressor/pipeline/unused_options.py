"""Refuse options that have no effect beside the others, because whoever gives one expects an effect.

An option that was given with its default value is not refused: it cannot be told from one that was not given, and the
result is the one that was asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

from compressor.choices import AUTO
from compressor.commands import InspectSettings
from compressor.errors import SettingsError
from compressor.settings import Settings
from compressor.target.registry import target_named
from passes.plan.selection import parse
from runtimes.base.ahead_of_time import ahead_of_time

DEFAULTS = {field.name: field.default for field in fields(Settings)}


def refuse_unused(settings: Settings) -> None:
    """Raise if an option differs from its default and the others make it meaningless.

    Raises:
        SettingsError: one sentence with the option, the reason and what to do.
    """
    for name, reason in (*_of_search(settings), *_of_engine(settings)):
        value = getattr(settings, name)
        if value != DEFAULTS[name]:
            option = f"--{name.replace('_', '-')}"
            text = "" if value is True else f" {value:g}" if isinstance(value, float) else f" {value}"
            raise SettingsError(f"found {option}{text}, {reason}, or leave {option} out.")


def _of_search(settings: Settings) -> Iterator[tuple[str, str]]:
    """Yield the options of the search, the ranking and healing that have no effect, with the reason and a remedy."""
    drop = settings.drop
    searched = drop == AUTO
    ranked = not searched and drop != "none" and not drop.endswith(".json") and not parse(drop).names
    if not searched:
        chosen = () if settings.image_tokens == AUTO else ("max_loss", "budget")
        for name in (*chosen, "cost", "prices"):
            yield name, f"which only a search uses, with --drop {drop}; give --drop auto"
        if settings.metric != "output":
            yield "search_samples", "on which effects on the output are measured; give --drop auto or --metric output"
    if searched or not (ranked or drop == "none"):  # inspect has --drop none and a metric
        yield "metric", f"which ranks sites for a number or a share, with --drop {drop}; give --drop such as 4 or 25%"
    if drop == "none" or drop.endswith(".json"):
        yield "actions", f"but --drop {drop} chooses no action; give another --drop"
    if _runs_nothing(settings):
        given = "random weights" if settings.random_weights else "random data"
        for name in ("workers", "ray"):
            yield (
                name,
                f"whose processes choose a plan, fit maps or measure quality, with --drop {drop} and {given}; give "
                "--drop with a number",
            )
    if settings.heal == "none":
        yield "heal_budget", "which is the time limit of healing, without healing; give --heal"


def _runs_nothing(settings: Settings) -> bool:
    """Return whether an export neither searches nor ranks, fits no map, and measures no quality."""
    if isinstance(settings, InspectSettings) or settings.drop == AUTO or settings.drop.endswith(".json"):
        return False
    if not settings.random_weights and str(settings.data) != "random":
        return False
    named = settings.drop == "none" or bool(parse(settings.drop).names)
    return named and settings.chosen_actions == ("drop",) and settings.heal == "none"


def _of_engine(settings: Settings) -> Iterator[tuple[str, str]]:
    """Yield the options of the precision and the engine that have no effect, with the reason and a remedy."""
    precision, target = settings.precision, settings.target
    if precision not in ("int8", AUTO):
        yield "calibration", f"which sets the ranges of int8, with --precision {precision}; give --precision int8"
    elif "int8" in target_named(target).own:
        yield "calibration", f"but target {target} sets the ranges of int8 itself; choose another --target"
    if precision == "fp32":
        yield "max_precision_loss", "which bounds the loss of a precision below fp32; give --precision"
    if target != "onnxruntime":
        reason = f"which merges ONNX files of an encoder-decoder, but target {target} writes others"
        yield "merge_decoder", f"{reason}; give --target onnxruntime"
    if target_named(target).devices == ("cuda",) and not settings.defer_build:
        yield "threads", f"but engines of {target} run on the GPU; choose another --target"
    if ahead_of_time(target_named(target)) is None:
        yield "gpu", f"but target {target} builds for the device that it runs on; give --target tensorrt_rtx"
    elif settings.defer_build:
        yield "gpu", "for which engines are built here, with --defer-build; leave out --defer-build"
