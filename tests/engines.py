"""A fake target that copies files, and an engine builder for it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from compressor.measure.engine_builder import EngineBuilder
from runtimes.base.protocols import BuildOptions, Int8Style
from tests.onnx_files import K, normal
from tests.samples import Tensors


class Target:
    """A target whose engine is a copy of the source, and which records the arguments of each build."""

    name = "fake"
    devices = ("cpu",)
    own = ("bf16",)
    int8 = Int8Style(activations="uint8", convolutions=False)

    def __init__(self, source: str = ".onnx", **facts: Any) -> None:
        self.source = source
        self.precisions = {"cpu": ("fp32", "fp16", "bf16", "int8")}
        self.builds: list[tuple[Path, Path, BuildOptions]] = []
        for name, value in facts.items():
            setattr(self, name, value)

    def build(self, source: Path, out: Path, options: BuildOptions) -> Path:
        assert out.is_dir()
        self.builds.append((source, out, options))
        (out / "engine").write_bytes(source.read_bytes())
        return out / "engine"

    def load(self, path: Path, options: BuildOptions) -> Any:
        assert path.is_file()
        return SimpleNamespace(close=lambda: None)


def builder(folder: Path, target: Any = None, no_quality: str | None = "the data are random") -> EngineBuilder:
    """Return a builder for a model without a graph, with 40 samples ``x`` [5, K] as the data of every split."""
    split = Tensors({"x": normal(40, 5, K)})
    data = SimpleNamespace(calibration=split, validation=split, test=split)
    names = {"name": "fake", "task": "feature-extraction", "problem_type": None, "answer": "y", "stacked": ()}
    model = SimpleNamespace(
        **names,
        **dict.fromkeys(("is_encoder_decoder", "is_vision_language", "has_two_towers", "has_parts"), False),
        state={},
        evaluated_output=SimpleNamespace(of=lambda outputs: outputs["y"]),
    )
    subject: Any = SimpleNamespace(data=data, model=model, metric="similarity", no_quality_because=no_quality)
    return EngineBuilder(subject, Target() if target is None else target, BuildOptions(), folder)
