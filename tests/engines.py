"""A target that copies files, and a builder that builds on it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from compressor.measure.engine_builder import EngineBuilder
from runtimes.base.protocols import BuildOptions, Int8Style
from tests.onnx_files import K, normal
from tests.samples import Tensors


class Target:
    """A target that copies its source, and notes what it is asked for."""

    name = "fake"
    devices = ("cpu",)
    own = ("bf16",)
    int8 = Int8Style(activations="uint8", convolutions=False)

    def __init__(self, source: str = ".onnx", **facts: Any) -> None:
        self.source = source
        self.precisions = {"cpu": ("fp32", "fp16", "bf16", "int8")}
        self.asked: list[tuple[Path, Path, BuildOptions]] = []
        for name, value in facts.items():
            setattr(self, name, value)

    def build(self, source: Path, out: Path, options: BuildOptions) -> Path:
        assert out.is_dir()
        self.asked.append((source, out, options))
        (out / "engine").write_bytes(source.read_bytes())
        return out / "engine"


def builder(folder: Path, target: Any = None, no_quality: str | None = "the data are random") -> EngineBuilder:
    """A builder of a model without a graph: 40 samples [5, K] named ``x``, for calibration, validation and test."""
    split = Tensors({"x": normal(40, 5, K)})
    data = SimpleNamespace(calibration=split, validation=split, test=split)
    model = SimpleNamespace(name="fake", task="feature-extraction", state={}, answer="y")
    subject: Any = SimpleNamespace(data=data, model=model, metric="similarity", no_quality_because=no_quality)
    return EngineBuilder(subject, Target() if target is None else target, BuildOptions(), folder)
