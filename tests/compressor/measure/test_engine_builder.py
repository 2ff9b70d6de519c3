"""Engine builder: the source and the folder of each engine, and the files in the output folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from compressor.quantize.precision import Source
from tests.engines import Target, builder
from tests.onnx_files import K, mlp, normal

pytest.importorskip("onnxruntime")


def test_the_targets_own_precisions_get_calibration_samples(tmp_path: Path) -> None:
    target = Target()
    engine_builder, path = builder(tmp_path, target), mlp(tmp_path / "f.onnx")
    built = [engine_builder.build(Source(path, precision)) for precision in ("fp32", "bf16", "int8")]
    assert len({engine.parent for engine in built}) == 3  # no engine overwrites another
    assert [options.precision for _, _, options in target.builds] == ["fp32", "bf16", "int8"]
    samples = [options.samples for _, _, options in target.builds]
    assert samples[0] is None
    assert samples[2] is None
    assert samples[1] is not None
    for _ in range(2):  # a fresh stream each time
        np.testing.assert_array_equal(np.concatenate([feeds["x"] for feeds in samples[1]()]), normal(40, 5, K))


def test_only_engines_from_exported_programs_are_kept(tmp_path: Path) -> None:
    for suffix, builds in ((".onnx", 2), (".pt2", 1)):
        target = Target(suffix)
        (tmp_path / f"m{suffix}").write_bytes(b"model")
        engine_builder = builder(tmp_path, target)
        assert engine_builder.build(Source(tmp_path / f"m{suffix}")) == engine_builder.build(
            Source(tmp_path / f"m{suffix}")
        )
        assert len(target.builds) == builds
        engine_builder.build(Source(tmp_path / f"m{suffix}", "bf16"))
        assert len(target.builds) == builds + 1


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_the_output_folder_gets_the_onnx_file_if_there_is_one(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"m{suffix}").write_bytes(b"model")
    (tmp_path / "out").mkdir()
    target = Target(suffix)
    source, engine = builder(tmp_path, target).ship(Source(tmp_path / f"m{suffix}", "bf16"), tmp_path / "out")
    assert engine == tmp_path / "out" / "engine"
    assert engine.read_bytes() == b"model"
    onnx_file = tmp_path / "out" / "model.onnx"
    assert source == Source(onnx_file if suffix == ".onnx" else tmp_path / "m.pt2", "bf16")
    assert onnx_file.exists() is (suffix == ".onnx")
    assert target.builds[0][0] == source.path  # built from the file in the output folder


def test_a_temporary_builder_leaves_no_engine_behind(tmp_path: Path) -> None:
    """An engine in a removed folder must not be returned again."""
    (tmp_path / "m.pt2").write_bytes(b"model")
    engine_builder = builder(tmp_path, Target(".pt2"))
    with engine_builder.temporary() as temporary:
        engine = temporary.build(Source(tmp_path / "m.pt2"))
        assert engine.is_file()
    assert not engine.exists()
    assert engine_builder.build(Source(tmp_path / "m.pt2")).is_file()
