"""The steps of a run: progress bars, and the time and peak memory of each step."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from compressor.workspace.environment import peak_memory, reset_peak_memory
from runtimes.base.freed_memory import return_freed_memory

if TYPE_CHECKING:
    from rich.console import Console

Tick = Callable[..., None]


@dataclass(frozen=True)
class Step:
    """A finished step: its duration in seconds and the peak memory of the process during it, in bytes."""

    name: str
    seconds: float
    peak_memory: int | None


@dataclass
class Steps:
    """A recorder of the steps of a run, with a progress bar for the current step on `console` (None: no output)."""

    console: Console | None = None
    done: list[Step] = field(default_factory=list)
    _tick: Tick | None = None

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[Tick]:
        """Time a step; yield ``tick(done, total, text)`` to update its progress bar. Every argument is optional."""
        start = time.perf_counter()
        return_freed_memory()
        reset_peak_memory()
        with self._bar(name) as tick:
            self._tick = tick
            yield tick
        self._tick = None
        self.done.append(Step(name, time.perf_counter() - start, peak_memory()))
        if self.console is not None:
            from rich.markup import escape

            self.console.print(
                f"[green]✓[/green] {escape(name)} [dim]{self.done[-1].seconds:.1f} s[/dim]", highlight=False
            )

    def show(self, text: str) -> None:
        """Show a text beside the progress bar of the current step, if there is one."""
        if self._tick is not None:
            self._tick(text=text)

    def say(self, message: str) -> None:
        """Show a sentence on the console."""
        if self.console is not None:
            self.console.print(message, highlight=False, markup=False)

    def warn(self, text: str) -> None:
        """Print a sentence that matters before the run ends."""
        if self.console is not None:
            from rich.markup import escape

            self.console.print(f"[yellow]![/yellow] {escape(text)}", highlight=False)

    @contextlib.contextmanager
    def _bar(self, name: str) -> Iterator[Tick]:
        if self.console is None or not self.console.is_terminal:
            yield lambda *_, **__: None
            return
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(24),
            TimeElapsedColumn(),
            TextColumn("{task.fields[text]}", markup=False),
        )
        with Progress(*columns, console=self.console, transient=True) as bars:
            task = bars.add_task(name, total=None, text="")

            def tick(done: float | None = None, total: float | None = None, text: str = "") -> None:
                bars.update(task, completed=done, total=total, text=text)

            yield tick
