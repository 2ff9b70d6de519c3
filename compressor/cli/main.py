"""The `compressor` command line: each command parses options into one settings object, makes one call and prints.

Heavy imports are inside the commands, so that `--help` is fast.
"""

from __future__ import annotations

import contextlib
import io
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

import click
from click.core import ParameterSource

from compressor import __version__
from compressor.choices import SHORT_FORMS
from compressor.cli.bench import bench
from compressor.cli.build import build
from compressor.cli.interrupts import exit_on_signals
from compressor.cli.options import argument_help, field_options, quiet_option
from compressor.cli.param_types import command_line, console, filter_library_logs, print_table
from compressor.commands import EXPORT, INSPECT, SUBJECT, SWEEP, InspectSettings, SweepSettings
from compressor.errors import CompressorError, SettingsError, Terminated
from compressor.settings import Settings

REPEAT = "Repeat the command to resume an interrupted search."
MODEL_HELP = argument_help(Settings, "model")


class Failing(click.Group):
    """A group that reports every user error as one sentence on standard error and an exit status."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; exit with status 1 for a failure, 2 for wrong usage, 130 for an interrupt, 143 for SIGTERM."""
        filter_library_logs()
        if isinstance(sys.stdout, io.TextIOWrapper):  # names may be no text in its encoding
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            with exit_on_signals():
                return super().invoke(ctx)
        except (click.exceptions.Exit, click.ClickException, click.Abort, BrokenPipeError):
            raise
        except KeyboardInterrupt:
            _fail(f"interrupted; no output was written. {REPEAT}", 130)
        except Terminated as ended:
            with contextlib.suppress(OSError):  # after SIGHUP, the terminal is gone
                name = signal.Signals(int(str(ended.code)) - 128).name
                click.echo(f"Error: ended by {name}; no output was written. {REPEAT}", err=True)
            raise
        except MemoryError:
            _fail("out of memory; give fewer --samples, or use a machine with more memory.", 1)
        except OSError as error:
            _fail(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}.", 1)
        except Exception as error:
            _fail(_message(error), 2 if isinstance(error, SettingsError) else 1)


class Export(click.Command):
    """A command whose ``--int8`` takes an optional value, even directly before MODEL."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Replace a bare ``--int8`` by ``--int8=static``, so that it does not consume the next argument.

        Raises:
            SettingsError: ``--precision fp32`` is given with an option that sets another precision.
        """
        following = [*args, ""][1:]
        bare = [arg == "--int8" and value not in SHORT_FORMS for arg, value in zip(args, following, strict=True)]
        options_end = args.index("--") if "--" in args else len(args)
        completed = [
            "--int8=static" if is_bare and index < options_end else arg
            for index, (arg, is_bare) in enumerate(zip(args, bare, strict=True))
        ]
        rest = super().parse_args(ctx, completed)
        given = ctx.get_parameter_source("precision") is ParameterSource.COMMANDLINE
        others = [name for name in ("int8", "factorial") if ctx.params.get(name)]
        if given and ctx.params["precision"] == "fp32" and others:
            raise SettingsError(
                f"found --{others[0]} and --precision fp32, which contradict each other; give one of them."
            )
        return rest


def _message(error: Exception) -> str:
    """Return the message of an error of this project as a sentence; raise any other error again, with its traceback."""
    from runtimes.base.protocols import RuntimesError

    # `passes` imports torch, which a device that builds an engine may lack: use its error classes only if it is loaded.
    candidates = (("passes.base", "PassError"), ("passes.graph.graph", "GraphError"))
    loaded = [getattr(sys.modules[module], name) for module, name in candidates if module in sys.modules]
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
    """Remove redundant parts of a pretrained transformer, export it, and measure the speed-up and the quality loss."""


main.add_command(build)


@main.command(cls=Export, epilog=MODEL_HELP)
@field_options(Settings, *SUBJECT)
@quiet_option
@field_options(Settings, *EXPORT)
def export(quiet: bool, **options: Any) -> None:
    """Compress MODEL and export an engine. The output folder also holds the plan and a report of speed and quality."""
    from rich.console import Console

    from compressor.pipeline import export as pipeline

    report = pipeline.export(Settings(**options), console=console(quiet), command=command_line())
    out = Console()
    print_table(report.table())
    if report.trials:
        from compressor.quantize.precision import table

        print_table(table(report.trials))
    if report.factorial is not None:
        print_table(report.factorial.table())
    out.print(f"{report.summary()}\nWritten to {options['output']}.", highlight=False, markup=False, soft_wrap=False)
    if report.missed():
        sys.exit(1)


@main.command(cls=Export, epilog=MODEL_HELP)
@field_options(SweepSettings, *SUBJECT)
@quiet_option
@field_options(SweepSettings, *SWEEP)
def sweep(quiet: bool, **options: Any) -> None:
    """Compute the Pareto front of speed and quality for MODEL. One run finds the best plan for every speed-up."""
    from rich.console import Console

    from compressor.pipeline import sweep as pipeline

    front = pipeline.sweep(SweepSettings(**options), console=console(quiet), command=command_line())
    out = Console()
    print_table(front.table())
    out.print(f"{front.summary()}\nWritten to {options['output']}.", highlight=False, markup=False, soft_wrap=False)


@main.command(epilog=MODEL_HELP)
@field_options(InspectSettings, *SUBJECT)
@quiet_option
@field_options(InspectSettings, *INSPECT)
def inspect(quiet: bool, **options: Any) -> None:
    """Report redundancy and cost of every branch of MODEL."""
    from rich.console import Console

    from compressor.limitations import format_limitations
    from compressor.pipeline import inspect as pipeline
    from compressor.workspace.output_folder import check_outside, check_outside_data, check_writable

    settings = InspectSettings(**options)
    output = Path(settings.output)
    check_writable(output)
    check_outside(output)
    check_outside_data(output, settings.data, *settings.against_data)
    inspection = pipeline.inspect(settings, console=console(quiet))
    out = Console()
    print_table(inspection.table())
    if inspection.study is not None:
        out.print("\n".join(inspection.study.summary()), highlight=False, markup=False)
    for line in format_limitations(inspection.limitations):
        out.print(line, highlight=False, markup=False)
    *files, last = map(str, inspection.save(output, command=command_line()))
    out.print(f"Written to {', '.join(files)} and {last}.", highlight=False, markup=False)


@main.command()
def targets() -> None:
    """List the target runtimes and their precisions."""
    from rich.markup import escape
    from rich.table import Table

    from compressor.target.registry import target_named
    from compressor.target.registry import targets as target_names
    from runtimes.base.ahead_of_time import ahead_of_time

    table = Table()
    for heading in ("target", "", "precisions", "description, or how to install it"):
        table.add_column(heading, overflow="fold")
    for name in target_names():
        target = target_named(name)
        reason, builder = target.missing(), ahead_of_time(target)
        state = "[green]ready[/green]" if reason is None else "[yellow]missing[/yellow]"
        if reason is not None and builder is not None and builder.missing_builder() is None:
            state = "[green]ready to build[/green]"
            reason = f"{target.description}; engines cannot run here: {reason}"
        precisions = "\n".join(f"{device}: {', '.join(each)}" for device, each in target.precisions.items())
        description = escape(target.description if reason is None else reason)  # [gpu] is not markup
        table.add_row(name, state, precisions, description)
    print_table(table)


main.add_command(bench)
