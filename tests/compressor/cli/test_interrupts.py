"""A signal ends a command, also where Python ignores the exception that it raises."""

import signal
import subprocess
import sys

import pytest

PROGRAM = """
import signal, sys, time
import click
from compressor.cli.main import Failing

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background makes its children ignore it

class Closing:
    def __del__(self):
        signal.raise_signal(int(sys.argv[1]))  # the exception is raised here, where Python ignores it

@click.group(cls=Failing)
def main(): ...

@main.command()
def work():
    Closing()
    for _ in range(200):
        time.sleep(0.02)
    print("went on to its end")

main(["work"])
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_in_a_destructor_ends_the_command(number: signal.Signals, status: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(int(number))], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stdout) == (status, "")
    assert "Traceback" not in done.stderr
    assert ("interrupted; no output was written" in done.stderr) == (number == signal.SIGINT)
    assert (f"ended by {number.name}; no output was written" in done.stderr) == (number != signal.SIGINT)


def test_a_signal_that_is_ignored_stays_so() -> None:
    """`nohup` has SIGHUP ignored, so that a run outlives its terminal."""
    program = PROGRAM.replace("class Closing", "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n\nclass Closing")
    done = subprocess.run(
        [sys.executable, "-c", program.replace("range(200)", "range(2)"), str(int(signal.SIGHUP))],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "went on to its end\n")


def test_another_ignored_exception_is_still_printed() -> None:
    program = PROGRAM.replace("signal.raise_signal(int(sys.argv[1]))", "raise ValueError('broken')")
    done = subprocess.run(
        [sys.executable, "-c", program.replace("range(200)", "range(2)"), "2"],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "went on to its end\n")
    assert "ValueError: broken" in done.stderr
