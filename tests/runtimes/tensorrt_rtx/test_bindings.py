"""The type stubs of TensorRT for RTX against the library: mypy holds the code to the stubs, this the stubs to it."""

import ast

import pytest

from tests.paths import ROOT

trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")

STUBS = ROOT / "typings" / "tensorrt-rtx-1.7" / "tensorrt_rtx" / "__init__.pyi"
# Methods that Python classes override, and protocols that pybind11 provides without a name.
UNNAMED = {
    "Dims.__iter__",
    "IHostMemory.__buffer__",
    "IOutputAllocator.notify_shape",
    "IOutputAllocator.reallocate_output",
    "IOutputAllocator.reallocate_output_async",
}


def members(body, within):
    """Yield the qualified name of every class, function and attribute of a stub."""
    for node in body:
        name = getattr(node, "name", None) or getattr(getattr(node, "target", None), "id", None)
        if name is None:
            continue
        yield f"{within}{name}"
        if isinstance(node, ast.ClassDef):
            yield from members(node.body, f"{within}{name}.")


def found(name):
    value = trt
    for part in name.split("."):
        if not hasattr(value, part):
            return False
        value = getattr(value, part)
    return True


@pytest.mark.skipif(not trt.__version__.startswith("1.7."), reason="the stubs are those of 1.7")
def test_everything_in_the_stubs_is_in_the_library():
    names = set(members(ast.parse(STUBS.read_text()).body, ""))
    assert {"IRuntimeConfig.cuda_graph_strategy", "ILogger.Severity.ERROR", "ComputeCapability.SM89"} <= names
    assert {name for name in names if not found(name)} == UNNAMED


@pytest.mark.parametrize("kind", ["ComputeCapability", "BuilderFlag", "DataType", "CudaGraphStrategy"])
def test_enumerations_of_the_stubs_are_complete(kind):
    names = set(members(ast.parse(STUBS.read_text()).body, ""))
    assert {f"{kind}.{member}" for member in getattr(trt, kind).__members__} <= names
