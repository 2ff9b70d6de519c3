"""The command `bench`: parse, one settings object, one call, print."""

from __future__ import annotations

from typing import Any

import click

from compressor.cli.options import no_cache_option
from compressor.cli.param_types import Names, Numbers, command_line, console

WHAT_HELP = (
    "WHAT is any number of folders that `compressor export` wrote (each cell of a factorial is measured), .onnx files, "
    "and models as for `export`, which are measured in torch, as checkpoints are that it wrote."
)


@click.command(epilog=WHAT_HELP)
@click.argument("what", nargs=-1)
@click.option("--data", help="Samples, as for export.  [default: those of the first folder]")
@click.option("--model", help="Whose preprocessing holds.  [default: the first folder's, or the first model's]")
@click.option("--against", help="What the others are compared with.  [default: the first]")
@click.option("--batch", type=Numbers(), default="1", show_default=True, help="Batch sizes, such as 1,8.")
@click.option("--threads", type=Numbers(), help="Numbers of threads, such as 1,2.  [default: the runtimes' own]")
@click.option(
    "--context",
    type=Numbers(),
    help="Tokens that language models generate after, such as 128,512.  [default: 128, or as many as fit]",
)
@click.option("--compile", is_flag=True, help="Measure torch models through torch.compile too.")
@click.option("--target", help="Runtime.  [default: the one a folder was exported for; onnxruntime for files]")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Where engines run.  [default: as targets prefer]")
@click.option("--task", help="Override the models' task, as for export.")
@click.option("--revision", help="Branch, tag or commit of a model on the hub.")
@click.option("--trust-remote-code", is_flag=True, help="Let a hub repository run code of its own.")
@click.option("--random-weights", is_flag=True, help="Build models without their weights (speed only).")
@no_cache_option
@click.option("--samples", type=click.IntRange(min=3), help="Most samples to use in total; as many as when exporting.")
@click.option(
    "--max-length",
    type=click.IntRange(min=2),
    help="Tokens of a window of a language model's texts.  [default: as when exporting]",
)
@click.option("--stride", type=click.IntRange(min=1), help="Tokens from one window to the next.  [default: likewise]")
@click.option(
    "--tasks",
    type=Names(),
    default="",
    help="Tasks of lm-eval (pip install lm-eval) that every language model is asked, such as arc_easy,wikitext.",
)
@click.option("--num-fewshot", type=click.IntRange(min=0), help="Examples before each question.  [default: the task's]")
@click.option("--limit", type=float, help="Questions of each task, or a share of them below 1.  [default: all]")
@click.option("--include-path", help="Folder with tasks of your own, as YAML files of lm-eval.")
@click.option(
    "--rounds", type=click.IntRange(min=1), default=10, show_default=True, help="Timed bursts of each engine."
)
@click.option("--seed", default=0, show_default=True, help="Seed of the data split; the same as when exporting.")
@click.option("--output", "-o", default="bench.json", show_default=True, help="File to write.")
@click.option("--quiet", "-q", is_flag=True, help="Show no progress.")
def bench(quiet: bool, what: tuple[str, ...], threads: tuple[int, ...] | None, **options: Any) -> None:
    """Measure exported folders, ONNX files and torch models again, side by side in one interleaved run."""
    from rich.console import Console

    from compressor.benchmark.bench import BenchSettings
    from compressor.benchmark.bench import bench as measure

    settings = BenchSettings(what=what, threads=threads or (), **options)
    comparison = measure(settings, console=console(quiet), command=command_line())
    out = Console()
    for table in comparison.tables():
        out.print(table, highlight=False)
    out.print(
        f"{comparison.summary()}\nWritten to {options['output']}.", highlight=False, markup=False, soft_wrap=False
    )
