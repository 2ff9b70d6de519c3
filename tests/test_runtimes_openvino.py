"""What the target openvino promises beyond the contract: float32 stays float32."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from runtimes import openvino as target
from runtimes.base import BuildError, BuildOptions

pytest.importorskip("openvino", reason="openvino is not installed")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """y = x w, with a weight whose values float16 cannot hold."""
    folder = tmp_path_factory.mktemp("openvino")
    weight = np.full((64, 64), 1 + 2**-20, np.float32)
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 64]) for name in "xy"]
    tensors = [numpy_helper.from_array(weight, "w")]
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "small", ends[:1], ends[1:], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), folder / "m.onnx")
    return target.build(folder / "m.onnx", folder, BuildOptions())


def test_weights_are_stored_in_float32(built):
    assert built.with_suffix(".bin").stat().st_size >= 64 * 64 * 4


def test_products_are_computed_in_float32(built):
    x = np.zeros((1, 64), np.float32)
    x[0, 0] = 1 + 2**-20  # bfloat16 has 8 bits of mantissa, float16 11: either would round this to 1
    with target.load(built, BuildOptions(threads=1)) as engine:
        (y,) = engine.run({"x": x}).values()
    np.testing.assert_allclose(y, np.full((1, 64), (1 + 2**-20) ** 2), rtol=2**-23)


def test_what_openvino_cannot_read_is_one_sentence(tmp_path):
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    with pytest.raises(BuildError, match=r"^OpenVINO cannot read broken\.onnx: .*\.$") as caught:
        target.build(tmp_path / "broken.onnx", tmp_path, BuildOptions())
    assert "\n" not in str(caught.value)
    assert not (tmp_path / target.FILE).exists()
