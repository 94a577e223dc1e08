"""Joining the scores of several searches into one ranking. Pure functions over `{key: score}` mappings, one a leg.

A leg that did not find a key says nothing by leaving it out: it counts as that leg's lowest. The result holds every
key that any leg found; higher is better. Which method is the default was measured (see BENCHMARKS.md), not assumed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Literal, TypeVar

Key = TypeVar("Key", bound=Hashable)
FusionMethod = Literal["rrf", "minmax", "dbsf"]

RRF_K = 60


def reciprocal_rank(legs: Sequence[Mapping[Key, float]], weights: Sequence[float]) -> dict[Key, float]:
    """Sum of weight / (60 + rank). Cormack, Clarke, Buettcher, "Reciprocal Rank Fusion outperforms Condorcet and
    individual Rank Learning Methods", SIGIR 2009. Looks at ranks alone, so equal scores share the better rank."""
    return _weighted_sum([_reciprocal_ranks(leg) for leg in legs], weights)


def min_max(legs: Sequence[Mapping[Key, float]], weights: Sequence[float]) -> dict[Key, float]:
    """Weighted mean of each leg's scores stretched to 0..1 between its lowest and highest. Bruch, Gai, Ingber, "An
    Analysis of Fusion Functions for Hybrid Retrieval", TOIS 2023 (there: convex combination)."""
    return _weighted_sum([_stretch(leg, *_range(leg)) for leg in legs], weights)


def distribution_based(legs: Sequence[Mapping[Key, float]], weights: Sequence[float]) -> dict[Key, float]:
    """As `min_max`, but stretched between mean minus and plus three standard deviations, so that one far-off score
    does not press all others together. Mazzeschi, "Distribution-Based Score Fusion", 2023; Qdrant's DBSF."""
    return _weighted_sum([_stretch(leg, *_three_sigma(leg)) for leg in legs], weights)


METHODS: dict[FusionMethod, Callable[[Sequence[Mapping[Key, float]], Sequence[float]], dict[Key, float]]] = {
    "rrf": reciprocal_rank,
    "minmax": min_max,
    "dbsf": distribution_based,
}


def fuse(
    legs: Sequence[Mapping[Key, float]], *, method: FusionMethod, weights: Sequence[float] | None = None
) -> dict[Key, float]:
    """Fuse with a method by name; weights default to equal ones. Legs that found nothing at all do not count."""
    weights = [1.0] * len(legs) if weights is None else weights
    if len(weights) != len(legs):
        raise ValueError(f"{len(legs)} legs came with {len(weights)} weights; give one weight a leg.")
    if any(weight < 0 for weight in weights):
        raise ValueError("A leg's weight cannot be negative.")
    kept = [(leg, weight) for leg, weight in zip(legs, weights, strict=True) if leg]
    return METHODS[method]([leg for leg, _ in kept], [weight for _, weight in kept])


def _weighted_sum(legs: Sequence[Mapping[Key, float]], weights: Sequence[float]) -> dict[Key, float]:
    total = sum(weights) or 1.0
    keys = dict.fromkeys(key for leg in legs for key in leg)
    return {
        key: sum(weight * leg.get(key, 0.0) for leg, weight in zip(legs, weights, strict=True)) / total for key in keys
    }


def _reciprocal_ranks(leg: Mapping[Key, float]) -> dict[Key, float]:
    ranks = {score: rank for rank, score in reversed(list(enumerate(sorted(leg.values(), reverse=True), start=1)))}
    return {key: 1.0 / (RRF_K + ranks[score]) for key, score in leg.items()}


def _stretch(leg: Mapping[Key, float], low: float, high: float) -> dict[Key, float]:
    """A leg whose scores are all the same says of each key the same: that it was found."""
    if math.isclose(low, high):
        return dict.fromkeys(leg, 1.0)
    return {key: (score - low) / (high - low) for key, score in leg.items()}


def _range(leg: Mapping[Key, float]) -> tuple[float, float]:
    return min(leg.values()), max(leg.values())


def _three_sigma(leg: Mapping[Key, float]) -> tuple[float, float]:
    mean = math.fsum(leg.values()) / len(leg)
    sigma = math.sqrt(math.fsum((score - mean) ** 2 for score in leg.values()) / max(1, len(leg) - 1))
    return mean - 3 * sigma, mean + 3 * sigma
