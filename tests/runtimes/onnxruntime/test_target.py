"""Tests of target onnxruntime: no silent fallback to the CPU, conflicting packages, session options."""

import shutil
from importlib import metadata
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from runtimes.base.protocols import BuildError, BuildOptions, RuntimesError, RuntimeUnavailable
from runtimes.onnxruntime import target

ort = pytest.importorskip("onnxruntime", reason="the extra `cpu` or `gpu` is not installed")


def save(path, node, inputs, outputs, *, kind=TensorProto.FLOAT):
    values = [[helper.make_tensor_value_info(name, kind, shape) for name, shape in part] for part in (inputs, outputs)]
    graph = helper.make_graph([node], "small", *values)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


@pytest.fixture
def relu(tmp_path):
    node = helper.make_node("Relu", ["x"], ["y"])
    return save(tmp_path / "relu.onnx", node, [("x", ["batch", 2])], [("y", ["batch", 2])])


def installed(monkeypatch, *distributions):
    def version(name):
        if name not in distributions:
            raise metadata.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(metadata, "version", version)


def test_the_portable_file_is_the_engine(relu, tmp_path):
    before = sorted(tmp_path.iterdir())
    assert target.build(relu, tmp_path, BuildOptions()) == relu
    assert sorted(tmp_path.iterdir()) == before


def test_missing_package_names_the_command(monkeypatch, relu):
    monkeypatch.setattr(target.util, "find_spec", lambda _: None)
    assert target.missing() == (
        "onnxruntime is not installed; pip install onnxruntime (for CUDA: pip install onnxruntime-gpu)"
    )
    with pytest.raises(RuntimeUnavailable, match="cannot be used here: onnxruntime is not installed; pip install"):
        target.load(relu, BuildOptions())


def test_both_packages_are_refused(monkeypatch, relu):
    installed(monkeypatch, "onnxruntime", "onnxruntime-gpu")
    with pytest.raises(RuntimeUnavailable, match=r"both installed and overwrite each other.*pip uninstall -y"):
        target.load(relu, BuildOptions())


@pytest.mark.parametrize("distribution", ["onnxruntime", "onnxruntime-gpu"])
def test_either_package_alone_is_enough(monkeypatch, distribution):
    installed(monkeypatch, distribution)
    assert target.missing() is None


def test_cuda_is_refused_by_a_build_without_cuda(monkeypatch, relu):
    monkeypatch.setattr(ort, "get_available_providers", lambda: [target.CPU])
    with pytest.raises(
        RuntimeUnavailable, match=r"built without CUDA; .*pip install onnxruntime-gpu, or use --device cpu"
    ):
        target.load(relu, BuildOptions(device="cuda"))


def test_cuda_that_does_not_start_is_refused(monkeypatch, relu):
    # Without a driver, ONNX Runtime lists the provider, logs an error and opens the session on the CPU.
    monkeypatch.setattr(ort, "get_available_providers", lambda: [target.CUDA, target.CPU])
    monkeypatch.setattr(ort, "preload_dlls", lambda: print("noise"), raising=False)
    fallen_back = SimpleNamespace(get_providers=lambda: [target.CPU])
    monkeypatch.setattr(ort, "InferenceSession", lambda *_, **__: fallen_back)
    with pytest.raises(RuntimeUnavailable, match=r"could not start its CUDA provider \(found CPUExecutionProvider\)"):
        target.load(relu, BuildOptions(device="cuda"))


def test_preloading_prints_nothing(monkeypatch, capsys):
    noisy = SimpleNamespace(get_available_providers=lambda: [target.CUDA], preload_dlls=lambda: print("noise"))
    target._need_cuda(noisy)
    assert capsys.readouterr().out == ""


@pytest.mark.gpu
def test_cuda_agrees_with_the_cpu(relu):
    if target.CUDA not in ort.get_available_providers() or shutil.which("nvidia-smi") is None:
        pytest.skip("no NVIDIA driver here, or an ONNX Runtime built without CUDA")
    feeds = {"x": np.array([[-1.0, 2.0]], np.float32)}
    with target.load(relu, BuildOptions(device="cuda")) as engine:
        engine.bind(feeds)()
        np.testing.assert_array_equal(engine.run(feeds)["y"], [[0.0, 2.0]])


@pytest.mark.parametrize(("threads", "spinning"), [(None, True), (2, False)])
def test_session_options(threads, spinning):
    found = target.session_options(BuildOptions(threads=threads, spinning=spinning))
    assert found.intra_op_num_threads == (threads if threads is not None else 0)  # 0: one for each physical core
    assert found.inter_op_num_threads == 1
    assert found.graph_optimization_level == ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    assert found.get_session_config_entry("session.intra_op.allow_spinning") == str(int(spinning))


def test_several_engines_without_spinning(relu):
    feeds = {"x": np.array([[-1.0, 2.0]], np.float32)}
    with target.load(relu, BuildOptions(spinning=False)) as a, target.load(relu, BuildOptions(spinning=False)) as b:
        np.testing.assert_array_equal(a.run(feeds)["y"], b.run(feeds)["y"])


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(BuildError, match=r"There is no ONNX file .*nowhere\.onnx\."):
        target.load(tmp_path / "nowhere.onnx", BuildOptions())


def test_unknown_operator_is_one_line(tmp_path):
    path = save(tmp_path / "odd.onnx", helper.make_node("NoSuchOperator", ["x"], ["y"]), [("x", [1])], [("y", [1])])
    with pytest.raises(BuildError, match=r"cannot open odd\.onnx: .*NoSuchOperator") as caught:
        target.build(path, tmp_path, BuildOptions())
    assert "\n" not in str(caught.value)


def test_a_failing_run_is_one_sentence(tmp_path):
    # The axes that must agree are symbolic, so only the run fails.
    node = helper.make_node("MatMul", ["a", "b"], ["c"])
    path = save(tmp_path / "mul.onnx", node, [("a", ["n", "k"]), ("b", ["l", "m"])], [("c", ["n", "m"])])
    feeds = {"a": np.zeros((2, 3), np.float32), "b": np.zeros((4, 5), np.float32)}
    with target.load(path, BuildOptions()) as engine:
        for use in (lambda: engine.run(feeds), engine.bind(feeds)):
            with pytest.raises(RuntimesError, match=r"ONNX Runtime failed while running: .*\.$") as caught:
                use()
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["float16", "float64", "int32", "uint8", "bool"])
def test_dtypes_are_those_of_numpy(tmp_path, name):
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(name))
    path = save(
        tmp_path / "id.onnx", helper.make_node("Identity", ["x"], ["y"]), [("x", ["n"])], [("y", ["n"])], kind=kind
    )
    with target.load(path, BuildOptions()) as engine:
        assert engine.input_dtypes["x"] == np.dtype(name)
        value = np.ones(3, name)
        np.testing.assert_array_equal(engine.run({"x": value})["y"], value)
        engine.bind({"x": value})()


def test_a_type_that_numpy_cannot_feed_is_named(tmp_path):
    node = helper.make_node("Identity", ["x"], ["y"])
    path = save(tmp_path / "bf.onnx", node, [("x", ["n"])], [("y", ["n"])], kind=TensorProto.BFLOAT16)
    with pytest.raises(BuildError, match=r"'x' has type tensor\(bfloat16\), which cannot be fed from NumPy\."):
        target.load(path, BuildOptions())
