"""The options of one export, checked once, written into report.json as they were."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from compressor.choices import (
    AUTO,
    AUTO_ACTIONS,
    CALIBRATIONS,
    COSTS,
    HEAL_METHODS,
    SHORT_FORMS,
    TASKS,
    TRANSFORMERS,
    Calibration,
)
from compressor.errors import SettingsError
from passes.base import PassError
from passes.plan.plan import form_and_rank
from passes.plan.selection import METRICS, parse
from runtimes.base.protocols import DEVICES, PRECISIONS, RuntimesError
from runtimes.base.registry import runtime

DEFAULT_LOSS = 1.0
ONLY_BLOCKS = f"--target {TRANSFORMERS} leaves whole blocks out and does nothing else"
INSTEAD = "give --drop block:N, names of whole blocks or a plan of such, or choose another --target"
# No module path holds these: a leading minus, a colon, a percent sign, a space.
_NO_SITE = re.compile(r"^-|[:%\s]")


@dataclass(frozen=True)
class Settings:
    """What `compressor export` was asked for; each field is a flag of the same name.

    Attributes:
        model: MODEL argument, a module, or None for the embedded sample.
        data: where samples come from; None takes the sample's own data.
        drop: ``none``, ``auto``, a number, a percentage, ``kind:number``, names, or a plan file.
        metric: how the ranked forms of `drop` rank.
        actions: what may be done to a site; ``auto`` chooses among several (None: `AUTO_ACTIONS`), the ranked forms
            and names take one (None: drop).
        tokens: ``auto`` (the search merges tokens too), ``none``, a number for every attention, one for each with
            commas, or the percentage that is gone half-way.
        max_loss: most quality that may be lost on validation data, in percent: points of accuracy, agreement,
            feature similarity or Spearman correlation; relative increase of perplexity. None: 1 for ``auto`` without a
            wish for speed, unlimited with one.
        speedup: how many times faster ``auto`` shall make the model.
        latency: the milliseconds ``auto`` shall reach.
        generate: what the latency of a language model with a cache is the time of, as ``PROMPT:NEW``: a prompt of so
            many tokens and so many new ones; ``PROMPT:0`` is the prompt alone. None: 128:128, as far as its positions
            hold them.
        cost: what ``auto`` saves: ``latency`` as timed on the target, or ``macs`` (multiply-adds).
        heal: ``none``, ``closed-form`` or ``distill``: how what is left is adapted after the changes.
        heal_budget: most seconds that healing takes.
        target: name of the runtime, or ``transformers`` for a checkpoint without whole blocks.
        precision: one of `runtimes.base.PRECISIONS`, or ``auto``: the fastest of the target's whose loss stays within
            `max_precision_loss`, found by measuring each.
        int8: short form of `precision`: ``static`` for int8, ``dynamic`` for int8-dynamic. Afterwards None.
        calibration: how ranges of activations are found for int8, a method of `compressor.calibration`; ``auto`` tries
            them on validation data, and SmoothQuant, until one loses little.
        factorial: also measure the compressed model in float, and before its tokens are merged, and say whether the
            speed-ups of compression and the precision multiply; that is int8 where none was asked for.
        max_precision_loss: most quality that a precision may lose against fp32, in percent: int8 returns layers to
            float until it holds, ``auto`` takes no precision that loses more.
        portable_engine: build a TensorRT engine for other GPUs (Ampere and newer) and later minor versions too.
        defer_build: leave the engine to `compressor build` on the device; ONNX Runtime on the CPU stands in here.
        device: ``cpu`` or ``cuda``, where the engine runs; None takes the one that the target prefers.
        threads: threads of the engine; None leaves it to the runtime.
        batch: batch size of the latency measurement.
        samples: most samples used in total; None takes all.
        cache: trace a causal language model with its KV cache; where it is not found, the export stops. False
            (``--no-cache``) goes on without.
        max_memory: bytes that the process may hold: the weights stay on disk, and the model is run block by block. None
            loads it whole.
        max_length: tokens of a window of a language model's texts; None: what the model takes, at most 2,048.
        stride: tokens from the start of a window to that of the next; None: half of a window.
        search_samples: calibration samples on which `auto` measures effects.
        rounds: timed bursts per engine.
        example_inputs: for a module: a tensor, a tuple or a dict of tensors.
    """

    model: str | Path | torch.nn.Module | None = None
    data: str | Path | None = None
    drop: str = "auto"
    metric: str = "cosine"
    actions: str | None = None
    tokens: str = "auto"
    max_loss: float | None = None
    speedup: float | None = None
    latency: float | None = None
    generate: str | None = None
    cost: str = "latency"
    heal: str = "none"
    heal_budget: float = 300.0
    target: str = "onnxruntime"
    precision: str = "fp32"
    int8: str | None = None
    calibration: Calibration | Literal["auto"] = "auto"
    factorial: bool = False
    max_precision_loss: float = 0.5
    defer_build: bool = False
    portable_engine: bool = False
    output: str | Path = "compressed"
    force: bool = False
    task: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    random_weights: bool = False
    cache: bool = True
    device: str | None = None
    threads: int | None = None
    batch: int = 1
    samples: int | None = None
    max_memory: int | None = None
    max_length: int | None = None
    stride: int | None = None
    search_samples: int = 64
    rounds: int = 10
    seed: int = 0
    example_inputs: Any = None

    def __post_init__(self) -> None:
        _check_precision(self)
        if self.precision == "fp32" and (self.int8 is not None or self.factorial):
            object.__setattr__(self, "precision", SHORT_FORMS[self.int8 or "static"])
        object.__setattr__(self, "int8", None)
        for check in (
            _check_texts,
            _check_choices,
            _check_numbers,
            _check_target,
            _check_drop,
            _check_actions,
            _check_data,
            _check_memory,
        ):
            check(self)

    @property
    def loss_limit(self) -> float:
        """The most that ``auto`` may lose, in percent."""
        if self.max_loss is not None:
            return self.max_loss
        return DEFAULT_LOSS if self.speedup is None and self.latency is None else math.inf

    @property
    def generated(self) -> tuple[int, int] | None:
        """Tokens of the prompt and further tokens, where `generate` names them."""
        if self.generate is None:
            return None
        prompt, _, new = self.generate.partition(":")
        return int(prompt), int(new)

    @property
    def chosen_actions(self) -> tuple[str, ...]:
        """The actions to choose among."""
        if self.actions is not None:
            return tuple(action.strip() for action in self.actions.split(","))
        chosen = AUTO_ACTIONS if self.drop == "auto" and self.target != TRANSFORMERS else ("drop",)
        return chosen if self.tokens == "auto" else tuple(action for action in chosen if action != "merge")

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain JSON values."""
        plain = {key: getattr(self, key) for key in self.__dataclass_fields__ if key != "example_inputs"}
        plain["model"] = type(self.model).__name__ if isinstance(self.model, torch.nn.Module) else _text(self.model)
        return plain | {"data": _text(self.data), "output": str(self.output)}


def _check_texts(settings: Settings) -> None:
    for name in ("model", "data", "output", "drop"):
        value = getattr(settings, name)
        if isinstance(value, str) and not value.strip():
            raise SettingsError(f"{name} is empty; give a value, or leave the option out for its default.")


def _check_choices(settings: Settings) -> None:
    named = (
        ("metric", METRICS),
        ("device", DEVICES),
        ("task", TASKS),
        ("cost", COSTS),
        ("heal", HEAL_METHODS),
        ("calibration", ("auto", *CALIBRATIONS)),
    )
    for name, choices in named:
        value = getattr(settings, name)
        if value not in choices and not (value is None and name in ("device", "task")):
            raise SettingsError(f"unknown {name} {value!r}; expected {' or '.join(choices)}.")


def _check_precision(settings: Settings) -> None:
    """Look at the precision as it was asked for, before its short form is put into it."""
    for name, choices in (("int8", tuple(SHORT_FORMS)), ("precision", (*PRECISIONS, AUTO))):
        value = getattr(settings, name)
        if value is not None and value not in choices:
            raise SettingsError(f"unknown {name} {value!r}; expected {' or '.join(choices)}.")
    if settings.int8 is not None and settings.precision not in ("fp32", SHORT_FORMS[settings.int8]):
        raise SettingsError(f"found --int8 and --precision {settings.precision}; give one of them.")
    if settings.factorial and settings.precision == AUTO:
        raise SettingsError("--factorial sets compression against one precision; found --precision auto, name it.")


def _check_numbers(settings: Settings) -> None:
    if settings.max_loss is not None and not 0.0 <= settings.max_loss < math.inf:  # perplexity can more than double
        raise SettingsError(f"max-loss is {settings.max_loss:g}, which is no budget in %; expected 0 or more.")
    if not 0.0 <= settings.max_precision_loss <= 100.0:
        found = settings.max_precision_loss
        raise SettingsError(f"max-precision-loss is {found:g}, which is no budget in %; expected 0 to 100.")
    counts = (("threads", 1), ("batch", 1), ("samples", 3), ("search_samples", 1), ("rounds", 1))
    for name, least in (*counts, ("max_length", 2), ("stride", 1)):
        value = getattr(settings, name)
        if value is not None and value < least:
            raise SettingsError(f"{name.replace('_', '-')} is {value}; expected at least {least}.")
    for name, floor in (("speedup", 1.0), ("latency", 0.0), ("heal_budget", 0.0)):
        value = getattr(settings, name)
        if value is not None and not (floor < value < math.inf):
            raise SettingsError(f"{name.replace('_', '-')} is {value:g}; expected more than {floor:g}.")


def _check_actions(settings: Settings) -> None:
    """Budgets and actions only make sense together with the right kind of ``drop``."""
    for action in settings.chosen_actions:
        if action == "merge" and settings.drop == "auto":
            continue  # the search chooses how many
        try:
            form_and_rank(action)
        except PassError as error:
            raise SettingsError(f"--actions: {error}") from error
    if settings.tokens not in ("auto", "none"):
        _check_tokens(settings.tokens)
    if settings.drop != "auto":
        if len(settings.chosen_actions) > 1:
            raise SettingsError(f"--actions {settings.actions}: only --drop auto chooses among several; give one.")
        for name in ("speedup", "latency"):
            if getattr(settings, name) is not None:
                raise SettingsError(
                    f"--{name} is a wish that --drop auto fulfils; --drop {settings.drop} names the plan."
                )
    if settings.speedup is not None and settings.latency is not None:
        raise SettingsError("found --speedup and --latency, which are one wish in two forms; give one of them.")
    if settings.latency is not None and settings.cost != "latency":
        raise SettingsError("--latency needs the target to be timed; leave out --cost macs.")
    if settings.generate is not None:
        if not settings.cache:
            raise SettingsError("found --generate and --no-cache, but generation is timed behind a cache; give one.")
        _check_generate(settings)
    if settings.latency is not None and settings.defer_build:
        raise SettingsError("--latency needs the target to be timed, which --defer-build leaves out; give --speedup.")


def _check_generate(settings: Settings) -> None:
    found = re.fullmatch(r"(\d+):(\d+)", settings.generate or "")
    if found is None or int(found[1]) < 1:
        raise SettingsError(
            f"--generate {settings.generate}: expected PROMPT:NEW, a prompt's tokens and further ones, such as 128:128."
        )
    if settings.defer_build and int(found[2]):
        raise SettingsError(
            "--defer-build leaves timing to the device, where a prompt alone is timed; give --generate "
            f"{found[1]}:0, or leave it out."
        )


def _check_tokens(text: str) -> None:
    """The forms of ``tokens`` that need no model; the number of attentions is known later."""
    if not re.fullmatch(r"\d+(,\d+)*|\d+%", text) or (text.endswith("%") and not 0 < int(text[:-1]) < 75):
        raise SettingsError(
            f"--tokens {text}: expected auto, none, a number such as 8, one for each attention such as 8,8,0,8, or a "
            "percentage below 75% such as 50%."
        )


def _check_target(settings: Settings) -> None:
    if settings.target == TRANSFORMERS:
        _check_checkpoint(settings)
        return
    try:
        runtime(settings.target)
    except RuntimesError as error:
        raise SettingsError(f"{error} A checkpoint is written by {TRANSFORMERS}.") from error


def _check_checkpoint(settings: Settings) -> None:
    """Refuse what a checkpoint cannot express, as far as that is known without the model."""
    if set(settings.chosen_actions) != {"drop"}:
        raise SettingsError(
            f"{ONLY_BLOCKS}, no --actions {settings.actions}; leave --actions out, or choose another --target."
        )
    if settings.tokens not in ("auto", "none"):
        raise SettingsError(
            f"{ONLY_BLOCKS}, no --tokens {settings.tokens}; leave --tokens out, or choose another --target."
        )
    counted = re.fullmatch(r"(?:([a-z]+):)?\d+%?", settings.drop.strip())
    if counted is not None and counted[1] != "block":
        raise SettingsError(f"{ONLY_BLOCKS}; found --drop {settings.drop}: {INSTEAD}.")


def _check_drop(settings: Settings) -> None:
    """What can be known without the model; names are held against its sites later."""
    drop = settings.drop
    if drop in ("none", "auto") or drop.endswith(".json"):
        return
    try:
        selection = parse(drop)
    except PassError as error:
        raise SettingsError(str(error)) from error
    strange = [name for name in selection.names if _NO_SITE.search(name)]
    if strange:
        raise SettingsError(
            f"--drop {drop}: {strange[0]!r} is no count and no site name; expected none, auto, a number such as 4, "
            "a percentage such as 25%, kind:number such as attention:4, site names with commas, or a plan.json."
        )


def _check_data(settings: Settings) -> None:
    if settings.data is None and settings.model is not None:
        raise SettingsError(
            "no data given; pass --data with a folder or file of samples, or --data random for speed only."
        )
    if settings.drop != "auto":
        return
    if str(settings.data) == "random":
        raise SettingsError(
            "a search (--drop auto, or sweep) needs real data; with --data random export a number, names or a file."
        )
    if settings.random_weights:
        raise SettingsError(
            "a search (--drop auto, or sweep) needs trained weights; with --random-weights export a number, names or a "
            "file."
        )


def _check_memory(settings: Settings) -> None:
    """Under a limit the model runs block by block, from its files: what needs all of it at once is refused."""
    if settings.max_memory is None:
        return
    asked = {
        "--drop auto": settings.drop == "auto",
        "--metric output": settings.metric == "output",
        f"--actions {settings.actions}": settings.chosen_actions != ("drop",),
        f"--heal {settings.heal}": settings.heal != "none",
        f"--tokens {settings.tokens}": settings.tokens not in ("auto", "none"),
        "--factorial": settings.factorial,
        f"--precision {settings.precision}": settings.precision != "fp32",
        f"--generate {settings.generate}": settings.generate is not None,
        "--random-weights": settings.random_weights,
    }
    found = next((name for name, needed in asked.items() if needed), None)
    if found is not None:
        raise SettingsError(
            f"found {found} with --max-memory, under which a model is read block by block and only ranked; give a "
            "number, names or a plan for --drop, and the rest as it is by default."
        )


def _text(value: object) -> str | None:
    return None if value is None else str(value)
