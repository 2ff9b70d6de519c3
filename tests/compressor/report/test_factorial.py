"""Tests of the factorial on synthetic latencies and predictions with known effects."""

import io
import json

import numpy as np
import pytest
from rich.console import Console

from compressor.quality.evaluate import Evaluation
from compressor.report.factorial import Factorial, cells_of, compute_factorial, conditions
from runtimes.base.timing import Latency

CELLS = cells_of("int8")
TWO = tuple(cell for cell in CELLS if not cell.startswith("changes"))
WHERE = conditions("onnxruntime", 1)
# Slowdown of each of four rounds, the same for all cells: drawing rounds together removes it from the ratios.
SLOWNESS = np.array([[1.0], [3.0], [8.0], [2.0]]) * np.ones((4, 5))


def latencies(values: dict[str, float], *, noise: float = 0.0) -> dict[str, Latency]:
    """Return four rounds of five samples: each cell's value times the slowdown of the round, times its own noise."""
    rng = np.random.default_rng(0)
    return {
        name: Latency(tuple(map(tuple, value * SLOWNESS * np.exp(noise * rng.normal(size=SLOWNESS.shape)))))
        for name, value in values.items()
    }


def factorial_of(values: dict[str, float], evaluation: Evaluation | None = None, *, noise: float = 0.0) -> Factorial:
    return compute_factorial(
        latencies(values, noise=noise), evaluation, {name: f"{name}.onnx" for name in values}, WHERE
    )


def accuracies(wrong: dict[str, set[int]], count: int = 200) -> Evaluation:
    """Return an evaluation in which each cell is wrong on the listed samples and right on all others."""
    columns = {
        name: {"accuracy": np.array([float(row not in rows) for row in range(count)])} for name, rows in wrong.items()
    }
    return Evaluation("accuracy", columns)


@pytest.mark.parametrize(
    ("both", "ratio", "verdict", "words"),
    [
        (2.0, 1.0, "multiplicative", "The speed-ups of compression and int8 multiply at batch 1 on onnxruntime"),
        (3.0, 2 / 3, "less", "Compression and int8 together gain less than the product of their speed-ups"),
        (1.0, 2.0, "more", "Compression and int8 together gain more than the product of their speed-ups"),
    ],
)
def test_the_ratio_compares_both_with_the_product_of_each(both: float, ratio: float, verdict: str, words: str) -> None:
    (interaction,) = factorial_of(dict(zip(TWO, (12.0, 4.0, 6.0, both), strict=True))).interactions
    # The same medians multiplied in another order: rounding of float64.
    assert [speedup.ratio for speedup in interaction.speed] == pytest.approx([2.0, 3.0, 12.0 / both], rel=1e-12)
    assert tuple(interaction.ratio) == pytest.approx((ratio, ratio, ratio), rel=1e-12)  # rounds are drawn together
    assert interaction.cells == ("dense float", "compressed float", "dense int8", "compressed int8")
    if ratio != 1.0:  # at 1, rounding decides on which side of 1 the interval of zero width lies
        assert interaction.verdict == verdict
        assert interaction.sentence(WHERE).startswith(words)


def test_the_interval_of_noisy_latencies_contains_the_true_ratio() -> None:
    (interaction,) = factorial_of(dict(zip(TWO, (12.0, 4.0, 6.0, 2.0), strict=True)), noise=0.02).interactions
    assert interaction.ratio.low < 1.0 < interaction.ratio.high
    # The noise of a median of twenty is below 2 %, of four of them below 4 %; the eightfold drift cancels.
    assert interaction.ratio.high - interaction.ratio.low < 0.1
    assert interaction.verdict == "multiplicative"
    assert "multiply" in interaction.sentence(WHERE)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_ratio_of_all_is_the_product_of_those_of_its_steps(seed: int) -> None:
    """Compression is the changes followed by token merging, so its speed-up and ratio are products of theirs."""
    values = np.random.default_rng(seed).uniform(0.1, 100.0, 6).tolist()
    cells = {name: Latency(((value,),)) for name, value in zip(CELLS, values, strict=True)}
    whole, changes, merging = compute_factorial(cells, None, dict.fromkeys(CELLS, ""), WHERE).interactions
    assert [interaction.change for interaction in (whole, changes, merging)] == [
        "compression",
        "compression without merging",
        "merging tokens",
    ]
    assert whole.speed[0].ratio == pytest.approx(changes.speed[0].ratio * merging.speed[0].ratio, rel=1e-9)
    assert whole.ratio.ratio == pytest.approx(changes.ratio.ratio * merging.ratio.ratio, rel=1e-9)
    for interaction in (whole, changes, merging):
        alone, int8, both = (speed.ratio for speed in interaction.speed)
        assert interaction.ratio.ratio == pytest.approx(both / (alone * int8), rel=1e-9)


@pytest.mark.parametrize(
    ("both", "excess", "additive", "words"),
    [
        (range(30), 0.0, "additive", "Their losses add up: +10.00 % and +5.00 % alone, +15.00 % together"),
        (range(20), -5.0, "less", "Together they lose less than the sum"),
        (range(60), 15.0, "more", "Together they lose more than the sum"),
    ],
)
def test_losses_on_different_samples_add_up(both: range, excess: float, additive: str, words: str) -> None:
    """Compression loses 20 of 200 samples and int8 loses 10 others: both lose 30 without an interaction."""
    wrong = dict(zip(TWO, (set(), set(range(20, 30)), set(range(20)), set(both)), strict=True))
    evaluation = accuracies(wrong)
    whole = factorial_of(dict.fromkeys(TWO, 1.0), evaluation)
    (interaction,) = whole.interactions
    assert interaction.loss is not None
    assert interaction.excess is not None
    assert [loss.value for loss in interaction.loss] == pytest.approx([10.0, 5.0, len(both) / 2], abs=1e-9)
    assert interaction.excess.value == pytest.approx(excess, abs=1e-9)
    if excess == 0.0:  # no sample is lost twice, so every resample has an excess of zero up to rounding
        assert (interaction.excess.low, interaction.excess.high) == pytest.approx((0.0, 0.0), abs=1e-9)
    else:
        assert interaction.additive == additive
        assert words in interaction.sentence(WHERE)
    assert whole.losses["dense int8"].value == pytest.approx(5.0, abs=1e-9)


def test_the_excess_is_resampled_over_the_same_samples() -> None:
    """Compare with an explicit bootstrap: one draw of rows for all four cells."""
    rng = np.random.default_rng(1)
    nll = {name: rng.gamma(2.0, size=50) * (1.0 + index / 10) for index, name in enumerate(TWO)}
    tokens = np.full(50, 2.0)
    columns = {name: {"nll": values, "tokens": tokens} for name, values in nll.items()}
    figure = Evaluation("perplexity", columns).excess(
        "dense float", "compressed float", "dense int8", "compressed int8"
    )
    rows = np.random.default_rng(0).integers(0, 50, (999, 50))
    at = {name: np.exp(values[rows].mean(-1) / 2.0) for name, values in nll.items()}
    lost = {name: (at[name] / at["dense float"] - 1.0) * 100.0 for name in TWO}
    excess = lost["compressed int8"] - lost["compressed float"] - lost["dense int8"]
    # The same sums except for one division: rounding of float64.
    assert (figure.low, figure.high) == pytest.approx(tuple(np.percentile(excess, [2.5, 97.5])), rel=1e-9)
    assert figure.n == 50


def test_the_factorial_becomes_plain_json_with_every_raw_sample() -> None:
    wrong: dict[str, set[int]] = {name: set() for name in TWO}
    whole = factorial_of(dict(zip(TWO, (12.0, 4.0, 6.0, 2.0), strict=True)), accuracies(wrong), noise=0.02)
    content = json.loads(json.dumps(whole.to_dict()))
    assert set(content["cells"]) == set(TWO)
    assert content["cells"]["dense float"]["speedup"] is None
    for name, cell in content["cells"].items():
        assert cell["file"] == f"{name}.onnx"
        assert np.shape(cell["latency"]["samples_ms"]) == SLOWNESS.shape
    assert content["conclusion"] == list(whole.conclusion)
    assert content["interactions"][0]["verdict"] == "multiplicative"
    assert content["interactions"][0]["ratio"]["ratio"] == whole.interactions[0].ratio.ratio
    stream = io.StringIO()
    Console(file=stream, width=80).print(whole.table())
    lines = stream.getvalue().splitlines()
    assert not any("…" in line for line in lines)
    assert [line.split()[0] for line in lines if "100.00" in line and "–" not in line] == ["dense"] * 2 + [
        "compressed"
    ] * 2


def test_without_quality_none_is_stated() -> None:
    whole = factorial_of(dict(zip(TWO, (12.0, 4.0, 6.0, 2.0), strict=True)))
    assert len(whole.table().columns) == 3
    assert "lose" not in whole.conclusion[0]
    assert whole.to_dict()["interactions"][0]["excess"] is None
