"""Check that the baseline of `bench` is better than chance, because losses against a guess mean nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from compressor.quality import chance
from compressor.quality.chance import Standing, standing
from compressor.quality.evaluate import Evaluation


def check_baseline(evaluation: Evaluation, reference: str, originals: Sequence[str], source: str) -> Iterator[str]:
    """Yield a sentence if the baseline gives one answer for all samples, or is not clearly better than chance.

    An exported engine may be at chance because it was compressed too far, which is a result. If a model that was not
    exported is measured too and no engine is better than chance, the labels are wrong, and nothing was measured.

    Args:
        evaluation: the quality of all engines.
        reference: name of the baseline of the losses.
        originals: names of the torch models that are no exports.
        source: name of the data in messages.

    Raises:
        ChanceError: originals are measured, and no engine is better than chance.
    """
    metric, columns = evaluation.metric, evaluation.columns
    if evaluation.variation is not None and evaluation.variation.constant:
        yield (
            f"{reference} gives the same answer for all {evaluation.variation.rows} inputs of {source}, so losses "
            "against it mean nothing; give another baseline with --against, or check its weights."
        )
        return
    if metric not in chance.METRICS:
        return

    def of(name: str) -> Standing:
        return standing(metric, columns[name], evaluation.outputs)

    found = of(reference)
    if found.better:
        return
    if not found.no_better:
        yield f"{reference} has {found}, so it is not certain to be better than chance; use more samples."
        return
    if originals and all(of(name).no_better for name in columns):
        chance.check_measured(metric, columns[originals[0]], evaluation.outputs, originals[0], source)
    if found.fault is not None:
        yield (
            f"{source} {found.fault}, so losses against {reference} mean nothing; correct its labels, or give the data "
            "without them."
        )
        return
    yield (
        f"{reference} has {found}, so losses against it mean nothing; give another baseline with --against, or correct "
        f"the labels of {source}."
    )
