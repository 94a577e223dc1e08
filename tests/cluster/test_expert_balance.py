"""Experts on ranks: optimal where it can be had, never worse than linear, and bounded from below."""

import itertools
import random

import pytest

from cluster.errors import PlanError
from cluster.expert_balance import (
    balanced_partition,
    busiest,
    imbalance,
    imbalance_bound,
    linear_partition,
    num_partitions,
    redundant_placement,
    round_robin_partition,
)


def skewed_loads(num_experts: int, seed: int) -> list[float]:
    return [random.Random(seed * 1000 + expert).paretovariate(1.2) for expert in range(num_experts)]


def test_eight_experts_have_35_partitions_on_two_ranks_and_105_on_four() -> None:
    assert num_partitions(8, 2) == 35
    assert num_partitions(8, 4) == 105


def test_linear_and_round_robin_partitions() -> None:
    assert linear_partition(8, 4) == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert round_robin_partition(8, 2) == ((0, 2, 4, 6), (1, 3, 5, 7))


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("seed", range(20))
def test_eight_experts_are_placed_as_well_as_any_ordering_can(num_ranks: int, seed: int) -> None:
    loads = skewed_loads(8, seed)
    size = 8 // num_ranks
    best = min(
        max(sum(loads[e] for e in order[i : i + size]) for i in range(0, 8, size))
        for order in itertools.permutations(range(8))
        if order[0] == 0
    )
    assert busiest(loads, balanced_partition(loads, num_ranks)) == pytest.approx(best)


@pytest.mark.parametrize(("num_experts", "num_ranks"), [(8, 2), (8, 4), (64, 8), (128, 16), (256, 32)])
def test_every_expert_stands_once_and_no_placement_is_worse_than_linear(num_experts: int, num_ranks: int) -> None:
    loads = skewed_loads(num_experts, 7)
    partition = balanced_partition(loads, num_ranks)
    assert sorted(itertools.chain(*partition)) == list(range(num_experts))
    assert {len(experts) for experts in partition} == {num_experts // num_ranks}
    assert busiest(loads, partition) <= busiest(loads, linear_partition(num_experts, num_ranks))
    assert imbalance(loads, partition) >= imbalance_bound(loads, num_ranks) - 1e-9


def test_swaps_bring_many_experts_close_to_the_bound() -> None:
    loads = [random.Random(expert).uniform(1, 3) for expert in range(64)]
    assert imbalance(loads, balanced_partition(loads, 8)) <= 1.02 * imbalance_bound(loads, 8)


def test_a_layer_without_load_is_balanced() -> None:
    assert imbalance([0.0] * 8, linear_partition(8, 2)) == 1.0
    assert imbalance_bound([0.0] * 8, 2) == 1.0


def test_the_heaviest_expert_is_copied_and_its_copies_lie_on_different_ranks() -> None:
    placed = redundant_placement([10, 1, 1, 1, 1, 1, 1, 1], num_ranks=4, num_redundant=4)
    assert placed.num_copies[0] == 4
    assert all(experts.count(0) == 1 for experts in placed.slots)
    assert {len(experts) for experts in placed.slots} == {3}


def test_copies_lower_the_busiest_rank() -> None:
    loads = [40.0, 5, 5, 5, 5, 5, 5, 5]
    plain = busiest(loads, balanced_partition(loads, 4))
    placed = redundant_placement(loads, 4, 4)
    shared = max(sum(loads[e] / placed.num_copies[e] for e in experts) for experts in placed.slots)
    assert shared < plain / 2


@pytest.mark.parametrize(
    ("num_experts", "num_ranks", "message"),
    [
        (8, 16, "16 ranks are more than the 8 experts"),
        (8, 3, "cannot be spread evenly over 3 ranks"),
        (8, 0, "at least one rank"),
    ],
)
def test_sizes_that_cannot_be_are_refused(num_experts: int, num_ranks: int, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        balanced_partition([1.0] * num_experts, num_ranks)


def test_more_copies_than_ranks_and_negative_loads_are_refused() -> None:
    with pytest.raises(PlanError, match="more than one copy on each"):
        redundant_placement([1.0, 1.0], num_ranks=2, num_redundant=4)
    with pytest.raises(PlanError, match="trace is damaged"):
        balanced_partition([1.0, -1.0], 2)
