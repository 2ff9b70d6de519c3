"""The baseline of `bench` is compared with chance: a stop, a sentence or nothing."""

import numpy as np
import pytest

from compressor.benchmark.baseline_standing import check_baseline
from compressor.quality.answer_variation import AnswerVariation
from compressor.quality.chance import ChanceError
from compressor.quality.evaluate import Evaluation
from compressor.quality.heads.registry import head_for

WRONG, RIGHT, UNCLEAR = 10, 90, 14  # correct answers of 100 among ten classes


def sentences(correct: dict[str, int], originals: tuple[str, ...]) -> list[str]:
    hits = {name: {"accuracy": (np.arange(100) < count).astype(float)} for name, count in correct.items()}
    evaluation = Evaluation("accuracy", hits, outputs=10)
    return list(check_baseline(evaluation, next(iter(correct)), originals, "rows.npz"))


def test_a_useful_baseline_needs_no_sentence() -> None:
    assert sentences({"dense": RIGHT, "out": WRONG}, ("dense",)) == []


def test_nothing_better_than_chance_stops_where_an_original_is_measured() -> None:
    with pytest.raises(ChanceError, match=r"^dense has an accuracy of 10\.0 % .* so the labels of rows\.npz are prob"):
        sentences({"out": WRONG, "dense": WRONG}, ("dense",))


@pytest.mark.parametrize("originals", [(), ("dense",)])
def test_a_compressed_baseline_at_chance_is_said(originals: tuple[str, ...]) -> None:
    correct = {"out": WRONG} | dict.fromkeys(originals, RIGHT)
    (sentence,) = sentences(correct, originals)
    assert sentence.startswith("out has an accuracy of 10.0 % (")
    assert sentence.endswith(
        "where chance is 10.0 %, so losses against it mean nothing; give another baseline with --against, or correct "
        "the labels of rows.npz."
    )


def test_an_uncertain_baseline_is_said() -> None:
    (sentence,) = sentences({"dense": UNCLEAR}, ("dense",))
    assert sentence.endswith("so it is not certain to be better than chance; use more samples.")


def test_scores_that_judge_no_model_are_said() -> None:
    """A correlation with equal scores is not 0, but not defined."""
    columns = {"out": {"prediction": np.arange(20.0), "gold": np.full(20, 2.5)}}
    (sentence,) = check_baseline(Evaluation("rank_correlation", columns, outputs=1), "out", (), "pairs.csv")
    assert sentence == (
        "pairs.csv has the score 2.5 for all 20 samples that were compared, with which nothing correlates and than "
        "which no model is better, so losses against out mean nothing; correct its labels, or give the data without "
        "them."
    )


def test_metrics_that_compare_with_the_baseline_have_no_chance() -> None:
    columns = {"out": {"agreement": np.zeros(100)}}
    assert list(check_baseline(Evaluation("agreement", columns, outputs=10), "out", (), "x")) == []


def test_a_baseline_that_gives_one_answer_is_said() -> None:
    """Agreement with a constant is 100 % for every constant; two rows of masked logits differ where they are finite."""
    variation = AnswerVariation(head_for("image-classification"))
    for _ in range(2):
        variation.add(np.zeros((3, 10), dtype=np.float32))
    evaluation = Evaluation("agreement", {"out": {"agreement": np.ones(6)}}, outputs=10, variation=variation)
    (sentence,) = check_baseline(evaluation, "out", (), "x.npz")
    assert sentence.startswith("out gives the same answer for all 6 inputs of x.npz, so losses against it mean nothing")
    variation.add(np.eye(2, 10, dtype=np.float32))
    assert list(check_baseline(evaluation, "out", (), "x.npz")) == []


@pytest.mark.parametrize(
    ("rows", "varies"),
    [
        ([[-np.inf, 1.0], [-np.inf, 1.0 + 1e-6]], False),
        ([[-np.inf, 1.0], [-np.inf, 1.001]], True),
        ([[-np.inf, 1.0], [1.0, -np.inf]], True),
        ([[0.0, 0.0], [0.0, 0.0]], False),
        ([[1e-12, 0.0], [0.0, 1e-12]], True),
    ],
)
def test_rows_differ_by_more_than_rounding(rows: list[list[float]], varies: bool) -> None:
    variation = AnswerVariation(head_for("image-classification"))
    variation.add(np.array(rows))
    assert variation.varies is varies
    assert variation.constant is not varies


def test_one_row_is_no_constant() -> None:
    variation = AnswerVariation(head_for("image-classification"))
    variation.add(np.ones((1, 10)))
    assert not variation.constant
    assert variation.only_class is None
