"""Do data sets rank sites alike: against scipy, brute force, and sets that are alike or unlike by construction."""

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
from compressor.study.dataset_agreement import Sums, between, random_tokens, shared_ends
from tests.paths import SHARED_DATA
from tests.samples import worded

LLAMA = SHARED_DATA / "stories260k"
KINDS = ["attention", "mlp"] * 5


def drawn(means, noise, seed, samples=40, name="set"):
    """Samples of 30 tokens whose mean cosine is that of the site and noise."""
    cosines = np.asarray(means)[:, None] + noise * np.random.default_rng(seed).standard_normal((len(means), samples))
    tokens = np.full_like(cosines, 30.0)
    return Sums(name, tokens, cosines * tokens)


def test_the_correlations_are_scipys_and_the_ends_are_counted():
    rng = np.random.default_rng(3)
    first, second = drawn(rng.random(10), 0.01, 1), drawn(rng.random(10), 0.01, 2)
    found = between(first, second, KINDS)
    one, other = (each.means()[0] for each in (first, second))
    assert found.spearman == pytest.approx(stats.spearmanr(one, other).statistic, abs=1e-12)
    assert found.kendall == pytest.approx(stats.kendalltau(one, other).statistic, abs=1e-12)
    assert found.kinds["mlp"] == pytest.approx(stats.spearmanr(one[1::2], other[1::2]).statistic, abs=1e-12)
    best = [set(sorted(range(10), key=lambda place: -each[place])[:4]) for each in (one, other)]
    assert found.shared[4] == len(best[0] & best[1])
    assert set(found.shared) == set(shared_ends(one, other)) == {1, 2, 4}
    assert not found.alike


@pytest.mark.parametrize("noise", [0.01, 0.3, 3.0])
def test_two_sets_of_one_kind_are_alike_however_noisy(noise):
    """One in twenty falls below the 5th percentile by chance; four of twelve or more do so in 2 of 1,000 runs."""
    means = np.linspace(0.5, 0.9, 10)
    found = [between(drawn(means, noise, 2 * seed), drawn(means, noise, 2 * seed + 1), KINDS) for seed in range(12)]
    assert sum(each.alike for each in found) > 8
    assert all(each.low <= each.high and each.floor <= each.mixed for each in found)


def test_what_is_ranked_the_other_way_round_is_not_alike():
    means = np.linspace(0.5, 0.9, 10)
    found = between(drawn(means, 0.05, 0), drawn(means[::-1], 0.05, 1), KINDS)
    assert found.spearman < -0.8
    assert found.shared[1] == 0
    assert not found.alike
    assert between(drawn(means[:2], 0.1, 0), drawn(means[:2], 0.1, 1), KINDS[:2]) is None


def test_random_tokens_keep_lengths_and_padding(tmp_path):
    model = models.load(str(worded(tmp_path / "llama", vocabulary=40)))
    (tmp_path / "texts.txt").write_text("\n".join(" ".join(["w5"] * count) for count in range(3, 20)))
    split = load(str(tmp_path / "texts.txt"), model.preprocess, task=model.task).calibration
    (real,) = split.batches(32)
    (found,) = random_tokens(model, split, 0)
    (again,) = random_tokens(model, split, 0)
    assert torch.equal(found["input_ids"], again["input_ids"])
    assert found["attention_mask"].tolist() == real.feeds["attention_mask"].tolist()
    assert found["input_ids"].shape == real.feeds["input_ids"].shape
    assert len(found["input_ids"].unique()) > 10
    assert int(found["input_ids"].max()) < 40


def test_a_study_compares_data_sets(tmp_path):
    """The embedded sample: its own digits again, and noise."""
    digits = str(models.SAMPLE / "digits.npz")
    found = compressor.inspect(data=digits, study=True, samples=60, against_data=[digits, "random"]).study
    same, noise, other = found.agreements
    assert (same.first, same.second, noise.second, other.second) == (digits, digits, "random", "random")
    assert same.spearman == 1.0
    assert same.alike
    assert noise.spearman < same.spearman
    assert noise == other.__class__(**{**vars(other), "first": digits})
    said = [line for line in found.summary() if line.startswith("Rankings by digits.npz")]
    assert len(said) == 3
    assert "and random" in said[-1]
    content = json.loads(found.to_json())
    assert [each["alike"] for each in content["agreements"]] == [each.alike for each in found.agreements]
    (section,) = [each for each in page(found).sections if each.heading == "Whether other data rank alike"]
    assert len(section.parts[0].rows) == 3


def test_other_data_need_a_study(tmp_path):
    with pytest.raises(SettingsError, match="add --study"):
        compressor.inspect(against_data=["random"])
    done = CliRunner().invoke(main, ["inspect", "--against-data", "random", "--output", str(tmp_path / "out")])
    assert done.exit_code != 0
    assert "add --study" in done.output


@pytest.mark.skipif(not LLAMA.is_dir(), reason="the trained Llama in ../shared/data is not here")
def test_random_tokens_rank_the_trained_llama_otherwise_than_its_own_texts(tmp_path):
    ids = np.load(LLAMA / "sampled_tokens.npy")
    np.save(tmp_path / "one.npy", ids[:128])
    np.save(tmp_path / "other.npy", ids[128:256])
    found = compressor.inspect(
        LLAMA, data=tmp_path / "one.npy", study=True, against_data=[tmp_path / "other.npy", "random"]
    ).study
    texts, noise, _ = found.agreements
    assert texts.alike
    assert not noise.alike
    assert noise.spearman < 0.9 < texts.spearman
