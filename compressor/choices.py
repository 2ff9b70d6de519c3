"""The values that options take, and their defaults. Imports nothing heavy: `--help` reads them."""

from __future__ import annotations

from typing import Literal, get_args

TASKS = (
    "image-classification",
    "image-feature-extraction",
    "text-classification",
    "feature-extraction",
    "sentence-similarity",
    "text-generation",
)
# The target that writes a checkpoint. Its name is needed before the packages that know checkpoints are imported.
TRANSFORMERS = "transformers"

COSTS = ("latency", "macs")
# What `--drop auto` chooses among where --actions does not say.
AUTO_ACTIONS = ("drop", "constant", "scale", "low-rank", "linear", "fuse", "merge")
HEAL_METHODS = ("none", "closed-form", "distill")

AUTO = "auto"
# The values of --int8, which is short for --precision.
SHORT_FORMS = {"static": "int8", "dynamic": "int8-dynamic"}

Calibration = Literal["typical", "minmax", "percentile", "entropy", "mse"]
CALIBRATIONS: tuple[Calibration, ...] = get_args(Calibration)
