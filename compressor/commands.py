"""Options of each command: groups of fields, and the fields that differ from those of an export."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from compressor.options import documented, like, option
from compressor.settings import Settings


@documented
@dataclass(frozen=True)
class SweepSettings(Settings):
    """Options of a sweep: those of an export, some with another default, and the number of plans."""

    max_loss: float | None = like(
        Settings, "max_loss", default=20.0, help="Largest loss of the front on validation data, in %.", unset=""
    )
    output: str | Path = like(Settings, "output", default="front")
    points: int = option(8, "Number of plans on the front to build, time and test.", least=2)


@documented
@dataclass(frozen=True)
class InspectSettings(Settings):
    """Options of an inspection: those of an export, without a plan, and the study."""

    drop: str = like(Settings, "drop", default="none")
    metric: str = like(
        Settings,
        "metric",
        help="output also measures each site's effect on the model's output.",
        choices=("cosine", "output"),
    )
    output: str | Path = like(
        Settings, "output", default="inspected", help="Folder for inspect.json and similarity.png."
    )
    study: bool = option(
        False,
        "Also analyse redundancy by depth, position and kind of token, and the stability of the ranking; write "
        "study.json and study.html.",
    )
    against_data: tuple[str | Path, ...] = option(
        (),
        "With --study: other data, or random (tokens or noise), to compare the ranking of branches on; repeatable.",
        repeatable=True,
    )


# Fields by group, in the order of --help.
SUBJECT = (
    "model",
    "data",
    "task",
    "problem_type",
    "class_names",
    "prompt_template",
    "revision",
    "trust_remote_code",
    "random_weights",
    "cache",
    "samples",
    "max_length",
    "stride",
    "image_size",
    "sequence_length",
    "search_samples",
    "seed",
)
SEARCH = ("actions", "tokens", "cost", "prices", "max_loss", "budget")
IMAGES = ("image_tokens",)
GOALS = ("confidence", "speedup", "latency", "heal", "heal_budget")
ENGINE = ("target", "precision", "int8", "device", "threads", "batch", "generate", "rounds")
QUANTIZATION = ("factorial", "calibration", "max_precision_loss")
BUILD = ("defer_build", "gpu", "portable_engine", "merge_decoder")
FOLDER = ("output", "force")
SPREAD = ("workers", "ray")

# Fields that a command takes after those of SUBJECT, in the order of --help.
EXPORT = ("max_memory", "drop", "metric", *IMAGES, *SEARCH, *GOALS, *ENGINE, *QUANTIZATION, *BUILD, *FOLDER, *SPREAD)
SWEEP = (*SEARCH, "points", *ENGINE, *FOLDER, *SPREAD)
INSPECT = ("max_memory", "metric", "output", "study", "against_data", *SPREAD)
