"""The options of one export, checked once, written into report.json as they were."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compressor.errors import CompressorError
from passes.plan import METRICS

INT8 = ("static", "dynamic")


class SettingsError(CompressorError):
    """An option has a value that cannot work; a usage error."""


@dataclass(frozen=True)
class Settings:
    """What `compressor export` was asked for; each field is a flag of the same name.

    Attributes:
        model: MODEL argument, a module, or None for the embedded sample.
        data: where samples come from; None takes the sample's own data.
        drop: ``none``, ``auto``, a number, a percentage, ``kind:number``, names, or a plan file.
        metric: how the ranked forms of `drop` rank.
        max_loss: most quality that may be lost on validation data, in percent: points of accuracy, agreement,
            feature similarity or Spearman correlation; relative increase of perplexity.
        target: name of the runtime.
        int8: None, ``static`` or ``dynamic``.
        max_int8_loss: most quality that int8 may lose against float before layers return to float, in percent.
        device: ``cpu`` or ``cuda``, where the engine runs.
        threads: threads of the engine; None leaves it to the runtime.
        batch: batch size of the latency measurement.
        samples: most samples used in total; None takes all.
        search_samples: calibration samples on which `auto` measures effects.
        rounds: timed bursts per engine.
        example_inputs: for a module: a tensor, a tuple or a dict of tensors.
    """

    model: str | Path | torch.nn.Module | None = None
    data: str | Path | None = None
    drop: str = "auto"
    metric: str = "cosine"
    max_loss: float = 1.0
    target: str = "onnxruntime"
    int8: str | None = None
    max_int8_loss: float = 0.5
    output: str | Path = "compressed"
    force: bool = False
    task: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    random_weights: bool = False
    device: str = "cpu"
    threads: int | None = None
    batch: int = 1
    samples: int | None = None
    search_samples: int = 64
    rounds: int = 6
    seed: int = 0
    example_inputs: Any = None

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise SettingsError(f"unknown metric {self.metric!r}; expected one of {', '.join(METRICS)}.")
        if self.int8 not in (None, *INT8):
            raise SettingsError(f"--int8 {self.int8}: expected {' or '.join(INT8)}.")
        if not 0.0 <= self.max_loss <= 100.0 or not 0.0 <= self.max_int8_loss <= 100.0:
            raise SettingsError(
                f"a loss of {self.max_loss} % or {self.max_int8_loss} % is no budget; expected 0 to 100."
            )
        if min(self.batch, self.search_samples, self.rounds) < 1:
            raise SettingsError("batch, search samples and rounds must be at least 1.")
        if self.drop == "auto" and self.data is not None and str(self.data) == "random":
            raise SettingsError("--drop auto needs real data; with --data random pass a number, names or a plan file.")

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain JSON values."""
        plain = {key: getattr(self, key) for key in self.__dataclass_fields__ if key != "example_inputs"}
        plain["model"] = type(self.model).__name__ if isinstance(self.model, torch.nn.Module) else _text(self.model)
        return plain | {"data": _text(self.data), "output": str(self.output)}


def _text(value: object) -> str | None:
    return None if value is None else str(value)
