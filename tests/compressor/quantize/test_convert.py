"""Tests of conversion: the quantizer of each precision, the options passed to it, and the choice of a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from compressor.errors import CompressorError
from compressor.quantize.convert import OURS, choose_conversion, convert, usable_quantizers
from compressor.quantize.precision import Converted, Source
from compressor.target.saturation import int8_saturates
from runtimes.base.protocols import Int8Style
from tests.onnx_files import Feeds, K, count, feeds_of, initializers, mlp, node, normal, run, save

pytest.importorskip("onnxruntime")

CPU = Int8Style(activations="uint8", convolutions=False)
GPU = Int8Style(activations="int8", convolutions=True, quantizers=(OURS, "nncf"))


def converted(path: Path, precision: str, style: Int8Style = CPU, **options: Any) -> Converted:
    return convert(path, path.with_name("out.onnx"), precision, style, feeds_of(normal(4, 5, K)), **options)


@pytest.mark.parametrize(
    ("precision", "by", "op", "nodes"),
    [
        ("fp16", OURS, "Cast", 2),
        ("int8", OURS, "QuantizeLinear", 2),
        ("int8-dynamic", OURS, "MatMulInteger", 2),
        ("int8-weight-only", "onnxruntime", "MatMulNBits", 2),
        ("int4", "onnxruntime", "MatMulNBits", 2),
        ("int2", OURS, "MatMulNBits", 2),
    ],
)
def test_each_precision_is_written_and_measured(tmp_path: Path, precision: str, by: str, op: str, nodes: int) -> None:
    path, measured, x = mlp(tmp_path / "f.onnx"), list[Path](), normal(2, 5, K)

    def loss(file: Path) -> float:
        measured.append(file)
        assert file.is_file()
        return 0.05  # a tenth of the allowed loss, so the search stops

    facts = converted(path, precision, loss=loss)
    assert (facts.precision, facts.by, facts.loss, facts.tried) == (precision, by, 0.05, ())
    assert measured == [tmp_path / "out.onnx"]
    assert count(measured[0], op) == nodes
    assert (facts.quantized is None) == precision.startswith(("fp", "int8-weight-only", "int4", "int2"))
    exact, low = run(path, x)[0], run(measured[0], x)[0]
    # The error of 4 bits is about a tenth of a weight, that of 2 bits a third to a half; that of 8 bits 0.09 where sums
    # of products saturate at 16 bits.
    allowed = {"int4": 0.2, "int2": 0.7}.get(
        precision, 0.15 if precision.startswith("int8") and int8_saturates() else 0.03
    )
    assert 0 < np.linalg.norm(low - exact) / np.linalg.norm(exact) < allowed
    assert converted(path, precision).loss is None


def test_int8_follows_the_style_of_the_target(tmp_path: Path) -> None:
    nodes = [node("Conv", ["x", "kernel"], "c"), node("MatMul", ["c", "w"], "y")]
    weights = {"kernel": normal(5, 5, 1), "w": normal(K, K)}
    path = save(tmp_path / "f.onnx", nodes, weights, ["y"])
    for style, quantized, kind in ((CPU, 1, np.uint8), (GPU, 2, np.int8)):
        facts = converted(path, "int8", style)
        assert facts.quantized is not None
        assert (facts.quantized.nodes, facts.quantized.mode) == (quantized, "static")
        assert initializers(tmp_path / "out.onnx")["int8/c/zero_point"].dtype == kind
    dynamic = converted(path, "int8-dynamic", GPU).quantized  # always uint8, and no convolutions
    assert dynamic is not None
    assert (dynamic.nodes, dynamic.mode, dynamic.activations) == (1, "dynamic", "uint8")


@pytest.mark.parametrize(("precision", "shared"), [("int8", False), ("int8-dynamic", True)])
def test_rows_of_a_batch_share_their_scales_in_int8_dynamic_alone(tmp_path: Path, precision: str, shared: bool) -> None:
    """So says a limitation: a row beside a much larger one loses its small values, unless the scale is a constant."""
    path, x = mlp(tmp_path / "f.onnx"), normal(1, 5, K)
    converted(path, precision)
    alone = run(tmp_path / "out.onnx", x)[0]
    beside = run(tmp_path / "out.onnx", np.concatenate([x, 50 * x]))[0]
    error = np.linalg.norm(alone[0] - beside[0]) / np.linalg.norm(alone)
    assert error > 0.1 if shared else error < 1e-6


def test_options_are_passed_to_the_quantizer(tmp_path: Path) -> None:
    path, messages = mlp(tmp_path / "f.onnx"), list[str]()
    losses = iter([3.0, 0.2])
    facts = converted(
        path, "int8", calibration="entropy", loss=lambda _: next(losses), max_loss=0.25, progress=messages.append
    )
    assert facts.quantized is not None
    assert [tried.method for tried in facts.quantized.calibrations] == ["entropy"]
    assert [attempt.loss for attempt in facts.quantized.attempts] == [3.0, 0.2]
    assert (facts.loss, len(facts.quantized.kept)) == (0.2, 1)
    assert any("samples" in text for text in messages)


def test_feeds_are_used_for_calibration(tmp_path: Path) -> None:
    path, seen = mlp(tmp_path / "f.onnx"), list[int]()

    def feeds() -> Any:
        for size in (3, 2):
            seen.append(size)
            yield {"x": normal(size, 5, K)}

    facts = convert(path, tmp_path / "out.onnx", "int8", CPU, feeds, calibration="typical")
    assert facts.quantized is not None
    assert (facts.quantized.samples, seen) == (5, [3, 2])


def test_other_quantizers_are_used_only_for_int8_and_if_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"nncf": object()}
    monkeypatch.setattr("compressor.quantize.convert.util.find_spec", installed.get)
    assert usable_quantizers("int8", GPU) == (OURS, "nncf")
    assert usable_quantizers("int8", CPU) == (OURS,)
    assert usable_quantizers("int8", GPU, "entropy") == (OURS,), "nncf would choose the ranges in its own way"
    for precision in ("fp16", "int8-dynamic", "int4"):
        assert usable_quantizers(precision, GPU) == (OURS,)
    installed.clear()
    assert usable_quantizers("int8", GPU) == (OURS,)


def test_other_quantizer_writes_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(source: Path, destination: Path, feeds: Feeds) -> None:
        assert [batch["x"].shape for batch in feeds()] == [(4, 5, K)]
        onnx.save(onnx.load(str(source)), str(destination))

    monkeypatch.setattr("compressor.quantize.convert.nncf_to_int8", fake)
    facts = converted(mlp(tmp_path / "f.onnx"), "int8", quantizer="nncf", loss=lambda _: 0.75)
    assert facts == Converted("int8", "nncf", 0.75)
    assert (tmp_path / "out.onnx").is_file()


def test_model_without_weights_raises(tmp_path: Path) -> None:
    path = save(tmp_path / "f.onnx", [node("Relu", ["x"], "y")], {}, ["y"])
    for precision in ("fp16", "int8", "int8-dynamic", "int4"):
        with pytest.raises(CompressorError, match=r"f\.onnx has no .*nothing to .*; choose another precision"):
            converted(path, precision)


# ---- choice of a file


def files(**losses: float | None) -> dict[Source, Converted]:
    return {Source(Path(name), "int8"): Converted("int8", name, loss) for name, loss in losses.items()}


@pytest.mark.parametrize(
    ("losses", "times", "best"),
    [
        ({"a": 0.1, "b": 0.4, "c": 2.0}, {"a": 3.0, "b": 2.0, "c": 1.0}, "b"),  # the fastest within the limit
        (
            {"a": 0.6, "b": 0.9, "c": 0.7},
            {"a": 3.0, "b": 1.0, "c": 2.0},
            "a",
        ),  # none is within the limit: the least loss
        ({"a": None, "b": None}, {"a": 3.0, "b": 2.0}, "b"),  # no quality may be stated
        ({"a": 0.5, "b": float("inf")}, {"a": 3.0, "b": 2.0}, "a"),
    ],
)
def test_fastest_file_within_the_limit_is_kept(
    losses: dict[str, float | None], times: dict[str, float], best: str
) -> None:
    made = files(**losses)
    milliseconds = {source: times[source.path.name] for source in made}
    source, facts = choose_conversion(made, milliseconds, 0.5)
    assert (source.path.name, facts.by, facts.loss) == (best, best, losses[best])
    assert facts.tried == tuple(
        {"by": name, "loss": loss, "milliseconds": times[name]} for name, loss in losses.items()
    )
