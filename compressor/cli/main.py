"""The command line: parse, one Settings object, one call, print. Heavy imports wait until a command runs."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import click

from compressor import __version__
from compressor.choices import AUTO, CALIBRATIONS, HEAL_METHODS, SHORT_FORMS
from compressor.cli.bench import bench
from compressor.cli.build import build
from compressor.cli.options import engine_options, memory_option, search_options, subject_options
from compressor.cli.param_types import Duration, Milliseconds, command_line, console, drop_messages_about_insides
from compressor.errors import CompressorError, SettingsError

MODEL_HELP = (
    "MODEL is a timm name, a hub id (timm or transformers), a local folder of either kind, a .gguf file (or the "
    "folder that holds it), or package.module:factory for a module of your own; without it the embedded sample is used."
)


class Failing(click.Group):
    """Turns every error that is meant for the user into one sentence and an exit status."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command: status 1 for what could not be done, 2 for usage, 130 for an interrupt."""
        drop_messages_about_insides()
        try:
            with _tidy_termination():
                return super().invoke(ctx)
        except (click.exceptions.Exit, click.ClickException, click.Abort, BrokenPipeError):
            raise
        except KeyboardInterrupt:
            _fail(
                "interrupted; no output was written. A search goes on where it stopped if the command is repeated.", 130
            )
        except MemoryError:
            _fail("the memory is not enough; give fewer --samples, or use a machine with more.", 1)
        except OSError as error:
            _fail(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}.", 1)
        except Exception as error:
            _fail(_sentence(error), 2 if isinstance(error, SettingsError) else 1)


class Export(click.Command):
    """A command whose ``--int8`` takes a value or none, also right before MODEL."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Give a bare ``--int8`` its value, so that it never swallows what comes after it."""
        following = [*args, ""][1:]
        bare = [arg == "--int8" and value not in SHORT_FORMS for arg, value in zip(args, following, strict=True)]
        plain = args.index("--") if "--" in args else len(args)
        filled = [
            "--int8=static" if empty and place < plain else arg
            for place, (arg, empty) in enumerate(zip(args, bare, strict=True))
        ]
        return super().parse_args(ctx, filled)


@contextlib.contextmanager
def _tidy_termination() -> Iterator[None]:
    """Let a SIGTERM (a container being stopped) clean up as an interrupt does, and end with its own status."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _sentence(error: Exception) -> str:
    """The message of an error of ours; anything else is a fault of ours and keeps its traceback."""
    from runtimes.base.protocols import RuntimesError

    # Those of `passes` only where it is loaded: it imports torch, which a device that builds an engine may lack.
    named = (("passes.base", "PassError"), ("passes.graph.graph", "GraphError"))
    loaded = [getattr(sys.modules[module], name) for module, name in named if module in sys.modules]
    if isinstance(error, (CompressorError, RuntimesError, *loaded)):
        text = str(error)
        return text if text.endswith((".", "?", "!", ")")) else f"{text}."
    raise error


def _fail(message: str, status: int) -> NoReturn:
    click.echo(f"Error: {message}", err=True)
    sys.exit(status)


@click.group(cls=Failing, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="compressor")
def main() -> None:
    """Drop what a pretrained transformer does not need, export it, and measure what that gained and cost."""


main.add_command(build)


@main.command(cls=Export, epilog=MODEL_HELP)
@subject_options
@memory_option
@click.option(
    "--drop",
    default="auto",
    show_default=True,
    help="none, auto, 4, 25%, attention:4, mlp:2, block:3, site names separated by commas, or a plan.json to replay.",
)
@click.option(
    "--metric",
    type=click.Choice(["cosine", "influence", "angular", "random", "reverse", "output"]),
    default="cosine",
    show_default=True,
    help="How the counted forms of --drop rank; output = measured effect on the model's output.",
)
@search_options
@click.option(
    "--max-loss",
    type=float,
    help="Most quality --drop auto may lose on validation data, in %: points of a score, or rise of perplexity.  "
    "[default: 1; unlimited with --speedup or --latency]",
)
@click.option("--speedup", type=float, help="How many times faster --drop auto shall make the model, such as 1.5.")
@click.option("--latency", type=Milliseconds(), help="The latency --drop auto shall reach, such as 5ms.")
@click.option(
    "--heal",
    type=click.Choice(HEAL_METHODS),
    default="none",
    show_default=True,
    help="Adapt what is left, without labels; taken back where it does not help on validation data.",
)
@click.option("--heal-budget", type=Duration(), default="5m", show_default=True, help="Most time healing takes.")
@engine_options
@click.option(
    "--factorial",
    is_flag=True,
    help="Measure compression and --precision alone and together: do the gains multiply? int8 if none is named.",
)
@click.option(
    "--calibration",
    type=click.Choice((AUTO, *CALIBRATIONS)),
    default="auto",
    show_default=True,
    help="How int8 finds the ranges of activations; auto tries them, and SmoothQuant, until one loses little.",
)
@click.option(
    "--max-precision-loss",
    default=0.5,
    show_default=True,
    help="Most a precision below fp32 may lose, in %: int8 returns layers to float until it holds.",
)
@click.option("--defer-build", is_flag=True, help="Leave the engine to `compressor build` on the device it runs on.")
@click.option(
    "--portable-engine", is_flag=True, help="TensorRT: an engine for all GPUs from Ampere on and later minor versions."
)
@click.option("--output", "-o", default="compressed", show_default=True, help="Folder to write.")
@click.option("--force", is_flag=True, help="Replace an output folder that Compressor wrote.")
def export(quiet: bool, **options: Any) -> None:
    """Compress MODEL and write an engine, its plan and a report of what was gained and lost."""
    from rich.console import Console

    from compressor.pipeline import export as pipeline
    from compressor.settings import Settings

    report = pipeline.export(Settings(**options), console=console(quiet), command=command_line())
    out = Console()
    out.print(report.table(), highlight=False)
    if report.trials:
        from compressor.quantize.precision import table

        out.print(table(report.trials), highlight=False)
    if report.factorial is not None:
        out.print(report.factorial.table(), highlight=False)
    out.print(f"{report.summary()}\nWritten to {options['output']}.", highlight=False, markup=False, soft_wrap=False)
    if report.missed():
        sys.exit(1)


@main.command(cls=Export, epilog=MODEL_HELP)
@subject_options
@search_options
@click.option(
    "--max-loss", default=20.0, show_default=True, help="Loss on validation data at which the front ends, in %."
)
@click.option(
    "--points", type=click.IntRange(min=2), default=8, show_default=True, help="Plans to build, time and test."
)
@engine_options
@click.option("--output", "-o", default="front", show_default=True, help="Folder to write.")
@click.option("--force", is_flag=True, help="Replace an output folder that Compressor wrote.")
def sweep(quiet: bool, points: int, **options: Any) -> None:
    """Find the best plans of MODEL at every budget, in one run: what speed costs what quality."""
    from rich.console import Console

    from compressor.pipeline import sweep as pipeline
    from compressor.settings import Settings

    front = pipeline.sweep(Settings(**options), points=points, console=console(quiet), command=command_line())
    out = Console()
    out.print(front.table(), highlight=False)
    out.print(f"{front.summary()}\nWritten to {options['output']}.", highlight=False, markup=False, soft_wrap=False)


@main.command(epilog=MODEL_HELP)
@subject_options
@memory_option
@click.option(
    "--metric",
    type=click.Choice(["cosine", "output"]),
    default="cosine",
    show_default=True,
    help="output also measures each site's effect on the output.",
)
@click.option(
    "--output", "-o", default="inspected", show_default=True, help="Folder for inspect.json and similarity.png."
)
@click.option(
    "--study",
    is_flag=True,
    help="Also answer how redundancy runs over depth, positions and kinds of tokens, and how stable the ranking is: "
    "study.json and study.html.",
)
@click.option(
    "--against-data",
    multiple=True,
    help="With --study: further data, or random (tokens, or noise); do they rank the branches alike? Several times.",
)
def inspect(quiet: bool, output: str, study: bool, against_data: tuple[str, ...], **options: Any) -> None:
    """Show every site of MODEL: how redundant it is, and what it costs."""
    from rich.console import Console

    from compressor.limitations import listed
    from compressor.pipeline import inspect as pipeline
    from compressor.settings import Settings
    from compressor.workspace.output_folder import check_writable

    check_writable(Path(output))
    settings = Settings(**options, drop="none", output=output)
    inspection = pipeline.inspect(settings, study=study, against_data=against_data, console=console(quiet))
    out = Console()
    out.print(inspection.table())
    if inspection.study is not None:
        out.print("\n".join(inspection.study.summary()), highlight=False, markup=False)
    for line in listed(inspection.limitations):
        out.print(line, highlight=False, markup=False)
    *files, last = map(str, inspection.save(Path(output), command=command_line()))
    out.print(f"Written to {', '.join(files)} and {last}.", highlight=False, markup=False)


@main.command()
def targets() -> None:
    """List the runtimes: which can be used here, in which precisions, and how to get the others."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from compressor.target.registry import target_named
    from compressor.target.registry import targets as names

    table = Table()
    for heading in ("target", "", "precisions", "what it is, or how to get it"):
        table.add_column(heading, overflow="fold")
    for name in names():
        found = target_named(name)
        reason = found.missing()
        state = "[green]ready[/green]" if reason is None else "[yellow]missing[/yellow]"
        had = "\n".join(f"{device}: {', '.join(precisions)}" for device, precisions in found.precisions.items())
        table.add_row(name, state, had, escape(found.description if reason is None else reason))  # [gpu] is no markup
    Console().print(table)


main.add_command(bench)
