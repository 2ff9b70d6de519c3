"""Tests of build options, target discovery and the shared check of feeds."""

import gc
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest

import runtimes
from runtimes.base.protocols import BuildOptions, Closing, RuntimesError, RuntimeUnavailable, check_feeds, first_line
from runtimes.base.registry import check_available, check_device, is_installed

DTYPES = {"a": np.dtype("float32"), "b": np.dtype("int64")}
SHAPES = {"a": (None, 4), "b": None}


def feeds(**changed):
    return {"a": np.zeros((2, 4), np.float32), "b": np.zeros(3, np.int64)} | changed


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_targets_are_the_modules_and_packages_of_the_folder():
    folder = Path(runtimes.__file__).parent
    modules = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    packages = {path.parent.name for path in folder.glob("*/target.py")}
    assert set(runtimes.targets()) == modules | packages
    assert list(runtimes.targets()) == sorted(runtimes.targets())


def test_unknown_target_lists_all_targets_and_a_suggestion():
    with pytest.raises(RuntimesError, match=r"'onnxruntme'; did you mean onnxruntime\?.*targets are: .*onnxruntime"):
        runtimes.runtime("onnxruntme")


@pytest.mark.parametrize("name", ["base", "qdq", "timing", "", "os", "../x"])
def test_other_names_are_refused(name):
    with pytest.raises(RuntimesError, match="The targets are"):
        runtimes.runtime(name)


def test_listing_targets_imports_no_engine_and_no_torch():
    # Any other module would make `compressor targets` slow, or fail without the extras. pydantic checks JSON.
    allowed = {"numpy", "runtimes", "__mp_main__", "pydantic", "pydantic_core", "annotated_types"}
    allowed |= {"typing_extensions", "typing_inspection"}
    code = (
        "import sys; before = set(sys.modules)\n"
        "import runtimes\n"
        "for name in runtimes.targets(): runtimes.runtime(name).missing()\n"
        "new = {m.split('.')[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names)\n"
        "print(*sorted(m for m in new if not m.startswith('_')))"
    )
    assert set(run_python(code).split()) <= allowed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": "tpu"}, r"Unknown device 'tpu'; expected one of: cpu, cuda\."),
        ({"threads": 0}, r"threads=0; expected at least 1"),
        ({"threads": -2}, r"threads=-2; expected at least 1"),
        ({"batches": (0, 1, 2)}, r"batches=\(0, 1, 2\); expected three sizes of at least 1"),
        ({"lengths": (1, 9, 8)}, r"lengths=\(1, 9, 8\); expected three sizes"),
    ],
)
def test_build_options_refuse_invalid_values(arguments, message):
    with pytest.raises(RuntimesError, match=message):
        BuildOptions(**arguments)


def test_check_device_names_found_and_expected():
    with pytest.raises(RuntimeUnavailable, match=r"Target x runs on cuda; found device 'cpu'\."):
        check_device("x", ("cuda",), BuildOptions())
    assert check_device("x", ("cpu", "cuda"), BuildOptions(device="cuda")) is None


def test_need_names_what_is_missing_before_the_device():
    with pytest.raises(
        RuntimeUnavailable, match=r"^Target x cannot be used here: y is not installed; pip install y\.$"
    ):
        check_available("x", "y is not installed; pip install y", ("cuda",), BuildOptions())
    with pytest.raises(RuntimeUnavailable, match=r"^Target x runs on cuda; found device 'cpu'\.$"):
        check_available("x", None, ("cuda",), BuildOptions())
    assert check_available("x", None, ("cpu",), BuildOptions()) is None


def test_installed_uses_the_distribution_name():
    assert is_installed("numpy")
    assert not is_installed("no-such-distribution")


def test_closed_engine_frees_its_session_and_refuses_use():
    session = np.zeros(1)
    reference = weakref.ref(session)
    closing = Closing(session)
    with closing as entered:
        assert entered is closing
        assert closing._live() is session
    closing.close()
    del session
    gc.collect()
    assert reference() is None
    for use in (closing._live, closing.__enter__):
        with pytest.raises(RuntimesError, match=r"^This engine is closed; load the model again to use it\.$"):
            use()


def test_dynamic_axes_accept_any_size():
    for batch in (0, 1, 7):
        arrays = feeds(a=np.zeros((batch, 4), np.float32))
        checked = check_feeds(arrays, DTYPES, SHAPES)
        assert set(checked) == set(DTYPES)
        assert all(checked[name] is arrays[name] for name in DTYPES)


def test_additional_feeds_are_dropped():
    assert set(check_feeds(feeds(c=np.zeros(1)), DTYPES, SHAPES)) == {"a", "b"}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"a": np.zeros((2, 4), np.float32)}, r"Found inputs a; the engine expects a, b\."),
        ({}, r"Found inputs \(none\); the engine expects a, b\."),
        (feeds(a=np.zeros((2, 4))), r"'a': found dtype float64; expected float32\."),
        (feeds(a=np.zeros((2, 4), ">f4")), r"'a': found dtype >f4; expected float32\."),
        (feeds(a=np.zeros(4, np.float32)), r"'a': found shape \[4\]; expected \[any, 4\]\."),
        (feeds(a=np.zeros((2, 5), np.float32)), r"'a': found shape \[2, 5\]; expected \[any, 4\]\."),
        (feeds(a=[[0.0] * 4]), r"'a': found list; expected a NumPy array\."),
    ],
)
def test_wrong_feeds_are_named_with_found_and_expected(arrays, message):
    with pytest.raises(RuntimesError, match=message):
        check_feeds(arrays, DTYPES, SHAPES)


@pytest.mark.parametrize(
    ("error", "line"),
    [(ValueError("\n  first.\nsecond"), "first"), (KeyError(), "KeyError"), (RuntimeError("one"), "one")],
)
def test_first_line(error, line):
    assert first_line(error) == line
