"""Tests of operator fusions: equal outputs, and no fusion of other patterns."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from runtimes.base.protocols import BuildError, BuildOptions
from runtimes.onnxruntime import target as onnxruntime
from runtimes.onnxruntime_fused import encoder_fusions as graphs
from runtimes.onnxruntime_fused import target as onnxruntime_fused
from tests.processors import exact_int8

pytest.importorskip("onnxruntime", reason="the extra `cpu` or `gpu` is not installed")

ONE = BuildOptions(threads=1)
# For float sums of at most 600 terms around one in another order, and another implementation of exp.
ROUNDING = 2e-5
# A quantized product is summed in integers; only scale and bias are rounded.
EXACT = 1e-6
HEADS, WIDTH = 2, 8
SIZE = HEADS * WIDTH


@dataclass
class Small:
    """A builder of graphs with names like those of the torch exporter."""

    nodes: list
    weights: dict

    def add(self, kind, inputs, output, **attributes):
        self.nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    def constant(self, name, value):
        self.weights[name] = np.asarray(value)
        return name

    def model(self, inputs, outputs):
        values = [
            [helper.make_tensor_value_info(key, TensorProto.FLOAT, shape) for key, shape in part]
            for part in (inputs, outputs)
        ]
        tensors = [numpy_helper.from_array(array, key) for key, array in self.weights.items()]
        graph = helper.make_graph(self.nodes, "small", *values, tensors)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        onnx.checker.check_model(model, full_check=True)
        return model


def dense(small, value, name, rows, columns, *, int8, join="Add"):
    """Add a linear map of `value`, with quantized operands if `int8`; the bias is added or its negative subtracted."""
    rng = np.random.default_rng(len(small.weights))
    values = rng.normal(size=columns).astype(np.float32)
    bias = small.constant(f"{name}.bias", values if join == "Add" else -values)
    if int8:
        scale, zero = (
            small.constant(f"{name}.x.scale", np.float32(0.02)),
            small.constant(f"{name}.x.zero", np.uint8(120)),
        )
        quantized = small.add("QuantizeLinear", [value, scale, zero], f"{name}.x.int8")
        value = small.add("DequantizeLinear", [quantized, scale, zero], f"{name}.x.float")
        weight = small.constant(f"{name}.w.int8", rng.integers(-127, 128, (rows, columns), dtype=np.int8))
        scales = small.constant(f"{name}.w.scale", rng.uniform(0.001, 0.004, columns).astype(np.float32))
        zeros = small.constant(f"{name}.w.zero", np.zeros(columns, np.int8))
        weight = small.add("DequantizeLinear", [weight, scales, zeros], f"{name}.w", axis=1)
    else:
        weight = small.constant(f"{name}.w", (rng.normal(size=(rows, columns)) / 4).astype(np.float32))
    product = small.add("MatMul", [value, weight], f"{name}.product")
    return small.add(join, [product, bias], name)


def attention(tokens, *, int8=False, swapped=False, masked=False, shared=False, scale=WIDTH**-0.25, long_way=True):
    """Return attention as exported from a packed linear map; keywords change it to patterns that are not fused."""
    small = Small([], {})
    packed = dense(small, "x", "linear", SIZE, 3 * SIZE, int8=int8)
    five = small.constant("five", np.array([-1, tokens, 3, HEADS, WIDTH]))
    permuted = small.add("Transpose", [small.add("Reshape", [packed, five], "view")], "permute", perm=[2, 0, 3, 1, 4])
    axis = small.constant("axis", np.array([0]))
    ends = [small.constant(f"number{i}", np.array([i])) for i in range(4)]
    parts = []
    for i, part in enumerate(("q", "k", "v")):
        cut = small.add("Slice", [permuted, ends[i], ends[i + 1], axis], f"{part}.cut")
        parts.append(small.add("Squeeze", [cut, axis], part))
    q, k, v = [parts[1], parts[0], parts[2]] if swapped else parts
    if long_way:
        three = small.constant("three", np.array([-1, tokens, WIDTH]))
        four = small.constant("four", np.array([-1, HEADS, WIDTH, tokens]))
        flat = small.add("Transpose", [small.add("Reshape", [k, three], "k.flat")], "k.turned", perm=[0, 2, 1])
        k = small.add("Reshape", [flat, four], "k.T")
    else:
        k = small.add("Transpose", [k], "k.T", perm=[0, 1, 3, 2])
    factor = small.constant("factor", np.float32(scale))
    scores = small.add("MatMul", [small.add("Mul", [q, factor], "q.s"), small.add("Mul", [k, factor], "k.s")], "scores")
    if masked:
        mask = small.constant("mask", np.triu(np.full((tokens, tokens), -9, np.float32), 1))
        scores = small.add("Add", [scores, mask], "masked")
    weights = small.add("Softmax", [scores], "weights", axis=-1)
    mixed = small.add("Transpose", [small.add("MatMul", [weights, v], "mixed")], "back", perm=[0, 2, 1, 3])
    y = small.add("Reshape", [mixed, small.constant("joined", np.array([-1, tokens, SIZE]))], "y")
    outputs = [(y, ["batch", tokens, SIZE])]
    if shared:
        outputs.append((weights, ["batch", HEADS, tokens, tokens]))
    return small.model([("x", ["batch", tokens, SIZE])], outputs)


def kinds(model):
    return Counter(node.op_type for node in model.graph.node)


def both(model, folder, tokens):
    """Return the outputs of the fused copy and of the portable file for a batch of three."""
    onnx.save(model, folder / "model.onnx")
    feeds = {"x": np.random.default_rng(1).normal(size=(3, tokens, SIZE)).astype(np.float32)}
    with onnxruntime.load(folder / "model.onnx", ONE) as plain:
        expected = plain.run(feeds)
    with onnxruntime_fused.load(onnxruntime_fused.build(folder / "model.onnx", folder, ONE), ONE) as engine:
        return engine.run(feeds), expected


@pytest.mark.parametrize("long_way", [True, False], ids=["keys in three axes", "keys in four"])
@pytest.mark.parametrize("scale", [WIDTH**-0.25, 0.4])
def test_many_tokens_become_multi_head_attention(tmp_path, long_way, scale):
    model = attention(600, long_way=long_way, scale=scale)
    found, expected = both(model, tmp_path, 600)
    np.testing.assert_allclose(found["y"], expected["y"], rtol=ROUNDING, atol=ROUNDING)
    assert graphs.fuse(model) == {"MultiHeadAttention": 1}
    assert kinds(model) == {"MatMul": 1, "Add": 1, "Split": 1, "MultiHeadAttention": 1}
    assert {each.name for each in model.graph.initializer} == {"linear.w", "linear.bias"}


def test_few_tokens_in_int8_become_quantized_attention(tmp_path):
    model = attention(5, int8=True)
    found, expected = both(model, tmp_path, 5)
    np.testing.assert_allclose(found["y"], expected["y"], rtol=ROUNDING, atol=ROUNDING)
    assert graphs.fuse(model) == {"QAttention": 1}
    assert kinds(model) == {"QuantizeLinear": 1, "QAttention": 1}


def test_many_tokens_in_int8_fuse_product_and_attention_separately(tmp_path):
    model = attention(600, int8=True)
    found, expected = both(model, tmp_path, 600)
    np.testing.assert_allclose(found["y"], expected["y"], rtol=ROUNDING, atol=ROUNDING)
    assert graphs.fuse(model) == {"MatMulIntegerToFloat": 1, "MultiHeadAttention": 1}


@pytest.mark.parametrize(
    "changed",
    [{"swapped": True}, {"masked": True}, {"shared": True}, {"tokens": 5}],
    ids=["queries and keys swapped", "a mask", "weights read elsewhere", "few tokens in float"],
)
def test_other_or_slower_patterns_are_not_fused(changed):
    model = attention(**{"tokens": 600} | changed)
    before = model.SerializeToString()
    assert not graphs.fuse(model)
    assert kinds(model) == kinds(onnx.ModelProto.FromString(before))


def test_graph_with_branches_is_not_fused():
    model = attention(600)
    body = helper.make_graph(
        [helper.make_node("Identity", ["linear"], ["inside"])],
        "body",
        [],
        [helper.make_tensor_value_info("inside", TensorProto.FLOAT, None)],
    )
    yes = helper.make_node("Constant", [], ["yes"], value=numpy_helper.from_array(np.array(True)))
    model.graph.node.extend([yes, helper.make_node("If", ["yes"], ["z"], then_branch=body, else_branch=body)])
    assert not graphs.fuse(model)


def test_other_scales_are_not_fused_to_quantized_attention():
    model = attention(5, int8=True, scale=0.4)
    assert graphs.fuse(model) == {"MatMulIntegerToFloat": 1}


def test_wide_model_is_not_fused_to_quantized_attention(monkeypatch):
    monkeypatch.setattr(graphs, "NARROW", SIZE - 1)
    assert graphs.fuse(attention(5, int8=True)) == {"MatMulIntegerToFloat": 1}


@exact_int8
@pytest.mark.parametrize("join", ["Add", "Sub"])
@pytest.mark.parametrize("rank", [2, 3], ids=["a head", "tokens"])
def test_quantized_product_is_fused_with_its_bias(tmp_path, rank, join):
    small = Small([], {})
    value, shape = "x", ["batch", *[4] * (rank - 2), SIZE]
    y = dense(small, value, "linear", SIZE, 10, int8=True, join=join)
    model = small.model([("x", ["batch", 4, SIZE][:1] + shape[1:])], [(y, [*shape[:-1], 10])])
    onnx.save(model, tmp_path / "model.onnx")
    feeds = {"x": np.random.default_rng(1).normal(size=(3, *shape[1:])).astype(np.float32)}
    with onnxruntime.load(tmp_path / "model.onnx", ONE) as plain:
        expected = plain.run(feeds)[y]
    with onnxruntime_fused.load(onnxruntime_fused.build(tmp_path / "model.onnx", tmp_path, ONE), ONE) as engine:
        np.testing.assert_allclose(engine.run(feeds)[y], expected, rtol=EXACT, atol=EXACT)
    assert graphs.fuse(model) == {"MatMulIntegerToFloat": 1}
    assert kinds(model) == {"QuantizeLinear": 1, "MatMulIntegerToFloat": 1}


def test_float_product_is_not_fused():
    small = Small([], {})
    y = dense(small, "x", "linear", SIZE, 10, int8=False)
    model = small.model([("x", ["batch", SIZE])], [(y, ["batch", 10])])
    assert not graphs.fuse(model)
    assert [each.domain for each in model.opset_import] == [""]


def norm(power=2.0, axis=-1, other=False, weights=(SIZE,)):
    """Return a root mean square norm; keywords change it to patterns that are not fused."""
    small = Small([], {})
    two, last, epsilon = (small.constant(*each) for each in (("two", np.float32(power)), ("last", np.array([axis])),
                                                              ("epsilon", np.float32(1e-3))))  # fmt: skip
    mean = small.add("ReduceMean", [small.add("Pow", ["x", two], "squares"), last], "mean", keepdims=1)
    root = small.add("Sqrt", [small.add("Add", [mean, epsilon], "shifted")], "root")
    value = small.add("Abs", ["x"], "positive") if other else "x"
    normed = small.add("Mul", [value, small.add("Reciprocal", [root], "inverse")], "normed")
    weight = small.constant("weight", np.random.default_rng(0).normal(size=weights).astype(np.float32))
    y = small.add("Mul", [weight, normed], "y")
    return small.model([("x", ["batch", SIZE, SIZE])], [(y, ["batch", SIZE, SIZE])])


def test_rms_norm_is_fused(tmp_path):
    model = norm()
    found, expected = both(model, tmp_path, SIZE)
    np.testing.assert_allclose(found["y"], expected["y"], rtol=ROUNDING, atol=ROUNDING)
    assert graphs.fuse(model) == kinds(model) == {"SimplifiedLayerNormalization": 1}
    assert {each.name for each in model.graph.initializer} == {"weight"}


@pytest.mark.parametrize(
    "changed",
    [{"power": 4.0}, {"axis": 1}, {"other": True}, {"weights": (SIZE, 1)}],
    ids=["another power", "over tokens", "of another value", "a weight for each token"],
)
def test_other_norms_are_not_fused(tmp_path, changed):
    model = norm(**changed)
    assert not graphs.fuse(model)


def test_portable_file_stays_unchanged(tmp_path):
    model = attention(600)
    onnx.save(model, tmp_path / "model.onnx")
    before = (tmp_path / "model.onnx").read_bytes()
    assert onnxruntime_fused.build(tmp_path / "model.onnx", tmp_path, ONE) == tmp_path / "model.fused.onnx"
    assert (tmp_path / "model.onnx").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.fused.onnx", "model.onnx"]


def test_large_weights_go_to_a_separate_file(tmp_path, monkeypatch):
    monkeypatch.setattr(onnxruntime_fused, "EXTERNAL_ABOVE", 1)
    for _ in range(2):  # the second build overwrites the files of the first
        found, expected = both(attention(600), tmp_path, 600)
        np.testing.assert_allclose(found["y"], expected["y"], rtol=ROUNDING, atol=ROUNDING)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "model.fused.onnx",
        "model.fused.onnx.data",
        "model.onnx",
    ]
    weights = sum(array.nbytes for array in map(numpy_helper.to_array, attention(600).graph.initializer))
    assert (tmp_path / "model.fused.onnx.data").stat().st_size < 2 * weights


def test_the_same_file_gives_the_same_engine(tmp_path):
    onnx.save(attention(5, int8=True), tmp_path / "model.onnx")
    first = onnxruntime_fused.build(tmp_path / "model.onnx", tmp_path, ONE).read_bytes()
    assert onnxruntime_fused.build(tmp_path / "model.onnx", tmp_path, ONE).read_bytes() == first


def test_a_failed_build_leaves_nothing(tmp_path):
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"this is no model")
    with pytest.raises(BuildError, match=r"^broken\.onnx cannot be fused for ONNX Runtime: .*\.$"):
        onnxruntime_fused.build(broken, tmp_path, ONE)
    assert list(tmp_path.iterdir()) == [broken]
