"""The engine builder: which file an engine is built from, where it lies, and what the output folder gets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from compressor.quantize.precision import Source
from tests.engines import Target, builder
from tests.onnx_files import K, mlp, normal

pytest.importorskip("onnxruntime")


def test_a_target_that_makes_a_precision_itself_is_given_samples_for_it(tmp_path: Path) -> None:
    target = Target()
    made, path = builder(tmp_path, target), mlp(tmp_path / "f.onnx")
    built = [made.build(Source(path, precision)) for precision in ("fp32", "bf16", "int8")]
    assert len({each.parent for each in built}) == 3  # no engine lies over another's
    assert [options.precision for _, _, options in target.asked] == ["fp32", "bf16", "int8"]
    samples = [options.samples for _, _, options in target.asked]
    assert samples[0] is None
    assert samples[2] is None
    assert samples[1] is not None
    for _ in range(2):  # a fresh stream each time
        np.testing.assert_array_equal(np.concatenate([each["x"] for each in samples[1]()]), normal(40, 5, K))


def test_only_engines_from_exported_programs_are_kept(tmp_path: Path) -> None:
    for suffix, builds in ((".onnx", 2), (".pt2", 1)):
        target = Target(suffix)
        (tmp_path / f"m{suffix}").write_bytes(b"model")
        made = builder(tmp_path, target)
        assert made.build(Source(tmp_path / f"m{suffix}")) == made.build(Source(tmp_path / f"m{suffix}"))
        assert len(target.asked) == builds
        made.build(Source(tmp_path / f"m{suffix}", "bf16"))
        assert len(target.asked) == builds + 1


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_the_output_folder_gets_the_portable_file_where_there_is_one(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"m{suffix}").write_bytes(b"model")
    (tmp_path / "out").mkdir()
    target = Target(suffix)
    source, engine = builder(tmp_path, target).ship(Source(tmp_path / f"m{suffix}", "bf16"), tmp_path / "out")
    assert engine == tmp_path / "out" / "engine"
    assert engine.read_bytes() == b"model"
    portable = tmp_path / "out" / "model.onnx"
    assert source == Source(portable if suffix == ".onnx" else tmp_path / "m.pt2", "bf16")
    assert portable.exists() is (suffix == ".onnx")
    assert target.asked[0][0] == source.path  # built from what is shipped


def test_a_temporary_builder_leaves_no_engine_behind(tmp_path: Path) -> None:
    """An engine that was compiled in a folder that is gone must not be handed out again."""
    (tmp_path / "m.pt2").write_bytes(b"model")
    made = builder(tmp_path, Target(".pt2"))
    with made.temporary() as temporary:
        engine = temporary.build(Source(tmp_path / "m.pt2"))
        assert engine.is_file()
    assert not engine.exists()
    assert made.build(Source(tmp_path / "m.pt2")).is_file()
