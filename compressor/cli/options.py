"""Options shared by several commands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from compressor.choices import COSTS, SHORT_FORMS, TASKS
from compressor.cli.param_types import Bytes

Command = TypeVar("Command", bound=Callable[..., Any])

# Copied from runtimes.base.protocols, which imports NumPy: --help must stay fast.
PRECISIONS = ("auto", "fp32", "fp16", "bf16", "int8", "int8-dynamic", "int4")


def _with(command: Command, options: Sequence[Callable[[Command], Command]]) -> Command:
    """Add options to a command, listed in this order by --help."""
    for option in reversed(options):
        command = option(command)
    return command


def no_cache_option(command: Command) -> Command:
    """Add --no-cache, which traces a language model without its KV cache."""
    return click.option(
        "--no-cache",
        "cache",
        is_flag=True,
        flag_value=False,
        default=True,
        help="Language models: do not use a KV cache; each new token then recomputes the whole text.",
    )(command)


def subject_options(command: Command) -> Command:
    """Add the options of the model and the data."""
    return _with(
        command,
        (
            click.argument("model", required=False),
            click.option(
                "--data",
                help="Image folder, .npy/.npz, .txt/.csv, hub dataset id, or random (speed only); required with MODEL.",
            ),
            click.option(
                "--task",
                help=f"Override the config's task: {', '.join(TASKS[:-1])} or {TASKS[-1]}.",
            ),
            click.option(
                "--problem-type",
                help="What a classifier predicts, if its config does not say: single_label_classification, "
                "multi_label_classification or regression.",
            ),
            click.option("--revision", help="Branch, tag or commit on the hub."),
            click.option("--trust-remote-code", is_flag=True, help="Let a hub repository run code of its own."),
            click.option("--random-weights", is_flag=True, help="Build the model with random weights (speed only)."),
            no_cache_option,
            click.option(
                "--samples", type=click.IntRange(min=3), help="Largest number of samples in total.  [default: all]"
            ),
            click.option(
                "--max-length",
                type=click.IntRange(min=2),
                help="Language models: tokens in each window of the texts.  [default: the model's limit, at most 2048]",
            ),
            click.option(
                "--stride",
                type=click.IntRange(min=1),
                help="Language models: tokens between the starts of two windows.  [default: half a window]",
            ),
            click.option(
                "--image-size",
                metavar="SIZE",
                help="Image models: size of the images in pixels, 224 or HEIGHTxWIDTH, or dynamic for any size.  "
                "[default: that of the model's preprocessing]",
            ),
            click.option(
                "--search-samples",
                type=click.IntRange(min=1),
                default=64,
                show_default=True,
                help="Calibration samples used to measure effects on the model's output.",
            ),
            click.option("--seed", default=0, show_default=True, help="Seed of the data split and of --metric random."),
            click.option("--quiet", "-q", is_flag=True, help="Show no progress."),
        ),
    )


def search_options(command: Command) -> Command:
    """Add the options of the search for a plan."""
    return _with(
        command,
        (
            click.option(
                "--actions",
                help="Actions allowed on a branch: drop, constant, scale, low-rank[:RANK], linear, fuse, or the "
                "published tba, replaceme, replaceme-cosine. --drop auto chooses among several, separated by commas; "
                "other forms of --drop take one.",
            ),
            click.option(
                "--tokens",
                default="auto",
                show_default=True,
                help="Tokens to merge in vision transformers and encoders: auto (by search, with --drop auto), none, "
                "a number after every attention (8), one number for each attention (8,8,0,...), or the share merged by "
                "half of the depth (50%).",
            ),
            click.option(
                "--cost",
                type=click.Choice(COSTS),
                default="latency",
                show_default=True,
                help="Cost that --drop auto reduces: latency on the target, or macs, multiply-adds (the same plan on "
                "every machine).",
            ),
        ),
    )


def engine_options(command: Command) -> Command:
    """Add the options of the engine and its timing."""
    return _with(
        command,
        (
            click.option(
                "--target", default="onnxruntime", show_default=True, help="Runtime; `compressor targets` lists them."
            ),
            click.option(
                "--precision",
                type=click.Choice(PRECISIONS),
                default="fp32",
                show_default=True,
                help="Precision of the engine; auto measures all that the target supports and keeps the fastest with a "
                "small loss.",
            ),
            click.option(
                "--int8",
                is_flag=False,
                flag_value="static",
                type=click.Choice(tuple(SHORT_FORMS)),
                help="Short for --precision int8; with the value dynamic, for --precision int8-dynamic.",
            ),
            click.option(
                "--device",
                type=click.Choice(["cpu", "cuda"]),
                help="Device of the engine.  [default: the target's first choice]",
            ),
            click.option(
                "--threads", type=click.IntRange(min=1), help="Threads of the engine.  [default: the runtime's own]"
            ),
            click.option(
                "--batch",
                type=click.IntRange(min=1),
                default=1,
                show_default=True,
                help="Batch size of the latency measurement.",
            ),
            click.option(
                "--generate",
                metavar="PROMPT:NEW",
                help="Language models: measure, and let --drop auto reduce, the time of a prompt of PROMPT tokens and "
                "NEW generated tokens; 512:0 is the prompt alone.  [default: 128:128]",
            ),
            click.option(
                "--rounds",
                type=click.IntRange(min=1),
                default=10,
                show_default=True,
                help="Timed bursts per engine; 2 for a quick look.",
            ),
        ),
    )


def memory_option(command: Command) -> Command:
    """Add --max-memory, for commands that can run a model without loading all of it."""
    return click.option(
        "--max-memory",
        type=Bytes(),
        help="Memory limit, such as 8GiB: a language model of transformers then stays on disk and runs block by block. "
        "An export then needs --drop with a number, a share or names, and --defer-build or --target transformers.  "
        "[default: load the whole model]",
    )(command)
