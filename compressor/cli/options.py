"""Options that several commands of the command line share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from compressor.choices import COSTS, SHORT_FORMS
from compressor.cli.param_types import Bytes

Command = TypeVar("Command", bound=Callable[..., Any])

# Those of runtimes.base.protocols, which imports NumPy: --help must stay fast.
PRECISIONS = ("auto", "fp32", "fp16", "bf16", "int8", "int8-dynamic", "int4")


def _with(command: Command, options: Sequence[Callable[[Command], Command]]) -> Command:
    """A command with options, shown in this order."""
    for option in reversed(options):
        command = option(command)
    return command


def no_cache_option(command: Command) -> Command:
    """The option of a language model that is traced without its KV cache."""
    return click.option(
        "--no-cache",
        "cache",
        is_flag=True,
        flag_value=False,
        default=True,
        help="Language models: go on without a KV cache, so that each new token computes the whole text again.",
    )(command)


def subject_options(command: Command) -> Command:
    """Options that name the model and the data."""
    return _with(
        command,
        (
            click.argument("model", required=False),
            click.option(
                "--data",
                help="Image folder, .npy/.npz, .txt/.csv, hub dataset id, or 'random' (speed only); needed with MODEL.",
            ),
            click.option(
                "--task",
                help="Override the config's task: image-classification, image-feature-extraction, text-classification, "
                "feature-extraction, sentence-similarity or text-generation.",
            ),
            click.option("--revision", help="Branch, tag or commit on the hub."),
            click.option("--trust-remote-code", is_flag=True, help="Let a hub repository run code of its own."),
            click.option(
                "--random-weights", is_flag=True, help="Build the architecture without its weights (speed only)."
            ),
            no_cache_option,
            click.option("--samples", type=click.IntRange(min=3), help="Most samples to use in total.  [default: all]"),
            click.option(
                "--max-length",
                type=click.IntRange(min=2),
                help="Tokens of a window of a language model's texts.  [default: what it takes, at most 2048]",
            ),
            click.option("--stride", type=click.IntRange(min=1), help="Tokens from window to window.  [default: half]"),
            click.option(
                "--search-samples",
                type=click.IntRange(min=1),
                default=64,
                show_default=True,
                help="Calibration samples on which effects on the output are measured.",
            ),
            click.option("--seed", default=0, show_default=True, help="Seed of the data split and of --metric random."),
            click.option("--quiet", "-q", is_flag=True, help="Show no progress."),
        ),
    )


def search_options(command: Command) -> Command:
    """Options of the search for a plan."""
    return _with(
        command,
        (
            click.option(
                "--actions",
                help="What may be done to a site: drop, constant, scale, low-rank[:RANK], linear, fuse, or the "
                "published tba, replaceme, replaceme-cosine. auto chooses among several, with commas; other forms of "
                "--drop take one.",
            ),
            click.option(
                "--tokens",
                default="auto",
                show_default=True,
                help="Tokens merged in vision transformers and encoders: auto (the search decides, with --drop auto), "
                "none, 8 behind every attention, 8,8,0,... or 50% by half-way.",
            ),
            click.option(
                "--cost",
                type=click.Choice(COSTS),
                default="latency",
                show_default=True,
                help="What auto saves: time on the target, or multiply-adds (the same plan on every machine).",
            ),
        ),
    )


def engine_options(command: Command) -> Command:
    """Options of the engine and its timing."""
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
                help="What the engine computes in; auto measures all that the target has and keeps the fastest that "
                "loses little.",
            ),
            click.option(
                "--int8",
                is_flag=False,
                flag_value="static",
                type=click.Choice(tuple(SHORT_FORMS)),
                help="Short for --precision int8, or int8-dynamic with the value dynamic.",
            ),
            click.option(
                "--device",
                type=click.Choice(["cpu", "cuda"]),
                help="Where the engine runs.  [default: as the target prefers]",
            ),
            click.option(
                "--threads", type=click.IntRange(min=1), help="Threads of the engine.  [default: the runtime's]"
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
                help="Language models: latency, and what auto saves, is the time of a prompt of so many tokens and so "
                "many new ones; 512:0 is the prompt alone.  [default: 128:128]",
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
    """The option of the commands that can do without the whole model in memory."""
    return click.option(
        "--max-memory",
        type=Bytes(),
        help="Memory to stay under, such as 8GiB: a language model of transformers then stays on disk and is run block "
        "by block. Export: a counted or named --drop, with --defer-build or --target transformers.  [default: load it "
        "whole]",
    )(command)
