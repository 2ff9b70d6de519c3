"""The problem type of a classifier: one class, a set of labels, or a number per sample."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from compressor.choices import PROBLEM_TYPES
from compressor.limitations import Limitation
from compressor.models.base import Model, ModelError

CLASSIFIERS = ("image-classification", "text-classification", "audio-classification", "video-classification")


def with_problem_type(model: Model, requested: str | None) -> Model:
    """Return the model with its problem type, if it is a classifier; its preprocessing learns the classes.

    The requested type comes first, then ``problem_type`` of the config. A model of transformers without it whose config
    has a single label predicts a number, as in transformers' own loss functions. All others predict one class.

    Args:
        model: any model.
        requested: one of `PROBLEM_TYPES`; None for that of the checkpoint.

    Raises:
        ModelError: the type is unknown, or the model is no classifier.
    """
    if requested is not None and requested not in PROBLEM_TYPES:
        raise ModelError(f"unknown problem type {requested!r}; expected one of {', '.join(PROBLEM_TYPES)}.")
    config = getattr(model.module, "config", None)
    classes = getattr(config, "num_labels", None)
    preprocess = dataclasses.replace(model.preprocess, classes=classes, class_names=model.class_names)
    model = dataclasses.replace(model, preprocess=preprocess)
    if model.task not in CLASSIFIERS:
        if requested is None:
            return model
        raise ModelError(
            f"--problem-type is for classifiers, but the task of {model.name} is "
            f"{model.task}; leave --problem-type out."
        )
    found = _of_config(config, model.name)
    limitations = () if requested is not None else tuple(_assumed(config, found))
    return dataclasses.replace(
        model,
        problem_type=requested or found,
        preprocess=dataclasses.replace(preprocess, problem_type=requested or found),
        limitations=(*model.limitations, *limitations),
    )


def _of_config(config: Any, name: str) -> str | None:
    """Return the problem type of a config of transformers; None without a config, or if the config does not say.

    Raises:
        ModelError: the config has a problem type that is unknown.
    """
    found = getattr(config, "problem_type", None)
    if found is None:
        return "regression" if getattr(config, "num_labels", None) == 1 else None
    if found not in PROBLEM_TYPES:
        raise ModelError(
            f"the config of {name} has the problem type {found!r}; expected one of {', '.join(PROBLEM_TYPES)}, or pass "
            "--problem-type."
        )
    return str(found)


def _assumed(config: Any, found: str | None) -> Iterator[Limitation]:
    """Yield a limitation if the single label of a config is taken for a number."""
    if found == "regression" and getattr(config, "problem_type", None) is None:
        yield Limitation(
            "problem type",
            "the config has one label and names no problem type, so regression is assumed, as in transformers; set "
            "another with --problem-type",
        )
