"""The command `compressor bench`."""

from __future__ import annotations

from typing import Any

import click

from compressor.cli.options import no_cache_option
from compressor.cli.param_types import Names, Numbers, command_line, console

WHAT_HELP = (
    "WHAT is any number of folders that `compressor export` wrote (with every cell of a factorial), .onnx files, and "
    "models as for `export`. Models, and folders that hold a checkpoint, are measured in torch."
)


@click.command(epilog=WHAT_HELP)
@click.argument("what", nargs=-1)
@click.option("--data", help="Samples, as for export.  [default: those of the first folder]")
@click.option(
    "--model",
    help="Model whose preprocessing is used; needed for a folder that was exported from a module of one's own.  "
    "[default: that of the first folder, or the first model]",
)
@click.option("--against", help="Baseline of the comparison.  [default: the first engine]")
@click.option("--batch", type=Numbers(), default="1", show_default=True, help="Batch sizes, such as 1,8.")
@click.option("--threads", type=Numbers(), help="Thread counts, such as 1,2.  [default: the runtimes' own]")
@click.option(
    "--context",
    type=Numbers(),
    help="Language models: context lengths in tokens at which generation is timed, such as 128,512.  [default: 128, or "
    "as many as fit]",
)
@click.option("--compile", is_flag=True, help="Also measure torch models with torch.compile.")
@click.option("--target", help="Runtime.  [default: that of the export for folders, onnxruntime for .onnx files]")
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), help="Device of the engines.  [default: the target's first choice]"
)
@click.option("--task", help="Override the task of the models, as for export.")
@click.option("--problem-type", help="What a classifier predicts, as for export.")
@click.option("--revision", help="Branch, tag or commit of a model on the hub.")
@click.option(
    "--trust-remote-code",
    is_flag=True,
    help="Let a hub repository run code of its own, and open a folder's engine that is compiled code (target torch).",
)
@click.option("--random-weights", is_flag=True, help="Build models with random weights (speed only).")
@no_cache_option
@click.option(
    "--samples", type=click.IntRange(min=3), help="Largest number of samples in total; use that of the export."
)
@click.option(
    "--max-length",
    type=click.IntRange(min=2),
    help="Language models: tokens in each window of the texts.  [default: as in the export]",
)
@click.option(
    "--stride",
    type=click.IntRange(min=1),
    help="Language models: tokens between the starts of two windows.  [default: as in the export]",
)
@click.option(
    "--image-size",
    metavar="SIZE",
    help="Image models: size of the images, as for export.  [default: as in the export]",
)
@click.option(
    "--tasks",
    type=Names(),
    default="",
    help="Language models: lm-eval tasks to evaluate, such as arc_easy,wikitext (needs pip install lm-eval).",
)
@click.option("--num-fewshot", type=click.IntRange(min=0), help="Few-shot examples of --tasks.  [default: the task's]")
@click.option("--limit", type=float, help="Questions of each task, or a share below 1.  [default: all]")
@click.option("--include-path", help="Folder with further lm-eval tasks as YAML files.")
@click.option("--rounds", type=click.IntRange(min=1), default=10, show_default=True, help="Timed bursts per engine.")
@click.option("--seed", default=0, show_default=True, help="Seed of the data split; use that of the export.")
@click.option("--output", "-o", default="bench.json", show_default=True, help="Output file.")
@click.option("--quiet", "-q", is_flag=True, help="Show no progress.")
def bench(quiet: bool, what: tuple[str, ...], threads: tuple[int, ...] | None, **options: Any) -> None:
    """Compare exported folders, ONNX files and torch models. One interleaved run measures all of them."""
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
