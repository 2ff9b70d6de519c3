"""The runtime configuration and the cache of kernels: the order of calls on a fake, as a GPU is needed for the rest.

Engine, context and CUDA are the fake of target tensorrt. `tests/runtimes/tensorrt_rtx/test_bindings.py` holds the names
to the real library.
"""

import enum
import pickle
import sys
import types

import numpy as np
import onnx
import pytest

from runtimes.base.protocols import BuildError, BuildOptions
from runtimes.tensorrt_rtx import target
from runtimes.tensorrt_rtx.runtime_config import cache_path
from tests.runtimes.tensorrt.test_target import Fake, FakeEngine, FakeLogger, FakeRuntime, HostMemory
from tests.runtimes.tensorrt_rtx.test_target import linear

OPTIONS = BuildOptions(device="cuda", batches=(1, 2, 4))
USUAL = {"x": [(1, 16), (2, 16), (4, 16)]}


class Cache:
    """A cache that takes only what a cache of this device wrote."""

    def __init__(self):
        self.content = b""

    def deserialize(self, content):
        if not content.startswith(b"this device"):
            return False
        self.content = content
        return True

    def serialize(self):
        return HostMemory(self.content + b"this device")


class Engine(FakeEngine):
    def create_runtime_config(self):
        config = types.SimpleNamespace(created=[], used=None)
        config.create_runtime_cache = lambda: config.created.append(Cache()) or config.created[-1]
        config.set_runtime_cache = lambda cache: (
            self.fake.ok("set_runtime_cache") and setattr(config, "used", cache) is None
        )
        return config if self.fake.ok("create_runtime_config") else None

    def create_execution_context(self, config):
        assert self.fake.streams  # a CUDA context is current: the cache needs it
        assert config.used is config.created[-1]
        assert config.cuda_graph_strategy.name == "WHOLE_GRAPH_CAPTURE"
        assert config.dynamic_shapes_kernel_specialization_strategy.name == "EAGER"
        self.fake.caches.append(config.used.content)
        return super().create_execution_context()


class Runtime(FakeRuntime):
    def deserialize_cuda_engine(self, plan):
        return Engine(self.fake, self.logger, *pickle.loads(plan))


@pytest.fixture
def fake(monkeypatch):
    """The library and CUDA on a fake, with a GPU."""
    fake = Fake("11.4.0.106")
    fake.caches = []
    fake.trt.Runtime = lambda logger: Runtime(fake, logger)
    fake.trt.CudaGraphStrategy = enum.Enum("CudaGraphStrategy", ["DISABLED", "WHOLE_GRAPH_CAPTURE"])
    strategies = enum.Enum("DynamicShapesKernelSpecializationStrategy", ["LAZY", "EAGER", "NONE"])
    fake.trt.DynamicShapesKernelSpecializationStrategy = strategies
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", fake.trt)
    monkeypatch.setitem(sys.modules, "cuda.bindings", types.SimpleNamespace(runtime=fake.cuda))
    monkeypatch.setattr(target, "missing", lambda: None)
    monkeypatch.setattr(target, "missing_builder", lambda: None)
    monkeypatch.setattr(target, "Log", lambda: types.SimpleNamespace(errors=[], logger=FakeLogger))
    return fake


@pytest.fixture
def engine(fake, tmp_path):
    path = tmp_path / "model.engine"
    path.write_bytes(pickle.dumps((onnx.load(linear(tmp_path / "model.onnx")).SerializeToString(), USUAL)))
    return path


def run(engine):
    x = np.random.default_rng(1).normal(size=(3, 16)).astype(np.float32)
    with target.load(engine, OPTIONS) as opened:
        return opened.run({"x": x})["y"], x


def test_an_engine_runs_with_an_empty_cache_and_without_writing_one(fake, engine):
    y, x = run(engine)
    weight = np.random.default_rng(0).normal(size=(16, 16)).astype(np.float32)
    np.testing.assert_allclose(y, x @ weight, rtol=1e-5, atol=1e-5)
    assert fake.caches == [b""]
    assert not cache_path(engine).exists()
    assert (fake.memory, fake.streams) == ({}, {})


def test_a_build_runs_the_usual_sizes_once_and_writes_the_cache(fake, engine, monkeypatch):
    monkeypatch.setattr(target, "_built", lambda *_: engine)
    assert target.build(engine.with_suffix(".onnx"), engine.parent, OPTIONS) == engine
    assert [feeds["x"].shape for feeds in fake.executed] == [(2, 16)]
    assert cache_path(engine).read_bytes() == b"this device"
    assert (fake.memory, fake.streams) == ({}, {})
    run(engine)
    assert fake.caches == [b"", b"this device"]


def test_a_cache_of_another_device_is_not_used(fake, engine):
    cache_path(engine).write_bytes(b"another device")
    run(engine)
    assert fake.caches == [b""]


@pytest.mark.parametrize("step", ["create_runtime_config", "set_runtime_cache", "create_execution_context"])
def test_each_failure_is_one_sentence_and_frees_everything(fake, engine, step):
    fake.fail[step] = 0
    with pytest.raises(BuildError, match=r"^TensorRT for RTX cannot open model\.engine: it .*\.$"):
        target.load(engine, OPTIONS)
    assert (fake.memory, fake.streams) == ({}, {})
