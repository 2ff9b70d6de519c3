"""Check that the inputs and labels of one model suit every model that `bench` measures.

All engines of a run get the same inputs, prepared for the first model, and are judged by the same labels. A model with
another normalization, tokenizer or order of classes would be judged on what it never saw, and nothing would fail.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from compressor.benchmark.contenders import BenchError, ExportFolder
from compressor.data.decoder_inputs import DECODER_IDS
from compressor.data.readers.base import Array
from compressor.data.splits import Batch, Data
from compressor.errors import CompressorError
from compressor.models import Model
from compressor.report.report import REPORT

SAMPLES = 16  # samples that are prepared for each model
TEXT = "The quick brown fox, 7 of them, jumped."
CLOSE = 1e-6  # of the largest value: one preprocessing in another order of float32 operations

# Files of a folder that do not say how its samples are prepared.
OWN = (REPORT, "plan.json", "genai_config.json", "generation_config.json")

Read = Callable[[Model], Data]


def other_models(
    first: str | None, folders: Mapping[str, ExportFolder], loaded: Mapping[str, Model]
) -> dict[str, Model]:
    """Return the models whose samples have to be compared with those of another, by the name of their contender.

    Folders whose own files are those of the first are left out, and so are folders of a module, which cannot be loaded
    and whose samples are arrays.

    Args:
        first: name of the contender whose model prepares the samples; None if that model is no contender.
        folders: all folders by name.
        loaded: the models that are measured in torch, by name.
    """
    known = _own_facts(folders[first]) if first is not None and first in folders else None
    others = dict(loaded)
    for name, folder in folders.items():
        if name not in loaded and not folder.needs_module and _own_facts(folder) != known:
            others[name] = folder.model()
    return {name: other for name, other in others.items() if name != first}


def _own_facts(folder: ExportFolder) -> tuple[dict[str, str], object]:
    """Return the SHA-256 of the config and the preprocessing files of a folder, by name, and what it predicts."""
    kinds = (".json", ".txt", ".model", ".jinja")
    files = {name: sha for name, sha in folder.digests.items() if name.endswith(kinds) and name not in OWN}
    return files, folder.report["model"].get("problem_type")


def check_equal_inputs(first: str, model: Model, others: Mapping[str, Model], read: Read | None) -> None:
    """Compare a few samples as each model prepares them.

    Args:
        first: name of the contender whose model prepares the samples.
        model: that model.
        others: the models of the other contenders, by name.
        read: returns a few samples of the data, prepared for a model; None if no quality is stated on the data.

    Raises:
        BenchError: a model prepares samples otherwise, numbers its classes otherwise, or predicts something else.
    """
    ours = None
    for name, other in others.items():
        difference = _of_outputs(model, other)
        if difference is None and read is not None:
            ours = read(model) if ours is None else ours
            try:
                difference = next(_of_samples(ours, read(other)), None)
            except CompressorError as error:
                difference = f"does not take the data as {first} does ({str(error).rstrip('.')})"
        if difference is not None:
            raise BenchError(
                f"{name} {difference}, but all engines of a run get the inputs and labels of {first}, so the figures "
                f"of {name} would be wrong; measure it in a run of its own, or give --data random to compare speed "
                "alone."
            )


def _of_outputs(model: Model, other: Model) -> str | None:
    """Return what another model predicts otherwise: a clause without its subject; None for no difference."""
    if _kind(model) != _kind(other):
        return f"predicts a {_kind(other)}, not a {_kind(model)}"
    if _tokens(model) != _tokens(other):
        return "tokenizes texts otherwise"
    if model.class_names is None or other.class_names is None:
        return None
    for number, name in model.class_names.id2label().items():
        numbers = other.class_names.numbers(name)
        if numbers and int(number) not in numbers:
            return f"gives the class {name!r} the number {numbers[0]}, not {number}"
    return None


def _kind(model: Model) -> str:
    """Return the problem type of a classifier in words; that of a config without one is a single class."""
    return (model.problem_type or "single_label_classification").replace("_", " ")


def _tokens(model: Model) -> list[int] | None:
    """Return the tokens of a short text; None for a model without a tokenizer."""
    whole = model.preprocess.whole
    return None if whole is None else whole(TEXT)["input_ids"].tolist()


def _of_samples(ours: Data, theirs: Data) -> Iterator[str]:
    """Yield what another model gets of the same samples: a clause without its subject."""
    for mine, other in zip(ours.test.batches(1), theirs.test.batches(1), strict=False):
        if mine.ids != other.ids:  # a sample that one of them cannot take
            yield f"leaves out other samples (it has {other.ids[0]} in place of {mine.ids[0]})"
        elif (name := _differing_input(mine, other)) is not None:
            yield f"prepares samples otherwise (the input {name} of sample {mine.ids[0]} differs)"
        elif DECODER_IDS not in mine.feeds and not np.array_equal(_labels(mine), _labels(other)):
            yield f"reads the label of {mine.ids[0]} otherwise"


def _labels(batch: Batch) -> Array:
    return np.zeros(0) if batch.labels is None else batch.labels


def _differing_input(mine: Batch, other: Batch) -> str | None:
    """Return the name of an input whose values differ; inputs that one of them lacks, such as a cache, are left out.

    So are the inputs of a decoder, which the model itself may generate.
    """
    for name in sorted(mine.feeds.keys() & other.feeds.keys() - {DECODER_IDS}):
        ours, theirs = np.asarray(mine.feeds[name]), np.asarray(other.feeds[name])
        if ours.shape != theirs.shape:
            return name
        allowed = CLOSE * float(np.abs(ours).max(initial=0.0)) if ours.dtype.kind == "f" else 0.0
        if ours.size and float(np.abs(ours.astype(np.float64) - theirs).max()) > allowed:
            return name
    return None
