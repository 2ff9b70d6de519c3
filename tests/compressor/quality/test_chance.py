"""The original is compared with chance: closed formulas, and a model with right, permuted and random labels."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy import stats

from compressor import models
from compressor.data.readers.base import Numbering
from compressor.data.splits import Split
from compressor.lower.trace import trace
from compressor.lower.traced_model import TracedModel, check_original
from compressor.quality import chance
from compressor.quality.answer_variation import AnswerVariation
from compressor.quality.chance import ChanceError, standing
from compressor.quality.intervals import Figure
from compressor.workspace.progress import Steps
from passes.analysis.counted_cost import Costs
from tests.samples import digits


def share(correct: int, count: int, classes: int) -> chance.Standing:
    hits = np.zeros(count)
    hits[:correct] = 1.0
    return standing("accuracy", {"accuracy": hits}, classes)


@pytest.mark.parametrize("count", [3, 36, 500])
def test_no_correct_answer_has_the_interval_of_the_closed_formula(count: int) -> None:
    """Without a correct answer, the upper bound of Clopper and Pearson is 1 - 0.025 ^ (1 / n); a bootstrap gives 0."""
    found = share(0, count, 3)
    assert found.figure.high == pytest.approx(100 * (1 - 0.025 ** (1 / count)), rel=1e-9)
    assert found.figure.low == 0.0


def test_few_samples_do_not_stop_and_clear_cases_do() -> None:
    assert not share(0, 4, 3).no_better  # a model of 60 % gives this in 3 % of all cases
    assert share(0, 12, 3).no_better
    assert not share(0, 20, 1000).no_better
    assert share(0, 36, 1000).no_better
    assert share(150, 512, 3).no_better
    assert not share(180, 512, 3).no_better  # 35 %, above chance
    assert share(30, 36, 3).better
    assert share(2, 32, 1000).better
    assert not share(13, 36, 3).better


@pytest.mark.parametrize("accuracy", [0.45, 0.6, 0.9])
def test_a_useful_model_is_almost_never_stopped(accuracy: float) -> None:
    """Sum the probability of a stop over the binomial distribution of the number of correct answers."""
    for count in (4, 8, 16, 64, 256):
        stops = sum(
            stats.binom.pmf(correct, count, accuracy)
            for correct in range(count + 1)
            if share(correct, count, 3).no_better
        )
        assert stops < 0.02


def test_reversed_scores_are_at_chance_and_few_pairs_are_not() -> None:
    rng = np.random.default_rng(0)
    gold = rng.random(100)
    cosine = gold + rng.normal(0, 0.3, 100)
    right = standing("spearman", {"cosine": cosine, "gold": gold}, 1)
    assert right.better
    assert right.figure.value == pytest.approx(100 * stats.spearmanr(cosine, gold).statistic, rel=1e-9)
    turned = standing("spearman", {"cosine": cosine, "gold": 5.0 - gold}, 1)
    assert turned.no_better
    assert turned.figure.value == pytest.approx(-right.figure.value, rel=1e-9)
    few = standing("spearman", {"cosine": cosine[:5], "gold": -gold[:5]}, 1)
    assert not few.no_better


def test_a_guess_among_all_tokens_is_chance() -> None:
    tokens = np.full(10, 20.0)
    uniform = standing("perplexity", {"nll": tokens * math.log(50), "tokens": tokens}, 50)
    assert uniform.skill.value == pytest.approx(0.0, abs=1e-12)
    assert standing("perplexity", {"nll": tokens * math.log(60), "tokens": tokens}, 50).no_better
    assert not standing("perplexity", {"nll": tokens[:2] * math.log(60), "tokens": tokens[:2]}, 50).no_better
    assert standing("perplexity", {"nll": tokens * math.log(30), "tokens": tokens}, 50).better
    with pytest.raises(
        ChanceError, match=r"^m has a perplexity of 60 .* a guess among its 50 tokens has 50, so t.txt is "
    ):
        chance.check_measured("perplexity", {"nll": tokens * math.log(60), "tokens": tokens}, 50, "m", "t.txt")


NUMBERS = np.random.default_rng(0).random(20)
UNSCORED = {"tokens": np.zeros(20), "accuracy": np.zeros(20)}


@pytest.mark.parametrize(
    ("metric", "columns", "sentence"),
    [
        ("spearman", {"cosine": NUMBERS, "gold": np.full(20, 3.0)}, "has the score 3 for all 20 samples that were"),
        ("rank_correlation", {"prediction": NUMBERS, "gold": np.zeros(20)}, "has the score 0 for all 20 samples that"),
        ("mae", {"error": NUMBERS, "gold": np.full(20, 1.5)}, "has the score 1.5 for all 20 samples that were"),
        ("mae", {"error": np.full(20, 1e-8), "gold": NUMBERS}, "has the model's own outputs as scores, up to an"),
        ("mae", {"error": np.zeros(20), "gold": NUMBERS}, "and a loss relative to an error of 0 is not defined, so no"),
        ("token_accuracy", UNSCORED, "marks everything in the 20 samples that were compared as not scored, so no"),
        ("mean_iou", {"both 0": np.zeros(20), "union 0": np.zeros(20)}, "marks everything in the 20 samples that"),
    ],
)
def test_labels_that_judge_no_model_are_refused_as_such(
    metric: str, columns: dict[str, np.ndarray[tuple[int], np.dtype[np.float64]]], sentence: str
) -> None:
    """They once passed as a correlation of 0, as scores on another scale or as labels of another model."""
    with pytest.raises(ChanceError) as stop:
        chance.check_measured(metric, columns, 3, "m", "x.csv")
    assert str(stop.value).startswith("x.csv ")
    assert sentence in str(stop.value)
    assert str(stop.value).endswith("to compare the result with the original.")


def test_a_few_equal_scores_are_chance() -> None:
    assert not standing("spearman", {"cosine": NUMBERS[:5], "gold": np.full(5, 3.0)}, 1).no_better


def test_test_samples_of_one_score_are_a_limitation() -> None:
    samples = dataclasses.replace(digits()[1].test.samples, labels=np.array([1.0, 2.0, 3.0, 3.0, 3.0]))
    decision, test = Split("decision", samples, (0, 1, 2)), Split("test", samples, (2, 3, 4))
    (limitation,) = chance.constant_scores("spearman", [decision, test])
    assert limitation.reason.startswith("all 3 test samples have the score 3, with which nothing correlates")
    assert list(chance.constant_scores("accuracy", [test])) == []


# ------------------------------------------------------------------------------------------------------ a trained model


def relabelled(order: list[int], **changes: object) -> TracedModel:
    """Return the trained sample with the classes of its data renumbered."""
    model, data, graph, sites = digits()
    samples = data.validation.samples
    changed = dataclasses.replace(samples, labels=np.array(order)[samples.labels])
    split = Split("validation", changed, tuple(range(200)))
    example = {name: torch.from_numpy(value) for name, value in next(split.batches(2)).feeds.items()}
    return TracedModel(
        model, dataclasses.replace(data, validation=split, **changes), graph, sites, Costs(graph, example)
    )


def test_the_original_with_its_labels_takes_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[int] = []
    original = chance.sample_columns

    def counted(metric: str, batch: object, *rest: object, **options: object) -> object:
        batches.append(1)
        return original(metric, batch, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(chance, "sample_columns", counted)
    subject = check_original(relabelled(list(range(10))), Steps())
    assert batches == [1]
    assert subject.data.limitations == digits()[1].limitations


def test_labels_in_another_order_stop_with_the_order_that_fits() -> None:
    shifted = [(number + 1) % 10 for number in range(10)]
    with pytest.raises(ChanceError) as stop:
        check_original(relabelled(shifted), Steps())
    message = str(stop.value)
    assert message.startswith("sample has an accuracy of ")
    assert "on 200 samples, where chance is 10.0 %, so the labels of " in message
    assert '(found 0 = 0, the model\'s "0"; 1 = 1, the model\'s "1"; 2 = 2, the model\'s "2"; ...)' in message
    assert (
        '; with 0 = 9, the model\'s "9"; 1 = 0, the model\'s "0"; 2 = 1, the model\'s "1"; ... the accuracy would be 9'
        in message
    )
    assert message.count(".\n") == 0


def test_two_exchanged_classes_are_reported_where_the_data_numbered_them() -> None:
    """The accuracy is about 80 %, far above chance; class names that the data numbers itself may still be wrong."""
    order = [1, 0, *range(2, 10)]
    subject = relabelled(order)
    assert check_original(subject, Steps()).data.limitations == subject.data.limitations
    names = {f"digit {order[number]}": number for number in range(10)}
    samples = dataclasses.replace(subject.data.validation.samples, numbering=Numbering(names, "order"))
    split = dataclasses.replace(subject.data.validation, samples=samples)
    doubtful = dataclasses.replace(subject, data=dataclasses.replace(subject.data, validation=split))
    (limitation,) = check_original(doubtful, Steps()).data.limitations[len(subject.data.limitations) :]
    assert limitation.feature == "class order"
    assert 'with digit 1 = 1, the model\'s "1"; digit 0 = 0, the model\'s "0" the accuracy would' in limitation.reason


def test_nothing_is_checked_without_quality() -> None:
    shifted = [(number + 1) % 10 for number in range(10)]
    subject = relabelled(shifted, random=True)
    assert check_original(subject, Steps()) is subject
    random = dataclasses.replace(relabelled(shifted), model=dataclasses.replace(digits()[0], random_weights=True))
    assert check_original(random, Steps()) is random
    assert chance.check_original(subject.graph, subject.model, subject.data.validation, "agreement", "x") == ()


def headless(keep: float = 0.0, bias: int | None = None, *, labels: bool = True) -> TracedModel:
    """Return the trained sample with its last layer scaled, and with one class that is added to all logits."""
    subject = relabelled(list(range(10)))
    model = models.load(None)
    with torch.no_grad():
        model.module.head.weight.mul_(keep)
        model.module.head.bias.mul_(keep)
        if bias is not None:
            model.module.head.bias[bias] = 100.0
    if not labels:
        samples = dataclasses.replace(subject.data.validation.samples, labels=None, label_kind=None)
        parts = ("calibration", "validation", "test")
        splits = {name: dataclasses.replace(getattr(subject.data, name), samples=samples) for name in parts}
        subject = dataclasses.replace(subject, data=dataclasses.replace(subject.data, label_kind=None, **splits))
    return dataclasses.replace(subject, model=model, graph=trace(model))


@pytest.mark.parametrize("labels", [True, False])
def test_the_same_answer_for_all_samples_stops(labels: bool) -> None:
    subject = headless(labels=labels)
    assert subject.metric == ("accuracy" if labels else "agreement")
    with pytest.raises(ChanceError, match=r"^sample gives the same answer for all 200 inputs of .* a last layer of ze"):
        check_original(subject, Steps())


def test_a_small_last_layer_is_no_constant() -> None:
    """Answers that differ in the fourth digit are not equal: only their scale is unusual."""
    subject = headless(keep=1e-3, labels=False)
    assert check_original(subject, Steps()).data.limitations == subject.data.limitations


@pytest.mark.parametrize("labels", [True, False])
def test_one_class_for_all_samples_is_a_limitation(labels: bool) -> None:
    subject = headless(keep=1.0, bias=7, labels=labels)
    if labels:  # with ten labels the model would be at chance
        samples = dataclasses.replace(subject.data.validation.samples, labels=np.full(2000, 7))
        split = dataclasses.replace(subject.data.validation, samples=samples)
        subject = dataclasses.replace(subject, data=dataclasses.replace(subject.data, validation=split))
    (limitation,) = check_original(subject, Steps()).data.limitations[len(subject.data.limitations) :]
    assert str(limitation).startswith("classes of the original: it predicts class 7 (7) for all 200 inputs that were ")


def test_without_labels_the_original_runs_over_four_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    add = AnswerVariation.add

    def counted(variation: AnswerVariation, answer: np.ndarray) -> None:
        rows.append(len(answer))
        add(variation, answer)

    monkeypatch.setattr(AnswerVariation, "add", counted)
    check_original(headless(keep=1.0, labels=False), Steps())
    assert rows == [4]


@pytest.mark.parametrize(
    ("metric", "name"),
    [
        ("f1", "an F1 of labels"),
        ("exact_match", "an exact match"),
        ("mean_iou", "an mIoU"),
        ("token_accuracy", "a token accuracy"),
    ],
)
def test_a_share_has_the_article_of_its_name(metric: str, name: str) -> None:
    found = chance.Standing(metric, Figure(9.5, 0.0, 26.1, 10), 0.0, Figure(0.1, 0.0, 0.3, 10))
    assert str(found) == f"{name} of 9.5 % (0.0 to 26.1 %) on 10 samples, where chance is 0.0 %"
