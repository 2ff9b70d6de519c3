"""Print and keep the versions of an environment: ``python benchmarks/versions.py locked|newest|oldest``.

`make newest` and `make oldest` call it once the suite has passed there; results/versions.json holds one entry for each.
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
    """The packages that pyproject.toml names itself, with the extras cpu and dev."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    named = [*project["dependencies"], *extras["cpu"], *extras["dev"]]
    return sorted({requirement.split(">")[0].split("=")[0].split("[")[0].strip() for requirement in named})


def versions() -> dict[str, object]:
    """The date, Python's version, and those of the packages that are named directly."""
    packages = {name: metadata.version(name) for name in direct()}
    return {"date": date.today().isoformat(), "python": platform.python_version(), "packages": packages}


def main(name: str) -> None:
    """Print the versions and put them into the results under a name."""
    if name not in NAMES:
        raise SystemExit(f"unknown environment {name!r}; expected one of {', '.join(NAMES)}.")
    found = versions()
    print(json.dumps({name: found}, indent=2))
    kept = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    RESULTS.write_text(json.dumps(kept | {name: found}, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
