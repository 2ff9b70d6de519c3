"""Tests that lock files, lower bounds and committed versions agree; they need no package index."""

import json
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tests.older_releases import NEEDS

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
DIRECT = [Requirement(each) for each in (*PROJECT["dependencies"], *EXTRAS["cpu"], *EXTRAS["dev"])]
VERSIONS = json.loads((ROOT / "benchmarks" / "results" / "versions.json").read_text())


def locked(name):
    """Return the lines of a lock file by package: one line for each range of Python and platform."""
    text = re.sub(r"\\\n\s*", "", (ROOT / "requirements" / f"{name}.txt").read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    by_package = {}
    for line in lines:
        by_package.setdefault(Requirement(line.split("--hash")[0]).name, []).append(line)
    return by_package


def pinned(lines):
    return {Version(re.search(r"==([^\s;]+)", line)[1]) for line in lines}


def bounds(requirement):
    """Return operator and version of a requirement with a single specifier."""
    (only,) = requirement.specifier
    return only.operator, Version(only.version)


@pytest.mark.parametrize("name", ["dev", "run", "models", "uv"])
def test_every_locked_package_has_hashes_and_names_no_index(name):
    lines = [line for each in locked(name).values() for line in each]
    assert lines
    assert all("--hash=sha256:" in line for line in lines)
    assert not [line for line in lines if "://" in line or line.startswith("-")]


@pytest.mark.parametrize("requirement", DIRECT, ids=lambda requirement: requirement.name)
def test_locked_versions_satisfy_the_requirements(requirement):
    versions = pinned(locked("dev")[requirement.name.replace("_", "-").lower()])
    assert all(version in requirement.specifier for version in versions)


def test_both_environments_have_the_same_versions():
    development, demo = locked("dev"), locked("run")
    assert demo.keys() < development.keys()
    assert {name: pinned(lines) for name, lines in demo.items()} == {name: pinned(development[name]) for name in demo}


@pytest.mark.parametrize("requirement", DIRECT, ids=lambda requirement: requirement.name)
def test_lower_bounds_are_tested_versions(requirement):
    """A lower bound must equal the oldest version with which the test suite passed."""
    operator, lowest = bounds(requirement)
    tested = Version(VERSIONS["oldest"]["packages"][requirement.name])
    assert operator == ">="
    assert tested.release[: len(lowest.release)] == lowest.release, f"{requirement} was tested with {tested}"


def test_committed_versions_are_locked():
    development = locked("dev")
    for name, version in VERSIONS["locked"]["packages"].items():
        assert Version(version) in pinned(development[name.replace("_", "-").lower()])


@pytest.mark.parametrize("skipped", NEEDS.items(), ids=lambda skipped: " ".join(skipped[0]))
def test_tests_are_skipped_for_releases_that_are_allowed(skipped):
    """A bound that was raised leaves nothing to skip, and a test that was renamed is not skipped any more."""
    (file, part), (package, version, _) = skipped
    (requirement,) = [each for each in DIRECT if each.name == package]
    assert bounds(requirement)[1] < Version(version) <= max(pinned(locked("dev")[package]))
    paths = list(ROOT.glob(f"tests/**/{file}"))
    assert any(part.split("[")[0].rstrip("]") in path.read_text() for path in paths)
