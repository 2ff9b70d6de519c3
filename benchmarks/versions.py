"""Print and record the package versions of an environment: ``python benchmarks/versions.py locked|newest|oldest``.

`make newest` and `make oldest` run it after the test suite passed; results/versions.json holds one entry for each.
"""

from __future__ import annotations

import json
import platform
import sys
import tomllib
from datetime import date
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "versions.json"
NAMES = ("locked", "newest", "oldest")


def direct() -> list[str]:
    """Return the direct dependencies in pyproject.toml, including the extras cpu and dev."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    named = [*project["dependencies"], *extras["cpu"], *extras["dev"]]
    return sorted({requirement.split(">")[0].split("=")[0].split("[")[0].strip() for requirement in named})


def versions() -> dict[str, object]:
    """Return the date, the Python version and the versions of the direct dependencies."""
    packages = {name: metadata.version(name) for name in direct()}
    return {"date": date.today().isoformat(), "python": platform.python_version(), "packages": packages}


def main(name: str) -> None:
    """Print the versions and write them to results/versions.json under `name`."""
    if name not in NAMES:
        raise SystemExit(f"unknown environment {name!r}; expected one of {', '.join(NAMES)}.")
    entry = versions()
    print(json.dumps({name: entry}, indent=2))
    entries = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    RESULTS.write_text(json.dumps(entries | {name: entry}, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
