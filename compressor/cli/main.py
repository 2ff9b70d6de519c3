"""The `compressor` command line: each command parses options into one settings object, makes one call and prints.

Heavy imports are inside the commands, so that `--help` is fast.
"""

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
from compressor.cli.param_types import Duration, Milliseconds, command_line, console, filter_library_logs
from compressor.errors import CompressorError, SettingsError, Terminated

MODEL_HELP = (
    "MODEL is a timm name, a hub id (timm or transformers), a local folder of either kind, a .gguf file (or the "
    "folder that holds it), or package.module:factory for a module of your own.  [default: the embedded sample]"
)


class Failing(click.Group):
    """A group that reports every user error as one sentence on standard error and an exit status."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; exit with status 1 for a failure, 2 for wrong usage, 130 for an interrupt."""
        filter_library_logs()
        try:
            with _exit_on_sigterm():
                return super().invoke(ctx)
        except (click.exceptions.Exit, click.ClickException, click.Abort, BrokenPipeError):
            raise
        except KeyboardInterrupt:
            _fail("interrupted; no output was written. Repeat the command to resume an interrupted search.", 130)
        except MemoryError:
            _fail("out of memory; give fewer --samples, or use a machine with more memory.", 1)
        except OSError as error:
            _fail(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}.", 1)
        except Exception as error:
            _fail(_message(error), 2 if isinstance(error, SettingsError) else 1)


class Export(click.Command):
    """A command whose ``--int8`` takes an optional value, even directly before MODEL."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Replace a bare ``--int8`` by ``--int8=static``, so that it does not consume the next argument."""
        following = [*args, ""][1:]
        bare = [arg == "--int8" and value not in SHORT_FORMS for arg, value in zip(args, following, strict=True)]
        options_end = args.index("--") if "--" in args else len(args)
        completed = [
            "--int8=static" if is_bare and index < options_end else arg
            for index, (arg, is_bare) in enumerate(zip(args, bare, strict=True))
        ]
        return super().parse_args(ctx, completed)


@contextlib.contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """Turn SIGTERM (a container being stopped) into `Terminated`, status 143, so that temporary files are removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _terminate(*_: object) -> NoReturn:
    raise Terminated(128 + signal.SIGTERM)


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
@subject_options
@memory_option
@click.option(
    "--drop",
    default="auto",
    show_default=True,
    help="Branches to remove: none, auto (by search), a number (4), a share (25%), a number of one kind (attention:4, "
    "mlp:2, block:3), site names separated by commas, or a plan.json to replay.",
)
@click.option(
    "--metric",
    type=click.Choice(["cosine", "influence", "angular", "random", "reverse", "output"]),
    default="cosine",
    show_default=True,
    help="Ranking for --drop with a number or a share; output = measured effect on the model's output.",
)
@search_options
@click.option(
    "--max-loss",
    type=float,
    help="Largest loss that --drop auto accepts on validation data, in %: points of a score, or relative rise of "
    "perplexity.  [default: 1; unlimited with --speedup or --latency]",
)
@click.option("--speedup", type=float, help="Speed-up that --drop auto must reach, such as 1.5.")
@click.option("--latency", type=Milliseconds(), help="Latency that --drop auto must reach, such as 5ms.")
@click.option(
    "--heal",
    type=click.Choice(HEAL_METHODS),
    default="none",
    show_default=True,
    help="Adapt the remaining weights, without labels; undone if the loss on validation data does not shrink.",
)
@click.option("--heal-budget", type=Duration(), default="5m", show_default=True, help="Time limit of --heal.")
@engine_options
@click.option(
    "--factorial",
    is_flag=True,
    help="Measure compression and --precision alone and together, to test whether the gains multiply (default: int8).",
)
@click.option(
    "--calibration",
    type=click.Choice((AUTO, *CALIBRATIONS)),
    default="auto",
    show_default=True,
    help="Method that sets the int8 activation ranges; auto tries them, and SmoothQuant, until the loss is small.",
)
@click.option(
    "--max-precision-loss",
    default=0.5,
    show_default=True,
    help="Largest loss of a precision below fp32, in %; int8 returns layers to float until the loss is that small.",
)
@click.option(
    "--defer-build", is_flag=True, help="Do not build the engine; `compressor build` builds it on the device."
)
@click.option(
    "--portable-engine",
    is_flag=True,
    help="TensorRT: build an engine for all GPUs from Ampere on and for later minor versions.",
)
@click.option("--output", "-o", default="compressed", show_default=True, help="Output folder.")
@click.option("--force", is_flag=True, help="Replace an output folder that Compressor wrote.")
def export(quiet: bool, **options: Any) -> None:
    """Compress MODEL and export an engine. The output folder also holds the plan and a report of speed and quality."""
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
@click.option("--max-loss", default=20.0, show_default=True, help="Largest loss of the front on validation data, in %.")
@click.option(
    "--points",
    type=click.IntRange(min=2),
    default=8,
    show_default=True,
    help="Number of plans on the front to build, time and test.",
)
@engine_options
@click.option("--output", "-o", default="front", show_default=True, help="Output folder.")
@click.option("--force", is_flag=True, help="Replace an output folder that Compressor wrote.")
def sweep(quiet: bool, points: int, **options: Any) -> None:
    """Compute the Pareto front of speed and quality for MODEL. One run finds the best plan for every speed-up."""
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
    help="output also measures each site's effect on the model's output.",
)
@click.option(
    "--output", "-o", default="inspected", show_default=True, help="Folder for inspect.json and similarity.png."
)
@click.option(
    "--study",
    is_flag=True,
    help="Also analyse redundancy by depth, position and kind of token, and the stability of the ranking; write "
    "study.json and study.html.",
)
@click.option(
    "--against-data",
    multiple=True,
    help="With --study: other data, or random (tokens or noise), to compare the ranking of branches on; repeatable.",
)
def inspect(quiet: bool, output: str, study: bool, against_data: tuple[str, ...], **options: Any) -> None:
    """Report redundancy and cost of every branch of MODEL."""
    from rich.console import Console

    from compressor.limitations import format_limitations
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
    for line in format_limitations(inspection.limitations):
        out.print(line, highlight=False, markup=False)
    *files, last = map(str, inspection.save(Path(output), command=command_line()))
    out.print(f"Written to {', '.join(files)} and {last}.", highlight=False, markup=False)


@main.command()
def targets() -> None:
    """List the target runtimes and their precisions."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from compressor.target.registry import target_named
    from compressor.target.registry import targets as target_names

    table = Table()
    for heading in ("target", "", "precisions", "description, or how to install it"):
        table.add_column(heading, overflow="fold")
    for name in target_names():
        target = target_named(name)
        reason = target.missing()
        state = "[green]ready[/green]" if reason is None else "[yellow]missing[/yellow]"
        precisions = "\n".join(f"{device}: {', '.join(each)}" for device, each in target.precisions.items())
        description = escape(target.description if reason is None else reason)  # [gpu] is not markup
        table.add_row(name, state, precisions, description)
    Console().print(table)


main.add_command(bench)
