"""Formulas of the heads against scikit-learn, torch and plain loops."""

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn import metrics as sklearn_metrics

from compressor.data.splits import Batch
from compressor.errors import CompressorError
from compressor.quality.evaluate import figure, metric_value, sample_columns
from compressor.quality.heads.pixels import resized
from compressor.quality.heads.registry import head_for
from compressor.quality.heads.spans import LONGEST, best_spans

RNG = np.random.default_rng(0)
LABEL_SETS = head_for("text-classification", "multi_label_classification")
NUMBERS = head_for("text-classification", "regression")


def batch(labels=None, feeds=None, scored=None, count=8):
    return Batch(feeds or {}, labels, 1, tuple(f"s{row}" for row in range(count)), scored)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# --------------------------------------------------------------------------------------------------------- label sets


def test_f1_of_label_sets_is_that_of_scikit_learn():
    answer, labels = normal(8, 6), RNG.integers(0, 2, (8, 6))
    columns = sample_columns(LABEL_SETS, "f1", batch(labels), answer, None)
    expected = sklearn_metrics.f1_score(labels, answer > 0, average="micro")
    assert metric_value("f1", columns) == pytest.approx(100 * expected)
    interval = figure("f1", columns)
    assert interval.low < interval.value < interval.high


def test_divergence_of_label_sets_is_the_sum_of_bernoulli_divergences():
    answer, original = torch.from_numpy(normal(8, 6)), torch.from_numpy(normal(8, 6, seed=1))
    sides = (torch.distributions.Bernoulli(logits=side) for side in (original, answer))
    expected = torch.distributions.kl_divergence(*sides).sum(-1)
    torch.testing.assert_close(LABEL_SETS.divergence(answer, original), expected, rtol=1e-4, atol=1e-5)  # float32


def test_expected_loss_of_f1_is_that_of_labels_drawn_with_the_originals_probabilities():
    """20,000 draws of 8 x 6 labels: the standard error of the mean F1 is below 0.1 points."""
    original, answer = normal(8, 6), normal(8, 6, seed=3)
    columns = sample_columns(LABEL_SETS, "f1", batch(np.zeros((8, 6), int)), answer, original)
    drawn = np.random.default_rng(5).random((20_000, 8, 6)) < 1 / (1 + np.exp(-original.astype(float)))
    scores = []
    for chosen in (original > 0, answer > 0):
        hits = (drawn & chosen).sum((1, 2)).mean()
        scores.append(200 * hits / (chosen.sum() + drawn.sum((1, 2)).mean()))
    assert LABEL_SETS.expected_loss("f1", columns) == pytest.approx(scores[0] - scores[1], abs=0.3)


def test_a_dominant_label_does_not_hide_changed_label_sets():
    """All rows agree in their largest logit, and no row agrees in its set."""
    original, answer = -np.ones((8, 6), np.float32), np.ones((8, 6), np.float32)
    original[:, 0] = answer[:, 0] = 30.0
    columns = sample_columns(LABEL_SETS, "set_agreement", batch(), answer, original)
    assert (answer.argmax(-1) == original.argmax(-1)).all()
    assert metric_value("set_agreement", columns) == 0.0
    assert columns["decisions"].tolist() == [1 / 6] * 8
    assert LABEL_SETS.lower_bound("set_agreement", columns, columns, 100.0) == 100.0


# ------------------------------------------------------------------------------------------------------------ numbers


def test_errors_of_numbers_are_those_of_scikit_learn_and_scipy():
    answer, original, gold = normal(8, 1), normal(8, 1, seed=1), normal(8, seed=2)
    columns = sample_columns(NUMBERS, "mae", batch(gold), answer, original)
    assert metric_value("mae", columns) == pytest.approx(sklearn_metrics.mean_absolute_error(gold, answer[:, 0]))
    spearman = stats.spearmanr(answer[:, 0], gold).statistic
    assert metric_value("rank_correlation", columns) == pytest.approx(100 * spearman)
    r_squared = sklearn_metrics.r2_score(original[:, 0], answer[:, 0])
    assert metric_value("r_squared", columns) == pytest.approx(100 * r_squared)


def test_r_squared_of_several_outputs_is_weighted_by_variance():
    answer, original = normal(8, 3), normal(8, 3, seed=1) * np.float32([1, 5, 0.1])
    columns = sample_columns(NUMBERS, "r_squared", batch(), answer, original)
    expected = sklearn_metrics.r2_score(original, answer, multioutput="variance_weighted")
    assert metric_value("r_squared", columns) == pytest.approx(100 * expected)


def test_divergence_of_numbers_is_that_of_normal_distributions():
    answer, original = torch.from_numpy(normal(8, 1)), torch.from_numpy(normal(8, 1, seed=1))
    sides = (torch.distributions.Normal(side[:, 0], 1.0) for side in (original, answer))
    expected = torch.distributions.kl_divergence(*sides)
    torch.testing.assert_close(NUMBERS.divergence(answer, original), expected)


# ------------------------------------------------------------------------------------------------------------- tokens


def test_perplexity_of_masked_tokens_is_that_of_torch():
    answer, labels = normal(4, 7, 11), RNG.integers(0, 11, (4, 7))
    labels[:, ::2] = -100
    columns = sample_columns(head_for("fill-mask"), "masked_perplexity", batch(labels, count=4), answer, answer)
    entropy = torch.nn.functional.cross_entropy(
        torch.from_numpy(answer).flatten(0, 1), torch.from_numpy(labels).flatten()
    )
    assert metric_value("masked_perplexity", columns) == pytest.approx(float(entropy.exp()), rel=1e-5)
    assert columns["tokens"].tolist() == [3.0] * 4
    assert columns["agreement"].tolist() == [1.0] * 4


def test_classes_of_tokens_are_counted_without_padding():
    answer, original = normal(4, 7, 5), normal(4, 7, 5, seed=1)
    labels = RNG.integers(0, 5, (4, 7))
    labels[1, 3:] = labels[3, 1:] = -100
    columns = sample_columns(
        head_for("token-classification"), "token_accuracy", batch(labels, count=4), answer, original
    )
    kept = labels >= 0
    right = sklearn_metrics.accuracy_score(labels[kept], answer.argmax(-1)[kept])
    assert metric_value("token_accuracy", columns) == pytest.approx(100 * right)
    same = (answer.argmax(-1) == original.argmax(-1))[kept].mean()
    assert metric_value("token_agreement", columns) == pytest.approx(100 * same)


# -------------------------------------------------------------------------------------------------------------- spans


def test_best_spans_are_those_of_a_loop():
    logits, allowed = normal(6, 2, 40), RNG.random((6, 40)) < 0.7
    allowed[:, 0] = True
    for row, (first, last) in enumerate(best_spans(logits, allowed)):
        best, place = -np.inf, None
        for start in np.flatnonzero(allowed[row]):
            for end in np.flatnonzero(allowed[row]):
                legal = start <= end < start + LONGEST and (start > 0 or end == 0)
                score = float(logits[row, 0, start]) + float(logits[row, 1, end])
                if legal and score > best:
                    best, place = score, (start, end)
        assert (first, last) == place


def test_a_span_matches_any_of_the_answers():
    logits = np.full((2, 2, 6), -5.0, np.float32)
    logits[:, 0, 2] = logits[:, 1, 3] = 5.0
    labels = np.array([[[1, 1], [2, 3]], [[4, 4], [0, 0]]])
    feeds = {"input_ids": np.zeros((2, 6), int)}
    columns = sample_columns(
        head_for("question-answering"), "exact_match", batch(labels, feeds, count=2), logits, logits
    )
    assert columns["exact"].tolist() == [1.0, 0.0]


def test_padding_is_left_out_of_the_divergence_of_spans():
    answer, original = normal(3, 2, 6), normal(3, 2, 6, seed=1)
    mask = np.ones((3, 6), np.int64)
    mask[:, 4:] = 0
    spoiled = answer.copy()
    spoiled[:, :, 4:] = 9.0
    sides = [
        head_for("question-answering").divergence(*(torch.from_numpy(side) for side in (one, original, mask)))
        for one in (answer, spoiled)
    ]
    torch.testing.assert_close(*sides)
    short = head_for("question-answering").divergence(
        *(torch.from_numpy(side[:, :, :4]) for side in (answer, original))
    )
    torch.testing.assert_close(sides[0], short, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------------ pixels, depth


def test_mean_iou_is_that_of_scikit_learn():
    answer, labels = normal(4, 5, 8, 8), RNG.integers(0, 5, (4, 8, 8))
    labels[0, :2] = 255
    columns = sample_columns(head_for("image-segmentation"), "mean_iou", batch(labels, count=4), answer, None)
    kept = labels != 255
    expected = sklearn_metrics.jaccard_score(labels[kept], answer.argmax(1)[kept], average="macro")
    assert metric_value("mean_iou", columns) == pytest.approx(100 * expected)
    absent = np.where(labels == 4, 3, labels)
    columns = sample_columns(head_for("image-segmentation"), "mean_iou", batch(absent, count=4), answer[:, :4], None)
    assert 0 < metric_value("mean_iou", columns) < 100


def test_a_class_that_the_model_does_not_have_is_refused():
    labels = np.full((1, 4, 4), 7)
    with pytest.raises(CompressorError, match=r"a mask holds the class 7, but the model has 5 classes.*255 marks"):
        sample_columns(head_for("image-segmentation"), "mean_iou", batch(labels, count=1), normal(1, 5, 4, 4), None)


def test_logits_of_a_smaller_size_are_resized_as_transformers_does():
    import transformers

    logits = normal(2, 5, 4, 4)
    processor = transformers.SegformerImageProcessor()
    returned = transformers.modeling_outputs.SemanticSegmenterOutput(logits=torch.from_numpy(logits))
    expected = processor.post_process_semantic_segmentation(returned, target_sizes=[(16, 16)] * 2)
    chosen = resized(logits, (16, 16)).argmax(1)
    assert all((mine == theirs.numpy()).all() for mine, theirs in zip(chosen, expected, strict=True))


def test_depth_agrees_within_a_factor():
    original = np.full((1, 2, 2), 4.0, np.float32)
    answer = np.array([[[4.9, 5.1], [3.3, 3.1]]], np.float32)  # 4 * 1.25 = 5 and 4 / 1.25 = 3.2
    columns = sample_columns(head_for("depth-estimation"), "depth_agreement", batch(count=1), answer, original)
    assert metric_value("depth_agreement", columns) == 50.0
