"""How sure a mean over questions is, and whether two rankings of the same questions differ: resampling, seeded.

Pure functions over one value per question. The same values, seed and number of samples give the same result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

NUM_SAMPLES = 10_000
SEED = 0
CONFIDENCE = 0.95
_CELLS_AT_ONCE = 4_000_000
"""Random numbers held at a time: memory stays small for any number of questions."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over questions with the limits of its confidence interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """How much higher the first of two systems scores than the second: mean, its interval, two-sided p-value."""

    mean: float
    low: float
    high: float
    p_value: float


def bootstrap_mean(values: Sequence[float], *, num_samples: int = NUM_SAMPLES, seed: int = SEED) -> Estimate:
    """Mean with its 95 % percentile bootstrap interval: questions are drawn again with replacement, and the interval
    holds the middle 95 % of the means. Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13."""
    array = _checked(values)
    draws = _in_parts(num_samples, len(array), seed)
    means = np.concatenate([array[rng.integers(0, len(array), shape)].mean(axis=1) for rng, shape in draws])
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, (tail, 1 - tail))
    return Estimate(float(array.mean()), float(low), float(high))


def compare_paired(
    first: Sequence[float], second: Sequence[float], *, num_samples: int = NUM_SAMPLES, seed: int = SEED
) -> PairedDifference:
    """Two-sided paired randomization test of the mean difference (first minus second, question by question).

    If both systems were alike, each question's difference could as well have the other sign; the p-value is the share
    of random signs whose mean lies at least as far from zero as the observed one, the observed signs counted as one of
    the samples, so it is never 0. Smucker, Allan, Carterette, "A Comparison of Statistical Significance Tests for
    Information Retrieval Evaluation", CIKM 2007; Phipson and Smyth, "Permutation P-values Should Never Be Zero", 2010.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} values cannot be paired with {len(second)}.")
    differences = _checked(first) - _checked(second)
    estimate = bootstrap_mean(differences.tolist(), num_samples=num_samples, seed=seed)
    observed = abs(differences.sum())
    # Sums of the same numbers in another order differ in the last digits.
    reached = observed - 1e-9 * max(1.0, float(np.abs(differences).sum()))
    num_as_far = 0
    for rng, shape in _in_parts(num_samples, len(differences), seed):
        signs = rng.integers(0, 2, shape, dtype=np.int8) * 2 - 1
        num_as_far += int((np.abs(signs @ differences) >= reached).sum())
    return PairedDifference(estimate.mean, estimate.low, estimate.high, (num_as_far + 1) / (num_samples + 1))


def _checked(values: Sequence[float]) -> Floats:
    if not len(values):
        raise ValueError("There is nothing to estimate from: no question was scored.")
    return np.asarray(values, dtype=np.float64)


def _in_parts(num_samples: int, size: int, seed: int) -> Iterator[tuple[np.random.Generator, tuple[int, int]]]:
    rng = np.random.default_rng(seed)
    rows = max(1, _CELLS_AT_ONCE // size)
    for start in range(0, num_samples, rows):
        yield rng, (min(rows, num_samples - start), size)
