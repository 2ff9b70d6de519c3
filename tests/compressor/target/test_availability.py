"""Targets are checked before the search; the errors state an alternative."""

from __future__ import annotations

import pytest

from compressor.quantize.precision import PrecisionError
from compressor.settings import Settings
from compressor.target.availability import AvailabilityError, check_target
from runtimes.base.registry import runtime

pytest.importorskip("onnxruntime")


@pytest.mark.parametrize(
    ("target", "precision", "words"),
    [
        ("openvino", "bf16", "--precision bf16 can only be measured where openvino runs; .* one of: fp32, int8"),
        ("openvino", "auto", "--precision auto can only be measured where openvino runs"),
        ("tensorrt", "auto", "--precision auto can only be measured where tensorrt runs; .* one of: fp32, fp16, int8"),
    ],
)
def test_precisions_that_only_the_device_can_measure_are_not_deferred(target: str, precision: str, words: str) -> None:
    with pytest.raises(AvailabilityError, match=words):
        check_target(Settings(target=target, precision=precision, defer_build=True))


def test_engines_from_exported_programs_are_not_deferred(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime("openvino"), "source", ".pt2")
    with pytest.raises(
        AvailabilityError,
        match="target openvino needs the torch model, so its engines are built on this machine; leave out --defer",
    ):
        check_target(Settings(target="openvino", defer_build=True))


def test_a_precision_that_is_written_here_is_deferred() -> None:
    target, options = check_target(Settings(target="tensorrt", precision="fp16", defer_build=True))
    assert (target.name, options.device) == ("onnxruntime", "cpu")
    assert "fp16" in target.precisions["cpu"]


def test_a_precision_that_the_target_lacks_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(PrecisionError, match="target onnxruntime has no fp16 on cpu"):
        check_target(Settings(precision="fp16"))
