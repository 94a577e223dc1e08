"""Which rank holds which expert: linear, round-robin, or so that the busiest rank of each layer has least to do.

Pure functions on one layer's loads. With few experts the best partition is found by trying all (35 ways for 8 experts
on 2 ranks, 105 on 4); with many, by longest-processing-time-first into ranks of equal size, improved by swaps. Every
rank holds the same number of experts, as engines want it. Redundant experts follow the greedy rule of DeepSeek's EPLB:
copy the expert whose copies carry most.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import factorial

from cluster.errors import PlanError

# Above this number of partitions the heuristic is used; 8 experts on 4 ranks have 105, 16 on 4 have 2.6 million.
MAX_EXHAUSTIVE_PARTITIONS = 50_000

Partition = tuple[tuple[int, ...], ...]
"""For each rank the experts that it holds, ascending."""


def linear_partition(num_experts: int, num_ranks: int) -> Partition:
    """Neighbouring experts together: rank 0 has the first, and so on."""
    size = _experts_per_rank(num_experts, num_ranks)
    return tuple(tuple(range(rank * size, (rank + 1) * size)) for rank in range(num_ranks))


def round_robin_partition(num_experts: int, num_ranks: int) -> Partition:
    """Experts dealt out one by one."""
    _experts_per_rank(num_experts, num_ranks)
    return tuple(tuple(range(rank, num_experts, num_ranks)) for rank in range(num_ranks))


def balanced_partition(loads: Sequence[float], num_ranks: int) -> Partition:
    """The partition of experts into ranks of equal size whose busiest rank has the least load.

    `loads` has one entry per expert (tokens routed, for example). Optimal where at most `MAX_EXHAUSTIVE_PARTITIONS`
    partitions exist, else a heuristic that is never worse than linear placement.
    """
    size = _experts_per_rank(len(loads), num_ranks)
    if any(load < 0 for load in loads):
        raise PlanError("An expert's load cannot be negative; the routing trace is damaged.")
    if num_partitions(len(loads), num_ranks) <= MAX_EXHAUSTIVE_PARTITIONS:
        best = min(_partitions(tuple(range(len(loads))), size), key=lambda p: (busiest(loads, p), p))
    else:
        greedy = _improve_by_swaps(loads, _longest_first(loads, num_ranks))
        best = min(greedy, linear_partition(len(loads), num_ranks), key=lambda p: busiest(loads, p))
    return tuple(sorted(best))


def busiest(loads: Sequence[float], partition: Partition) -> float:
    """Load of the rank that has most to do."""
    return max(sum(loads[expert] for expert in experts) for experts in partition)


def imbalance(loads: Sequence[float], partition: Partition) -> float:
    """Busiest rank's load divided by the mean load of a rank; 1.0 is perfect, and so is a layer without any load."""
    total = sum(loads)
    return busiest(loads, partition) * len(partition) / total if total else 1.0


def imbalance_bound(loads: Sequence[float], num_ranks: int) -> float:
    """No placement of whole experts can have a smaller imbalance.

    The larger of: the mean, the busiest expert with the lightest others that must share its rank, and, where all
    partitions can be tried, the optimum itself.
    """
    size = _experts_per_rank(len(loads), num_ranks)
    total = sum(loads)
    if not total:
        return 1.0
    if num_partitions(len(loads), num_ranks) <= MAX_EXHAUSTIVE_PARTITIONS:
        return imbalance(loads, balanced_partition(loads, num_ranks))
    ordered = sorted(loads)
    fullest = ordered[-1] + sum(ordered[: size - 1])
    return max(1.0, fullest * num_ranks / total)


def num_partitions(num_experts: int, num_ranks: int) -> int:
    """Ways to split experts into unordered ranks of equal size."""
    size = _experts_per_rank(num_experts, num_ranks)
    return factorial(num_experts) // (factorial(size) ** num_ranks * factorial(num_ranks))


@dataclass(frozen=True, slots=True)
class RedundantPlacement:
    """`slots[rank]` lists the experts held there; an expert may stand on several ranks. `num_copies[expert]`."""

    slots: Partition
    num_copies: tuple[int, ...]


def redundant_placement(loads: Sequence[float], num_ranks: int, num_redundant: int) -> RedundantPlacement:
    """Place all experts and `num_redundant` copies, copies on different ranks where there are enough.

    The expert with the highest load per copy gets the next copy (greedy rule of DeepSeek's EPLB), then the copies are
    dealt out, heaviest first, to the least loaded rank that has room and no copy of it yet, and swapped between ranks
    for as long as that helps.
    """
    num_slots = len(loads) + num_redundant
    size = _experts_per_rank(num_slots, num_ranks, what="experts with their copies")
    copies = [1] * len(loads)
    for _ in range(num_redundant):
        allowed = [expert for expert in range(len(loads)) if copies[expert] < num_ranks]
        if not allowed:
            raise PlanError(f"{num_redundant} redundant experts are more than one copy on each of {num_ranks} ranks.")
        heaviest = max(allowed, key=lambda expert: (loads[expert] / copies[expert], -expert))
        copies[heaviest] += 1
    items = sorted(
        ((loads[expert] / copies[expert], expert) for expert in range(len(loads)) for _ in range(copies[expert])),
        # Experts with many copies first among equals: they have the fewest ranks to choose from.
        key=lambda item: (-item[0], -copies[item[1]], item[1]),
    )
    dealt = [list(experts) for experts in _deal(items, num_ranks, size)]
    per_copy = [load / number for load, number in zip(loads, copies, strict=True)]
    return RedundantPlacement(_improve_by_swaps(per_copy, dealt), tuple(copies))


def _deal(items: Sequence[tuple[float, int]], num_ranks: int, size: int) -> Partition:
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    weight = [0.0] * num_ranks
    for load, expert in items:
        open_ranks = [rank for rank in range(num_ranks) if len(ranks[rank]) < size]
        fresh = [rank for rank in open_ranks if expert not in ranks[rank]]
        rank = min(fresh or open_ranks, key=lambda r: (weight[r], r))
        ranks[rank].append(expert)
        weight[rank] += load
    return tuple(tuple(sorted(experts)) for experts in ranks)


def _experts_per_rank(num_experts: int, num_ranks: int, *, what: str = "experts") -> int:
    if num_ranks < 1:
        raise PlanError(f"A gang needs at least one rank, not {num_ranks}.")
    if num_ranks > num_experts:
        raise PlanError(f"{num_ranks} ranks are more than the {num_experts} {what}; use at most {num_experts} ranks.")
    if num_experts % num_ranks:
        raise PlanError(f"{num_experts} {what} cannot be spread evenly over {num_ranks} ranks; use a divisor.")
    return num_experts // num_ranks


def _partitions(experts: tuple[int, ...], size: int) -> Iterator[Partition]:
    """All unordered partitions into groups of `size`; the first expert always leads the first group."""
    if not experts:
        yield ()
        return
    first, rest = experts[0], experts[1:]
    for others in itertools.combinations(rest, size - 1):
        left = tuple(expert for expert in rest if expert not in others)
        for tail in _partitions(left, size):
            yield ((first, *others), *tail)


def _longest_first(loads: Sequence[float], num_ranks: int) -> list[list[int]]:
    size = len(loads) // num_ranks
    heap = [(0.0, rank) for rank in range(num_ranks)]
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    for expert in sorted(range(len(loads)), key=lambda e: (-loads[e], e)):
        load, rank = heapq.heappop(heap)
        ranks[rank].append(expert)
        if len(ranks[rank]) < size:
            heapq.heappush(heap, (load + loads[expert], rank))
    return ranks


def _improve_by_swaps(loads: Sequence[float], ranks: list[list[int]]) -> Partition:
    """Swap an expert of the busiest rank with one elsewhere for as long as that lowers the busiest load."""
    weight = [sum(loads[expert] for expert in experts) for experts in ranks]
    while True:
        top = max(range(len(ranks)), key=lambda rank: weight[rank])
        swap = _best_swap(loads, ranks, weight, top)
        if swap is None:
            return tuple(tuple(sorted(experts)) for experts in ranks)
        other, mine, theirs = swap
        ranks[top][ranks[top].index(mine)] = theirs
        ranks[other][ranks[other].index(theirs)] = mine
        weight[top] += loads[theirs] - loads[mine]
        weight[other] += loads[mine] - loads[theirs]


def _best_swap(
    loads: Sequence[float], ranks: Sequence[Sequence[int]], weight: Sequence[float], top: int
) -> tuple[int, int, int] | None:
    best: tuple[int, int, int] | None = None
    lowest = weight[top]
    for other in range(len(ranks)):
        if other == top:
            continue
        for mine, theirs in itertools.product(ranks[top], ranks[other]):
            if mine in ranks[other] or theirs in ranks[top]:
                continue  # two copies on one rank would share nothing
            moved = loads[mine] - loads[theirs]
            result = max(weight[top] - moved, weight[other] + moved)
            if result < lowest * (1 - 1e-12):
                best, lowest = (other, mine, theirs), result
    return best
