"""The command `compressor bench`."""

from __future__ import annotations

from typing import Any

import click

from compressor.benchmark.bench_settings import BenchSettings
from compressor.cli.options import argument_help, field_options, quiet_option
from compressor.cli.param_types import command_line, console, print_table
from compressor.options import fields_of


@click.command(epilog=argument_help(BenchSettings, "what"))
@field_options(BenchSettings, *fields_of(BenchSettings))
@quiet_option
def bench(quiet: bool, **options: Any) -> None:
    """Compare exported folders, ONNX files and torch models. One interleaved run measures all of them."""
    from rich.console import Console

    from compressor.benchmark.bench import bench as measure

    comparison = measure(BenchSettings(**options), console=console(quiet), command=command_line())
    out = Console()
    for table in comparison.tables():
        print_table(table)
    out.print(
        f"{comparison.summary()}\nWritten to {options['output']}.", highlight=False, markup=False, soft_wrap=False
    )
