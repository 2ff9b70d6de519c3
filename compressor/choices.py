"""The values that options accept. The module imports only the standard library, so that `--help` stays fast."""

from __future__ import annotations

from typing import Literal, get_args

TASKS = (
    "image-classification",
    "image-feature-extraction",
    "text-classification",
    "feature-extraction",
    "sentence-similarity",
    "text-generation",
    "token-classification",
    "question-answering",
    "fill-mask",
    "image-segmentation",
    "depth-estimation",
)
# What a classifier predicts, in the words of transformers' configs.
PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")
# The target that writes a checkpoint. Named here because the settings must not import the code that writes it.
TRANSFORMERS = "transformers"

COSTS = ("latency", "macs")
# The actions that `--drop auto` chooses among by default.
AUTO_ACTIONS = ("drop", "constant", "scale", "low-rank", "linear", "fuse", "merge")
HEAL_METHODS = ("none", "closed-form", "distill")

AUTO = "auto"
# The values of --int8, which is short for --precision.
SHORT_FORMS = {"static": "int8", "dynamic": "int8-dynamic"}

Calibration = Literal["typical", "minmax", "percentile", "entropy", "mse"]
CALIBRATIONS: tuple[Calibration, ...] = get_args(Calibration)
