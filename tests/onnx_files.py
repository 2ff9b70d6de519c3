"""Small ONNX files and helpers for the tests of rewrites of ONNX files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

Array = npt.NDArray[np.float32]
Feeds = Callable[[], Iterator[Mapping[str, npt.NDArray[Any]]]]
K, H, N = 32, 48, 24


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def save(path: Path, nodes: list[onnx.NodeProto], weights: Mapping[str, npt.NDArray[Any]], outputs: list[str]) -> Path:
    """Write a model with input x [batch, rows, K] and outputs of unknown shape to `path`."""
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "rows", K])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", "rows", None]) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    helper.set_model_props(model, {"made by": "a test"})
    onnx.checker.check_model(model)
    onnx.save(model, str(path))
    return path


def node(op: str, inputs: list[str], output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs, [output], name=f"node_{output}", **attributes)


MLP_WEIGHTS = {"w1": normal(K, H, seed=1), "b1": normal(H, seed=2), "w2": normal(H, N, seed=3), "b2": normal(N, seed=4)}


def mlp(path: Path) -> Path:
    nodes = [
        node("MatMul", ["x", "w1"], "h0"),
        node("Add", ["h0", "b1"], "h1"),
        node("Relu", ["h1"], "h2"),
        node("MatMul", ["h2", "w2"], "y0"),
        node("Add", ["y0", "b2"], "y"),
    ]
    return save(path, nodes, MLP_WEIGHTS, ["y"])


def feeds_of(*batches: Array) -> Feeds:
    return lambda: iter([{"x": batch} for batch in batches])


def run(path: Path, x: Array) -> list[Array]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return [np.asarray(value) for value in session.run(None, {"x": x})]


def initializers(path: Path) -> dict[str, npt.NDArray[Any]]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(str(path)).graph.initializer}


def count(path: Path, op: str) -> int:
    return sum(n.op_type == op for n in onnx.load(str(path)).graph.node)


def round_weight(w: Array) -> Array:
    """Round to symmetric int8 per column; a reference independent of the tested module."""
    scale = np.abs(w).max(axis=0, keepdims=True) / 127
    return np.asarray(np.round(w / scale) * scale, np.float32)


def round_activation(x: Array, low: float, high: float, *, symmetric: bool) -> Array:
    low, high = min(low, 0.0), max(high, 0.0)
    if symmetric:
        scale = max(-low, high) / 127
        return np.asarray(np.clip(np.round(x / scale), -128, 127) * scale, np.float32)
    scale = (high - low) / 255
    zero = np.round(-low / scale)
    return np.asarray((np.clip(np.round(x / scale) + zero, 0, 255) - zero) * scale, np.float32)


def outlier(path: Path) -> Path:
    """Write four linear maps; the input of `bad` has one channel a thousand times larger than the others."""
    spread = np.ones(K, np.float32)
    spread[0] = 1000
    weights = {f"w{i}": normal(K, K, seed=i) / np.float32(np.sqrt(K)) for i in range(4)}
    weights["w2"][0] /= 1000
    nodes = [
        node("MatMul", ["x", "w0"], "a"),
        node("MatMul", ["a", "w1"], "b"),
        node("Mul", ["b", "spread"], "wide"),
        node("MatMul", ["wide", "w2"], "bad"),
        node("MatMul", ["bad", "w3"], "y"),
    ]
    return save(path, nodes, {**weights, "spread": spread}, ["y"])


def relative_loss(path: Path, x: Array) -> Callable[[Path], float]:
    (exact,) = run(path, x)
    return lambda file: float(np.linalg.norm(run(file, x)[0] - exact) / np.linalg.norm(exact))


def normed_parts() -> tuple[list[onnx.NodeProto], dict[str, npt.NDArray[Any]]]:
    """Return nodes and weights of a LayerNorm with large channels, two linear maps of it, and one of their sum."""
    scale = np.random.default_rng(7).uniform(0.5, 1.5, K).astype(np.float32)
    scale[[3, 11]] *= 40
    nodes = [
        node("LayerNormalization", ["x", "scale", "shift"], "n"),
        node("MatMul", ["n", "w1"], "a"),
        node("MatMul", ["n", "w2"], "b"),
        node("Add", ["a", "b"], "sum"),
        node("Tanh", ["sum"], "t"),
        node("MatMul", ["t", "w3"], "y"),
    ]
    weights = {"scale": scale, "shift": normal(K, seed=8)}
    weights |= {f"w{i}": normal(*shape, seed=i) / 8 for i, shape in ((1, (K, H)), (2, (K, H)), (3, (H, N)))}
    return nodes, weights


def normed(path: Path) -> Path:
    return save(path, *normed_parts(), ["y"])
