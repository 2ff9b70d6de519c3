"""The layout of the packages: small folders, a name for each, tests in the same folders."""

import ast

import pytest

from tests.paths import ROOT

PACKAGES = ("compressor", "passes", "runtimes")
FOLDERS = sorted({path.parent for package in PACKAGES for path in (ROOT / package).rglob("*.py")})
MOST_FILES = 12


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: str(folder.relative_to(ROOT)))
def test_folder_is_small_and_says_what_it_contains(folder):
    assert len([path for path in folder.iterdir() if path.is_file()]) <= MOST_FILES
    assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))


@pytest.mark.parametrize("package", PACKAGES)
def test_tests_lie_in_the_folders_of_what_they_test(package):
    folders = {path.parent.relative_to(ROOT / "tests") for path in (ROOT / "tests" / package).rglob("test_*.py")}
    assert folders
    assert [folder for folder in folders if not (ROOT / folder).is_dir()] == []


def test_packages_that_are_no_targets_import_nothing_when_they_are_imported():
    """A device that builds an engine has no torch: importing a sub-package must not bring it in."""
    for folder in FOLDERS:
        if folder.relative_to(ROOT).as_posix() in (
            "compressor",
            "compressor/models",
            "compressor/data/readers",
            "runtimes",
        ):
            continue
        body = ast.parse((folder / "__init__.py").read_text()).body
        assert not [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)], folder
