"""Tests of NNCF int8: a valid file close to float, calibration by single samples, and silence."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

from compressor.errors import CompressorError
from compressor.quantize.nncf import NncfError, to_int8
from tests.onnx_files import K, count, feeds_of, mlp, node, normal, run, save
from tests.processors import exact_int8

pytest.importorskip("onnxruntime")


@exact_int8
def test_result_is_close_to_float_and_silent(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("nncf", reason="nncf is not installed")
    path, x = mlp(tmp_path / "f.onnx"), normal(6, 5, K)
    to_int8(path, tmp_path / "q.onnx", feeds_of(x[:4], x[4:]))
    assert capfd.readouterr() == ("", "")
    assert count(tmp_path / "q.onnx", "QuantizeLinear") >= 2
    exact, rounded = run(path, x)[0], run(tmp_path / "q.onnx", x)[0]
    # 8 bits on both sides of two products in a row.
    assert 0 < np.linalg.norm(rounded - exact) / np.linalg.norm(exact) < 0.05
    assert run(tmp_path / "q.onnx", normal(3, 7, K))[0].shape == (3, 7, exact.shape[-1])


class Fake:
    """A replacement of the nncf package that records its arguments."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, failure: str = "") -> None:
        self.samples: list[Any] = []
        self.options: dict[str, Any] = {}
        self.failure = failure
        package = SimpleNamespace(
            quantize=self.quantize, Dataset=list, ModelType=SimpleNamespace(TRANSFORMER="transformer")
        )
        monkeypatch.setitem(sys.modules, "nncf", package)

    def quantize(self, model: onnx.ModelProto, samples: list[Any], **options: Any) -> onnx.ModelProto:
        print("Statistics collection")  # in place of NNCF's progress bars
        logging.getLogger("nncf").warning("every step")
        if self.failure:
            raise ZeroDivisionError(self.failure)
        self.samples, self.options = samples, options
        return model


def test_all_samples_are_passed_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    fake, x = Fake(monkeypatch), normal(6, 5, K)
    to_int8(mlp(tmp_path / "f.onnx"), tmp_path / "q.onnx", feeds_of(x[:4], x[4:]))
    assert fake.options == {"model_type": "transformer", "subset_size": 6}
    np.testing.assert_array_equal(np.stack([sample["x"] for sample in fake.samples]), x[:, None])
    assert (tmp_path / "q.onnx").is_file()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("disabled", [logging.NOTSET, logging.ERROR])
def test_failure_raises_and_logging_is_restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disabled: int) -> None:
    Fake(monkeypatch, "no such operator.\nsecond line")
    path = save(tmp_path / "f.onnx", [node("Relu", ["x"], "y")], {}, ["y"])
    before = logging.root.manager.disable
    logging.disable(disabled)
    try:
        with pytest.raises(NncfError, match=r"^NNCF cannot quantize f\.onnx: no such operator\.$"):
            to_int8(path, tmp_path / "q.onnx", feeds_of(normal(1, 2, K)))
        assert logging.root.manager.disable == disabled
    finally:
        logging.disable(before)
    assert issubclass(NncfError, CompressorError)
    assert not (tmp_path / "q.onnx").exists()


def test_a_package_that_cannot_be_imported_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nncf", None)  # the import raises an ImportError
    path = save(tmp_path / "f.onnx", [node("Relu", ["x"], "y")], {}, ["y"])
    with pytest.raises(NncfError, match=r"^NNCF cannot quantize f\.onnx: import of nncf halted"):
        to_int8(path, tmp_path / "q.onnx", feeds_of(normal(1, 2, K)))
