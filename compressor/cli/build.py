"""The command `compressor build`. It runs on the device, where torch may be missing, and does not import it."""

from __future__ import annotations

import sys
from pathlib import Path

import click


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--threads", type=click.IntRange(min=1), help="Threads of the engine.  [default: as in the export]")
@click.option("--rounds", type=click.IntRange(min=1), help="Timed bursts per engine.  [default: as in the export]")
@click.option(
    "--portable-engine",
    is_flag=True,
    help="TensorRT: build an engine for all GPUs from Ampere on and for later minor versions.",
)
@click.option("--force", is_flag=True, help="Build the engine again if it was built already.")
@click.option("--quiet", "-q", is_flag=True, help="Show no progress.")
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
    out.print(report.table(), highlight=False)
    out.print(f"{report.summary()}\nWritten to {folder}.", highlight=False, markup=False, soft_wrap=False)
    if report.missed():
        sys.exit(1)
