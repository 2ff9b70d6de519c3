"""Contract tests, run on every discovered target, including new ones."""

import gc
import json
import shutil

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import runtimes
from runtimes.base.protocols import DEVICES, PRECISIONS, BuildError, BuildOptions, Int8Style, LayerCounts, RuntimesError

# For float32 sums of at most 16 terms around 1, in any order and without TF32, 1e-5 leaves a factor of ten.
TOLERANCE = 1e-5


def value(name, kind, shape):
    return helper.make_tensor_value_info(name, kind, shape)


def save(path, nodes, inputs, outputs, weights):
    tensors = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "small", inputs, outputs, tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    return path


def weights():
    rng = np.random.default_rng(0)
    return {
        "w": rng.normal(size=(8, 16)).astype(np.float32),
        "v": rng.normal(size=(16, 4)).astype(np.float32),
        "table": rng.normal(size=(11, 8)).astype(np.float32),
    }


def save_vision(path):
    """Write logits = relu(pixel_values w) v and hidden = relu(pixel_values w), batch dynamic."""
    nodes = [
        helper.make_node("MatMul", ["pixel_values", "w"], ["before"]),
        helper.make_node("Relu", ["before"], ["hidden"]),
        helper.make_node("MatMul", ["hidden", "v"], ["logits"]),
    ]
    inputs = [value("pixel_values", TensorProto.FLOAT, ["batch", 8])]
    outputs = [value("logits", TensorProto.FLOAT, ["batch", 4]), value("hidden", TensorProto.FLOAT, ["batch", 16])]
    return save(path, nodes, inputs, outputs, {key: weights()[key] for key in ("w", "v")})


def save_text(path):
    """Write states = table[input_ids] * attention_mask, batch and length dynamic."""
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["rows"], axis=0),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "last"], ["column"]),
        helper.make_node("Mul", ["rows", "column"], ["states"]),
    ]
    inputs = [value(name, TensorProto.INT64, ["batch", "length"]) for name in ("input_ids", "attention_mask")]
    outputs = [value("states", TensorProto.FLOAT, ["batch", "length", 8])]
    return save(path, nodes, inputs, outputs, {"table": weights()["table"], "last": np.array([-1])})


class Vision(torch.nn.Module):
    """The computation of save_vision."""

    def __init__(self):
        super().__init__()
        self.w, self.v = (torch.nn.Parameter(torch.from_numpy(weights()[name])) for name in "wv")

    def forward(self, pixel_values):
        hidden = torch.relu(pixel_values @ self.w)
        return hidden @ self.v, hidden


class Text(torch.nn.Module):
    """The computation of save_text."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Parameter(torch.from_numpy(weights()["table"]))

    def forward(self, input_ids, attention_mask):
        return self.table[input_ids] * attention_mask.unsqueeze(-1).to(torch.float32)


def save_program(path, module, examples, outputs):
    """Write an exported program with free first axes (and lengths), as compressor.lower does."""
    free = tuple(dict.fromkeys(range(min(value.ndim, 2)), torch.export.Dim.AUTO) for value in examples.values())
    if path.stem == "vision":
        free = ({0: torch.export.Dim.AUTO},)
    program = torch.export.export(module.eval(), tuple(examples.values()), dynamic_shapes=free, strict=False)
    names = json.dumps({"inputs": list(examples), "outputs": outputs})
    torch.export.save(program, path, extra_files={"compressor.json": names})
    return path


def write_source(folder, name, suffix):
    """Write the tiny vision or text model in the source format `suffix`."""
    path = folder / f"{name}{suffix}"
    if suffix == ".onnx":
        return {"vision": save_vision, "text": save_text}[name](path)
    if name == "vision":
        return save_program(path, Vision(), {"pixel_values": torch.zeros(2, 8)}, ["logits", "hidden"])
    ids = torch.ones(2, 3, dtype=torch.int64)
    # Separate tensors, because torch.export merges inputs that are the same object.
    return save_program(path, Text(), {"input_ids": ids, "attention_mask": ids.clone()}, ["states"])


def pixels(batch, seed=0):
    return {"pixel_values": np.random.default_rng(seed).normal(size=(batch, 8)).astype(np.float32)}


# Files of llama.cpp hold language models alone, so that its engines have a contract of their own (gguf/test_target.py).
ANY_MODEL = [name for name in runtimes.targets() if runtimes.runtime(name).source != ".gguf"]


@pytest.fixture(scope="module", params=ANY_MODEL)
def target(request):
    return runtimes.runtime(request.param)


@pytest.fixture(params=runtimes.targets())
def any_target(request):
    return runtimes.runtime(request.param)


@pytest.fixture(scope="module")
def options(target):
    """Options for the target's first device; skips the test if the target cannot run here."""
    if (reason := target.missing()) is not None:
        pytest.skip(reason)
    return BuildOptions(device=target.devices[0], threads=1)


@pytest.fixture(scope="module")
def built(target, options, tmp_path_factory):
    return {
        name: target.build(write_source(folder, name, target.source), folder, options)
        for name in ("vision", "text")
        for folder in [tmp_path_factory.mktemp(f"{target.name}-{name}")]
    }


@pytest.fixture
def engine(target, options, built):
    with target.load(built["vision"], options) as opened:
        yield opened


def test_facts(any_target):
    target = any_target
    assert target.name in runtimes.targets()
    assert runtimes.runtime(target.name) is target
    assert target.description
    assert "\n" not in target.description
    assert target.devices
    assert set(target.devices) <= set(DEVICES)
    assert isinstance(target.int8, Int8Style)
    assert set(target.precisions) == set(target.devices)
    for supported in target.precisions.values():
        assert supported[0] == "fp32"
        assert list(supported) == sorted(set(supported), key=PRECISIONS.index)
        assert set(supported) <= set(PRECISIONS)
    assert set(target.own) <= {name for supported in target.precisions.values() for name in supported} - {"fp32"}
    assert target.source in (".onnx", ".pt2", ".gguf")


def test_layers_are_counted_if_the_runtime_reports_them(target, options, built):
    found = target.layers(built["vision"], options)
    assert found is None or isinstance(found, LayerCounts)
    if found is not None:
        assert sum(found.precisions.values()) == sum(found.kinds.values()) == found.count > 0
        assert set(found.precisions) <= {"fp32", "other"}
        assert found.fused_attention is None  # the model has no attention


def test_missing_contains_the_install_command(any_target):
    reason = any_target.missing()
    assert reason is None or "pip install" in reason
    assert "compressor" not in (reason or "")  # pip cannot install an extra of this project, which is not on PyPI


def test_engine_describes_its_inputs_and_outputs(target, options, built, engine):
    assert (engine.inputs, engine.outputs) == (("pixel_values",), ("logits", "hidden"))
    assert dict(engine.input_dtypes) == {"pixel_values": np.dtype("float32")}
    assert dict(engine.input_shapes) == {"pixel_values": (None, 8)}
    with target.load(built["text"], options) as text:
        assert text.inputs == ("input_ids", "attention_mask")
        assert set(text.input_dtypes.values()) == {np.dtype("int64")}


@pytest.mark.parametrize("batch", [1, 3])
def test_floats_agree_with_numpy(engine, batch):
    feeds, w = pixels(batch), weights()
    hidden = np.maximum(feeds["pixel_values"] @ w["w"], 0)
    found = engine.run(feeds)
    assert list(found) == ["logits", "hidden"]
    np.testing.assert_allclose(found["hidden"], hidden, rtol=TOLERANCE, atol=TOLERANCE)
    np.testing.assert_allclose(found["logits"], hidden @ w["v"], rtol=TOLERANCE, atol=10 * TOLERANCE)


@pytest.mark.parametrize(("batch", "length"), [(1, 5), (3, 2)])
def test_integers_agree_with_numpy(target, options, built, batch, length):
    rng = np.random.default_rng(1)
    ids, mask = rng.integers(0, 11, (batch, length)), rng.integers(0, 2, (batch, length))
    with target.load(built["text"], options) as opened:
        found = opened.run({"input_ids": ids, "attention_mask": mask})["states"]
    # Exact, because it is a selection times zero or one.
    np.testing.assert_array_equal(found, weights()["table"][ids] * mask[..., None])


def test_memory_layout_of_the_feeds_does_not_matter(engine):
    feeds = pixels(3)
    expected = engine.run(feeds)["logits"]
    for variant in (np.asfortranarray(feeds["pixel_values"]), np.repeat(feeds["pixel_values"], 2, axis=1)[:, ::2]):
        np.testing.assert_array_equal(engine.run({"pixel_values": variant})["logits"], expected)
        engine.bind({"pixel_values": variant})()


def test_outputs_of_one_run_survive_the_next(engine):
    first = engine.run(pixels(3))["logits"]
    kept = first.copy()
    engine.run(pixels(3, seed=1))
    np.testing.assert_array_equal(first, kept)


def test_a_bound_run_repeats_and_returns_nothing(engine):
    feeds = pixels(2)
    step = engine.bind(feeds)
    feeds["pixel_values"][:] = np.nan  # bound inputs are a copy
    del feeds
    gc.collect(1)  # the oldest generation, which holds nothing of this test, would take seconds
    assert [step() for _ in range(3)] == [None] * 3
    assert np.isfinite(engine.run(pixels(2))["logits"]).all()


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ({}, r"Found inputs \(none\); the engine expects pixel_values\."),
        ({"x": pixels(1)["pixel_values"]}, r"Found inputs x; the engine expects pixel_values\."),
        ({"pixel_values": np.zeros((1, 8))}, r"found dtype float64; expected float32"),
        ({"pixel_values": np.zeros(8, np.float32)}, r"found shape \[8\]; expected \[any, 8\]"),
        ({"pixel_values": np.zeros((1, 9), np.float32)}, r"found shape \[1, 9\]; expected \[any, 8\]"),
    ],
)
def test_wrong_feeds_are_refused_with_found_and_expected(engine, feeds, message):
    with pytest.raises(RuntimesError, match=message):
        engine.run(feeds)
    with pytest.raises(RuntimesError, match=message):
        engine.bind(feeds)


def test_use_after_close_is_refused(target, options, built):
    opened = target.load(built["vision"], options)
    step = opened.bind(pixels(1))
    opened.close()
    opened.close()
    for use in (lambda: opened.run(pixels(1)), lambda: opened.bind(pixels(1)), step, opened.__enter__):
        with pytest.raises(RuntimesError, match="This engine is closed"):
            use()


def test_leaving_the_block_closes(target, options, built):
    with target.load(built["vision"], options) as opened:
        assert opened.run(pixels(1))["logits"].shape == (1, 4)
    with pytest.raises(RuntimesError, match="This engine is closed"):
        opened.run(pixels(1))


def test_a_moved_engine_still_opens(target, options, built, tmp_path):
    moved = shutil.copytree(built["vision"].parent, tmp_path / "moved")
    with target.load(moved / built["vision"].name, options) as opened:
        assert opened.run(pixels(1))["logits"].shape == (1, 4)


@pytest.mark.parametrize("content", [None, b"", b"this is not an ONNX file"])
def test_invalid_model_file_is_a_build_error(target, options, tmp_path, content):
    path = tmp_path / f"broken{target.source}"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BuildError, match=r"broken\.(onnx|pt2).*\.$"):
        target.build(path, tmp_path, options)


def test_unsupported_device_is_refused(target, built, options):
    for device in set(DEVICES) - set(target.devices):
        with pytest.raises(runtimes.RuntimeUnavailable, match=f"found device '{device}'"):
            target.load(built["vision"], BuildOptions(device=device))
    assert options.device in target.devices


def test_two_engines_are_timed_against_each_other(target, options, built):
    openers = {name: (lambda: target.load(built["vision"], options)) for name in ("baseline", "result")}
    found = runtimes.interleave(openers, pixels(2), rounds=2, burst_seconds=0.0, warmup_seconds=0.0, min_runs=4)
    assert [[len(burst) for burst in latency.samples_ms] for latency in found.values()] == [[4, 4], [4, 4]]
    ratio, low, high = found["result"].speedup_over(found["baseline"], resamples=100)
    assert 0 < low <= high
    assert ratio > 0
