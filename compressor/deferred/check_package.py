"""Check a folder with a deferred engine before anything of it is used: nothing in it is trusted.

`compressor build` reads names, sizes, options and tolerances from the folder. A tolerance can only be as large as an
export of this release allows; a name must be that of a file in the manifest; sizes must be plausible.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from compressor.deferred.package import ANSWERS
from compressor.deferred.reference_answers import AnswersError, ReferenceOutputs
from compressor.errors import CompressorError
from compressor.quality.intervals import Array
from compressor.report.report import REPORT
from compressor.report.report_schema import read_deferred_report
from compressor.workspace.json_files import OBJECT, read_json
from compressor.workspace.manifest import check_folder, listed_file
from compressor.workspace.plan_file import PLAN, PlanFields, read_plan_fields

Json = dict[str, Any]
ROUNDING = 1e-9  # of a tolerance that is computed again


class PackageError(CompressorError):
    """A folder whose engine cannot be built from it: it has none to build, or its parts do not fit each other."""


class Package(TypedDict):
    """The checked content of a folder with a deferred engine.

    Attributes:
        report: the content of report.json.
        plan: the content of plan.json.
        answers: the stored samples with the outputs of torch.
        digests: SHA-256 of every file by name.
    """

    report: Json
    plan: PlanFields
    answers: ReferenceOutputs
    digests: dict[str, str]


def read_package(folder: Path) -> Package:
    """Read a folder with a deferred engine.

    Raises:
        CompressorError: a file is missing, has changed or does not fit its schema; the engine was exported already; or
            the report allows a larger difference from torch than this release.
    """
    digests = check_folder(folder)
    listed_file(folder, REPORT, digests)
    _check_deferred(folder)
    for name in (PLAN, ANSWERS):
        listed_file(folder, name, digests)
    report = read_deferred_report(folder)
    engine = report["engine"]
    for name, file in engine["files"].items():
        if listed_file(folder, file, digests).suffix != ".onnx":
            raise PackageError(f"{folder / REPORT} names {file} as the model of {name}; expected a file .onnx.")
    answers = ReferenceOutputs.load(folder / ANSWERS)
    for name in engine["files"]:
        _check_tolerance(folder, name, engine, answers)
    _check_answers(answers, engine, report["settings"]["batch"])
    return Package(report=report, plan=read_plan_fields(folder / PLAN), answers=answers, digests=digests)


def _check_deferred(folder: Path) -> None:
    """Raise if the engine was exported already; its report lacks the options of a build."""
    content = read_json(folder / REPORT, OBJECT, remedy="export the model again")
    engine = content.get("engine")
    if isinstance(engine, Mapping) and engine.get("state") == "built" and "options" not in engine:
        raise PackageError(
            f"{folder} was exported with its engine; give a folder that was exported with --defer-build."
        )


def _check_tolerance(folder: Path, name: str, engine: Json, answers: ReferenceOutputs) -> None:
    """Raise if the report names another difference than the stored limits, or a file in float32 has limits of its own.

    The limits themselves are held to `compressor.deferred.reference_answers.LARGEST_LIMIT` when they are read.
    """
    reduced, most = engine["precisions"][name] != "fp32", answers.largest_limit(name)
    if name in answers.allowed and not reduced:
        raise PackageError(f"{folder / ANSWERS} has limits of {name}, which is in fp32; export the model again.")
    if abs(engine["allowed"][name] - most) > ROUNDING * most:
        raise PackageError(
            f"{folder / REPORT} allows {name} a difference of {engine['allowed'][name]:g} from torch; expected "
            f"{most:g}, so export the model again."
        )


def _check_answers(answers: ReferenceOutputs, engine: Json, batch: int) -> None:
    """Raise if the stored samples do not fit the report, or the timed batch would not fit in memory."""
    for name in engine["files"]:
        outputs = answers.expected.get("baseline" if name == "original" else name, {})
        if engine["answer"] not in outputs:
            raise AnswersError(
                f"{ANSWERS} holds no output {engine['answer']!r} of {name}; copy the whole folder again."
            )
        classes = outputs[engine["answer"]].ndim == 2  # [rows, classes]
        if answers.labels is not None and not (classes and answers.labels.ndim == 1):
            raise AnswersError(f"the labels in {ANSWERS} do not fit its outputs; copy the whole folder again.")
        if answers.labels is not None and not _are_classes(answers.labels, outputs[engine["answer"]].shape[1]):
            raise AnswersError(f"the labels in {ANSWERS} are no classes of the model; copy the whole folder again.")
    answers.check_batch(batch)


def _are_classes(labels: Array, classes: int) -> bool:
    """Return whether labels can be class numbers; scores, which are floats, have no such limits."""
    return labels.dtype.kind == "f" or bool((labels >= 0).all() and (labels < classes).all())
