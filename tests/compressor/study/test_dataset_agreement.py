"""Tests of the agreement between data sets: against SciPy, brute force, and sets with a known relation."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from scipy import stats

import compressor
from compressor import models
from compressor.cli.main import main
from compressor.data.splits import load
from compressor.errors import SettingsError
from compressor.report.pages.study_page import page
from compressor.study.dataset_agreement import CosineSums, between, random_tokens, shared_ends
from tests.paths import SHARED_DATA
from tests.samples import worded

LLAMA = SHARED_DATA / "stories260k"
KINDS = ["attention", "mlp"] * 5


def drawn(means, noise, seed, samples=40, name="set"):
    """Return sums of samples of 30 tokens: the mean cosine of each site plus noise."""
    cosines = np.asarray(means)[:, None] + noise * np.random.default_rng(seed).standard_normal((len(means), samples))
    tokens = np.full_like(cosines, 30.0)
    return CosineSums(name, tokens, cosines * tokens)


def test_the_correlations_equal_scipys_and_shared_sites_are_counted():
    rng = np.random.default_rng(3)
    first, second = drawn(rng.random(10), 0.01, 1), drawn(rng.random(10), 0.01, 2)
    agreement = between(first, second, KINDS)
    one, other = (each.means()[0] for each in (first, second))
    assert agreement.spearman == pytest.approx(stats.spearmanr(one, other).statistic, abs=1e-12)
    assert agreement.kendall == pytest.approx(stats.kendalltau(one, other).statistic, abs=1e-12)
    assert agreement.kinds["mlp"] == pytest.approx(stats.spearmanr(one[1::2], other[1::2]).statistic, abs=1e-12)
    best = [set(sorted(range(10), key=lambda place: -each[place])[:4]) for each in (one, other)]
    assert agreement.shared[4] == len(best[0] & best[1])
    assert set(agreement.shared) == set(shared_ends(one, other)) == {1, 2, 4}
    assert not agreement.alike


@pytest.mark.parametrize("noise", [0.01, 0.3, 3.0])
def test_two_sets_of_one_distribution_are_alike_at_any_noise(noise):
    """A pair is below the 5th percentile with probability 1/20; four of twelve or more are in 2 of 1,000 runs."""
    means = np.linspace(0.5, 0.9, 10)
    agreements = [
        between(drawn(means, noise, 2 * seed), drawn(means, noise, 2 * seed + 1), KINDS) for seed in range(12)
    ]
    assert sum(pair.alike for pair in agreements) > 8
    assert all(pair.low <= pair.high and pair.floor <= pair.mixed for pair in agreements)


def test_sets_with_opposite_rankings_are_not_alike():
    means = np.linspace(0.5, 0.9, 10)
    agreement = between(drawn(means, 0.05, 0), drawn(means[::-1], 0.05, 1), KINDS)
    assert agreement.spearman < -0.8
    assert agreement.shared[1] == 0
    assert not agreement.alike
    assert between(drawn(means[:2], 0.1, 0), drawn(means[:2], 0.1, 1), KINDS[:2]) is None


def test_random_tokens_keep_lengths_and_padding(tmp_path):
    model = models.load(str(worded(tmp_path / "llama", vocabulary=40)))
    (tmp_path / "texts.txt").write_text("\n".join(" ".join(["w5"] * count) for count in range(3, 20)))
    split = load(str(tmp_path / "texts.txt"), model.preprocess, task=model.task).calibration
    (real,) = split.batches(32)
    (batch,) = random_tokens(model, split, 0)
    (again,) = random_tokens(model, split, 0)
    assert torch.equal(batch["input_ids"], again["input_ids"])
    assert batch["attention_mask"].tolist() == real.feeds["attention_mask"].tolist()
    assert batch["input_ids"].shape == real.feeds["input_ids"].shape
    assert len(batch["input_ids"].unique()) > 10
    assert int(batch["input_ids"].max()) < 40


def test_a_study_compares_data_sets(tmp_path):
    """Compare the digits of the embedded sample with themselves and with noise."""
    digits = str(models.SAMPLE / "digits.npz")
    study = compressor.inspect(data=digits, study=True, samples=60, against_data=[digits, "random"]).study
    same, noise, other = study.agreements
    assert (same.first, same.second, noise.second, other.second) == (digits, digits, "random", "random")
    assert same.spearman == 1.0
    assert same.alike
    assert noise.spearman < same.spearman
    assert noise == other.__class__(**{**vars(other), "first": digits})
    sentences = [line for line in study.summary() if line.startswith("Rankings by digits.npz")]
    assert len(sentences) == 3
    assert "and random" in sentences[-1]
    content = json.loads(study.to_json())
    assert [pair["alike"] for pair in content["agreements"]] == [pair.alike for pair in study.agreements]
    (section,) = [part for part in page(study).sections if part.heading == "Agreement between data sets"]
    assert len(section.parts[0].rows) == 3


def test_against_data_needs_study(tmp_path):
    with pytest.raises(SettingsError, match="add --study"):
        compressor.inspect(against_data=["random"])
    done = CliRunner().invoke(main, ["inspect", "--against-data", "random", "--output", str(tmp_path / "out")])
    assert done.exit_code != 0
    assert "add --study" in done.output


@pytest.mark.slow
@pytest.mark.skipif(not LLAMA.is_dir(), reason="the trained Llama in ../shared/data is not here")
def test_random_tokens_rank_the_sites_of_a_trained_llama_differently(tmp_path):
    ids = np.load(LLAMA / "sampled_tokens.npy")
    np.save(tmp_path / "one.npy", ids[:128])
    np.save(tmp_path / "other.npy", ids[128:256])
    study = compressor.inspect(
        LLAMA, data=tmp_path / "one.npy", study=True, against_data=[tmp_path / "other.npy", "random"]
    ).study
    texts, noise, _ = study.agreements
    assert texts.alike
    assert not noise.alike
    assert noise.spearman < 0.9 < texts.spearman
