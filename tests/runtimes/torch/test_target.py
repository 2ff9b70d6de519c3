"""Tests of target torch beyond the contract: its own precisions and the metadata of its packages."""

import json
import shutil
import subprocess
import sys
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from runtimes.base.protocols import BuildError, BuildOptions, RuntimesError, RuntimeUnavailable, suppress_output
from runtimes.torch import program as torch_program
from runtimes.torch import target
from tests.processors import need_exact_int8

WIDTH = 32
NAMES = {"inputs": ["states", "scale"], "outputs": ["mixed", "passed"]}
THREADS = BuildOptions(threads=1)
ONE = {"inputs": ["x"], "outputs": ["y"]}


class Block(torch.nn.Module):
    """A transformer block with two heads, multiplied by `scale`, which is also an output."""

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.LayerNorm(WIDTH)
        self.qkv, self.out = torch.nn.Linear(WIDTH, 3 * WIDTH), torch.nn.Linear(WIDTH, WIDTH)
        self.up, self.down = torch.nn.Linear(WIDTH, 2 * WIDTH), torch.nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, states, scale):
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(self.norm(states)).chunk(3, dim=-1))
        states = states + self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        states = states + self.down(torch.nn.functional.gelu(self.up(states)))
        # An explicit float32 cast, as models use for norms; it must stay correct in lower precisions.
        return states.to(torch.float32) * scale[:, None, None], scale.clone()


def feeds(batch, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "states": rng.normal(size=(batch, 5, WIDTH)).astype(np.float32),
        "scale": rng.uniform(1, 2, batch).astype(np.float32),
    }


def one():
    return {"x": np.random.default_rng(0).normal(size=(2, 8)).astype(np.float32)}


def samples():
    return iter([feeds(8, seed) for seed in range(4)])


def saved(module, path, example=None, names=NAMES):
    example = feeds(2) if example is None else example
    tensors = tuple(map(torch.from_numpy, example.values()))
    free = tuple({0: torch.export.Dim.DYNAMIC} for _ in tensors)
    program = torch.export.export(module.eval(), tensors, dynamic_shapes=free, strict=False)
    torch.export.save(program, path, extra_files={torch_program.NAMES: json.dumps(names)})
    return path


@pytest.fixture(scope="module")
def block():
    torch.manual_seed(0)
    return Block().eval()


@pytest.fixture(scope="module")
def program(block, tmp_path_factory):
    return saved(block, tmp_path_factory.mktemp("program") / "small.pt2")


def build_precision(program, folder, precision):
    if precision.startswith("int8"):
        pytest.importorskip("torchao", reason="torchao is not installed")
    options = BuildOptions(threads=1, precision=precision, samples=samples)
    return target.build(program, folder.mktemp(precision), options)


@pytest.fixture(scope="module")
def fp32(program, tmp_path_factory):
    return build_precision(program, tmp_path_factory, "fp32")


@pytest.fixture(scope="module", params=[pytest.param("bf16", marks=pytest.mark.slow), "int8"])
def lower(request, program, tmp_path_factory):
    """A package in bf16 or int8, with lower and upper bounds of its difference from float32."""
    # As a share of the outputs' standard deviation. bfloat16 rounds by up to 2^-9 = 0.002 of each value, in five
    # consecutive products. int8 rounds weights and inputs by half a step of about 8 standard deviations / 255, which is
    # 0.016. A difference above the upper bound is an error; one below the lower bound means a higher precision.
    bounds = {"bf16": (0.0003, 0.01), "int8": (0.002, 0.05)}[request.param]
    return build_precision(program, tmp_path_factory, request.param), bounds


def computed(module, values):
    with torch.no_grad():
        return [value.numpy() for value in module(*map(torch.from_numpy, values.values()))]


def away(found, expected):
    return float(np.sqrt(np.mean((found - expected) ** 2)) / expected.std())


@pytest.mark.parametrize("batch", [1, 3])
def test_fp32_agrees_with_torch(fp32, block, batch):
    values = feeds(batch, seed=5)
    with target.load(fp32, THREADS) as engine:
        found = engine.run(values)
    mixed, passed = computed(block, values)
    # Sums of at most 64 terms of size about 1, in another order.
    np.testing.assert_allclose(found["mixed"], mixed, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found["passed"], passed)


@pytest.mark.parametrize("batch", [1, 3])
def test_lower_precisions_stay_close_and_take_float32(request, lower, block, batch):
    need_exact_int8(request.node.callspec.params["lower"])
    path, (least, most) = lower
    values = feeds(batch, seed=5)
    with target.load(path, THREADS) as engine:
        assert set(engine.input_dtypes.values()) == {np.dtype("float32")}
        found = engine.run(values)
    mixed, passed = computed(block, values)
    assert found["mixed"].dtype == np.float32
    assert least < away(found["mixed"], mixed) < most
    np.testing.assert_array_equal(found["passed"], passed)  # no product: not rounded


def test_dynamic_int8_needs_no_samples_and_stays_close(block, program):
    pytest.importorskip("torchao", reason="torchao is not installed")
    values = feeds(3, seed=5)
    with suppress_output():
        exported = torch.export.load(program)
        quantized = torch_program.quantize_int8(exported, dynamic=True, names=NAMES["inputs"], samples=None)
        found = computed(quantized.module(check_guards=False), values)[0]
    assert 0.002 < away(found, computed(block, values)[0]) < 0.05  # the bounds of int8 in `lower`


def test_package_contains_names_and_shapes_and_can_be_moved(fp32, tmp_path):
    moved = shutil.copy(fp32, tmp_path / target.FILE)
    with target.load(moved, THREADS) as engine:
        assert (engine.inputs, engine.outputs) == (("states", "scale"), ("mixed", "passed"))
        assert dict(engine.input_shapes) == {"states": (None, 5, WIDTH), "scale": (None,)}
        assert engine.run(feeds(2))["mixed"].shape == (2, 5, WIDTH)


def test_axes_with_the_same_symbol_must_agree(fp32):
    with target.load(fp32, THREADS) as engine:
        mixed = feeds(3) | {"scale": feeds(2)["scale"]}
        for use in (engine.run, engine.bind):
            with pytest.raises(
                RuntimesError, match=r"^Input 'scale': found size 2 of axis 0; expected 3, as in the other inputs\.$"
            ):
                use(mixed)


def test_number_of_threads_is_set_and_restored(fp32, monkeypatch):
    before, seen = torch.get_num_threads(), []
    wanted = before + 1
    with target.load(fp32, BuildOptions(threads=wanted)) as engine:
        real = engine._live().loader

        def recording(tensors):
            seen.append(torch.get_num_threads())
            return real.run(tensors)

        monkeypatch.setattr(engine._live(), "loader", SimpleNamespace(run=recording))
        engine.bind(feeds(1))()
    assert (seen, torch.get_num_threads()) == ([wanted], before)


def test_package_for_another_processor_is_refused_before_opening(fp32, tmp_path, monkeypatch):
    monkeypatch.setattr(torch._inductor, "aoti_load_package", None)
    monkeypatch.setattr(target, "_machine", lambda: "linux riscv64 DEFAULT")
    with pytest.raises(
        BuildError, match=r"^model\.pt2 was compiled for .*; found linux riscv64 DEFAULT: build it again"
    ):
        target.load(fp32, THREADS)


@pytest.mark.parametrize("content", ["nothing", "text", "zip", "program"])
def test_other_files_are_refused(program, tmp_path, content):
    path = tmp_path / "model.pt2"
    if content == "text":
        path.write_text("no package")
    elif content == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a/wrapper_metadata.json", "{}")
    elif content == "program":
        shutil.copy(program, path)
    with pytest.raises(BuildError, match=r"^(There is no|model\.pt2 is no package).*\.$"):
        target.load(path, THREADS)


def test_missing_compiler_is_one_sentence(program, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    with pytest.raises(BuildError, match=r"found no no-such-compiler; install it .* or name another one .* CXX\.$"):
        target.build(program, tmp_path, THREADS)


@pytest.mark.parametrize(
    ("precision", "without", "message"),
    [
        ("int8", "torchao", r"with int8 needs torchao, which is not installed; pip install torchao\.$"),
        ("int8", None, r"needs calibration samples for int8; found none"),
        ("int4", None, r"supports fp32, bf16, int8, int8-dynamic on cpu; found precision 'int4'\.$"),
    ],
)
def test_unsupported_precision_is_one_sentence(program, tmp_path, monkeypatch, precision, without, message):
    if without is not None:
        monkeypatch.setattr(torch_program.util, "find_spec", lambda name: None if name == without else True)
    elif precision == "int8":
        pytest.importorskip("torchao", reason="torchao is not installed")
    with pytest.raises(BuildError, match=message):
        target.build(program, tmp_path, BuildOptions(precision=precision))
    assert not list(tmp_path.iterdir())


def test_int8_without_linear_layers_is_refused(tmp_path):
    pytest.importorskip("torchao", reason="torchao is not installed")
    path = saved(torch.nn.Sequential(torch.nn.GELU()), tmp_path / "gelu.pt2", one(), ONE)
    with pytest.raises(BuildError, match=r"^The model has no Linear layer"):
        target.build(path, tmp_path, BuildOptions(precision="int8-dynamic"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_missing_cuda_device_is_one_sentence(program, tmp_path):
    with pytest.raises(RuntimeUnavailable, match=r"^torch finds no CUDA device here .*--device cpu\.$"):
        target.build(program, tmp_path, BuildOptions(device="cuda"))


def test_symbolic_sizes_are_checked_against_sums_and_bounds():
    size = {"p": 1}, {"p": 1, "n": 1}, {"n": 1}
    inputs = [torch_program.Input(key, "int64", (each,)) for key, each in zip("abc", size, strict=True)]
    signature = torch_program.Signature(tuple(inputs), (), {"n": 4})

    def check(*lengths):
        signature.check({key: np.zeros(length, np.int64) for key, length in zip("abc", lengths, strict=True)})

    check(0, 4, 4)
    with pytest.raises(
        RuntimesError, match=r"^Input 'b': found size 5 of axis 0; expected 6, as in the other inputs\.$"
    ):
        check(2, 5, 4)
    with pytest.raises(RuntimesError, match=r"^Input 'c': found size 5 of axis 0; expected at most 4\.$"):
        check(2, 7, 5)


def test_importing_the_target_does_not_import_torch():
    code = "import sys, runtimes.torch.target as target; target.missing(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
