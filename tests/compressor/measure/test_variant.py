"""Variants: their conversion, their engines, and the files in the output folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from compressor.measure.variant import Variant, build_variants, convert_variants, engines_of
from compressor.quality.parity import Parity
from compressor.quantize.precision import Converted, Source
from compressor.workspace.progress import Steps
from tests.engines import Target, builder


class Converter:
    """A fake converter that names a converted file after its source and records the sources."""

    def __init__(self) -> None:
        self.sources: list[Path] = []

    def convert(self, path: Path, precision: str, tick: Any) -> tuple[Source, Converted]:
        self.sources.append(path)
        return Source(path.with_suffix(".low"), precision), Converted(precision, "x", float(len(self.sources)))


def variants(*files: str) -> list[Any]:
    graph: Any = None
    names = ("baseline", "result", "changes")
    parity = Parity("", 0.0, 0)
    paths = map(Path, files)
    return [Variant(name, graph, path, parity, Source(path)) for name, path in zip(names, paths, strict=False)]


def test_every_variant_except_the_original_is_converted() -> None:
    converter: Any = Converter()
    converted = convert_variants(variants("a.onnx", "b.onnx"), "int8", converter, Steps())
    assert {variant.name: variant.source for variant in converted} == {
        "original": Source(Path("a.onnx")),
        "baseline": Source(Path("a.low"), "int8"),
        "result": Source(Path("b.low"), "int8"),
    }
    losses = {variant.name: variant.conversion and variant.conversion.loss for variant in converted}
    assert losses == {"original": None, "baseline": 1.0, "result": 2.0}
    assert converter.sources == [Path("a.onnx"), Path("b.onnx")]


def test_a_float_file_of_two_variants_is_converted_once() -> None:
    converter: Any = Converter()
    _, baseline, result = convert_variants(variants("a.onnx", "a.onnx"), "int8", converter, Steps())
    assert (result.source, result.conversion) == (baseline.source, baseline.conversion)
    assert converter.sources == [Path("a.onnx")]


def test_in_fp32_there_is_no_original_and_nothing_is_converted() -> None:
    converter: Any = Converter()
    assert convert_variants(variants("a.onnx", "b.onnx"), "fp32", converter, Steps()) == variants("a.onnx", "b.onnx")
    assert converter.sources == []


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_only_the_engine_of_the_result_is_built_in_the_output_folder(tmp_path: Path, suffix: str) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}{suffix}").write_bytes(name.encode())
    out = tmp_path / "out"
    out.mkdir()
    engine_builder = builder(tmp_path, Target(suffix))
    built = build_variants(
        variants(str(tmp_path / f"a{suffix}"), str(tmp_path / f"b{suffix}")), engine_builder, out, Steps()
    )
    engines = engines_of(built)
    assert engines["result"].parent == out
    assert out not in engines["baseline"].parents
    assert [engines[name].read_bytes() for name in ("baseline", "result")] == [b"a", b"b"]
    assert built[1].source.path.parent == (out if suffix == ".onnx" else tmp_path)
