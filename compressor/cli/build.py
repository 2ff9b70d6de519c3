"""The command `compressor build`. It runs on the device, where torch may be missing, and does not import it."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from compressor.cli.options import field_option, quiet_option
from compressor.cli.param_types import print_table
from compressor.settings import Settings


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@field_option(Settings, "threads", unset="as in the export")
@field_option(Settings, "rounds", default=None, help="Timed bursts per engine.", unset="as in the export")
@field_option(Settings, "portable_engine")
@field_option(Settings, "force", help="Build the engine again if it was built already.")
@quiet_option
def build(
    folder: Path, threads: int | None, rounds: int | None, portable_engine: bool, force: bool, quiet: bool
) -> None:
    """Build the engine of a --defer-build export on this device. FOLDER is the export; its report is completed."""
    from rich.console import Console

    from compressor.deferred import build

    console = None if quiet else Console(stderr=True)
    report = build.build(
        folder, threads=threads, rounds=rounds, portable_engine=portable_engine, force=force, console=console
    )
    out = Console()
    print_table(report.table())
    out.print(f"{report.summary()}\nWritten to {folder}.", highlight=False, markup=False, soft_wrap=False)
    if report.missed():
        sys.exit(1)
