"""Judges where a plan puts the experts, by loads that it was made from or by others, beside what no placement can beat.

A layer is done when its busiest rank is, so what counts is the busiest rank against the mean, averaged over the layers.
Pure functions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.expert_balance import (
    Partition,
    imbalance,
    imbalance_bound,
    linear_partition,
    redundant_placement,
)
from cluster.plan import ExpertLoads, Plan


@dataclass(frozen=True, slots=True)
class Balance:
    """Busiest rank's load divided by the mean, averaged over the layers; 1.0 is even.

    `linear`: neighbouring experts together, without copies. `bound`: no placement with as many copies is better.
    `worst_layer` is where the plan is farthest from even, `worst` how far.
    """

    linear: float
    planned: float
    bound: float
    worst_layer: int
    worst: float

    @property
    def over_bound(self) -> float:
        """How far the plan is above the bound, as a share of it."""
        return self.planned / self.bound - 1


def judge(plan: Plan, loads: ExpertLoads) -> Balance | None:
    """The plan under these loads; none where no experts are spread over ranks."""
    num_ranks = plan.parallel.num_expert_ranks
    if num_ranks == 1 or not plan.replicas:
        return None
    loads.check(plan.shape)
    held = expert_partitions_of(plan)
    linear = linear_partition(plan.shape.num_experts, num_ranks)
    planned = [layer_imbalance(tokens, held[layer]) for layer, tokens in enumerate(loads.tokens)]
    bounds = [layer_bound(tokens, held[layer]) for layer, tokens in enumerate(loads.tokens)]
    worst = max(range(len(planned)), key=lambda layer: planned[layer])
    return Balance(
        linear=_mean([imbalance(tokens, linear) for tokens in loads.tokens]),
        planned=_mean(planned),
        bound=_mean(bounds),
        worst_layer=worst,
        worst=planned[worst],
    )


def layer_imbalance(tokens: Sequence[int], held: Partition) -> float:
    """Like `imbalance`, where experts may stand on several ranks: their tokens are shared evenly by the copies."""
    copies = Counter(expert for experts in held for expert in experts)
    shared = [count / max(1, copies[expert]) for expert, count in enumerate(tokens)]
    total = sum(tokens)
    busiest = max(sum(shared[expert] for expert in experts) for experts in held)
    return busiest * len(held) / total if total else 1.0


def layer_bound(tokens: Sequence[int], held: Partition) -> float:
    """What no placement with as many slots can beat.

    Without copies the exhaustive optimum where it can be had. With copies: some rank holds a copy of the expert that
    is heaviest per copy, and the greedy choice of copies makes that as light as it can be.
    """
    num_ranks = len(held)
    num_redundant = sum(map(len, held)) - len(tokens)
    if not num_redundant:
        return imbalance_bound(tokens, num_ranks)
    total = sum(tokens)
    copies = redundant_placement(tokens, num_ranks, num_redundant).num_copies
    heaviest = max(count / number for count, number in zip(tokens, copies, strict=True))
    return max(1.0, heaviest * num_ranks / total) if total else 1.0


def expert_partitions_of(plan: Plan) -> tuple[Partition, ...]:
    """For each layer the experts of each rank of the first replica; ranks of one pipeline stage only."""
    ranks = [rank for rank in plan.replicas[0].ranks if rank.pipeline_rank == 0]
    return tuple(tuple(rank.experts[layer] for rank in ranks) for layer in range(plan.shape.num_layers))


def copied_experts(plan: Plan) -> dict[int, int]:
    """Experts that have copies, and in how many layers; those that are copied most often first."""
    if not plan.replicas or plan.parallel.num_expert_ranks == 1:
        return {}
    layers = Counter(
        expert
        for held in expert_partitions_of(plan)
        for expert, number in Counter(expert for experts in held for expert in experts).items()
        if number > 1
    )
    return dict(sorted(layers.items(), key=lambda item: (-item[1], item[0])))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
