"""Intervals and p-values: exact where they can be counted, the same every time, right on average."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from rag import significance
from rag.significance import bootstrap_mean, compare_paired


def test_the_same_seed_gives_the_same_interval_and_another_seed_another() -> None:
    values = np.random.default_rng(1).random(40).tolist()
    assert bootstrap_mean(values) == bootstrap_mean(values)
    assert bootstrap_mean(values) != bootstrap_mean(values, seed=2)


def test_equal_values_leave_no_doubt() -> None:
    estimate = bootstrap_mean([0.25] * 12)
    assert (estimate.mean, estimate.low, estimate.high) == (0.25, 0.25, 0.25)
    assert bootstrap_mean([0.7]).high == 0.7


def test_the_interval_is_that_of_the_counted_distribution() -> None:
    """All 4**4 draws of four values can be counted; the resampled quantiles must be near theirs."""
    values = [0.0, 0.1, 0.6, 1.0]
    all_means = [np.mean(draw) for draw in itertools.product(values, repeat=4)]
    low, high = np.quantile(all_means, (0.025, 0.975))
    estimate = bootstrap_mean(values)
    assert estimate.mean == pytest.approx(0.425)
    assert estimate.low == pytest.approx(low, abs=0.02)
    assert estimate.high == pytest.approx(high, abs=0.02)


def test_intervals_hold_the_true_mean_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(3)
    num_held = 0
    for trial in range(200):
        estimate = bootstrap_mean((rng.random(60) ** 2).tolist(), num_samples=500, seed=trial)
        num_held += estimate.low <= 1 / 3 <= estimate.high
    assert 0.88 <= num_held / 200 <= 0.99


def exact_p_value(differences: list[float]) -> float:
    observed = abs(sum(differences))
    signs = list(itertools.product((1, -1), repeat=len(differences)))
    as_far = sum(abs(np.dot(each, differences)) >= observed - 1e-12 for each in signs)
    return as_far / len(signs)


@pytest.mark.parametrize(
    "differences", [[0.5, 0.25, 0.125, 0.25, 0.5], [0.5, -0.25, 0.125, 0.25, -0.5, 0.75], [0.3, -0.1, 0.0, 0.0, 0.2]]
)
def test_the_p_value_is_that_of_all_signs(differences: list[float]) -> None:
    compared = compare_paired(differences, [0.0] * len(differences))
    assert compared.mean == pytest.approx(np.mean(differences))
    assert compared.p_value == pytest.approx(exact_p_value(differences), abs=0.02)


def test_equal_systems_do_not_differ_and_the_p_value_is_never_zero() -> None:
    values = np.random.default_rng(4).random(50)
    assert compare_paired(values.tolist(), values.tolist()).p_value == 1.0
    far = compare_paired((values + 1).tolist(), values.tolist(), num_samples=999)
    assert far.p_value == pytest.approx(1 / 1000)
    assert far.low == pytest.approx(1) and far.high == pytest.approx(1)


def test_direction_changes_the_sign_and_not_the_p_value() -> None:
    rng = np.random.default_rng(5)
    first, second = rng.random(30).tolist(), rng.random(30).tolist()
    forth, back = compare_paired(first, second), compare_paired(second, first)
    assert forth.mean == pytest.approx(-back.mean)
    assert forth.p_value == back.p_value


def test_without_an_effect_small_p_values_are_rare() -> None:
    rng = np.random.default_rng(6)
    p_values = [
        compare_paired(rng.random(20).tolist(), rng.random(20).tolist(), num_samples=400).p_value for _ in range(200)
    ]
    assert np.mean(np.array(p_values) <= 0.05) <= 0.10


def test_many_questions_are_resampled_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(7).random(30).tolist()
    whole = bootstrap_mean(values, num_samples=5000)
    monkeypatch.setattr(significance, "_CELLS_AT_ONCE", 900)
    parts = bootstrap_mean(values, num_samples=5000)
    assert parts.low == pytest.approx(whole.low, abs=0.01)
    assert compare_paired(values, [0.5] * 30).p_value > 0


def test_nothing_and_unequal_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="nothing to estimate"):
        bootstrap_mean([])
    with pytest.raises(ValueError, match="3 values cannot be paired with 2"):
        compare_paired([1, 2, 3], [1, 2])
