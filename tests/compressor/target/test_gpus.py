"""Tests of the choice of GPUs to build for, on a target whose library is replaced."""

import pytest

from compressor.errors import SettingsError
from compressor.pipeline.unused_options import refuse_unused
from compressor.settings import Settings
from compressor.target.availability import check_target
from compressor.target.gpus import gpus_ahead, measured_by_stand_in
from runtimes.base.protocols import RuntimeUnavailable
from runtimes.tensorrt import target as tensorrt
from runtimes.tensorrt_rtx import target as rtx


@pytest.fixture(autouse=True)
def library(monkeypatch):
    """A release that knows two GPUs, on a machine without any."""
    monkeypatch.setattr(rtx, "missing_builder", lambda: None)
    monkeypatch.setattr(rtx, "missing", lambda: "there is no NVIDIA GPU")
    monkeypatch.setattr(rtx, "gpus", lambda: ("sm86", "sm89"))
    monkeypatch.setattr(rtx, "builder_version", lambda: "TensorRT for RTX 1.7")


def rtx_settings(**options):
    return Settings(target="tensorrt_rtx", **options)


def test_without_a_gpu_all_that_the_release_knows():
    found = gpus_ahead(rtx_settings())
    assert (found.target, found.names, found.named) == (rtx, ("sm86", "sm89"), False)


def test_with_a_gpu_its_engine_is_built_as_for_any_target(monkeypatch):
    monkeypatch.setattr(rtx, "missing", lambda: None)
    assert gpus_ahead(rtx_settings()) is None
    assert gpus_ahead(rtx_settings(gpu="sm89")).names == ("sm89",)


def test_names_are_read_once_each_in_their_order():
    found = gpus_ahead(rtx_settings(gpu=" SM89, sm86,sm89"))
    assert (found.names, found.named) == (("sm89", "sm86"), True)
    assert gpus_ahead(rtx_settings(gpu="sm86 + SM89,sm86")).names == ("sm86+sm89", "sm86")


@pytest.mark.parametrize(
    ("gpu", "error", "message"),
    [
        ("rtx4090", SettingsError, "found --gpu 'rtx4090'; expected compute capabilities"),
        ("sm86,", SettingsError, "found --gpu ''"),
        ("sm86+", SettingsError, r"found --gpu 'sm86\+'; .* or by \+ for those that share an engine"),
        ("sm86+sm90", RuntimeUnavailable, "found --gpu sm90|Found --gpu sm90"),
        (
            "sm90",
            RuntimeUnavailable,
            r"sm90, which TensorRT for RTX 1\.7 does not build for; .* of: sm86, sm89",
        ),
    ],
)
def test_unknown_gpus_are_refused(gpu, error, message):
    with pytest.raises(error, match=message):
        gpus_ahead(rtx_settings(gpu=gpu))


def test_other_targets_deferred_builds_and_a_missing_library_build_nothing_ahead(monkeypatch):
    assert gpus_ahead(Settings()) is None
    assert gpus_ahead(rtx_settings(defer_build=True)) is None
    monkeypatch.setattr(rtx, "missing_builder", lambda: "TensorRT for RTX is not installed; pip install it")
    assert gpus_ahead(rtx_settings()) is None  # check_target() says what to install
    with pytest.raises(RuntimeUnavailable, match="there is no NVIDIA GPU, or export with --defer-build"):
        check_target(rtx_settings())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latency": 5.0}, "found --latency, but the engines of tensorrt_rtx are built here but run elsewhere"),
        ({"generate": "16:8"}, r"give --generate 16:0"),
    ],
)
def test_goals_that_need_the_gpu_are_refused(options, message):
    with pytest.raises(SettingsError, match=message):
        gpus_ahead(rtx_settings(**options))


def test_engines_for_elsewhere_are_measured_by_onnx_runtime():
    pytest.importorskip("onnxruntime", reason="it is the stand-in")
    target, options = check_target(measured_by_stand_in(rtx_settings(precision="int8")))
    assert (target.name, options.device, target.int8) == ("onnxruntime", "cpu", rtx.int8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpu": "sm89"}, "but target onnxruntime builds for the device that it runs on; give --target tensorrt_rtx"),
        ({"gpu": "sm89", "target": "tensorrt_rtx", "defer_build": True}, "leave out --defer-build"),
        ({"threads": 2, "target": "tensorrt_rtx"}, "engines of tensorrt_rtx run on the GPU"),
    ],
)
def test_options_without_effect_are_refused(options, message):
    with pytest.raises(SettingsError, match=message):
        refuse_unused(Settings(**options))


@pytest.mark.parametrize(("reason", "advice"), [(None, r"a GPU\."), ("pip install x", r"a GPU \(pip install x\)")])
def test_tensorrt_without_a_gpu_names_the_target_that_works_here(monkeypatch, reason, advice):
    monkeypatch.setattr(tensorrt, "missing", lambda: "there is no NVIDIA driver")
    monkeypatch.setattr(rtx, "missing_builder", lambda: reason)
    with pytest.raises(RuntimeUnavailable, match=f"--target tensorrt_rtx, which builds engines here without {advice}"):
        check_target(Settings(target="tensorrt"))
