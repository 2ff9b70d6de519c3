"""Modules of the user: names of nested outputs, fixed lengths and batch sizes, and that the module stays as it was."""

import dataclasses
import json
import sys
import threading
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

import compressor
from compressor.errors import CompressorError, Terminated
from compressor.lower.trace import trace
from compressor.lower.write_onnx import lower
from compressor.models import Model, ModelError, load
from compressor.models.base import UndetectedCacheError
from passes.execute.interpreter import run
from runtimes.base.protocols import BuildOptions
from runtimes.onnxruntime import target

Scores = namedtuple("Scores", ["keys", "weights"])


@dataclasses.dataclass
class Features:
    first: Any
    last: Any


class Returning(nn.Module):
    """A residual branch whose output `form` puts into containers, with the input."""

    def __init__(self, form: Callable[[torch.Tensor, torch.Tensor], Any]) -> None:
        super().__init__()
        self.inner, self.form = nn.Linear(4, 4), form

    def forward(self, x: torch.Tensor) -> Any:
        return self.form(x + self.inner(x), x)


FORMS: list[tuple[Callable[..., Any], tuple[str, ...]]] = [
    (lambda y, x: y, ("output",)),
    (lambda y, x: (None, y), ("output",)),
    (lambda y, x: [y, 2 * y], ("output_0", "output_1")),
    (lambda y, x: (y, (2 * y, [3 * y]), "words", {"k": -y}), ("output_0", "output_1.0", "output_1.1.0", "output_3.k")),
    (lambda y, x: {"encoder": (y, 2 * y), "f": {"p q": -y}}, ("encoder.0", "encoder.1", "f.p_q")),
    (lambda y, x: Features(y, [Scores(2 * y, 3 * y), None]), ("first", "last.0.keys", "last.0.weights")),
    (lambda y, x: OrderedDict({1: y, "more": Features(2 * y, 0.5)}), ("1", "more.first")),
    (lambda y, x: {"x": y, "y": 2 * y}, ("output.x", "y")),
]


def leaves(value: Any) -> list[torch.Tensor]:
    """Return the tensors in the containers of `FORMS`, by another rule than that of the package."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Features):
        value = [value.first, value.last]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else []
    return [tensor for each in values for tensor in leaves(each)]


@pytest.mark.parametrize(("form", "names"), FORMS)
def test_nested_outputs_are_named_by_their_path(form: Callable[..., Any], names: tuple[str, ...]) -> None:
    module, x = Returning(form), torch.rand(2, 4)
    model = load(module, example_inputs=x)
    assert model.outputs == names
    with torch.inference_mode():
        for got, wanted in zip(run(trace(model), {"x": x}), leaves(module(x)), strict=True):
            torch.testing.assert_close(got, wanted)
    assert model.answer in names


def test_inputs_and_repeated_tensors_are_named_and_left_out() -> None:
    model = load(Returning(lambda y, x: {"x": x, "y": y, "again": (y, -y)}), example_inputs=torch.rand(2, 4))
    assert model.outputs == ("y", "again.1")
    assert model.answer == "y"
    assert reasons(model)["outputs left out"].startswith("x (the input x), again.0 (the same as y): only")
    changed = load(Returning(lambda y, x: {"sum": x.add_(y)}), example_inputs=torch.rand(2, 4))  # no longer the input
    assert changed.outputs == ("sum",)


def test_nested_outputs_are_outputs_of_the_file(tmp_path: Path) -> None:
    module, x = Returning(lambda y, x: {"x": y, "again": (2 * y, {"z": -y})}), torch.rand(3, 4)
    model = load(module, example_inputs=x)
    with target.load(lower(trace(model), model, tmp_path / "model.onnx"), BuildOptions(threads=1)) as engine:
        results = engine.run({"x": x.numpy()})
    assert set(results) == {"output.x", "again.0", "again.1.z"} == set(model.outputs)
    for name, wanted in zip(model.outputs, leaves(module(x)), strict=True):
        np.testing.assert_allclose(results[name], wanted.detach().numpy(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (lambda y, x: {"a.b": y, "a": {"b": y}}, "two outputs with the name a.b; rename one of the keys"),
        (lambda y, x: {"a b": y, "a_b": y}, "two outputs with the name a_b"),
        (lambda y, x: {"y": y, "more": (Plain(),)}, "class Plain at more.0, in which tensors cannot be found; return"),
        (lambda y, x: Plain(), "class Plain, in which"),
        (lambda y, x: {y}, "class set, in which"),
        (lambda y, x: (1.0, {"a": None}), "returned tuple without tensors"),
    ],
)
def test_outputs_without_unique_names_or_in_unknown_classes_are_refused(form: Callable[..., Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load(Returning(form), example_inputs=torch.rand(2, 4))


class Plain:
    """A class that is no container."""


def test_sparse_and_complex_outputs_are_refused() -> None:
    with pytest.raises(ModelError, match=r"returns output as torch.sparse_coo; return a dense tensor of real numbers"):
        load(Returning(lambda y, x: y.to_sparse()), example_inputs=torch.ones(2, 4))
    with pytest.raises(ModelError, match=r"returns output as torch.complex64; return a dense tensor of real numbers"):
        load(Returning(lambda y, x: y * 1j), example_inputs=torch.ones(2, 4))


def test_sys_exit_in_the_forward_pass_does_not_end_the_command() -> None:
    with pytest.raises(ModelError, match=r"the forward pass of Returning calls sys.exit\(0\); remove the call from it"):
        load(Returning(lambda y, x: sys.exit(0)), example_inputs=torch.ones(2, 4))

    def stopped(y: torch.Tensor, x: torch.Tensor) -> None:
        raise Terminated(143)

    with pytest.raises(Terminated):  # SIGTERM during a forward pass
        load(Returning(stopped), example_inputs=torch.ones(2, 4))


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (nn.Linear(4, 4, device="meta"), "Linear: its weight weight has no values"),
        (nn.LazyLinear(4), "LazyLinear: its weight weight has no shape yet"),
    ],
)
def test_weights_without_values_are_refused(module: nn.Module, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        load(module, example_inputs=torch.ones(2, 4))


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:torch.quantize_per_tensor")
def test_weights_that_torch_quantized_are_refused_and_other_state_is_not() -> None:
    module = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 4)), {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(
        ModelError, match=r"its weight 0._packed_params.* is quantized by torch \(torch.qint8\); expected"
    ):
        load(module, example_inputs=torch.ones(2, 4))

    class Stateful(nn.Linear):
        def get_extra_state(self) -> dict[str, bool]:
            return {"calibrated": True}

    assert set(load(Stateful(4, 4), example_inputs=torch.ones(2, 4)).dtypes) == {"weight", "bias"}


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_script_module_is_refused() -> None:
    module = torch.jit.script(nn.Linear(4, 4).eval())
    for inner, name in ((module, "the module"), (nn.Sequential(module), "0"), (torch.jit.freeze(module), "the module")):
        with pytest.raises(ModelError, match=rf": {name} is a ScriptModule, which torch.export does not trace; return"):
            load(inner, example_inputs=torch.ones(2, 4))


def test_the_module_of_an_exported_program_is_refused() -> None:
    program = torch.export.export(nn.Linear(4, 4).eval(), (torch.ones(2, 4),))
    for inner, name in ((program.module(), "the module"), (nn.Sequential(program.module()), "0")):
        with pytest.raises(ModelError, match=rf": {name} is the module of an exported program, which torch.export"):
            load(inner, example_inputs=torch.ones(2, 4))
    traced = torch.fx.symbolic_trace(nn.Linear(4, 4))  # another GraphModule, which is as good as a module in Python
    assert load(traced, example_inputs=torch.ones(2, 4)).inputs


def test_a_weight_that_holds_other_tensors_is_refused() -> None:
    module = nn.Sequential(nn.Linear(4, 4))
    module[0].weight = nn.Parameter(TwoTensor(torch.ones(4, 4), torch.ones(4, 4)))
    with pytest.raises(ModelError, match=r"its weight 0.weight is a TwoTensor, which holds other tensors"):
        load(module, example_inputs=torch.ones(2, 4))


def test_a_file_in_place_of_a_module_is_told_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_network.py").write_text("def build(): ...")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ModelError, match=r"my_network\.py:build names a file; .* in the folder of the file: my_network:b"
    ):
        load("my_network.py:build")


def test_a_wrapper_that_takes_any_arguments_is_called_by_position() -> None:
    module, x = Returning(lambda y, x: y), torch.rand(2, 4)
    model = load(torch.optim.swa_utils.AveragedModel(module), example_inputs=(x,))
    assert model.inputs == ("args_0",)
    with torch.inference_mode():
        torch.testing.assert_close(run(trace(model), {"args_0": x})[0], module(x))


def test_a_compiled_module_is_the_module_in_it() -> None:
    module, x = Returning(lambda y, x: y), torch.rand(2, 4)
    module.inner = torch.compile(module.inner)  # type: ignore[assignment]
    model = load(torch.compile(module), example_inputs=x)  # type: ignore[arg-type]
    assert model.name == "Returning"
    assert isinstance(model.module.inner, nn.Linear)
    assert isinstance(module.inner, torch._dynamo.OptimizedModule)  # the user's stays compiled
    with torch.inference_mode():
        torch.testing.assert_close(model.call(model.module, x)[0], x + module.inner(x))


def test_an_example_of_nan_is_refused() -> None:
    with pytest.raises(ModelError, match="example input x holds NaN; expected numbers"):
        load(Returning(lambda y, x: y), example_inputs=torch.full((2, 4), torch.nan))


def reasons(model: Model) -> dict[str, str]:
    return {limitation.feature: limitation.reason for limitation in model.limitations}


def test_values_that_are_no_tensors_are_named() -> None:
    model = load(Returning(lambda y, x: {"y": y, "n": (1, None, {"s": "x"})}), example_inputs=torch.rand(2, 4))
    assert reasons(model)["outputs left out"] == "n.0 (int), n.2.s (str): only computed tensors are exported, each once"


# ---------------------------------------------------------------------------------------------------- fixed shapes

TOKENS = 6


class Encoder(nn.Module):
    def __init__(self, change: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.words, self.inner, self.change = nn.Embedding(20, 4), nn.Linear(4, 4), change
        self.table = nn.Parameter(torch.rand(TOKENS, 4))

    def forward(self, input_ids: torch.Tensor, other: torch.Tensor | None = None) -> torch.Tensor:
        x = self.change(self, self.words(input_ids))
        if other is not None:
            x = x + self.words(other).mean(1, keepdim=True)
        return x + self.inner(x)


def checked(_: nn.Module, x: torch.Tensor) -> torch.Tensor:
    if x.shape[1] != TOKENS:
        raise ValueError("six tokens")
    return x


@pytest.mark.parametrize(
    ("change", "fixed"),
    [
        (lambda self, x: x + self.table, True),
        (lambda self, x: x.reshape(-1, TOKENS, 4), True),
        (checked, True),
        (lambda self, x: x, False),
        (lambda self, x: x + self.table[: x.shape[1]], False),
    ],
)
def test_a_length_that_cannot_vary_is_taken_as_fixed_and_said(change: Callable[..., Any], fixed: bool) -> None:
    ids = torch.arange(2 * TOKENS).reshape(2, TOKENS)
    model = load(Encoder(change), example_inputs=(ids, ids[:, :4]))
    assert model.dynamic_axes["input_ids"] == ({0: "batch"} if fixed else {0: "batch", 1: "sequence"})
    assert model.dynamic_axes["other"] == {0: "batch", 1: "sequence" if fixed else "other_sequence"}
    assert ("every sample must have 6 tokens" in reasons(model).get("length of input_ids", "")) is fixed
    length = TOKENS if fixed else 5
    feeds = {"input_ids": torch.arange(3 * length).reshape(3, length), "other": ids[:1, :3].repeat(3, 1)}
    (got,) = run(trace(model), feeds)
    torch.testing.assert_close(got, model.module(**feeds))


class Padded(nn.Module):
    """A module whose tokens have features in the example, with the mask of their padding."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        return (x + self.inner(x)) * keep[..., None]


def test_a_mask_beside_features_is_fixed_by_their_shape() -> None:
    model = load(Padded(), example_inputs=(torch.rand(2, 5, 4), torch.ones(2, 5, dtype=torch.int64)))
    assert reasons(model)["length of keep"] == (
        "the module fails with another number of tokens while x keeps the shape of the example, so every sample must "
        "have 5 tokens; other lengths are rejected"
    )


class Decoding(nn.Module):
    """Attention of one text to another, with a mask of the latter; the lengths of the two are independent."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.head = nn.Embedding(20, 8), nn.Linear(8, 20)

    def forward(self, source: torch.Tensor, keep: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        memory, x = self.words(source), self.words(target)
        scores = (x @ memory.transpose(1, 2)).masked_fill(keep[:, None] == 0, -1e9)
        own = (x @ x.transpose(1, 2)).softmax(-1) @ x
        return self.head(own + scores.softmax(-1) @ memory)


@pytest.mark.parametrize("length", [9, 7])
def test_lengths_that_are_independent_have_names_of_their_own(length: int, tmp_path: Path) -> None:
    """ONNX Runtime shares the memory of values of one shape, so one name for two lengths ends in an error."""
    source, keep = torch.arange(18).reshape(2, 9), torch.ones(2, 9, dtype=torch.int64)
    model = load(Decoding(), example_inputs=(source, keep, source[:, :length]))
    assert [axes[1] for axes in model.dynamic_axes.values()] == ["sequence", "sequence", "target_sequence"]
    feeds = {"source": source[:, :8], "keep": keep[:, :8], "target": source[:, :3]}
    with target.load(lower(trace(model), model, tmp_path / "m.onnx"), BuildOptions()) as engine:
        (got,) = engine.run({name: value.numpy() for name, value in feeds.items()}).values()
    np.testing.assert_allclose(got, model.module(**feeds).detach().numpy(), atol=1e-5)


@pytest.mark.parametrize(("length", "fixed"), [(1, True), (2, False)])
def test_an_example_of_one_token_is_fixed_and_one_of_two_is_not(length: int, fixed: bool) -> None:
    model = load(Encoder(lambda self, x: x), example_inputs=torch.zeros(2, length, dtype=torch.int64))
    assert (model.dynamic_axes["input_ids"] == {0: "batch"}) is fixed
    trace(model)


@pytest.mark.parametrize("rows", [1, 4])
def test_a_fixed_batch_is_an_error_in_one_sentence(rows: int) -> None:
    module = Returning(lambda y, x: y + torch.zeros(rows, 4) if len(x) == rows else x.reshape(rows, 3))
    with pytest.raises(ModelError, match=f"a batch of {rows}, but not a batch of two .* works at any batch size"):
        load(module, example_inputs=torch.rand(rows, 4))


# ---------------------------------------------------------------------------------------- the module stays as it was


class Kept(nn.Module):
    """A module with everything that an export could change."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop, self.lstm = nn.BatchNorm1d(8), nn.Dropout(0.5), nn.LSTM(8, 8, batch_first=True)
        self.inner = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.old = nn.Linear(8, 8)
        self.tied = self.old.weight
        self.register_buffer("calls", torch.zeros(()))
        self.seen: list[int] = []
        self.last: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.seen.append(1)
        y = self.norm(self.drop(x)) + self.lstm(x[:, None])[0][:, 0] + nn.functional.linear(x, self.tied)
        self.last = y + torch.relu(self.inner(y))
        return self.last + torch.relu(self.old(self.last))


def kept(dtype: torch.dtype = torch.float32) -> Kept:
    """Return the module after a step of training: with gradients, statistics and an output that was kept."""
    torch.manual_seed(0)
    module = Kept().train()
    module.norm.eval()
    module.lstm.weight_hh_l0.requires_grad_(False)
    module.inner.register_forward_hook(lambda _, __, output: 2 * output)
    module.old.register_full_backward_hook(lambda *_: None)
    module(torch.rand(4, 8)).sum().backward()
    return module.to(dtype)


def state(module: nn.Module) -> dict[str, Any]:
    """Return everything about a module that a user could notice, with copies of all values."""
    parts = dict(module.named_modules())
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {
        "training": {name: part.training for name, part in parts.items()},
        "hooks": {name: (dict(part._forward_hooks), dict(part._backward_hooks)) for name, part in parts.items()},
        "objects": {name: id(tensor) for name, tensor in tensors.items()},
        "places": {name: (tensor.data_ptr(), tensor.dtype, tensor.device) for name, tensor in tensors.items()},
        "versions": {name: tensor._version for name, tensor in tensors.items()},
        "values": {name: tensor.detach().clone() for name, tensor in tensors.items()},
        "trained": {name: tensor.requires_grad for name, tensor in tensors.items()},
        "gradients": {name: None if tensor.grad is None else tensor.grad.clone() for name, tensor in tensors.items()},
        "flat": [id(weight) for weight in module.lstm._flat_weights],
        "kept": (list(module.seen), id(module.last), module.tied is module.old.weight),
        "process": (
            torch.get_rng_state(),
            torch.is_grad_enabled(),
            torch.get_default_dtype(),
            torch.get_num_threads(),
            torch.backends.cudnn.benchmark,
            torch.backends.cudnn.enabled,
            str(np.random.get_state()[1][:5]),
        ),
    }


def same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, tuple):
        return all(map(same, left, right))
    return bool(left == right)


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return [part for part in before if not same(before[part], after[part])]


def exported(module: nn.Module, folder: Path) -> None:
    options: dict[str, Any] = {"data": "random", "samples": 24, "rounds": 1, "threads": 1, "drop": "1"}
    compressor.export(module, example_inputs=torch.rand(2, 8), output=folder / "out", **options)


def failing(module: nn.Module, folder: Path) -> None:
    with pytest.raises(CompressorError):
        compressor.export(module, example_inputs=torch.rand(2, 8), data=folder / "absent.npz", output=folder / "out")


def wrong_input(module: nn.Module, folder: Path) -> None:
    with pytest.raises(ModelError, match="fails on its example inputs"):
        load(module, example_inputs=torch.rand(2, 5))


def inspected(module: nn.Module, folder: Path) -> None:
    compressor.inspect(module, example_inputs=torch.rand(2, 8), data="random", samples=24)


def interrupted(module: nn.Module, folder: Path) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = torch.nn.modules.module.register_module_forward_pre_hook(stop)
    try:
        with pytest.raises(KeyboardInterrupt):
            load(module, example_inputs=torch.rand(2, 8))
    finally:
        handle.remove()


@pytest.mark.parametrize(
    ("use", "dtype"),
    [
        *((use, torch.bfloat16) for use in (exported, failing, wrong_input, inspected, interrupted)),
        *((use, torch.float32) for use in (failing, wrong_input, inspected, interrupted)),
        pytest.param(exported, torch.float32, marks=pytest.mark.slow),
    ],
)
def test_the_module_comes_back_as_it_was(use: Callable[..., None], dtype: torch.dtype, tmp_path: Path) -> None:
    module = kept(dtype)
    generator = torch.get_rng_state()
    before = state(module)
    use(module, tmp_path)
    torch.set_rng_state(generator) if use is not inspected else None  # the example inputs were drawn
    after = state(module)
    if use is inspected:
        before.pop("process"), after.pop("process")
    assert changes(before, after) == []


def test_the_copy_shares_float32_weights_and_computes_the_same() -> None:
    module, x = kept(), torch.rand(2, 8)
    model = load(module, example_inputs=x)
    own = {parameter.data_ptr() for parameter in module.parameters()}
    assert {parameter.data_ptr() for parameter in model.module.parameters()} == own
    half = load(kept(torch.float16), example_inputs=x.half())
    assert {parameter.dtype for parameter in half.module.parameters()} == {torch.float32}
    with torch.inference_mode():
        wanted = module.eval()(x)
        torch.testing.assert_close(model.call(model.module, x)[0], wanted)
        torch.testing.assert_close(half.call(half.module, x)[0], wanted, rtol=0.02, atol=0.02)  # weights of 11 bits


def test_forward_hooks_are_part_of_the_model_and_said() -> None:
    module = Returning(lambda y, x: y)
    module.inner.register_forward_hook(lambda _, __, output: output * 3)
    module.register_forward_pre_hook(lambda _, inputs: (inputs[0] + 1,))
    x = torch.rand(2, 4)
    model = load(module, example_inputs=x)
    assert reasons(model)["forward hooks"].startswith("those of the module, inner become part of the model")
    with torch.inference_mode():
        torch.testing.assert_close(run(trace(model), {"x": x})[0], x + 1 + 3 * module.inner.forward(x + 1))
    normed = nn.utils.spectral_norm(nn.Linear(4, 4))  # computes its weight in a hook of its own
    assert "forward hooks" not in reasons(load(nn.Sequential(normed), example_inputs=x))


def test_a_module_that_cannot_be_copied_is_refused_with_a_way_round() -> None:
    module = Returning(lambda y, x: y)
    module.lock = threading.Lock()
    with pytest.raises(
        ModelError, match=r"Returning cannot be copied \(TypeError: .*lock.*pass package.module:factory"
    ):
        load(module, example_inputs=torch.rand(2, 4))
    with torch.device("meta"):
        absent = nn.Linear(4, 4)
    with pytest.raises(ModelError, match=r"Linear: its weight weight has no values"):
        load(absent, example_inputs=torch.rand(2, 4))


# ------------------------------------------------------------------------------------------------ modules of texts


class Texts(torch.nn.Module):
    """Values for each token; `rule` makes the outputs of them."""

    def __init__(self, rule):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.inner, self.head = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 9)
        self.rule = rule

    def values(self, tokens):
        x = self.embed(tokens)
        return self.rule(self.head(x + 0.1 * self.inner(x).cumsum(1)))


class Ids(Texts):
    def forward(self, input_ids):
        return self.values(input_ids)


class Masked(Texts):
    def forward(self, tokens, mask):
        return self.values(tokens * mask)


class Named(Texts):
    def forward(self, input_ids, attention_mask):
        return self.values(input_ids * attention_mask)


def rows(count=40, length=7, seed=0):
    return np.random.default_rng(seed).integers(0, 9, (count, length))


def exported(module, folder, example, arrays, **options):
    np.savez(folder / "x.npz", **arrays)
    output = folder / "out"
    compressor.export(
        module, example_inputs=example, data=str(folder / "x.npz"), drop="1", rounds=1, output=str(output), **options
    )
    return json.loads((output / "report.json").read_text())


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_a_language_model_of_ones_own_has_a_perplexity_on_token_ids(dtype, tmp_path):
    """It was refused, because its data "holds no token ids"; and --no-cache was the advice where no cache was found."""
    module = Ids(lambda logits: logits).eval()
    with pytest.raises(UndetectedCacheError, match="pass --no-cache"):
        load(module, example_inputs=torch.zeros(2, 4, dtype=dtype), task="text-generation")
    with torch.no_grad():  # samples of the model itself, so that it predicts them better than a guess
        ids = torch.from_numpy(rows(length=1))
        module.head.weight.mul_(8)
        generator = torch.Generator().manual_seed(0)
        for _ in range(11):
            following = torch.multinomial(module(ids)[:, -1].softmax(-1), 1, generator=generator)
            ids = torch.cat([ids, following], 1)
    report = exported(
        module,
        tmp_path,
        torch.zeros(2, 4, dtype=dtype),
        {"input_ids": ids.numpy()},
        task="text-generation",
        cache=False,
    )
    test = ids[[int(each) for each in report["data"]["test_ids"]]]
    with torch.no_grad():
        nll = torch.nn.functional.cross_entropy(module(test)[:, :-1].flatten(0, 1), test[:, 1:].flatten())
    assert report["quality"]["metric"] == "perplexity"
    assert report["quality"]["figures"]["baseline"]["value"] == pytest.approx(float(nll.exp()), rel=1e-4)


def test_tokens_of_other_names_and_lengths_are_judged_and_an_unnamed_mask_is_said(tmp_path):
    """The names ended an export with a KeyError, after its search."""
    arrays = {"tokens": rows(), "mask": np.ones((40, 7), dtype=np.int64)}
    example = {"tokens": torch.zeros(2, 4, dtype=torch.int64), "mask": torch.ones(2, 4, dtype=torch.int64)}
    report = exported(Masked(lambda x: x), tmp_path, example, arrays, task="token-classification")
    reasons = {each["feature"]: each["reason"] for each in report["limitations"]}
    assert report["quality"]["metric"] == "token_agreement"
    assert reasons["padding"].endswith("if mask is the mask of padding, name it so")
    named = {"input_ids": arrays["tokens"], "attention_mask": arrays["mask"]}
    model = load(
        Named(lambda x: x),
        example_inputs={name: torch.from_numpy(value[:2]) for name, value in named.items()},
        task="token-classification",
    )
    assert not [each for each in model.limitations if each.feature == "padding"]


def test_both_ends_of_a_span_are_judged():
    """A limitation said that quality is not measured on the end."""
    module = Ids(lambda x: {"start_logits": x[..., 0], "end_logits": x[..., 1], "other": x[:, 0]})
    ids = torch.zeros(2, 4, dtype=torch.int64)
    model = load(module, example_inputs=ids, task="question-answering")
    assert (model.answer, *model.stacked) == ("start_logits", "end_logits")
    assert not [each for each in model.limitations if each.feature == "judged output"]


@pytest.mark.parametrize("name", ["weight", "buffer"])
def test_a_weight_that_is_an_output_is_left_out(name: str) -> None:
    class Weighted(Returning):
        def forward(self, x: torch.Tensor) -> Any:
            return super().forward(x), getattr(self.inner, name)

    module = Weighted(lambda y, x: y)
    module.inner.register_buffer("buffer", torch.rand(2, 3))
    model = load(module, example_inputs=torch.rand(2, 4))
    assert len(model.outputs) == 1
    assert reasons(model)["outputs left out"].startswith(f"output_1 (the weight inner.{name}): only computed")


@pytest.mark.parametrize("form", [lambda y: y > 0, lambda y: y.argmax(-1, keepdim=True), lambda y: (y * 9).int()])
def test_decisions_are_no_output_that_quality_is_measured_on(form: Callable[[torch.Tensor], torch.Tensor]) -> None:
    example = torch.rand(2, 4)
    with pytest.raises(ModelError, match="which quality is not measured on; return numbers as the first output"):
        load(Returning(lambda y, x: form(y)), example_inputs=example)
    assert load(Returning(lambda y, x: (y, form(y))), example_inputs=example).outputs == ("output_0", "output_1")


@pytest.mark.parametrize("kind", [torch.float64, torch.float16, torch.bfloat16])
def test_conversions_in_forward_are_told_from_other_failures(kind: torch.dtype) -> None:
    """Weights are converted to float32, so a forward that converts its input fails although the module does not."""

    class Converting(Returning):
        def forward(self, x: torch.Tensor) -> Any:
            return super().forward(x.to(kind))

    module = Converting(lambda y, x: y).to(kind)
    with pytest.raises(
        ModelError, match=r"Converting fails in float32, to which its weights .* are converted \(Runtime"
    ):
        load(module, example_inputs=torch.rand(2, 4))


def test_float64_is_converted_and_said() -> None:
    model = load(Returning(lambda y, x: y).double(), example_inputs={"x": torch.rand(2, 4).double()})
    assert reasons(model)["float64 weights"] == (
        "inner.weight, inner.bias: converted to float32, in which engines compute"
    )
    assert reasons(model)["float64 inputs"].startswith("x: converted to float32")
    assert not {"float64 weights", "float64 inputs"} & set(
        reasons(load(Returning(lambda y, x: y), example_inputs=torch.rand(2, 4)))
    )


def test_a_numpy_array_in_forward_is_refused_by_what_to_do() -> None:
    form = lambda y, x: y + torch.from_numpy(np.sign(x.numpy()))  # noqa: E731
    model = load(Returning(form), example_inputs=torch.rand(2, 4))
    with pytest.raises(
        CompressorError, match=r"computes with a NumPy array .*; keep the values as a tensor, such as by"
    ):
        trace(model)


def test_texts_and_images_are_refused_for_a_module_by_the_arrays_that_it_takes(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("a\nb\nc\n")
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n' * 4)
    (tmp_path / "pictures").mkdir()
    for number in range(3):
        Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / f"{number}.png")
    for name, held in (("x.txt", "texts"), ("x.jsonl", "texts"), ("pictures", "images")):
        with pytest.raises(CompressorError, match=rf"{name} holds {held}, .* np.savez\('data.npz', x=...\) writes it"):
            compressor.export(Returning(lambda y, x: y), data=tmp_path / name, example_inputs=torch.rand(2, 4))
