"""Options of an export: defaults, checks, and the JSON form that report.json records."""

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
    DYNAMIC,
    HEAL_METHODS,
    MOST_ROUNDS,
    MOST_ROWS,
    MOST_THREADS,
    MOST_TOKENS,
    PROBLEM_TYPES,
    SHORT_FORMS,
    TASKS,
    TRANSFORMERS,
    Calibration,
    ImageSize,
    parse_image_size,
)
from compressor.errors import SettingsError
from passes.base import PassError
from passes.plan.plan import form_and_rank
from passes.plan.selection import METRICS, parse
from runtimes.base.protocols import DEVICES, PRECISIONS, RuntimesError
from runtimes.base.registry import runtime

DEFAULT_LOSS = 1.0
ONLY_BLOCKS = f"--target {TRANSFORMERS} can only remove whole blocks"
BLOCKS_ADVICE = (
    "give --drop block:N, the names of whole blocks or a plan that drops whole blocks, or choose another --target"
)
# Targets that cannot have dynamic height and width, with the reason.
FIXED_SIZE = {
    "tensorrt": "whose engines bound every dynamic axis",
    "executorch": "whose programs bound every dynamic axis",
}
# Counts with their smallest and largest values. A report with larger ones is refused when it is read.
COUNTS = (
    ("threads", 1, MOST_THREADS),
    ("batch", 1, MOST_ROWS),
    ("rounds", 1, MOST_ROUNDS),
    ("max_length", 2, MOST_TOKENS),
    ("stride", 1, MOST_TOKENS),
)
# Matches text that is no module path: a leading minus, a colon, a percent sign or a space.
_NO_SITE = re.compile(r"^-|[:%\s]")


@dataclass(frozen=True)
class Settings:
    """Options of an export; each field corresponds to the command-line option of the same name.

    Attributes:
        model: MODEL argument, a module, or None for the embedded sample.
        data: source of the samples; None takes the data of the embedded sample.
        drop: ``none``, ``auto``, a number, a percentage, ``kind:number``, site names, or a plan file.
        metric: ranking of the sites if `drop` is a number or a percentage.
        actions: actions allowed on a site. ``auto`` chooses among several (None: `AUTO_ACTIONS`); the other forms of
            `drop` take one (None: drop).
        tokens: ``auto`` (the search merges tokens too), ``none``, a number for every attention, one number for each
            attention, separated by commas, or the percentage merged by half of the depth.
        max_loss: largest loss of quality on validation data, in percent: points of accuracy, agreement, feature
            similarity or Spearman correlation; relative increase of perplexity. None: 1 for ``auto``, unlimited with
            `speedup` or `latency`.
        speedup: speed-up that ``auto`` must reach, as a factor.
        latency: latency that ``auto`` must reach, in milliseconds.
        generate: workload whose time is the latency of a language model with a KV cache, as ``PROMPT:NEW``: tokens of
            the prompt and generated tokens; ``PROMPT:0`` is the prompt alone. None: 128:128, or less if the model has
            fewer positions.
        cost: cost that ``auto`` reduces: ``latency`` as timed on the target, or ``macs`` (multiply-adds).
        heal: ``none``, ``closed-form`` or ``distill``: method that adapts the remaining weights after the changes.
        heal_budget: time limit of healing, in seconds.
        problem_type: one of `compressor.choices.PROBLEM_TYPES` for a classifier; None for that of its config.
        target: name of the runtime, or ``transformers`` for a checkpoint without whole blocks.
        precision: one of `runtimes.base.protocols.PRECISIONS`, or ``auto``: the fastest precision of the target whose
            measured loss is at most `max_precision_loss`.
        int8: short form of `precision`: ``static`` for int8, ``dynamic`` for int8-dynamic. It is None after
            initialisation.
        calibration: method of `compressor.quantize.calibration` that sets the int8 activation ranges; ``auto`` tries
            the methods, and SmoothQuant, on validation data until the loss is small.
        factorial: also measure the compressed model in float, and before its tokens are merged, to test whether the
            speed-ups of compression and of the precision multiply; int8 if no precision is set.
        max_precision_loss: largest loss of quality of a precision against fp32, in percent. int8 returns layers to
            float until the loss is that small; ``auto`` rejects a precision that loses more.
        portable_engine: build a TensorRT engine for all GPUs from Ampere on and for later minor versions.
        defer_build: do not build the engine; `compressor build` builds it on the device. Measurements on this machine
            use ONNX Runtime on the CPU.
        device: device of the engine, ``cpu`` or ``cuda``; None takes the target's first choice.
        threads: threads of the engine; None leaves it to the runtime.
        batch: batch size of the latency measurement.
        samples: largest number of samples in total; None takes all.
        cache: trace a causal language model with its KV cache, or stop if the model has none. False (``--no-cache``)
            traces the model without a cache.
        max_memory: memory limit of the process, in bytes: the weights stay on disk and the model runs block by block.
            None loads the whole model.
        max_length: tokens in a window of a language model's texts; None: the model's limit, at most 2,048.
        stride: tokens between the starts of two windows; None: half a window.
        image_size: height and width of the images of an image model: a number, ``HEIGHTxWIDTH``, or ``dynamic`` for
            dynamic axes. None takes the size that the model's preprocessing gives.
        search_samples: calibration samples on which `auto` measures effects on the output.
        rounds: timed bursts per engine.
        example_inputs: inputs of a module: a tensor, a tuple or a dict of tensors.
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
    problem_type: str | None = None
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
    image_size: str | int | None = None
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
            _check_image_size,
        ):
            check(self)

    @property
    def loss_limit(self) -> float:
        """Return the largest loss that ``auto`` accepts on validation data, in percent."""
        if self.max_loss is not None:
            return self.max_loss
        return DEFAULT_LOSS if self.speedup is None and self.latency is None else math.inf

    @property
    def generated(self) -> tuple[int, int] | None:
        """Return the number of prompt tokens and of generated tokens, or None if `generate` is None."""
        if self.generate is None:
            return None
        prompt, _, new = self.generate.partition(":")
        return int(prompt), int(new)

    @property
    def pixels(self) -> ImageSize:
        """Return height and width of `image_size`, ``dynamic``, or None."""
        return parse_image_size(self.image_size)

    @property
    def chosen_actions(self) -> tuple[str, ...]:
        """Return the actions allowed on a site, with the default of `actions` filled in."""
        if self.actions is not None:
            return tuple(action.strip() for action in self.actions.split(","))
        chosen = AUTO_ACTIONS if self.drop == "auto" and self.target != TRANSFORMERS else ("drop",)
        return chosen if self.tokens == "auto" else tuple(action for action in chosen if action != "merge")

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain JSON values, without `example_inputs`."""
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
        ("problem_type", PROBLEM_TYPES),
        ("cost", COSTS),
        ("heal", HEAL_METHODS),
        ("calibration", ("auto", *CALIBRATIONS)),
    )
    for name, choices in named:
        value = getattr(settings, name)
        if value not in choices and not (value is None and name in ("device", "task", "problem_type")):
            raise SettingsError(f"unknown {name} {value!r}; expected {' or '.join(choices)}.")


def _check_precision(settings: Settings) -> None:
    """Check `precision` and `int8` before the short form replaces the precision."""
    for name, choices in (("int8", tuple(SHORT_FORMS)), ("precision", (*PRECISIONS, AUTO))):
        value = getattr(settings, name)
        if value is not None and value not in choices:
            raise SettingsError(f"unknown {name} {value!r}; expected {' or '.join(choices)}.")
    if settings.int8 is not None and settings.precision not in ("fp32", SHORT_FORMS[settings.int8]):
        raise SettingsError(f"found --int8 and --precision {settings.precision}; give one of them.")
    if settings.factorial and settings.precision == AUTO:
        raise SettingsError(
            "--factorial compares compression with one precision; found --precision auto, give one such as int8."
        )


def _check_numbers(settings: Settings) -> None:
    if settings.max_loss is not None and not 0.0 <= settings.max_loss < math.inf:  # perplexity can more than double
        raise SettingsError(f"max-loss is {settings.max_loss:g}; expected a finite percentage of at least 0.")
    if not 0.0 <= settings.max_precision_loss <= 100.0:
        percent = settings.max_precision_loss
        raise SettingsError(f"max-precision-loss is {percent:g}; expected 0 to 100 percent.")
    for name, least, most in (*COUNTS, ("samples", 3, None), ("search_samples", 1, None)):
        value = getattr(settings, name)
        if value is not None and value < least:
            raise SettingsError(f"{name.replace('_', '-')} is {value}; expected at least {least}.")
        if value is not None and most is not None and value > most:
            raise SettingsError(f"{name.replace('_', '-')} is {value}; expected at most {most:,}.")
    for name, floor in (("speedup", 1.0), ("latency", 0.0), ("heal_budget", 0.0)):
        value = getattr(settings, name)
        if value is not None and not (floor < value < math.inf):
            raise SettingsError(f"{name.replace('_', '-')} is {value:g}; expected a finite number above {floor:g}.")


def _check_actions(settings: Settings) -> None:
    """Check `actions`, `tokens`, `generate` and the goals of the search, which depend on `drop` and on each other."""
    for action in settings.chosen_actions:
        if action == "merge" and settings.drop == "auto":
            continue  # the search chooses the number of tokens
        try:
            form_and_rank(action)
        except PassError as error:
            raise SettingsError(f"--actions: {error}") from error
    if settings.tokens not in ("auto", "none"):
        _check_tokens(settings.tokens)
    if settings.drop != "auto":
        if len(settings.chosen_actions) > 1:
            raise SettingsError(
                f"found --actions {settings.actions} with --drop {settings.drop}; several actions need --drop auto, so "
                "give one action."
            )
        for name in ("speedup", "latency"):
            if getattr(settings, name) is not None:
                raise SettingsError(
                    f"--{name} is a goal of the search; found --drop {settings.drop}. Give --drop auto, or leave out "
                    f"--{name}."
                )
    if settings.speedup is not None and settings.latency is not None:
        raise SettingsError("found --speedup and --latency, which both set the goal for speed; give one of them.")
    if settings.latency is not None and settings.cost != "latency":
        raise SettingsError("found --latency with --cost macs, which does not time the target; leave out --cost macs.")
    if settings.generate is not None:
        if not settings.cache:
            raise SettingsError(
                "found --generate and --no-cache, but generation is timed with a KV cache; give one of them."
            )
        _check_generate(settings)
    if settings.latency is not None and settings.defer_build:
        raise SettingsError(
            "found --latency with --defer-build, which does not time the target; give --speedup instead."
        )


def _check_generate(settings: Settings) -> None:
    counts = re.fullmatch(r"(\d+):(\d+)", settings.generate or "")
    if counts is None or int(counts[1]) < 1:
        raise SettingsError(
            f"--generate {settings.generate}: expected PROMPT:NEW, at least one prompt token and the number of "
            "generated tokens, such as 128:128."
        )
    if settings.defer_build and int(counts[2]):
        raise SettingsError(
            f"found --generate {settings.generate} with --defer-build, but the device times the prompt only; give "
            f"--generate {counts[1]}:0, or leave out --generate."
        )


def _check_tokens(text: str) -> None:
    """Check the form of ``tokens``; `merge_schedule` compares its length with the number of attentions of the model."""
    if not re.fullmatch(r"\d+(,\d+)*|\d+%", text) or (text.endswith("%") and not 0 < int(text[:-1]) < 75):
        raise SettingsError(
            f"--tokens {text}: expected auto, none, a number such as 8, one number for each attention such as 8,8,0,8, "
            "or a percentage below 75% such as 50%."
        )


def _check_target(settings: Settings) -> None:
    if settings.target == TRANSFORMERS:
        _check_checkpoint(settings)
        return
    try:
        runtime(settings.target)
    except RuntimesError as error:
        raise SettingsError(f"{error} For a checkpoint, give --target {TRANSFORMERS}.") from error


def _check_checkpoint(settings: Settings) -> None:
    """Refuse changes that a checkpoint cannot express, as far as the settings tell without the model."""
    if set(settings.chosen_actions) != {"drop"}:
        raise SettingsError(
            f"{ONLY_BLOCKS}; found --actions {settings.actions}: leave out --actions, or choose another --target."
        )
    if settings.tokens not in ("auto", "none"):
        raise SettingsError(
            f"{ONLY_BLOCKS}; found --tokens {settings.tokens}: leave out --tokens, or choose another --target."
        )
    counted = re.fullmatch(r"(?:([a-z]+):)?\d+%?", settings.drop.strip())
    if counted is not None and counted[1] != "block":
        raise SettingsError(f"{ONLY_BLOCKS}; found --drop {settings.drop}: {BLOCKS_ADVICE}.")


def _check_drop(settings: Settings) -> None:
    """Check the form of `drop`; names are compared with the sites once the model is loaded."""
    drop = settings.drop
    if drop in ("none", "auto") or drop.endswith(".json"):
        return
    try:
        selection = parse(drop)
    except PassError as error:
        raise SettingsError(str(error)) from error
    invalid = [name for name in selection.names if _NO_SITE.search(name)]
    if invalid:
        raise SettingsError(
            f"--drop {drop}: {invalid[0]!r} is neither a number nor a site name; expected none, auto, a number such as "
            "4, a percentage such as 25%, kind:number such as attention:4, site names separated by commas, or a "
            "plan.json."
        )


def _check_data(settings: Settings) -> None:
    if settings.data is None and settings.model is not None:
        raise SettingsError(
            "no data given; pass --data with a folder or file of samples, or --data random to measure speed only."
        )
    if settings.drop != "auto":
        return
    if str(settings.data) == "random":
        raise SettingsError(
            "a search (--drop auto, or sweep) needs real data; found --data random. Give real data, or --drop with a "
            "number, site names or a plan file."
        )
    if settings.random_weights:
        raise SettingsError(
            "a search (--drop auto, or sweep) needs trained weights; found --random-weights. Leave it out, or give "
            "--drop with a number, site names or a plan file."
        )


def _check_memory(settings: Settings) -> None:
    """Refuse options that need the whole model in memory; with `max_memory` it runs block by block from its files."""
    if settings.max_memory is None:
        return
    unsupported = {
        "--drop auto": settings.drop == "auto",
        "--metric output": settings.metric == "output",
        f"--actions {settings.actions}": settings.chosen_actions != ("drop",),
        f"--heal {settings.heal}": settings.heal != "none",
        f"--tokens {settings.tokens}": settings.tokens not in ("auto", "none"),
        "--factorial": settings.factorial,
        f"--precision {settings.precision}": settings.precision != "fp32",
        f"--generate {settings.generate}": settings.generate is not None,
        "--random-weights": settings.random_weights,
        f"--image-size {settings.image_size}": settings.image_size is not None,
    }
    option = next((name for name, used in unsupported.items() if used), None)
    if option is not None:
        raise SettingsError(
            f"found {option} with --max-memory, which runs the model block by block and only ranks and drops; give "
            "--drop with a number, site names or a plan file, and leave the other options at their defaults."
        )


def _check_image_size(settings: Settings) -> None:
    try:
        dynamic = settings.pixels == DYNAMIC
    except ValueError as error:
        raise SettingsError(f"{error}.") from error
    if dynamic and settings.target in FIXED_SIZE:
        raise SettingsError(
            f"found --image-size dynamic with --target {settings.target}, {FIXED_SIZE[settings.target]}; give "
            "--image-size with numbers, or choose another --target."
        )


def _text(value: object) -> str | None:
    return None if value is None else str(value)
