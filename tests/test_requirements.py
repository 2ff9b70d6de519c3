"""The lock, the lower bounds and the committed versions agree; nothing here asks an index."""

import json
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
DIRECT = [Requirement(each) for each in (*PROJECT["dependencies"], *EXTRAS["cpu"], *EXTRAS["dev"])]
VERSIONS = json.loads((ROOT / "benchmarks" / "results" / "versions.json").read_text())


def locked(name):
    """The lines of a lock by their package: one for each range of Python and platform."""
    text = re.sub(r"\\\n\s*", "", (ROOT / "requirements" / f"{name}.txt").read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    found = {}
    for line in lines:
        found.setdefault(Requirement(line.split("--hash")[0]).name, []).append(line)
    return found


def pinned(lines):
    return {Version(re.search(r"==([^\s;]+)", line)[1]) for line in lines}


def bounds(requirement):
    """The lower bound of a requirement, and whether that is all it says."""
    (only,) = requirement.specifier
    return only.operator, Version(only.version)


@pytest.mark.parametrize("name", ["dev", "run", "models", "uv"])
def test_every_locked_package_has_hashes_and_names_no_index(name):
    lines = [line for each in locked(name).values() for line in each]
    assert lines
    assert all("--hash=sha256:" in line for line in lines)
    assert not [line for line in lines if "://" in line or line.startswith("-")]


@pytest.mark.parametrize("requirement", DIRECT, ids=lambda requirement: requirement.name)
def test_the_lock_holds_what_the_project_asks_for(requirement):
    versions = pinned(locked("dev")[requirement.name.replace("_", "-").lower()])
    assert all(version in requirement.specifier for version in versions)


def test_both_environments_are_locked_alike():
    development, demo = locked("dev"), locked("run")
    assert demo.keys() < development.keys()
    assert {name: pinned(lines) for name, lines in demo.items()} == {name: pinned(development[name]) for name in demo}


@pytest.mark.parametrize("requirement", DIRECT, ids=lambda requirement: requirement.name)
def test_lower_bounds_are_what_the_suite_passed_with(requirement):
    """A bound below that was never tried; one above it is not the lowest that works."""
    operator, least = bounds(requirement)
    tried = Version(VERSIONS["oldest"]["packages"][requirement.name])
    assert operator == ">="
    assert tried.release[: len(least.release)] == least.release, f"{requirement} was tried with {tried}"


def test_the_committed_versions_are_of_the_lock():
    development = locked("dev")
    for name, version in VERSIONS["locked"]["packages"].items():
        assert Version(version) in pinned(development[name.replace("_", "-").lower()])
