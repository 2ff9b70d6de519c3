"""Tests of target tensorrt against a fake: call order, and a one-sentence error without a leak for each failure.

The fake keeps device memory in host memory, runs queued work only when its stream is synchronized, computes with ONNX
Runtime and checks arguments as the documentation of TensorRT states. It has the enum values of 10.x and 11.x. It does
not test the real parser, kernels or numerical results.
"""

import ctypes
import enum
import json
import pickle
import re
import sys
import types
from dataclasses import replace
from functools import partial
from importlib import machinery

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

import runtimes
from compressor.errors import CompressorError
from compressor.measure import engine_builder
from compressor.measure import latency as engine_timing
from compressor.pipeline import export as pipeline
from compressor.quantize.convert import convert
from compressor.quantize.half_precision import HalfError, to_fp16
from compressor.quantize.int8_search import quantize
from compressor.settings import Settings
from runtimes.base.protocols import BuildError, BuildOptions, LayerCounts, RuntimesError, RuntimeUnavailable
from runtimes.tensorrt import qdq_rules as qdq
from runtimes.tensorrt import target
from tests.processors import exact_int8

OPTIONS = BuildOptions(device="cuda", batches=(1, 2, 4), lengths=(2, 8, 16))
ENUMS = {
    "10.16.1.11": {
        "NetworkDefinitionCreationFlag": {"EXPLICIT_BATCH": 0, "STRONGLY_TYPED": 1},
        "TF32": 7,
        "VERSION_COMPATIBLE": 13,
    },
    "11.4.0.106": {"NetworkDefinitionCreationFlag": {"STRONGLY_TYPED": 0}, "TF32": 4, "VERSION_COMPATIBLE": 12},
}
NUMPY = {"FLOAT": np.float32, "INT64": np.int64}
ONNX_TYPES = {"tensor(float)": "FLOAT", "tensor(int64)": "INT64"}


class HostMemory(bytes):
    pass


class Fake:
    """Fake `tensorrt` and `cuda.bindings.runtime`; `fail` maps a step to the number of its calls that still succeed."""

    def __init__(self, version):
        self.version = version
        self.calls = []
        self.fail = {}
        self.memory = {}
        self.streams = {}
        self.executed = []
        self.timings = []
        self.profiles = []
        self.flags = None
        self.types = dict(ONNX_TYPES)
        self.location = "DEVICE"
        self.trt = self._tensorrt()
        self.cuda = self._cuda()

    def ok(self, step):
        self.calls.append(step)
        if step not in self.fail:
            return True
        self.fail[step] -= 1
        return self.fail[step] >= 0

    def _cuda(self):
        module = types.ModuleType("cuda.bindings.runtime")
        module.cudaError_t = enum.IntEnum("cudaError_t", {"cudaSuccess": 0, "cudaErrorMemoryAllocation": 2})
        module.cudaMemcpyKind = enum.IntEnum(
            "cudaMemcpyKind", {"cudaMemcpyHostToDevice": 1, "cudaMemcpyDeviceToHost": 2}
        )
        for function in (self.malloc, self.free, self.copy, self.create, self.destroy, self.wait):
            setattr(module, function.__doc__, self._coded(function))
        module.cudaGetErrorString = lambda code: (module.cudaError_t.cudaSuccess, b"out of memory")
        return module

    def _coded(self, function):
        def call(*arguments):
            errors = self.cuda.cudaError_t
            if not self.ok(function.__doc__):
                return (errors.cudaErrorMemoryAllocation, None)
            result = function(*arguments)
            return (errors.cudaSuccess,) if result is None else (errors.cudaSuccess, result)

        return call

    def malloc(self, size):
        "cudaMalloc"
        assert size > 0
        room = np.zeros(size + 512, np.uint8)
        address = (room.ctypes.data + 255) // 256 * 256 + ("misaligned" in self.fail)
        self.memory[address] = room
        return address

    def free(self, address):
        "cudaFree"
        del self.memory[address]

    def create(self):
        "cudaStreamCreate"
        stream = 1000 + len(self.streams)
        self.streams[stream] = []
        return stream

    def destroy(self, stream):
        "cudaStreamDestroy"
        del self.streams[stream]

    def copy(self, to, source, size, kind, stream):
        "cudaMemcpyAsync"
        device = to if kind == self.cuda.cudaMemcpyKind.cudaMemcpyHostToDevice else source
        assert device in self.memory
        self.streams[stream].append(lambda: ctypes.memmove(to, source, size))

    def wait(self, stream):
        "cudaStreamSynchronize"
        for work in self.streams[stream]:
            work()
        self.streams[stream].clear()

    def array(self, address, shape, dtype):
        """Return the array at an address."""
        assert address in self.memory
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return np.frombuffer((ctypes.c_char * size).from_address(address), dtype).reshape(shape)

    def _tensorrt(self):
        fake, module = self, types.ModuleType("tensorrt")
        module.__version__ = self.version
        module.__spec__ = machinery.ModuleSpec("tensorrt", None)  # torch looks for it
        members = ENUMS[self.version]
        module.NetworkDefinitionCreationFlag = enum.IntEnum("Flag", members["NetworkDefinitionCreationFlag"])
        module.BuilderFlag = enum.IntEnum("BuilderFlag", {key: members[key] for key in ("TF32", "VERSION_COMPATIBLE")})
        levels = ["NONE", "AMPERE_PLUS", "SAME_COMPUTE_CAPABILITY"]
        module.HardwareCompatibilityLevel = enum.Enum("HardwareCompatibilityLevel", levels)
        module.ProfilingVerbosity = enum.Enum("ProfilingVerbosity", ["LAYER_NAMES_ONLY", "DETAILED"])
        module.TensorIOMode = enum.Enum("TensorIOMode", ["NONE", "INPUT", "OUTPUT"])
        module.TensorLocation = enum.Enum("TensorLocation", ["DEVICE", "HOST"])
        module.LayerInformationFormat = enum.Enum("LayerInformationFormat", ["ONELINE", "JSON"])
        module.DataType = enum.Enum("DataType", ["FLOAT", "INT64", "BF16"])
        module.ILogger = FakeLogger
        for kind in (FakeBuilder, FakeParser, FakeRuntime):
            setattr(module, kind.__name__.replace("Fake", ""), lambda *arguments, kind=kind: kind(fake, *arguments))
        module.OnnxParser = module.Parser
        module.nptype = self.nptype
        return module

    def nptype(self, kind):
        if kind.name not in NUMPY:
            raise TypeError("Could not resolve TensorRT datatype to an equivalent numpy datatype.")
        return NUMPY[kind.name]


class FakeLogger:
    Severity = enum.Enum("Severity", ["INTERNAL_ERROR", "ERROR", "WARNING"])

    def __init__(self):
        self.ready = True

    def error(self, text):
        assert self.ready
        self.log(self.Severity.WARNING, "a warning that nobody needs")
        self.log(self.Severity.ERROR, text)


class FakeBuilder:
    def __init__(self, fake, logger):
        if not fake.ok("Builder"):
            raise TypeError("pybind11::init(): factory function returned nullptr")
        self.fake, self.logger = fake, logger

    def create_network(self, flags):
        self.fake.flags = flags
        return types.SimpleNamespace(model=None) if self.fake.ok("create_network") else None

    def create_builder_config(self):
        return FakeConfig(self.fake) if self.fake.ok("create_builder_config") else None

    def create_optimization_profile(self):
        return FakeProfile(self.fake) if self.fake.ok("create_optimization_profile") else None

    def build_serialized_network(self, network, config):
        free = [tensor for tensor in network.inputs if -1 in tensor.shape]
        if not self.fake.ok("build_serialized_network") or (free and not config.profiles):
            self.logger.error("Error Code 4: no implementation for node block.3\nmore")
            return None
        shapes = config.profiles[0].shapes if config.profiles else {}
        assert config.verbosity is self.fake.trt.ProfilingVerbosity.DETAILED
        assert config.cache is not None
        portable = config.set == [self.fake.trt.BuilderFlag.VERSION_COMPATIBLE]
        level = config.hardware_compatibility_level
        assert level is (self.fake.trt.HardwareCompatibilityLevel.AMPERE_PLUS if portable else None)
        plan = pickle.dumps((network.model.SerializeToString(), shapes))
        return HostMemory((b"PLAN+CODE" if portable else b"PLAN") + plan)


class FakeConfig:
    def __init__(self, fake):
        self.fake, self.profiles, self.cleared, self.cache, self.verbosity = fake, [], [], None, None

        self.set, self.hardware_compatibility_level = [], None

    def set_flag(self, flag):
        self.set.append(flag)

    @property
    def profiling_verbosity(self):
        return self.verbosity

    @profiling_verbosity.setter
    def profiling_verbosity(self, value):
        self.verbosity = value

    def clear_flag(self, flag):
        assert flag is self.fake.trt.BuilderFlag.TF32
        self.fake.calls.append("clear_flag")

    def add_optimization_profile(self, profile):
        self.profiles.append(profile)
        self.fake.profiles.append(profile.shapes)
        return 0 if self.fake.ok("add_optimization_profile") else -1

    def create_timing_cache(self, old):
        if old == b"damaged":
            raise RuntimeError("bad cache")
        self.fake.timings.append(bytes(old))
        return types.SimpleNamespace(serialize=lambda: HostMemory(old + b"+")) if self.fake.ok("create_cache") else None

    def set_timing_cache(self, cache, ignore_mismatch):
        assert ignore_mismatch is False
        if cache is None:
            raise TypeError("incompatible function arguments")
        self.cache = cache
        return self.fake.ok("set_timing_cache")

    def get_timing_cache(self):
        return self.cache


class FakeProfile:
    def __init__(self, fake):
        self.fake, self.shapes = fake, {}

    def set_shape(self, name, least, usual, most):
        self.fake.calls.append("set_shape")
        assert all(-1 not in shape for shape in (least, usual, most))
        self.shapes[name] = (least, usual, most)


class FakeParser:
    def __init__(self, fake, network, logger):
        assert fake.ok("OnnxParser")
        self.fake, self.network = fake, network

    def parse_from_file(self, path):
        assert isinstance(path, str)
        self.network.model = onnx.load(path)
        self.network.inputs = [self._tensor(value) for value in self.network.model.graph.input]
        self.network.num_inputs = len(self.network.inputs)
        self.network.get_input = self.network.inputs.__getitem__
        return self.fake.ok("parse_from_file")

    def _tensor(self, value):
        shape = tuple(axis.dim_value if axis.HasField("dim_value") else -1 for axis in value.type.tensor_type.shape.dim)
        return types.SimpleNamespace(name=value.name, shape=shape, is_shape_tensor="is_shape_tensor" in self.fake.fail)

    num_errors = 2

    def get_error(self, place):
        return types.SimpleNamespace(
            code=lambda: types.SimpleNamespace(name="INVALID_NODE"),
            node_name=lambda: f"node_{place}",
            node_operator=lambda: "Einsum",
            desc=lambda: "Assertion\n failed",
        )


class FakeRuntime:
    def __init__(self, fake, logger):
        assert fake.ok("Runtime")
        self.fake, self.logger, self.engine_host_code_allowed = fake, logger, False

    def deserialize_cuda_engine(self, plan):
        if plan.startswith(b"PLAN+CODE") and self.engine_host_code_allowed:
            plan = plan.replace(b"+CODE", b"", 1)
        if not self.fake.ok("deserialize_cuda_engine") or plan[:5] != b"PLAN\x80":  # pickle's first byte
            self.logger.error("Serialization (Serialization assertion failed)")
            return None
        return FakeEngine(self.fake, self.logger, *pickle.loads(plan[4:]))


class FakeEngine:
    def __init__(self, fake, logger, model, shapes):
        self.fake, self.logger, self.shapes = fake, logger, shapes
        self.session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.tensors = self.inputs | {value.name: value for value in self.session.get_outputs()}
        self.num_io_tensors = len(self.tensors)

    def get_tensor_name(self, place):
        return list(self.tensors)[place]

    def get_tensor_mode(self, name):
        return self.fake.trt.TensorIOMode["INPUT" if name in self.inputs else "OUTPUT"]

    def get_tensor_dtype(self, name):
        return self.fake.trt.DataType[self.fake.types[self.tensors[name].type]]

    def get_tensor_location(self, name):
        return self.fake.trt.TensorLocation[self.fake.location]

    def get_tensor_shape(self, name):
        return [size if isinstance(size, int) else -1 for size in self.tensors[name].shape]

    def get_tensor_profile_shape(self, name, profile):
        assert profile == 0
        return list(self.shapes.get(name, [self.get_tensor_shape(name)] * 3))

    def create_engine_inspector(self):
        return FakeInspector(self) if self.fake.ok("create_engine_inspector") else None

    def create_execution_context(self):
        return FakeContext(self) if self.fake.ok("create_execution_context") else None


class FakeInspector:
    """A fake inspector, which reports types only if all input shapes of its context are set."""

    def __init__(self, engine):
        self.engine, self.execution_context = engine, None

    def get_engine_information(self, form):
        assert form is self.engine.fake.trt.LayerInformationFormat.JSON
        if not self.engine.fake.ok("get_engine_information"):
            return "{}"
        context = self.execution_context
        shapes_set = context is not None and set(context.shapes) == set(self.engine.inputs)
        text = "Row major linear FP32" if shapes_set else "N/A due to dynamic shapes"
        key = "Format/Datatype" if self.engine.fake.version.startswith("10") else "DataType"
        layer = {"Name": "h_myl0_0", "LayerType": "gemm", "Inputs": [{"Name": "x", key: text}], "Outputs": []}
        return json.dumps({"Layers": [layer]})


class FakeContext:
    def __init__(self, engine):
        self.engine, self.fake, self.shapes, self.addresses = engine, engine.fake, {}, {}

    def set_input_shape(self, name, shape):
        least, _, most = self.engine.get_tensor_profile_shape(name, 0)
        inside = all(low <= size <= high for low, size, high in zip(least, shape, most, strict=True))
        if not self.fake.ok("set_input_shape") or not inside:
            return False
        self.shapes[name] = shape
        return True

    def infer_shapes(self):
        unset = [name for name in self.engine.inputs if name not in self.shapes]
        return unset if self.fake.ok("infer_shapes") else ["mask"]

    def get_tensor_shape(self, name):
        if not self.fake.ok("get_tensor_shape"):
            return [-1, 4]
        zeros = {
            key: np.zeros(shape, self.fake.nptype(self.engine.get_tensor_dtype(key)))
            for key, shape in self.shapes.items()
        }
        return list(self.engine.session.run([name], zeros)[0].shape)

    def set_tensor_address(self, name, address):
        assert address % 256 == 0
        assert isinstance(address, int)
        self.addresses[name] = address
        return self.fake.ok("set_tensor_address")

    def execute_async_v3(self, stream):
        if not self.fake.ok("execute_async_v3") or set(self.addresses) != set(self.engine.tensors):
            self.engine.logger.error("enqueueV3: an address is not set")
            return False
        shapes, addresses = dict(self.shapes), dict(self.addresses)
        self.fake.streams[stream].append(lambda: self._compute(shapes, addresses))
        return True

    def _compute(self, shapes, addresses):
        def dtype(key):
            return self.fake.nptype(self.engine.get_tensor_dtype(key))

        feeds = {key: self.fake.array(addresses[key], shape, dtype(key)).copy() for key, shape in shapes.items()}
        self.fake.executed.append(feeds)
        names = [value.name for value in self.engine.session.get_outputs()]
        for name, value in zip(names, self.engine.session.run(names, feeds), strict=True):
            self.fake.array(addresses[name], value.shape, dtype(name))[...] = value


# ------------------------------------------------------------------------------------------------------------- models


def save(path, nodes, inputs, outputs, weights):
    tensors = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "small", inputs, outputs, tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def value(name, shape, kind=TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, kind, shape)


def save_vision(path, batch="batch"):
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Relu", ["h"], ["y"])]
    weights = {"w": np.arange(32, dtype=np.float32).reshape(8, 4) - 9}
    return save(path, nodes, [value("x", [batch, 8])], [value("y", [batch, 4]), value("h", [batch, 4])], weights)


def save_text(path):
    nodes = [helper.make_node("Mul", ["ids", "mask"], ["y"])]
    inputs = [value(name, ["batch", "length"], TensorProto.INT64) for name in ("ids", "mask")]
    return save(path, nodes, inputs, [value("y", ["batch", "length"], TensorProto.INT64)], {})


def pixels(batch, seed=0):
    return {"x": np.random.default_rng(seed).integers(-5, 5, (batch, 8)).astype(np.float32)}


def expected(feeds):
    # Products of small integers are exact in float32 in any order.
    hidden = feeds["x"] @ (np.arange(32, dtype=np.float32).reshape(8, 4) - 9)
    return {"y": np.maximum(hidden, 0), "h": hidden}


@pytest.fixture(params=list(ENUMS))
def fake(request, monkeypatch):
    fake = Fake(request.param)
    monkeypatch.setattr(target, "missing", lambda: None)
    monkeypatch.setitem(sys.modules, "tensorrt", fake.trt)
    monkeypatch.setitem(sys.modules, "cuda", types.ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", types.SimpleNamespace(runtime=fake.cuda))
    return fake


@pytest.fixture
def built(fake, tmp_path):
    path = target.build(save_vision(tmp_path / "model.onnx"), tmp_path, OPTIONS)
    fake.calls.clear()
    return path


def check_sentence(error, *words):
    text = str(error.value)
    assert all(word in text for word in words), text
    assert "\n" not in text
    assert text.endswith(".")


# ----------------------------------------------------------------------------------------------------- what is missing


@pytest.mark.parametrize(
    ("package", "bindings", "found", "word"),
    [
        (None, False, None, "tensorrt is not installed"),
        ("there", False, None, "cuda-bindings is not installed"),
        ("there", True, None, "no NVIDIA driver"),
        ("there", True, 0, "finds no GPU"),
        ("there", True, 2, None),
    ],
)
def test_missing_names_the_first_missing_requirement(monkeypatch, package, bindings, found, word):
    monkeypatch.setattr(target.util, "find_spec", lambda name: {"tensorrt": package}[name])
    monkeypatch.setattr(target, "is_installed", lambda name: {"cuda-bindings": bindings}[name])
    monkeypatch.setattr(target, "cuda_devices", lambda: found)
    reason = target.missing()
    assert (reason is None) == (word is None)
    if reason is not None:
        assert word in reason
        assert "pip install tensorrt cuda-bindings" in reason


def test_devices_are_counted_by_the_driver(monkeypatch):
    def driver(ready, count):
        def devices(pointer):
            pointer._obj.value = count
            return 0

        return lambda name: types.SimpleNamespace(cuInit=lambda flags: ready, cuDeviceGetCount=devices)

    def absent(name):
        raise OSError(name)

    for library, result in ((absent, None), (driver(100, 3), 0), (driver(0, 0), 0), (driver(0, 3), 3)):
        monkeypatch.setattr(target.ctypes, "CDLL", library)
        assert target.cuda_devices() == result


def test_unavailable_target_is_refused_before_any_work(fake, tmp_path, monkeypatch):
    path = save_vision(tmp_path / "model.onnx")
    with pytest.raises(RuntimeUnavailable, match=r"Target tensorrt runs on cuda; found device 'cpu'\."):
        target.build(path, tmp_path, BuildOptions(device="cpu"))
    fake.trt.__version__ = "10.9.0.34"
    with pytest.raises(
        RuntimeUnavailable,
        match=r"Found TensorRT 10\.9\.0\.34; expected 10\.12 or newer: pip install --upgrade tensorrt",
    ):
        target.load(path, OPTIONS)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(RuntimeUnavailable, match="installed but cannot be loaded"):
        target.build(path, tmp_path, OPTIONS)
    monkeypatch.setattr(target, "missing", lambda: "there is no NVIDIA driver; pip install x")
    with pytest.raises(RuntimeUnavailable, match=r"cannot be used here: there is no NVIDIA driver; pip install x\."):
        target.load(path, OPTIONS)
    assert fake.calls == []


# ---------------------------------------------------------------------------------------------------------------- build


def test_order_of_the_calls_of_a_build(fake, tmp_path):
    path = target.build(save_vision(tmp_path / "model.onnx"), tmp_path, OPTIONS)
    assert fake.calls == [
        "Builder",
        "create_network",
        "OnnxParser",
        "parse_from_file",
        "create_builder_config",
        "clear_flag",
        "create_optimization_profile",
        "set_shape",
        "add_optimization_profile",
        "create_cache",
        "set_timing_cache",
        "build_serialized_network",
    ]
    assert path == tmp_path / "model.engine"
    assert {item.name for item in tmp_path.iterdir()} == {"model.onnx", "model.engine", "tensorrt.timing"}


def test_network_is_strongly_typed_in_every_version(fake, built):
    assert fake.flags == 1 << {"10": 1, "11": 0}[fake.version[:2]]


def test_free_axes_get_the_sizes_of_the_options(fake, built, tmp_path):
    assert fake.profiles == [{"x": ((1, 8), (2, 8), (4, 8))}]
    target.build(save_text(tmp_path / "text.onnx"), tmp_path, OPTIONS)
    shapes = ((1, 2), (2, 8), (4, 16))
    assert fake.profiles[1] == {"ids": shapes, "mask": shapes}
    target.build(save_vision(tmp_path / "fixed.onnx", batch=3), tmp_path, OPTIONS)
    assert len(fake.profiles) == 2


@pytest.mark.parametrize(
    ("step", "words"),
    [
        ("Builder", ["factory function returned nullptr"]),
        ("create_network", ["it created no network"]),
        ("parse_from_file", ["node 'node_0' (Einsum): Assertion failed; node 'node_1' (Einsum): Assertion failed"]),
        ("create_builder_config", ["it created no builder configuration"]),
        ("create_optimization_profile", ["it created no optimization profile"]),
        ("is_shape_tensor", ["input 'x' is a shape tensor"]),
        ("add_optimization_profile", ["it rejected the profile with batches (1, 2, 4) and lengths (2, 8, 16)"]),
        ("create_cache", ["it created no timing cache"]),
        ("set_timing_cache", ["it rejected an empty timing cache"]),
        ("build_serialized_network", ["it built no engine", "no implementation for node block.3"]),
    ],
)
def test_each_failure_of_a_build_is_one_sentence_and_leaves_no_file(fake, tmp_path, step, words):
    path = save_vision(tmp_path / "model.onnx")
    fake.fail = {step: 0}
    with pytest.raises(BuildError) as error:
        target.build(path, tmp_path, OPTIONS)
    check_sentence(error, "TensorRT cannot build model.onnx: ", *words)
    assert [item.name for item in tmp_path.iterdir()] == ["model.onnx"]


def test_timing_cache_of_earlier_builds_is_used_if_it_matches(fake, tmp_path):
    path, timings = save_vision(tmp_path / "model.onnx"), tmp_path / "tensorrt.timing"
    for _ in range(2):
        target.build(path, tmp_path, OPTIONS)
    assert fake.timings == [b"", b"+"]
    assert timings.read_bytes() == b"++"
    timings.write_bytes(b"damaged")
    target.build(path, tmp_path, OPTIONS)
    assert (fake.timings[2:], timings.read_bytes()) == ([b""], b"+")
    fake.fail = {"set_timing_cache": 0}  # as for another GPU; here the empty cache is refused too
    with pytest.raises(BuildError, match="it rejected an empty timing cache"):
        target.build(path, tmp_path, OPTIONS)
    assert fake.timings[3:] == [b"+", b""]


# ------------------------------------------------------------------------------------------------------- load and run


@pytest.mark.parametrize(
    ("step", "words"),
    [
        ("deserialize_cuda_engine", ["built for another GPU or TensorRT version", "build it again", "Serialization"]),
        ("create_execution_context", ["it created no execution context"]),
        ("cudaStreamCreate", ["CUDA failed in cudaStreamCreate: out of memory"]),
    ],
)
def test_each_failure_to_open_is_one_sentence_and_leaves_nothing(fake, built, step, words):
    fake.fail = {step: 0}
    with pytest.raises(RuntimesError) as error:
        target.load(built, OPTIONS)
    check_sentence(error, *words)
    assert (fake.memory, fake.streams) == ({}, {})


def test_files_and_types_that_cannot_be_opened(fake, built, tmp_path):
    with pytest.raises(BuildError, match=r"There is no engine .*absent\.engine\."):
        target.load(tmp_path / "absent.engine", OPTIONS)
    with pytest.raises(BuildError, match=r"cannot open model\.onnx: it was built for another GPU"):
        target.load(tmp_path / "model.onnx", OPTIONS)
    fake.types["tensor(float)"] = "BF16"
    with pytest.raises(BuildError, match=r"'x' has type BF16, which has no NumPy dtype"):
        target.load(built, OPTIONS)
    fake.location = "HOST"
    with pytest.raises(BuildError, match="'x' is in host memory"):
        target.load(built, OPTIONS)
    assert (fake.memory, fake.streams) == ({}, {})


def test_engine_states_its_signature_and_computes(fake, built):
    with target.load(built, OPTIONS) as engine:
        assert (engine.inputs, engine.outputs) == (("x",), ("y", "h"))
        assert dict(engine.input_dtypes) == {"x": np.dtype("float32")}
        assert dict(engine.input_shapes) == {"x": (None, 8)}
        for batch in (1, 4, 4, 2):
            for feeds in (pixels(batch), {"x": np.asfortranarray(pixels(batch, seed=1)["x"])}):
                found = engine.run(feeds)
                assert list(found) == ["y", "h"]
                for key, array in expected(feeds).items():
                    np.testing.assert_array_equal(found[key], array)


def test_two_inputs_of_free_length(fake, tmp_path):
    path = target.build(save_text(tmp_path / "text.onnx"), tmp_path, OPTIONS)
    feeds = {"ids": np.arange(10).reshape(2, 5), "mask": np.array([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])}
    with target.load(path, OPTIONS) as engine:
        np.testing.assert_array_equal(engine.run(feeds)["y"], feeds["ids"] * feeds["mask"])


def test_order_of_the_calls_of_a_run_and_of_the_next_of_the_same_shape(fake, built):
    engine = target.load(built, OPTIONS)
    fake.calls.clear()
    engine.run(pixels(2))
    prepare = ["set_input_shape", "infer_shapes", *["get_tensor_shape"] * 2]
    reserve = [*["cudaMalloc"] * 3, *["set_tensor_address"] * 3]
    execute = ["cudaMemcpyAsync", "cudaStreamSynchronize", "execute_async_v3"]
    download = [*["cudaMemcpyAsync"] * 2, "cudaStreamSynchronize"]
    assert fake.calls == [*prepare, *reserve, *execute, *download]
    fake.calls.clear()
    engine.run(pixels(2))
    assert fake.calls == [*execute, *download]
    fake.calls.clear()
    engine.close()
    engine.close()
    assert fake.calls == [*["cudaFree"] * 3, "cudaStreamDestroy"]


def test_bound_inputs_stay_resident_while_other_feeds_run(fake, built):
    with target.load(built, OPTIONS) as engine:
        feeds = pixels(2, seed=1)
        kept = feeds["x"].copy()
        step = engine.bind(feeds)
        feeds["x"][:] = np.nan
        fake.calls.clear()
        assert step() is None
        assert fake.calls == ["execute_async_v3", "cudaStreamSynchronize"]
        for batch in (2, 4):
            np.testing.assert_array_equal(engine.run(pixels(batch))["h"], expected(pixels(batch))["h"])
            step()
            np.testing.assert_array_equal(fake.executed[-1]["x"], kept)


def test_run_holds_memory_for_one_shape_only(fake, built):
    with target.load(built, OPTIONS) as engine:
        for batch in (1, 2, 3, 4, 3):
            engine.run(pixels(batch))
            assert len(fake.memory) == 3
    assert (fake.memory, fake.streams) == ({}, {})


@pytest.mark.parametrize(
    ("feeds", "words"),
    [
        ({"x": np.zeros((2, 8))}, ["found dtype float64; expected float32"]),
        ({"x": np.zeros((2, 9), np.float32)}, ["found shape [2, 9]; expected [any, 8]"]),
        (pixels(5), ["found shape [5, 8]", "built for [1, 8] to [4, 8]", "build it again for other sizes"]),
        ({}, ["Found inputs (none); the engine expects x"]),
    ],
)
def test_wrong_feeds_are_refused_with_found_and_expected(fake, built, feeds, words):
    with target.load(built, OPTIONS) as engine:
        for use in (engine.run, engine.bind):
            with pytest.raises(RuntimesError) as error:
                use(feeds)
            check_sentence(error, *words)
            assert fake.memory == {}


@pytest.mark.parametrize(
    ("step", "after", "words"),
    [
        ("set_input_shape", 0, ["found shape [2, 8]"]),
        ("infer_shapes", 0, ["cannot infer the output shapes: input mask has no shape"]),
        ("get_tensor_shape", 0, ["Output 'y' has a data-dependent shape, [-1, 4]"]),
        ("cudaMalloc", 0, ["CUDA failed in cudaMalloc: out of memory"]),
        ("cudaMalloc", 2, ["CUDA failed in cudaMalloc: out of memory"]),
        ("misaligned", 0, ["needs a multiple of 256"]),
        ("set_tensor_address", 1, ["TensorRT rejected the address of 'y'"]),
        ("cudaMemcpyAsync", 0, ["CUDA failed in cudaMemcpyAsync"]),
        ("cudaStreamSynchronize", 0, ["CUDA failed in cudaStreamSynchronize"]),
        ("execute_async_v3", 0, ["TensorRT failed while running: enqueueV3: an address is not set"]),
    ],
)
def test_each_failure_of_a_run_is_one_sentence_and_the_engine_goes_on(fake, built, step, after, words):
    with target.load(built, OPTIONS) as engine:
        fake.fail = {step: after}
        with pytest.raises(RuntimesError) as error:
            engine.run(pixels(2))
        check_sentence(error, *words)
        reserved = step in ("cudaMemcpyAsync", "cudaStreamSynchronize", "execute_async_v3")
        assert len(fake.memory) == (3 if reserved else 0)
        fake.fail = {}
        np.testing.assert_array_equal(engine.run(pixels(2))["h"], expected(pixels(2))["h"])
    assert (fake.memory, fake.streams) == ({}, {})


def test_failed_bind_frees_its_memory(fake, built):
    with target.load(built, OPTIONS) as engine:
        engine.run(pixels(1))
        fake.fail = {"cudaMemcpyAsync": 0}
        with pytest.raises(RuntimesError, match="CUDA failed in cudaMemcpyAsync"):
            engine.bind(pixels(2))
        assert len(fake.memory) == 3


def test_portable_engine_contains_code_and_needs_the_option(fake, tmp_path):
    portable = replace(OPTIONS, portable=True)
    path = target.build(save_vision(tmp_path / "model.onnx"), tmp_path, portable)
    with target.load(path, portable) as engine:
        np.testing.assert_array_equal(engine.run(pixels(2))["h"], expected(pixels(2))["h"])
    with pytest.raises(BuildError, match=r"TensorRT cannot open model\.engine"):  # its code is not allowed
        target.load(path, OPTIONS)
    assert (fake.memory, fake.streams) == ({}, {})
    for line in target.command_lines(tmp_path / "model.onnx", portable).values():
        assert " --hardwareCompatibilityLevel=ampere+ --versionCompatible " in line
    assert not any("ompatib" in line for line in target.command_lines(tmp_path / "model.onnx", OPTIONS).values())


@pytest.mark.parametrize("defer", [False, True])
def test_other_targets_refuse_to_be_portable(tmp_path, defer):
    words = (
        r"^Target onnxruntime has no portable engines; only tensorrt builds one for several GPUs and versions: .*\.$"
    )
    with pytest.raises(RuntimeUnavailable, match=words):
        pipeline.export(Settings(portable_engine=True, defer_build=defer, output=tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_layers_are_reported_at_the_usual_sizes(fake, built):
    assert target.layers(built, OPTIONS) == LayerCounts(1, {"fp32": 1}, {"gemm": 1}, None)
    steps = ["set_input_shape", "create_engine_inspector", "get_engine_information"]
    assert [call for call in fake.calls if call in steps] == steps
    assert (fake.memory, fake.streams) == ({}, {})


@pytest.mark.parametrize(
    ("step", "words"),
    [
        ("create_engine_inspector", "TensorRT created no inspector: no reason given."),
        ("set_input_shape", "TensorRT rejected the usual shape [2, 8] of input 'x'."),
        ("get_engine_information", "TensorRT's description of the engine cannot be read: Layers: field required."),
        ("deserialize_cuda_engine", "TensorRT cannot open model.engine: it was built for another GPU"),
    ],
)
def test_each_failure_of_the_inspector_is_one_sentence_and_no_leak(fake, built, step, words):
    fake.fail = {step: 0}
    with pytest.raises(RuntimesError) as error:
        target.layers(built, OPTIONS)
    check_sentence(error, words)
    assert (fake.memory, fake.streams) == ({}, {})


def test_use_after_close_is_refused(fake, built):
    engine = target.load(built, OPTIONS)
    step = engine.bind(pixels(1))
    engine.close()
    for use in (lambda: engine.run(pixels(1)), lambda: engine.bind(pixels(1)), step, engine.__enter__):
        with pytest.raises(RuntimesError, match=r"This engine is closed; load the model again"):
            use()
    assert (fake.memory, fake.streams) == ({}, {})


def test_engine_can_be_timed(fake, built):
    openers = {name: (lambda: target.load(built, OPTIONS)) for name in ("baseline", "result")}
    found = runtimes.interleave(openers, pixels(2), rounds=2, burst_seconds=0.0, warmup_seconds=0.0, min_runs=3)
    assert [[len(burst) for burst in latency.samples_ms] for latency in found.values()] == [[3, 3], [3, 3]]
    assert (fake.memory, fake.streams) == ({}, {})


# ----------------------------------------------------------------------------------------------- rules of quantization


def quantized_model(tmp_path, *, op="MatMul", change=None, dtype=np.int8, **attributes):
    """Write one product with Q and DQ on both inputs; `change` edits its nodes and constants to violate a rule."""
    shape = {"MatMul": (8, 4), "Gemm": (4, 8) if attributes.get("transB") else (8, 4), "Conv": (4, 8, 1, 1)}[op]
    axis = {"MatMul": 1, "Gemm": 1 - attributes.get("transB", 0), "Conv": 0}[op]
    constants = {
        "scale": np.float32(0.1),
        "zero": np.array(0, dtype),
        "w": np.ones(shape, np.int8),
        "w_scale": np.full(4, 0.5, np.float32),
        "w_zero": np.zeros(4, np.int8),
        "bias": np.ones(4, np.float32),
    }
    nodes = {
        "q": helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["xq"], "q"),
        "dq": helper.make_node("DequantizeLinear", ["xq", "scale", "zero"], ["xf"], "dq"),
        "wdq": helper.make_node("DequantizeLinear", ["w", "w_scale", "w_zero"], ["wf"], "wdq", axis=axis),
        "product": helper.make_node(op, ["xf", "wf"], ["p"], "product", **attributes),
        "end": helper.make_node("Identity", ["p"], ["y"], "end"),
    }
    if change is not None:
        change(nodes, constants)
    ends = [value("x", None if op == "Conv" else ["batch", 8]), value("y", None)]
    return save(tmp_path / "model.onnx", list(nodes.values()), ends[:1], ends[1:], constants)


def set_constants(**values):
    return lambda nodes, constants: constants.update(values)


def set_inputs(node, *inputs):
    def change(nodes, constants):
        del nodes[node].input[:]
        nodes[node].input.extend(inputs)

    return change


def computed_zero(nodes, constants):
    constants["axes"] = np.array([0, 1])
    del constants["zero"]
    made = {
        "largest": helper.make_node("ReduceMax", ["x", "axes"], ["most"], "largest", keepdims=0),
        "made": helper.make_node("Cast", ["most"], ["zero"], "made", to=TensorProto.INT8),
    }
    rest = dict(nodes)
    nodes.clear()
    nodes.update(made | rest)


def float_weight(nodes, constants):
    constants["wf"] = constants.pop("w").astype(np.float32)
    del nodes["wdq"]


def between_product_and_bias(nodes, constants):
    nodes["end"] = helper.make_node("QuantizeLinear", ["p", "scale", "zero"], ["pq"], "late")
    nodes["late_dq"] = helper.make_node("DequantizeLinear", ["pq", "scale", "zero"], ["pf"], "late_dq")
    nodes["add"] = helper.make_node("Add", ["pf", "bias"], ["y"], "add")


def replaced(node, new):
    return lambda nodes, constants: nodes.update({node: new})


def wrong_axis(nodes, constants):
    nodes["wdq"].attribute[0].i = 0
    constants |= {"w_scale": np.ones(8, np.float32), "w_zero": np.zeros(8, np.int8)}


def quantized_bias(nodes, constants):
    constants["b"] = np.ones(4, np.int32)
    nodes["bias_dq"] = helper.make_node("DequantizeLinear", ["b", "scale"], ["bf"], "bias_dq")


VIOLATIONS = {
    "MatMulInteger": (replaced("product", helper.make_node("MatMulInteger", ["xq", "w"], ["p"], "n")), "is MatMulInt"),
    "com.microsoft": (
        replaced("product", helper.make_node("FusedMatMul", ["xf", "wf"], ["p"], "n", domain="com.microsoft")),
        "node 'n' is FusedMatMul, which TensorRT does not support",
    ),
    "uint8": (set_constants(zero=np.uint8(0)), "node 'q' has the quantized type uint8, expected int8"),
    "no zero point": (set_inputs("q", "x", "scale"), "node 'q' has the quantized type uint8, expected int8"),
    "int32 bias": (quantized_bias, "node 'bias_dq' has the quantized type int32, expected int8: leave biases in float"),
    "zero point": (set_constants(zero=np.int8(3)), "node 'q' has a zero point other than 0: quantize symmetrically"),
    "computed zero": (computed_zero, "node 'q' has the zero point zero, which is computed"),
    "scale 0": (set_constants(scale=np.float32(0)), "node 'q' has a scale that is not positive and finite"),
    "scale NaN": (set_constants(scale=np.float32("nan")), "node 'q' has a scale that is not positive and finite"),
    "activation": (
        set_constants(scale=np.ones(8, np.float32), zero=np.zeros(8, np.int8)),
        "node 'q' has one scale per channel on an activation",
    ),
    "count": (
        set_constants(w_scale=np.ones(3, np.float32), w_zero=np.zeros(3, np.int8)),
        "node 'wdq' has 3 scales for axis 1 of a weight of shape [8, 4]",
    ),
    "axis": (wrong_axis, "node 'product' has weight scales along axis 0, expected the output channels, axis 1"),
    "float weight": (float_weight, "node 'product' has an int8 input and the float input wf: put Q"),
    "product of two types": (
        set_constants(w_scale=np.full(4, 0.5, np.float16)),
        "node 'product' has inputs of types float and float16, expected one: that of the scales of its DQs",
    ),
    "bias": (between_product_and_bias, "node 'late' lies between product and its bias"),
    "scalar": (set_constants(w=np.int8(1)), "node 'wdq' has a scalar input"),
}


@pytest.mark.parametrize("case", VIOLATIONS)
def test_each_rule_violation_is_a_sentence_with_its_node_before_any_build(fake, tmp_path, case):
    change, words = VIOLATIONS[case]
    path = quantized_model(tmp_path, change=change)
    with pytest.raises(BuildError) as error:
        target.build(path, tmp_path, OPTIONS)
    assert fake.calls == []
    text = str(error.value)
    assert text.startswith("TensorRT cannot import model.onnx: node ")
    assert text.endswith(".")
    rules = [f"node {found.node!r} {found.rule}" for found in qdq.violations(path)]
    assert any(words in rule for rule in rules), rules


@pytest.mark.parametrize(
    ("op", "attributes"), [("MatMul", {}), ("Gemm", {}), ("Gemm", {"transB": 1}), ("Conv", {})], ids=str
)
def test_a_conforming_product_passes(tmp_path, op, attributes):
    assert qdq.violations(quantized_model(tmp_path, op=op, **attributes)) == []


def quantized_output(nodes, constants):
    nodes["end"] = helper.make_node("QuantizeLinear", ["p", "scale", "zero"], ["y"], "end")


def computed_scale(nodes, constants):
    computed_zero(nodes, constants)
    constants["zero"] = np.int8(0)
    nodes["made"] = helper.make_node("Identity", ["most"], ["scale"], "made")
    del constants["scale"]


# Forms that the builder takes; tests/runtimes/tensorrt_rtx/test_rules.py builds each.
ACCEPTED = {
    "conforming": None,
    "weight only": set_inputs("product", "x", "wf"),
    "quantized output": quantized_output,
    "computed scale": computed_scale,
    "scales of another type than the input": set_constants(scale=np.float16(0.1), w_scale=np.full(4, 0.5, np.float16)),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_what_the_builder_takes_violates_no_rule(tmp_path, case):
    assert qdq.violations(quantized_model(tmp_path, change=ACCEPTED[case])) == []


def test_constants_in_external_data_and_in_constant_nodes_are_read(tmp_path):
    def change(nodes, constants):
        scale = helper.make_node("Constant", [], ["scale"], value=numpy_helper.from_array(constants.pop("scale")))
        rest = dict(nodes)
        nodes.clear()
        nodes.update({"constant": scale} | rest)

    path = quantized_model(tmp_path, change=change)
    assert qdq.violations(path) == []
    model = onnx.load(path)
    next(found for found in model.graph.initializer if found.name == "w_zero").CopyFrom(
        numpy_helper.from_array(np.array([0, 0, 1, 0], np.int8), "w_zero")
    )
    onnx.save(model, path, save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    assert (tmp_path / "model.onnx.data").stat().st_size > 0
    assert [(found.node, found.rule) for found in qdq.violations(path)] == [
        ("wdq", "has a zero point other than 0: quantize symmetrically")
    ]


@pytest.mark.parametrize("content", [None, b"", b"this is not an ONNX file"])
def test_invalid_model_file_is_a_build_error(fake, tmp_path, content):
    path = tmp_path / "broken.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BuildError, match=r"broken\.onnx.*\.$"):
        target.build(path, tmp_path, OPTIONS)
    assert fake.calls == []


def answer(path, images):
    return ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": images})[0]


def save_network(path, change=lambda constants: None):
    """Write Conv, MatMul, Gemm of both layouts with biases, and a product of activations, which stays in float."""
    rng = np.random.default_rng(0)
    shapes = {"c": (16, 3, 2, 2), "w": (16, 32), "b": (32,), "g": (24, 32), "gb": (24,), "v": (24, 16), "vb": (16,)}
    constants = {key: rng.normal(size=shape).astype(np.float32) for key, shape in shapes.items()}
    constants["rows"] = np.array([-1, 16])
    change(constants)
    nodes = [
        helper.make_node("Conv", ["x", "c"], ["conv"], "conv", strides=[2, 2]),
        helper.make_node("Reshape", ["conv", "rows"], ["r"], "reshape"),
        helper.make_node("MatMul", ["r", "w"], ["m"], "matmul"),
        helper.make_node("Add", ["m", "b"], ["a"], "add"),
        helper.make_node("Gemm", ["a", "g", "gb"], ["e"], "gemm", transB=1),
        helper.make_node("Gemm", ["e", "v", "vb"], ["f"], "gemm_2"),
        helper.make_node("Transpose", ["f"], ["t"], "transpose", perm=[1, 0]),
        helper.make_node("MatMul", ["t", "f"], ["y"], "scores"),
    ]
    return save(path, nodes, [value("x", ["batch", 3, 8, 8])], [value("y", [16, 16])], constants)


def images_for(count=3):
    rng = np.random.default_rng(1)
    images = [rng.normal(size=(2, 3, 8, 8)).astype(np.float32) for _ in range(count)]
    return lambda: ({"x": image} for image in images)


def types_of(path, op, place=1):
    """Return the inferred types of one input of all nodes with operator `op`."""
    model = onnx.shape_inference.infer_shapes(onnx.load(path))
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    kinds |= {info.name: info.type.tensor_type.elem_type for info in (*model.graph.value_info, *model.graph.input)}
    return {TensorProto.DataType.Name(kinds[node.input[place]]) for node in model.graph.node if node.op_type == op}


@exact_int8
def test_int8_for_this_target_has_fp16_rest_and_scales(tmp_path):
    def within_fp16(constants):
        for weight in "gvw":
            constants[weight] /= 8

    source, path = save_network(tmp_path / "float.onnx", within_fp16), tmp_path / "int8.onnx"
    done = convert(source, path, "int8", target.int8, images_for())
    assert done.to_dict()["rest"] == "fp16"
    assert done.quantized.nodes == 4
    assert qdq.violations(path) == []
    for op in ("QuantizeLinear", "DequantizeLinear", "MatMul", "Conv", "Add"):
        assert types_of(path, op) == {"FLOAT16"}, op
    model = onnx.load(path)
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    zeros = [node.input[2] for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert {kinds[name] for name in zeros} == {TensorProto.INT8}
    ends = [*model.graph.input, *model.graph.output]
    assert {end.type.tensor_type.elem_type for end in ends} == {TensorProto.FLOAT}
    plain = tmp_path / "plain.onnx"
    assert convert(source, plain, "int8", replace(target.int8, rest="fp32"), images_for()).rest == "fp32"
    assert types_of(plain, "DequantizeLinear") == {"FLOAT"}
    first, second = (answer(each, next(images_for()())["x"]) for each in (plain, path))
    # The integers are the same; fp16 rounds to 5e-4 at each of four products, which can move an int8 value by one step.
    np.testing.assert_allclose(second, first, rtol=0, atol=0.02 * np.abs(first).max())
    assert not np.array_equal(first, second)


def test_float_fallback_is_chosen_by_the_loss_of_the_fp16_file(tmp_path):
    source, path, seen = save_network(tmp_path / "float.onnx"), tmp_path / "int8.onnx", []

    def loss(file):
        seen.append(types_of(file, "DequantizeLinear"))
        return 1.0

    done = convert(source, path, "int8", target.int8, images_for(), calibration="minmax", loss=loss, max_loss=0.5)
    kept = [attempt.kept for attempt in done.quantized.attempts]
    assert kept in ([0, 2], [0, 1, 2])  # 1 is left out if the errors of the layers say that it cannot suffice
    assert (len(seen), {*map(frozenset, seen)}) == (len(kept), {frozenset({"FLOAT16"})})
    assert done.loss == 1.0
    assert qdq.violations(path) == []
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []


def test_a_product_with_scales_below_the_range_of_fp16_stays_in_float32(tmp_path):
    def shrink(constants):
        constants["w"][:, 0] = 1e-9

    source = save_network(tmp_path / "float.onnx", shrink)
    facts = convert(source, tmp_path / "int8.onnx", "int8", target.int8, images_for())
    stored = {each.name: numpy_helper.to_array(each) for each in onnx.load(tmp_path / "int8.onnx").graph.initializer}
    scales = {key: value for key, value in stored.items() if key.startswith("int8/") and key.endswith("/scale")}
    wide = {key for key, value in scales.items() if value.dtype == np.float32}
    assert "int8/w/scale" in wide
    assert len(wide) == 2 < len(scales)  # with that of the activation
    assert scales["int8/w/scale"][0] == np.float32(1e-9) / 127
    assert any("an int8 scale of 7.9e-12" in kept.reason for kept in facts.float32)
    assert qdq.violations(tmp_path / "int8.onnx") == []


def test_scales_in_fp16_need_an_opset_that_has_them(tmp_path):
    path = quantized_model(tmp_path)
    model = onnx.load(path)
    model.opset_import[0].version = 18
    onnx.save(model, path)
    with pytest.raises(HalfError, match=r"model\.onnx has int8 products and opset 18, but fp16 scales need opset 19"):
        to_fp16(path, path, {})


def test_the_int8_files_of_compressor_conform_in_the_style_of_this_target_only(tmp_path):
    source = save_network(tmp_path / "float.onnx")
    rng = np.random.default_rng(1)
    images = [rng.normal(size=(2, 3, 8, 8)).astype(np.float32) for _ in range(3)]
    found = {}
    for name in ("tensorrt", "onnxruntime"):
        style = runtimes.runtime(name).int8
        path = tmp_path / f"{name}.onnx"
        done = quantize(
            source,
            path,
            lambda: ({"x": image} for image in images),
            activations=style.activations,
            convolutions=style.convolutions,
        )
        found[name] = done.nodes, len(qdq.violations(path))
    assert found["tensorrt"] == (4, 0)
    assert found["onnxruntime"][0] == 3
    assert found["onnxruntime"][1] > 0
    dynamic = tmp_path / "dynamic.onnx"
    quantize(source, dynamic, lambda: iter(()), mode="dynamic")
    assert {"MatMulInteger", "DynamicQuantizeLinear"} <= {
        found.rule.split()[1].rstrip(",") for found in qdq.violations(dynamic)
    }


# -------------------------------------------------------------------------------------------------------- the pipeline


def test_dynamic_int8_and_a_missing_target_are_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(target, "missing", lambda: "there is no NVIDIA driver; pip install x")
    settings = Settings(target="tensorrt", int8="dynamic", output=tmp_path / "out")
    with pytest.raises(CompressorError, match=r"tensorrt has no int8-dynamic on cuda; it has fp32, fp16, int8 there\."):
        pipeline.export(settings)
    with pytest.raises(RuntimeUnavailable, match=r"Target tensorrt cannot be used here: there is no NVIDIA driver"):
        pipeline.export(Settings(target="tensorrt", output=tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "device", "mode", "words"),
    [
        (
            "onnxruntime",
            "cuda",
            "static",
            "no int8 on cuda; it has fp32, fp16 there; int8 on cuda needs --target onnxruntime_rtx or tensorrt or "
            "tensorrt_rtx.",
        ),
        ("onnxruntime", "cuda", "dynamic", "has no int8-dynamic on cuda; it has fp32, fp16 there."),
        ("tensorrt", "cpu", "static", "tensorrt has no int8 on cpu; int8 on cpu needs --target"),
    ],
)
def test_int8_is_refused_on_a_device_that_has_none(tmp_path, name, device, mode, words):
    with pytest.raises(CompressorError, match=re.escape(words)):
        pipeline.export(Settings(target=name, device=device, int8=mode, output=tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("fake", ["11.4.0.106"], indirect=True)
def test_export_for_a_target_with_planned_sizes(fake, tmp_path, monkeypatch):
    # Only calls and files are checked: the fake computes with ONNX Runtime.
    output = tmp_path / "out"
    timed = partial(runtimes.interleave, burst_seconds=0.0, warmup_seconds=0.0, min_runs=2)
    monkeypatch.setattr(engine_timing, "interleave", timed)
    report = pipeline.export(
        Settings(
            target="tensorrt",
            drop="1",
            int8="static",
            max_precision_loss=100,
            samples=60,
            batch=3,
            rounds=1,
            output=output,
        )
    )
    assert set(report.latency) == {"original", "baseline", "result"}
    assert {"model.onnx", "model.engine", "report.json"} <= {path.name for path in output.iterdir()}
    assert [path.name for path in output.glob("*.engine")] == ["model.engine"]
    assert {sizes[place][0] for profile in fake.profiles for sizes in profile.values() for place in (0, 1, 2)} == {
        1,
        3,
        32,
    }
    assert {len(feeds["pixel_values"]) for feeds in fake.executed} >= {1, 3, 8}
    assert qdq.violations(output / "model.onnx") == []
    assert report.engine["layers"] == {
        "count": 1,
        "precisions": {"fp32": 1},
        "kinds": {"gemm": 1},
        "fused_attention": None,
    }
    assert "The engine has 1 layers: 1 fp32; fusion of attention is unknown." in report.summary()
    assert (fake.memory, fake.streams) == ({}, {})


def test_lengths_range_from_one_to_the_longest_sample():
    def part(*lengths):
        def batches(size):
            chunks = (lengths[start : start + size] for start in range(0, len(lengths), size))
            return (types.SimpleNamespace(feeds={"ids": np.zeros((len(chunk), max(chunk)))}) for chunk in chunks)

        split = types.SimpleNamespace(batches=batches, samples=types.SimpleNamespace(rows_per_sample=2))
        split.middle = lambda count: split
        return split

    parts = (part(3, 4), part(*[5] * 40, 19), part(8, 2), part(6, 11, 7))
    data = types.SimpleNamespace(calibration=parts[0], validation=parts[1], test=parts[-1], parts=parts)
    model = types.SimpleNamespace(state={}, has_two_towers=False, dynamic_axes={"ids": {0: "batch", 1: "sequence"}})
    subject = types.SimpleNamespace(data=data, model=model)
    found = engine_builder.with_input_sizes(OPTIONS, subject, Settings(batch=2))
    assert (found.batches, found.lengths) == ((1, 2, 64), (1, 11, 19))
    model.dynamic_axes = {"ids": {0: "batch"}}
    assert engine_builder.with_input_sizes(OPTIONS, subject, Settings(batch=100)).batches == (1, 100, 100)
