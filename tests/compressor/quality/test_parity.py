"""Tests of the parity check: the scales of channels, the measured difference and the errors."""

import functools
import tracemalloc
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from compressor.quality import parity
from compressor.quality.parity import (
    ROUNDING,
    TOLERANCE,
    NotFiniteError,
    Parity,
    ParityError,
    Reference,
    check_parity,
    differences,
    row_differences,
)

Array = npt.NDArray[Any]


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def compared(expected: Array, value: Array, **options: Any) -> Parity:
    return check_parity(Reference.of({"y": expected}), lambda: {"y": value}, name="m", **options)


def changed(value: Array, place: tuple[int, ...], by: float) -> Array:
    copied = value.copy()
    copied[place] += by
    return copied


def test_a_column_a_million_times_smaller_has_its_own_scale() -> None:
    expected = normal(200, 4) * np.array([1e6, 1e6, 1e6, 1.0], dtype=np.float32)
    value = expected.copy()
    value[::7, 3] += 5.0
    assert np.abs(value - expected).max() / np.abs(expected).max() < TOLERANCE  # of the largest value of all
    with pytest.raises(ParityError) as refusal:
        compared(expected, value)
    largest = float(np.abs(expected[:, 3]).max())
    worst = int(np.abs(value.astype(float) - expected)[:, 3].argmax())
    assert f"in 29 of 200 rows, by {5.0 / largest:.2e} of its channel's scale ({largest:.3g})" in str(refusal.value)
    assert refusal.value.place == (
        f"output y, row {worst}, channel 3: found {value[worst, 3]:.7g}, expected {expected[worst, 3]:.7g}"
    )
    assert str(refusal.value).endswith("this is a bug in the export, not in your model: please report it.")


def test_the_difference_is_the_largest_of_all_channels_and_outputs() -> None:
    left, right = normal(20, 3), normal(20, 5, 2, seed=1)
    values = {"a": changed(left, (4, 1), 3e-5), "b": changed(right, (7, 2, 1), 8e-5)}
    parity = check_parity(Reference.of({"a": left, "b": right}), lambda: values, name="m")
    relative = np.abs(values["b"].astype(float) - right) / np.abs(right).max(0)
    assert parity == Parity("b", pytest.approx(relative.max()), 20)


def test_channels_are_the_static_axes() -> None:
    cache = normal(2, 3, 9, 4)  # batch, heads, tokens, features
    reference = Reference.of({"y": cache}, {"y": (1, 3)})
    np.testing.assert_array_equal(reference.scale["y"], np.abs(cache).max((0, 2), keepdims=True))
    with pytest.raises(ParityError, match="row 1, position 5, channel 2 3: found"):
        check_parity(reference, lambda: {"y": changed(cache, (1, 2, 5, 3), 0.1)}, name="m")


def test_channels_with_few_values_have_at_least_the_median_scale() -> None:
    row = np.array([[1e-6, 1.0, 2.0, 3.0]], dtype=np.float32)
    assert compared(row, changed(row, (0, 0), 1e-5)).difference == pytest.approx(1e-5 / 1.5, rel=1e-3)
    reference = Reference.of({"y": normal(8, 4)})
    np.testing.assert_array_equal(reference.part(slice(0, 1)).scale["y"], reference.scale["y"])


@pytest.mark.parametrize("mask", [-1e4, -65504.0, -1e9, np.finfo(np.float32).min, -np.inf])
def test_masked_values_do_not_set_the_scale(mask: float) -> None:
    scores = normal(2, 2, 8, 8)
    scores[..., np.triu_indices(8, 1)[0], np.triu_indices(8, 1)[1]] = mask
    assert compared(scores, scores).difference == 0.0
    assert compared(scores, changed(scores, (0, 0, 7, 1), 5e-6)).difference < TOLERANCE
    with pytest.raises(ParityError, match="found"):
        check_parity(
            Reference.of({"y": scores}, {"y": (1, 3)}), lambda: {"y": changed(scores, (0, 0, 7, 1), 0.1)}, name="m"
        )


def test_a_mask_that_the_engine_lacks_is_a_fault() -> None:
    expected = normal(8, 3)
    expected[:, 1] = -np.inf
    with pytest.raises(ParityError, match=r"channel 1: found -3.4\d+e\+38, expected -inf"):
        compared(expected, np.maximum(expected, np.finfo(np.float32).min))


def test_a_channel_of_zeros_allows_the_rounding_of_the_others() -> None:
    expected = normal(8, 3)
    expected[:, 1] = 0.0
    largest = float(np.abs(expected).max())
    compared(expected, changed(expected, (0, 1), 0.9 * largest * 2**-23))
    with pytest.raises(ParityError):
        compared(expected, changed(expected, (0, 1), 1.1 * largest * 2**-23))


def test_rounding_of_torch_widens_only_its_channel() -> None:
    exact = normal(8, 3).astype(np.float64)
    single = exact.astype(np.float32)
    single[:, 1] += np.float32(1e-3)
    reference = Reference.of({"y": single})
    refined = reference.with_rounding({"y": single}, {"y": exact}, np.zeros(8), {}, ("a note",))
    assert refined.scale["y"][0, 1] == pytest.approx(1e-3 * ROUNDING / TOLERANCE, rel=1e-3)
    np.testing.assert_array_equal(refined.scale["y"][0, [0, 2]], reference.scale["y"][0, [0, 2]])
    check = functools.partial(check_parity, reference, refine=lambda: refined, name="m")
    assert check(lambda: {"y": changed(single, (2, 1), 9e-3)}).notes == ("a note",)
    assert check(lambda: {"y": single}).notes == ()  # without need, nothing is refined
    for place, by in (((2, 1), 17e-3), ((2, 0), 9e-3)):
        with pytest.raises(ParityError, match=r"\(a note\); this is a bug"):
            check(lambda place=place, by=by: {"y": changed(single, place, by)})


def test_a_row_with_a_tie_may_differ_as_the_tie_does() -> None:
    value = normal(8, 3)
    ties = np.array([0.0, 0.2, 0, 0, 0, 0, 0, 0])
    reference = Reference.of({"y": value})
    double = {"y": value.astype(np.float64)}
    refined = reference.with_rounding({"y": value}, double, ties, {}, ())
    scale = float(reference.scale["y"][0, 2])
    parity = check_parity(refined, lambda: {"y": changed(value, (1, 2), 0.39 * scale)}, name="m")
    assert parity.difference == 0.0
    for row, by in ((1, 0.41), (0, 0.01)):
        with pytest.raises(ParityError, match="in 1 of 8 rows"):
            check_parity(refined, lambda row=row, by=by: {"y": changed(value, (row, 2), by * scale)}, name="m")


@pytest.mark.parametrize("dtype", [np.int64, np.bool_])
def test_integers_and_booleans_must_be_equal(dtype: Any) -> None:
    expected = (normal(8, 3) > 0).astype(dtype)
    value = expected.copy()
    assert compared(expected, value).difference == 0.0
    value[5, 1] = not value[5, 1]
    with pytest.raises(ParityError, match="row 5, position 1: found"):
        compared(expected, value)
    assert differences(Reference.of({"y": expected}), {"y": value}) == {}
    rows = row_differences(Reference.of({"y": expected}), {"y": expected}, {"y": value})
    assert rows.tolist() == [0, 0, 0, 0, 0, np.inf, 0, 0]


@pytest.mark.parametrize("shape", [(), (8,), (0, 4), (8, 0)])
def test_outputs_of_unusual_shapes(shape: tuple[int, ...]) -> None:
    assert compared(np.ones(shape, np.float16), np.ones(shape, np.float16)).difference == 0.0


def test_nan_in_the_engine_alone_is_a_bug_in_the_export() -> None:
    with pytest.raises(ParityError, match="bug in the export"):
        compared(normal(8, 1), np.full((8, 1), np.nan, np.float32))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_in_torch_is_a_fault_of_the_model(value: float) -> None:
    with pytest.raises(NotFiniteError, match="output y of the torch model has NaN or infinity"):
        compared(np.array([[value]]), np.array([[value]]))


def test_different_shape_raises() -> None:
    with pytest.raises(ParityError, match=r"shape \(2,\), expected \(1,\) as in torch"):
        compared(np.ones(1), np.ones(2))


def test_allowed_differences_by_channel_and_advice() -> None:
    value = normal(8, 2)
    reference = Reference.of({"y": value}, allowed=np.inf)
    assert check_parity(reference, lambda: {"y": value + 9}, name="m").difference > 1
    limited = Reference(reference.expected, {"y": np.ones((1, 2))}, {"y": np.array([[0.1, 1.0]])})
    check_parity(limited, lambda: {"y": changed(value, (0, 1), 0.9)}, name="m")
    with pytest.raises(ParityError, match=r"expected at most 0.1: row 0, channel 0: .*; look at it\.$"):
        check_parity(limited, lambda: {"y": changed(value, (0, 0), 0.2)}, name="m", advice="look at it")


@pytest.mark.parametrize("axes", [(1,), (2,), (1, 2), ()])
def test_the_size_of_the_pieces_changes_nothing(monkeypatch: pytest.MonkeyPatch, axes: tuple[int, ...]) -> None:
    """The scales, the difference, and row, position and channel of a fault are those of the whole output."""
    found = []
    for piece in (1, 5, 2**20):
        monkeypatch.setattr(parity, "PIECE", piece)
        for shape in ((4, 9, 3), (4, 9, 3, 2)):
            value = normal(*shape)
            value[:, 4] *= 50.0
            reference = Reference.of({"y": value}, {"y": axes})
            slight = reference.expected["y"] + normal(*shape, seed=1) * 1e-6
            faulty = changed(changed(value, (2, 7, 1), 3.0), (3, 0, 0), 2.5)
            with pytest.raises(ParityError) as error:
                check_parity(reference, lambda faulty=faulty: {"y": faulty}, name="m")  # type: ignore[misc]
            parity_found = check_parity(reference, lambda slight=slight: {"y": slight}, name="m")  # type: ignore[misc]
            found.append((reference.scale["y"].tolist(), parity_found, str(error.value)))
    assert found[:2] == found[2:4] == found[4:]
    assert "in 2 of 4 rows" in found[0][2]


def test_the_comparison_of_a_large_output_takes_little_memory() -> None:
    expected = normal(2, 64, 2**16)  # 32 MiB
    value = expected + np.float32(1e-6)
    tracemalloc.start()
    try:
        check_parity(Reference.of({"y": expected}, {"y": (2,)}), lambda: {"y": value}, name="m")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < expected.nbytes  # masks of one byte for each value, twice, and pieces
