"""Tests of target executorch beyond the contract: bounded sizes, names in the file and its own int8."""

import json
import re
import shutil

import numpy as np
import pytest
import torch

from runtimes.base.protocols import BuildError, BuildOptions, RuntimesError, RuntimeUnavailable
from runtimes.executorch import target

OPTIONS = BuildOptions(threads=1, batches=(1, 1, 4), lengths=(1, 4, 6))
WIDE, NARROW = 64, 16
# float32 sums of at most 64 terms of size about 1, in any order: 1e-5 leaves a factor of ten.
TOLERANCE = 1e-5


class Vision(torch.nn.Module):
    """Outputs hidden = x W^T + b and -relu(hidden), in this order."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.linear = torch.nn.Linear(WIDE, NARROW)
        for tensor in self.linear.parameters():
            tensor.data = torch.randn(tensor.shape, generator=generator)

    def forward(self, x):
        hidden = self.linear(x)
        return hidden, -torch.relu(hidden)


class Text(torch.nn.Module):
    """Output states = table[ids] * mask, for integers."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(11, 8, _weight=torch.arange(88.0).reshape(11, 8))

    def forward(self, ids, mask):
        return (self.table(ids) * mask[..., None],)


def saved(path, module, example, axes, inputs, outputs):
    program = torch.export.export(module, example, dynamic_shapes=axes, strict=False)
    names = {"compressor.json": json.dumps({"inputs": inputs, "outputs": outputs})}
    torch.export.save(program, path, extra_files=names)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    if (reason := target.missing()) is not None:
        pytest.skip(reason)
    return tmp_path_factory.mktemp("executorch")


@pytest.fixture(scope="module")
def vision(folder):
    """The source file, with names other than torch's."""
    free = {0: torch.export.Dim.DYNAMIC}
    return saved(folder / "v.pt2", Vision(), (torch.ones(2, WIDE),), (free,), ["pixel_values"], ["logits", "below"])


@pytest.fixture(scope="module")
def built(vision, folder):
    return target.build(vision, folder, OPTIONS)


@pytest.fixture(scope="module")
def text(folder):
    free = dict.fromkeys((0, 1), torch.export.Dim.DYNAMIC)
    example = tuple(torch.ones(2, 8, dtype=torch.int64) for _ in range(2))
    path = saved(folder / "t.pt2", Text(), example, (free, free), ["input_ids", "attention_mask"], ["states"])
    (folder / "text").mkdir()
    return target.build(path, folder / "text", OPTIONS)


def pixels(batch, seed=0):
    return np.random.default_rng(seed).normal(size=(batch, WIDE)).astype(np.float32)


def weights():
    return [tensor.detach().numpy() for tensor in Vision().linear.parameters()]


def expected(x):
    weight, bias = weights()
    return x @ weight.T + bias


@pytest.mark.parametrize("batch", [1, 3, 4])
def test_floats_agree_with_numpy_up_to_the_largest_batch(built, batch):
    x = pixels(batch)
    with target.load(built, OPTIONS) as engine:
        found = engine.run({"pixel_values": x})
    np.testing.assert_allclose(found["logits"], expected(x), rtol=TOLERANCE, atol=10 * TOLERANCE)
    np.testing.assert_allclose(found["below"], -np.maximum(expected(x), 0), rtol=TOLERANCE, atol=10 * TOLERANCE)


@pytest.mark.parametrize(("batch", "length"), [(1, 5), (3, 2), (4, 6)])
def test_integers_agree_exactly(text, batch, length):
    rng = np.random.default_rng(1)
    ids, mask = rng.integers(0, 11, (batch, length)), rng.integers(0, 2, (batch, length))
    with target.load(text, OPTIONS) as engine:
        found = engine.run({"attention_mask": mask, "input_ids": ids})["states"]
    np.testing.assert_array_equal(found, np.arange(88).reshape(11, 8)[ids] * mask[..., None])


def test_file_contains_names_and_sizes(built, text, tmp_path):
    alone = shutil.copy(built, tmp_path / "elsewhere.pte")
    with target.load(alone, OPTIONS) as engine:
        assert (engine.inputs, engine.outputs) == (("pixel_values",), ("logits", "below"))
        assert dict(engine.input_shapes) == {"pixel_values": (None, WIDE)}
        assert dict(engine.input_dtypes) == {"pixel_values": np.dtype("float32")}
        assert list(engine.run({"pixel_values": pixels(1)})) == ["logits", "below"]
    with target.load(text, OPTIONS) as engine:
        assert engine.inputs == ("input_ids", "attention_mask")
        assert set(engine.input_shapes.values()) == {(None, None)}
        assert set(engine.input_dtypes.values()) == {np.dtype("int64")}


def test_sizes_beyond_the_largest_are_refused_with_found_and_expected(built, text):
    with target.load(built, OPTIONS) as engine:
        for use in (engine.run, engine.bind):
            with pytest.raises(RuntimesError, match=r"found shape \[5, 64\]; expected at most \[4, 64\], .*\.$"):
                use({"pixel_values": pixels(5)})
    long = np.zeros((1, 7), np.int64)
    with target.load(text, OPTIONS) as engine, pytest.raises(RuntimesError, match=r"\[1, 7\].* at most \[4, 6\]"):
        engine.run({"input_ids": long, "attention_mask": long})


def test_largest_batch_of_one_gives_a_static_axis(vision, tmp_path):
    path = target.build(vision, tmp_path, BuildOptions(threads=1, batches=(1, 1, 1)))
    with target.load(path, OPTIONS) as engine:
        assert dict(engine.input_shapes) == {"pixel_values": (1, WIDE)}
        found = engine.run({"pixel_values": pixels(1)})["logits"]
    np.testing.assert_allclose(found, expected(pixels(1)), rtol=TOLERANCE, atol=10 * TOLERANCE)


def test_outputs_of_one_run_survive_the_next(built):
    with target.load(built, OPTIONS) as engine:
        first = engine.run({"pixel_values": pixels(3)})["logits"]
        kept = first.copy()
        engine.run({"pixel_values": pixels(3, seed=1)})
    np.testing.assert_array_equal(first, kept)


@pytest.mark.parametrize("precision", target.own)
def test_int8_differs_by_rounding_only(vision, tmp_path, precision):
    x = pixels(4)
    options = BuildOptions(
        threads=1, batches=OPTIONS.batches, precision=precision, samples=lambda: iter([{"pixel_values": x}])
    )
    path = target.build(vision, tmp_path, options)
    with target.load(path, OPTIONS) as engine:
        found = engine.run({"pixel_values": x})["logits"]
    weight, _ = weights()
    y = expected(x)
    # Rounding errs by half a step. Weights have 127 steps on each side. Activations have 255 steps, and their rounded
    # zero point costs another half step. Both errors multiply in each product. 1 % covers float32 rounding.
    of_x, of_w = np.ptp(x) / 255, np.abs(weight).max(1) / 127 / 2
    bound = np.abs(x).sum(1)[:, None] * of_w + of_x * (np.abs(weight).sum(1) + WIDE * of_w)
    if precision == "int8":
        bound = bound + np.ptp(y) / 255
    assert (np.abs(found - y) <= 1.01 * bound).all()
    assert np.abs(found - y).max() > TOLERANCE  # float32 would have no larger error


class Shifted(torch.nn.Module):
    """Rows of x W^T + b, chosen by indices that are computed from integers and numbers."""

    def __init__(self):
        super().__init__()
        self.linear = Vision().linear

    def forward(self, x, ids):
        return (self.linear(x).index_select(0, ids[0] * 2 + 1),)


@pytest.mark.parametrize("precision", target.own)
def test_indices_stay_integers_in_int8(folder, tmp_path, precision):
    names, x = ["pixel_values", "input_ids"], torch.from_numpy(pixels(4))
    ids = torch.tensor([[1, 0]])
    path = saved(tmp_path / "shifted.pt2", Shifted(), (x, ids), None, names, ["chosen"])
    feeds = dict(zip(names, (x.numpy(), ids.numpy()), strict=True))
    options = BuildOptions(threads=1, batches=(1, 4, 4), precision=precision, samples=lambda: iter([feeds]))
    with target.load(target.build(path, tmp_path, options), options) as engine:
        found = engine.run(feeds)["chosen"]
    assert np.abs(found - expected(x.numpy()[[3, 1]])).max() < 0.5  # of values up to 20; int8 rounds by less than 0.3


class Attention(torch.nn.Module):
    """Attention without a mask, attention with a boolean mask, and a matrix product."""

    def forward(self, x, seen):
        attend = torch.nn.functional.scaled_dot_product_attention
        return attend(x, 2 * x, x), attend(x, x, 3 * x, attn_mask=seen, scale=0.5), x @ x.transpose(-2, -1)


class Undecomposed(torch.nn.Module):
    """Forms of attention and matrix product that ExecuTorch decomposes itself."""

    def forward(self, x, seen):
        attend = torch.nn.functional.scaled_dot_product_attention
        added = torch.where(seen, 0.0, -torch.inf)
        return attend(x, x, x, attn_mask=added), attend(x, x, x, is_causal=True), x @ x[:, :1].transpose(-2, -1)


@pytest.mark.parametrize(
    "module", [pytest.param(Attention(), id="ours"), pytest.param(Undecomposed(), id="rest", marks=pytest.mark.slow)]
)
def test_attention_agrees_with_torch(folder, tmp_path, module):
    example = torch.ones(2, 2, 5, 8), torch.ones(2, 1, 5, 5, dtype=torch.bool)
    free = ({0: torch.export.Dim.DYNAMIC},) * 2
    names = ["a", "b", "c"]
    path = target.build(saved(tmp_path / "a.pt2", module, example, free, ["x", "seen"], names), tmp_path, OPTIONS)
    x, seen = np.random.default_rng(0).normal(size=(3, 2, 5, 8)).astype(np.float32), np.tri(5, dtype=bool)
    seen = np.stack([seen, ~seen, ~seen.T])[:, None]  # the last masks hide whole rows or columns
    with target.load(path, OPTIONS) as engine:
        found = engine.run({"x": x, "seen": seen})
    for key, wanted in zip(names, module(torch.from_numpy(x), torch.from_numpy(seen)), strict=True):
        np.testing.assert_allclose(found[key], wanted.numpy(), rtol=TOLERANCE, atol=TOLERANCE)
    # Kernels outside of XNNPACK: the detection of fully masked rows, and redundant expand copies.
    slow = [key for key in (b"aten::where", b"aten::any", b"aten::expand_copy") if key in path.read_bytes()]
    assert bool(slow) == isinstance(module, Undecomposed)


def test_int8_weights_take_a_quarter_of_the_size(tmp_path, folder):
    size = 256
    free = ({0: torch.export.Dim.DYNAMIC},)
    path = saved(folder / "w.pt2", torch.nn.Linear(size, size), (torch.ones(2, size),), free, ["x"], ["y"])
    written = target.build(path, tmp_path, BuildOptions(threads=1, precision="int8-dynamic")).stat().st_size
    assert size * size < written < size * size * 2  # float32 would be four times


def test_int8_without_samples_is_refused(vision, tmp_path):
    with pytest.raises(BuildError, match=r"int8 needs calibration samples; found none\.$"):
        target.build(vision, tmp_path, BuildOptions(precision="int8"))


def test_unsupported_precision_is_refused(vision, tmp_path):
    with pytest.raises(BuildError, match=r"no precision 'bf16'; expected one of: fp32, int8, int8-dynamic\.$"):
        target.build(vision, tmp_path, BuildOptions(precision="bf16"))
    assert not (tmp_path / target.FILE).exists()


def test_thread_pool_in_use_is_not_resized(built):
    with target.load(built, OPTIONS) as engine:
        with pytest.raises(RuntimesError, match=r"Found threads=2 while an open engine uses 1; .*\.$"):
            target.load(built, BuildOptions(threads=2))
        target.load(built, BuildOptions()).close()  # None keeps the pool of one thread
        assert engine.run({"pixel_values": pixels(1)})["logits"].shape == (1, NARROW)
    with target.load(built, BuildOptions(threads=2)) as engine:
        assert engine.run({"pixel_values": pixels(2)})["logits"].shape == (2, NARROW)
    target.load(built, OPTIONS).close()


def test_nothing_is_printed(vision, tmp_path, capfd):
    path = target.build(vision, tmp_path, OPTIONS)
    with target.load(path, BuildOptions(threads=2)) as engine:
        engine.run({"pixel_values": pixels(1)})
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("content", [None, b"", b"this is no program"])
def test_other_files_are_refused_in_one_sentence(folder, tmp_path, content):
    paths = tmp_path / "broken.pt2", tmp_path / "broken.pte"
    for path in paths:
        if content is not None:
            path.write_bytes(content)
    with pytest.raises(BuildError, match=r"^torch\.export cannot read broken\.pt2: .*\.$"):
        target.build(paths[0], tmp_path, OPTIONS)
    with pytest.raises(BuildError, match=r"broken\.pte.*\.$") as caught:
        target.load(paths[1], OPTIONS)
    assert "\n" not in str(caught.value)


def test_a_program_without_names_is_one_sentence(folder, tmp_path):
    program = torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),))
    torch.export.save(program, tmp_path / "nameless.pt2")
    with pytest.raises(BuildError, match=r"^nameless\.pt2 does not name its inputs and outputs"):
        target.build(tmp_path / "nameless.pt2", tmp_path, OPTIONS)


@pytest.mark.parametrize("module", ["executorch", "torchao"])
def test_not_installed_is_one_sentence(monkeypatch, tmp_path, module):
    monkeypatch.setattr(target.util, "find_spec", lambda name: None if name == module else object())
    assert re.match(rf"{module} is not installed.*; pip install {module}$", target.missing())
    with pytest.raises(RuntimeUnavailable, match=r"^Target executorch cannot be used here: .* pip install .*\.$"):
        target.build(tmp_path / "model.pt2", tmp_path, OPTIONS)
    with pytest.raises(RuntimeUnavailable, match=r"^Target executorch cannot be used here"):
        target.load(tmp_path / target.FILE, OPTIONS)


class Cached(torch.nn.Module):
    """Appends x to a cache of any length, also an empty one."""

    def forward(self, x, past):
        return (torch.cat([past, x], dim=1) * 2.0,)


def test_an_empty_cache_is_an_input_like_any_other(folder):
    """ExecuTorch ends the process on the strides that NumPy gives an empty array."""
    axes = ({0: torch.export.Dim.DYNAMIC}, dict.fromkeys((0, 1), torch.export.Dim.DYNAMIC))
    example = (torch.ones(2, 3, 8), torch.ones(2, 4, 8))
    source = saved(folder / "c.pt2", Cached(), example, axes, ["x", "past"], ["present"])
    (folder / "cached").mkdir()
    built = target.build(source, folder / "cached", BuildOptions(threads=1, batches=(1, 1, 4), lengths=(0, 4, 6)))
    x = np.random.default_rng(0).random((2, 3, 8), dtype=np.float32)
    with target.load(built, OPTIONS) as engine:
        for tokens in (0, 5):
            past = np.ones((2, tokens, 8), np.float32)
            expected = np.concatenate([past, x], axis=1) * 2
            np.testing.assert_array_equal(engine.run({"x": x, "past": past})["present"], expected)
