"""Target onnxruntime_rtx with ONNX Runtime's CPU provider in place of NVIDIA's, which needs a driver to register."""

import sys
import types

import numpy as np
import pytest

from runtimes import onnxruntime_rtx as target
from runtimes.base.protocols import BuildError, BuildOptions, RuntimeUnavailable
from tests.onnx_files import MLP_WEIGHTS, K, mlp, node, normal, save

ort = pytest.importorskip("onnxruntime")
OPTIONS = BuildOptions(device="cuda", batches=(1, 2, 4), lengths=(1, 8, 16))


@pytest.fixture
def device(monkeypatch):
    """Make the CPU the device of the provider."""
    monkeypatch.setattr(target, "missing", lambda: None)
    monkeypatch.setattr(target, "PROVIDER", "CPUExecutionProvider")
    monkeypatch.setattr(target, "_devices", lambda: tuple(ort.get_ep_devices()))
    # The provider of the CPU has no options.
    monkeypatch.setattr(target, "_profile", lambda source, options: {})


def test_a_model_is_compiled_to_a_file_that_runs(device, tmp_path):
    path, x = mlp(tmp_path / "model.onnx"), normal(3, 5, K)
    engine = target.build(path, tmp_path, OPTIONS)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["model.onnx", "model.rtx.onnx"]
    assert engine.name == "model.rtx.onnx"
    path.unlink()  # the compiled file is all that is needed
    with target.load(engine, OPTIONS) as opened:
        found = opened.run({"x": x})["y"]
        opened.bind({"x": x})()
    hidden = np.maximum(x @ MLP_WEIGHTS["w1"] + MLP_WEIGHTS["b1"], 0)
    np.testing.assert_allclose(found, hidden @ MLP_WEIGHTS["w2"] + MLP_WEIGHTS["b2"], rtol=1e-4, atol=1e-3)


def test_nodes_left_to_another_provider_are_an_error(device, monkeypatch, tmp_path):
    engine = target.build(mlp(tmp_path / "model.onnx"), tmp_path, OPTIONS)
    monkeypatch.setattr(target, "PROVIDER", "NvTensorRTRTXExecutionProvider")
    with pytest.raises(BuildError, match=r"left .*MatMul.* of model\.rtx\.onnx to CPUExecutionProvider\.$"):
        target.load(engine, OPTIONS)


def test_an_operator_that_onnxruntime_lacks_leaves_nothing(device, tmp_path):
    path = save(tmp_path / "model.onnx", [node("Relu", ["x"], "y")], {}, ["y"])
    path.write_bytes(path.read_bytes().replace(b"Relu", b"Rulu"))
    with pytest.raises(BuildError, match=r"^ONNX Runtime cannot compile model\.onnx for RTX: .*\.$"):
        target.build(path, tmp_path, OPTIONS)
    assert list(tmp_path.iterdir()) == [path]


def test_the_profile_states_the_range_of_every_dynamic_input(tmp_path):
    profile = target._profile(mlp(tmp_path / "model.onnx"), OPTIONS)
    sizes = {"min": (1, 1), "opt": (2, 8), "max": (4, 16)}
    assert profile == {f"nv_profile_{key}_shapes": f"x:{batch}x{rows}x{K}" for key, (batch, rows) in sizes.items()}


def test_a_library_that_cannot_be_registered_is_named(monkeypatch, tmp_path):
    library = types.SimpleNamespace(get_library_path=lambda: str(tmp_path / "none.so"))
    monkeypatch.setitem(sys.modules, target.MODULE, library)
    target._devices.cache_clear()
    with pytest.raises(RuntimeUnavailable, match=r"^NVIDIA's execution provider cannot be registered: .*none\.so.*\.$"):
        target._devices()


def test_without_the_package_or_a_gpu_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(target.onnxruntime, "missing", lambda: None)
    monkeypatch.setattr(target, "cuda_devices", lambda: 0)
    monkeypatch.setattr(target.util, "find_spec", lambda name: None)
    assert target.missing() == f"NVIDIA's execution provider is not installed; pip install {target.PACKAGE}"
    monkeypatch.setattr(target.util, "find_spec", lambda name: object())
    assert "there is no NVIDIA GPU" in target.missing()
