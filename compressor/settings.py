"""Options of an export: fields, checks, and the JSON form that report.json records.

The command line reads the fields for `--help`, so torch and NumPy are imported only by the checks that need them.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from compressor.choices import (
    ACCURACY,
    AUTO,
    AUTO_ACTIONS,
    BUDGETS,
    CALIBRATIONS,
    COSTS,
    DEVICES,
    DYNAMIC,
    GGUF,
    HEAL_METHODS,
    METRICS,
    MOST_ROUNDS,
    MOST_ROWS,
    MOST_THREADS,
    MOST_TOKENS,
    MOST_WORKERS,
    NO_STAGES,
    PRECISIONS,
    PROBLEM_TYPES,
    SHORT_FORMS,
    TASKS,
    TEMPLATE_GAP,
    TRANSFORMERS,
    Calibration,
    ImageSize,
    ImageTokens,
    parse_image_size,
    parse_image_tokens,
)
from compressor.errors import SettingsError
from compressor.options import check_options, documented, option

if TYPE_CHECKING:
    import torch

DEFAULT_LOSS = 1.0
MODULE = "torch.nn.modules.module.Module"  # by name, because torch is not imported here
# Fields that are arguments of Python functions only.
API_ONLY = ("example_inputs",)
ONLY_DROPS = f"--target {TRANSFORMERS} can only drop: whole blocks, or single branches of Llama and Mistral models"
ONLY_BLOCKS = f"--target {TRANSFORMERS} can only remove whole blocks"
BLOCKS_ADVICE = (
    "give --drop block:N, the names of whole blocks or a plan that drops whole blocks, or choose another --target, "
    "such as onnxruntime, which takes any plan"
)
ONLY_ATTENTION = f"--target {GGUF} can only remove whole blocks and the attention of blocks"
ATTENTION_ADVICE = (
    "give --drop attention:N or block:N, their names or a plan that drops them, or choose another --target (every "
    "other but transformers can express it)"
)
# Targets that cannot have dynamic height and width, with the reason.
FIXED_SIZE = {
    "tensorrt": "whose engines bound every dynamic axis",
    "tensorrt_rtx": "whose engines bound every dynamic axis",
    "onnxruntime_rtx": "whose engines bound every dynamic axis",
    "executorch": "whose programs bound every dynamic axis",
}
# Targets whose files can only leave parts of the model out, with the sentence that says so.
ONLY_LEAVE_OUT = {TRANSFORMERS: ONLY_DROPS, GGUF: ONLY_ATTENTION}
# Matches text that is no module path: a leading minus, a colon, a percent sign or a space.
_NO_SITE = re.compile(r"^-|[:%\s]")


@documented
@dataclass(frozen=True)
class Settings:
    """Options of an export; each field corresponds to the command-line option of the same name.

    `int8` and `factorial` set `precision`, and `int8` is None after initialisation. Measurements with `defer_build`
    use ONNX Runtime on the CPU. With `example_inputs`, `model` is a `torch.nn.Module`.
    """

    model: str | Path | torch.nn.Module | None = option(
        None,
        "a timm name, a hub id (timm or transformers), a local folder of either kind, a .gguf file (or the folder that "
        "holds it), or package.module:factory for a module of your own.",
        unset="the embedded sample",
        positional=True,
    )
    data: str | Path | None = option(
        None, "Image folder, .npy/.npz, .txt/.csv, hub dataset id, or random (speed only); required with MODEL."
    )
    drop: str = option(
        "auto",
        "Branches to remove: none, auto (by search), a number (4), a share (25%), a number of one kind (attention:4, "
        "mlp:2, block:3), site names separated by commas, or a plan.json to replay.",
    )
    metric: str = option(
        "cosine",
        "Ranking for --drop with a number or a share; output = measured effect on the model's output.",
        choices=METRICS,
    )
    actions: str | None = option(
        None,
        "Actions allowed on a branch: drop, constant, scale, low-rank[:RANK], linear, fuse, or the published tba, "
        "replaceme, replaceme-cosine. --drop auto chooses among several, separated by commas; other forms of --drop "
        "take one.",
    )
    tokens: str = option(
        "auto",
        "Tokens to merge in vision transformers and encoders: auto (by search, with --drop auto), none, a number after "
        "every attention (8), one number for each attention (8,8,0,...), or the share merged by half of the depth "
        "(50%).",
    )
    image_tokens: str = option(
        NO_STAGES,
        "Vision-language models: image tokens that are kept in the language model's prompt behind some of its blocks, "
        "such as 50%@8,25%@16, ranked by the attention of the last token; norm:50%@8 and random:50%@8 rank otherwise; "
        "auto chooses by --max-loss, with --drop auto by half of it.",
        metavar="SHARE@BLOCK,...",
    )
    max_loss: float | None = option(
        None,
        "Largest loss that --drop auto accepts, decided on samples that the search does not see, in %: points of a "
        "score, or relative rise of perplexity.",
        unset="1; unlimited with --speedup or --latency",
        least=0.0,  # without an upper bound: perplexity can more than double
        unit="percent",
    )
    budget: str = option(
        ACCURACY,
        "What --max-loss bounds: accuracy, with or without labels (without, it is expected from the original's "
        "probabilities); agreement, the share of other predictions than the original's; divergence from the original's "
        "output, in hundredths of a nat.",
        choices=BUDGETS,
    )
    confidence: float | None = option(
        None,
        "Confidence with which the loss on new samples is at most --max-loss, such as 90%.",
        unset="none: the loss to expect of new samples is at most --max-loss",
        least=50.0,
        most=99.99,
        unit="percent",
        metavar="PERCENT",
    )
    speedup: float | None = option(None, "Speed-up that --drop auto must reach, such as 1.5.", above=1.0)
    latency: float | None = option(
        None, "Latency that --drop auto must reach, such as 5ms.", above=0.0, unit="milliseconds"
    )
    generate: str | None = option(
        None,
        "Language models: measure, and let --drop auto reduce, the time of a prompt of PROMPT tokens and NEW generated "
        "tokens; 512:0 is the prompt alone.",
        unset="128:128",
        metavar="PROMPT:NEW",
    )
    cost: str = option(
        "latency",
        "Cost that --drop auto reduces: latency on the target, or macs, multiply-adds (the same plan on every "
        "machine).",
        choices=COSTS,
    )
    prices: str | Path | None = option(
        None,
        "Folder of an earlier export or sweep whose timings replace those of the search, so that the plan does not "
        "depend on the noise of timing.",
        unset="time the target",
        metavar="FOLDER",
    )
    heal: str = option(
        "none",
        "Adapt the remaining weights, without labels; undone if the loss on validation data does not shrink.",
        choices=HEAL_METHODS,
    )
    heal_budget: float = option(300.0, "Time limit of --heal.", above=0.0, unit="seconds")
    target: str = option("onnxruntime", "Runtime; `compressor targets` lists them.")
    precision: str = option(
        "fp32",
        "Precision of the engine; auto measures all that the target supports and keeps the fastest with a small loss.",
        choices=(AUTO, *PRECISIONS),
    )
    int8: str | None = option(
        None,
        "Short for --precision int8; with the value dynamic or weight-only, for int8-dynamic or int8-weight-only.",
        choices=tuple(SHORT_FORMS),
        bare="static",
    )
    calibration: Calibration | Literal["auto"] = option(
        "auto",
        "Method that sets the int8 activation ranges; auto tries them, and SmoothQuant, until the loss is small.",
        choices=(AUTO, *CALIBRATIONS),
    )
    factorial: bool = option(
        False,
        "Measure compression and --precision alone and together, to test whether the gains multiply (default: int8).",
    )
    max_precision_loss: float = option(
        0.5,
        "Largest loss of a precision below fp32, in %; int8 and fp8 return layers to float to meet it.",
        least=0.0,
        most=100.0,
        unit="percent",
    )
    defer_build: bool = option(False, "Do not build the engine; `compressor build` builds it on the device.")
    gpu: str | None = option(
        None,
        "GPUs to build engines for ahead of time, such as sm86,sm89 (compute capabilities), or sm86+sm89 for one "
        "engine of both; --target tensorrt_rtx.",
        unset="the present GPU; without one, all that the installed release builds for",
        metavar="SM,...",
    )
    portable_engine: bool = option(
        False, "TensorRT: build an engine for all GPUs from Ampere on and for later minor versions."
    )
    output: str | Path = option("compressed", "Output folder.", letter="o")
    force: bool = option(False, "Replace an output folder that Compressor wrote.")
    task: str | None = option(
        None,
        f"Override the config's task: {', '.join(TASKS[:-1])} or {TASKS[-1]}.",
        choices=TASKS,
        metavar="TEXT",
    )
    class_names: str | Path | None = option(
        None,
        "Models of images and texts (CLIP): file with a class name a line, or FOLDER, a tab and NAME.",
        unset="the names of the class folders",
        metavar="FILE",
    )
    prompt_template: str | None = option(
        None,
        "Models of images and texts (CLIP): prompt of a class, with {} for its name.",
        unset="'a photo of a {}.', for SigLIP 'This is a photo of {}.'",
        metavar="TEXT",
    )
    problem_type: str | None = option(
        None,
        "What a classifier predicts, if its config does not say: "
        f"{', '.join(PROBLEM_TYPES[:-1])} or {PROBLEM_TYPES[-1]}.",
        choices=PROBLEM_TYPES,
        metavar="TEXT",
    )
    revision: str | None = option(None, "Branch, tag or commit on the hub.")
    trust_remote_code: bool = option(False, "Let a hub repository run code of its own.")
    random_weights: bool = option(False, "Build the model with random weights (speed only).")
    cache: bool = option(True, "Language models: do not use a KV cache; each new token then recomputes the whole text.")
    merge_decoder: bool = option(
        False,
        "Encoder-decoders: also write decoder_model_merged.onnx, which is both files of the decoder in one, with the "
        "weights once. transformers.js opens it.",
    )
    device: str | None = option(None, "Device of the engine.", unset="the target's first choice", choices=DEVICES)
    threads: int | None = option(None, "Threads of the engine.", unset="the runtime's own", least=1, most=MOST_THREADS)
    batch: int = option(1, "Batch size of the latency measurement.", least=1, most=MOST_ROWS)
    samples: int | None = option(None, "Largest number of samples in total.", unset="all", least=3)
    max_memory: int | None = option(
        None,
        "Memory limit, such as 8GiB, of this process and of each worker: a language model of transformers stays on "
        "disk and runs block by block. An export then needs --drop with a number, a share or names, and --defer-build "
        "or --target transformers.",
        unset="load the whole model",
        unit="bytes",
    )
    max_length: int | None = option(
        None,
        "Language models: tokens in each window of the texts.",
        unset="the model's limit, at most 2048",
        least=2,
        most=MOST_TOKENS,
    )
    stride: int | None = option(
        None,
        "Language models: tokens between the starts of two windows.",
        unset="half a window",
        least=1,
        most=MOST_TOKENS,
    )
    image_size: str | int | None = option(
        None,
        "Image models: size of the images in pixels, 224 or HEIGHTxWIDTH, or dynamic for any size.",
        unset="that of the model's preprocessing",
        metavar="SIZE",
    )
    sequence_length: int | None = option(
        None,
        "Models of texts, or of sound: export for this number of tokens, or of samples or frames, alone; shorter texts "
        "and clips are padded to it, longer ones are cut. For models that can only be traced for one length.",
        unset="any length",
        least=1,
        most=MOST_TOKENS,
    )
    workers: int | None = option(
        None,
        "Processes of Ray that run the model and its engines over the data, of one core each; the results are those of "
        "one process. All timing stays in this process.",
        unset="this process; with --ray, the cores of the cluster",
        least=1,
        most=MOST_WORKERS,
    )
    ray: str | None = option(
        None,
        "Cluster of Ray whose workers run them over the data: HOST:PORT, as `ray start --head` prints it, or auto "
        "for the one that this machine belongs to.",
        metavar="ADDRESS",
    )
    search_samples: int = option(64, "Calibration samples used to measure effects on the model's output.", least=1)
    rounds: int = option(10, "Timed bursts per engine; 2 for a quick look.", least=1, most=MOST_ROUNDS)
    seed: int = option(0, "Seed of the data split and of --metric random.")
    example_inputs: Any = option(None, "Inputs of a module: a tensor, a tuple or a dict of tensors.")

    def __post_init__(self) -> None:
        _check_in_memory(self)
        check_options(self)
        _check_precision(self)
        if self.precision == "fp32" and (self.int8 is not None or self.factorial):
            object.__setattr__(self, "precision", SHORT_FORMS[self.int8 or "static"])
        object.__setattr__(self, "int8", None)
        for check in (
            _check_texts,
            _check_target,
            _check_drop,
            _check_actions,
            _check_goals,
            _check_data,
            _check_memory,
            _check_image_size,
            _check_image_tokens,
            _check_sequence_length,
        ):
            check(self)

    @property
    def loss_limit(self) -> float:
        """Return the largest loss that ``auto`` accepts, in percent."""
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
    def image_stages(self) -> ImageTokens | None:
        """Return the method and the stages of `image_tokens`, or None."""
        return parse_image_tokens(self.image_tokens)

    @property
    def chosen_actions(self) -> tuple[str, ...]:
        """Return the actions allowed on a site, with the default of `actions` filled in."""
        if self.actions is not None:
            return tuple(action.strip() for action in self.actions.split(","))
        chosen = AUTO_ACTIONS if self.drop == "auto" and self.target not in ONLY_LEAVE_OUT else ("drop",)
        return chosen if self.tokens == "auto" else tuple(action for action in chosen if action != "merge")

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain JSON values, without `example_inputs`."""
        plain = {key: getattr(self, key) for key in self.__dataclass_fields__ if key not in API_ONLY}
        named = self.model is None or isinstance(self.model, str | Path)
        plain["model"] = text(self.model) if named else type(self.model).__name__
        return plain | {
            "data": text(self.data),
            "prices": text(self.prices),
            "class_names": text(self.class_names),
            "output": str(self.output),
        }


def _check_in_memory(settings: Settings) -> None:
    """Refuse data in memory, and a model that is neither a name nor a module."""
    if not isinstance(settings.data, str | os.PathLike | None):
        raise SettingsError(
            f"data is of the type {type(settings.data).__name__}; expected a path, the name of a hub dataset, or "
            "random, so save the samples (images in a folder, texts in a .txt or .csv file, arrays with numpy.savez "
            "under the names of the inputs) and pass the path."
        )
    named, kind = isinstance(settings.model, str | os.PathLike | None), type(settings.model)
    if not named and not any(f"{each.__module__}.{each.__name__}" == MODULE for each in kind.__mro__):
        raise SettingsError(
            f"model is of the type {kind.__name__}; expected a name, a path, or a torch.nn.Module with example_inputs."
        )


def _check_precision(settings: Settings) -> None:
    """Check `precision`, `int8` and `factorial`, before the short form replaces the precision."""
    if settings.int8 is not None and settings.precision not in ("fp32", SHORT_FORMS[settings.int8]):
        raise SettingsError(f"found --int8 and --precision {settings.precision}; give one of them.")
    if settings.factorial and settings.precision == AUTO:
        raise SettingsError(
            "--factorial compares compression with one precision; found --precision auto, give one such as int8."
        )


def _check_texts(settings: Settings) -> None:
    for name in ("model", "data", "output", "drop", "prices", "ray", "class_names"):
        value = getattr(settings, name)
        if isinstance(value, str) and not value.strip():
            raise SettingsError(f"{name} is empty; give a value, or leave the option out for its default.")
    if settings.prompt_template is not None and settings.prompt_template.count(TEMPLATE_GAP) != 1:
        raise SettingsError(
            f"--prompt-template {settings.prompt_template!r}: expected a text with one {TEMPLATE_GAP}, which stands "
            "for the name of a class."
        )


def _check_actions(settings: Settings) -> None:
    """Check `actions` and `tokens`, whose forms depend on `drop`."""
    from passes.base import PassError
    from passes.plan.plan import form_and_rank

    for action in settings.chosen_actions:
        if action == "merge" and settings.drop == "auto":
            continue  # the search chooses the number of tokens
        try:
            form_and_rank(action)
        except PassError as error:
            raise SettingsError(f"--actions: {error}") from error
    if settings.tokens not in ("auto", "none"):
        _check_tokens(settings.tokens)
    if settings.drop != "auto" and len(settings.chosen_actions) > 1:
        raise SettingsError(
            f"found --actions {settings.actions} with --drop {settings.drop}; several actions need --drop auto, so "
            "give one action."
        )


def _check_goals(settings: Settings) -> None:
    """Check the goals of the search and `generate`, the workload whose time is the latency."""
    if settings.drop != "auto":
        for name in ("speedup", "latency"):
            if getattr(settings, name) is not None:
                raise SettingsError(
                    f"--{name} is a goal of the search; found --drop {settings.drop}. Give --drop auto, or leave out "
                    f"--{name}."
                )
    if settings.confidence is not None and (settings.drop != "auto" or math.isinf(settings.loss_limit)):
        raise SettingsError(
            "found --confidence without a limit that the search could keep; give --drop auto and --max-loss, or leave "
            "out --confidence."
        )
    if settings.speedup is not None and settings.latency is not None:
        raise SettingsError("found --speedup and --latency, which both set the goal for speed; give one of them.")
    if settings.prices is not None and settings.cost != "latency":
        raise SettingsError("found --prices with --cost macs, which needs no timings; leave out one of them.")
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
    from runtimes.base.protocols import RuntimesError
    from runtimes.base.registry import runtime

    if settings.target in ONLY_LEAVE_OUT:
        _check_only_drops(settings)
    if settings.target == TRANSFORMERS:
        return
    try:
        runtime(settings.target)
    except RuntimesError as error:
        raise SettingsError(f"{error} For a checkpoint, give --target {TRANSFORMERS}.") from error


def _check_only_drops(settings: Settings) -> None:
    """Refuse changes that the file of a target cannot express, as far as the settings tell without the model."""
    limit = ONLY_LEAVE_OUT[settings.target]
    if set(settings.chosen_actions) != {"drop"}:
        raise SettingsError(
            f"{limit}; found --actions {settings.actions}: leave out --actions, or choose another --target."
        )
    if settings.tokens not in ("auto", "none"):
        raise SettingsError(
            f"{limit}; found --tokens {settings.tokens}: leave out --tokens, or choose another --target."
        )
    counted = re.fullmatch(r"(?:([a-z]+):)?\d+%?", settings.drop.strip())
    if settings.target == GGUF and counted is not None and counted[1] not in ("block", "attention"):
        raise SettingsError(f"{limit}; found --drop {settings.drop}: {ATTENTION_ADVICE}.")


def _check_drop(settings: Settings) -> None:
    """Check the form of `drop`; names are compared with the sites once the model is loaded."""
    from passes.base import PassError
    from passes.plan.selection import parse

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
        f"--image-tokens {settings.image_tokens}": settings.image_tokens != NO_STAGES,
        "--factorial": settings.factorial,
        f"--precision {settings.precision}": settings.precision != "fp32",
        f"--generate {settings.generate}": settings.generate is not None,
        "--random-weights": settings.random_weights,
        f"--image-size {settings.image_size}": settings.image_size is not None,
        f"--sequence-length {settings.sequence_length}": settings.sequence_length is not None,
    }
    option = next((name for name, used in unsupported.items() if used), None)
    if option is not None:
        raise SettingsError(
            f"found {option} with --max-memory, which runs the model block by block and only ranks and drops; give "
            "--drop with a number, site names or a plan file, and leave the other options at their defaults."
        )


def _check_image_tokens(settings: Settings) -> None:
    try:
        parse_image_tokens(settings.image_tokens)
    except ValueError as error:
        raise SettingsError(f"{error}.") from error


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


def _check_sequence_length(settings: Settings) -> None:
    """Refuse a fixed length for targets whose files take any, and beside another length of windows."""
    if settings.sequence_length is None:
        return
    if settings.target in ONLY_LEAVE_OUT:
        raise SettingsError(
            f"found --sequence-length with --target {settings.target}, whose files take texts of any length; leave "
            "--sequence-length out, or choose another --target."
        )
    if settings.max_length is not None:
        raise SettingsError(
            f"found --max-length {settings.max_length} with --sequence-length {settings.sequence_length}, which is "
            "also the length of the windows; leave --max-length out."
        )


def text(value: object) -> str | None:
    """Return a path or a name as text, and None as None."""
    return None if value is None else str(value)
