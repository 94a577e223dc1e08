"""Plans are judged by loads that they were not made from, beside what no placement can beat."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest

from cluster.errors import PlanError
from cluster.expert_balance import Partition, imbalance
from cluster.expert_placement import plan
from cluster.known_shapes import KNOWN_SHAPES
from cluster.plan import ExpertLoads, Plan, PlanRequest
from cluster.plan_judgement import copied_experts, expert_partitions_of, judge, layer_bound, layer_imbalance
from cluster.sizing import Workload
from cluster.topology import Accelerator, Node, Topology

SMALL = KNOWN_SHAPES["small"]
GIB = 2**30


def loads_of(seed: int, num_tokens: int = 20_000, popularity_seed: int = 7) -> ExpertLoads:
    """Tokens of one recording: the same skewed popularity for each seed, other tokens."""
    popularity = np.random.default_rng(popularity_seed).dirichlet(np.full(8, 0.7), size=SMALL.num_layers)
    random = np.random.default_rng(seed)
    return ExpertLoads("small", tuple(tuple(random.multinomial(2 * num_tokens, p).tolist()) for p in popularity))


def cpu_plan(ranks: int, loads: ExpertLoads | None) -> Plan:
    nodes = Topology(tuple(Node(f"n{index}", 2, 16 * GIB) for index in range(ranks)))
    return plan(nodes, PlanRequest(SMALL, Workload(2048, 4), data=ranks, loads=loads))


def gpu_plan(ranks: int, loads: ExpertLoads, redundant: int) -> Plan:
    cards = tuple(Accelerator("A100", 80 * GIB) for _ in range(ranks))
    request = PlanRequest(SMALL, Workload(2048, 4), data=ranks, loads=loads, redundant_experts=redundant)
    return plan(Topology((Node("gpu", 64, 512 * GIB, cards),)), request)


def brute_force(tokens: Sequence[int], num_ranks: int) -> float:
    """Every assignment of eight experts to ranks of equal size, one by one: slow, and independent of the planner."""
    size = len(tokens) // num_ranks
    best = float("inf")
    for ranks in itertools.product(range(num_ranks), repeat=len(tokens)):
        weights = [0] * num_ranks
        for expert, rank in enumerate(ranks):
            weights[rank] += tokens[expert]
        if all(ranks.count(rank) == size for rank in range(num_ranks)):
            best = min(best, max(weights) * num_ranks / sum(tokens))
    return best


@pytest.mark.parametrize("ranks", [2, 4])
def test_planned_from_one_trace_it_is_near_the_bound_on_another(ranks: int) -> None:
    balance = judge(cpu_plan(ranks, loads_of(seed=1)), loads_of(seed=2))
    assert balance is not None
    assert balance.bound <= balance.planned <= 1.02 * balance.bound
    assert balance.planned < balance.linear
    assert balance.over_bound == pytest.approx(balance.planned / balance.bound - 1)
    assert balance.worst >= balance.planned


@pytest.mark.parametrize("ranks", [2, 4])
def test_on_its_own_trace_the_plan_is_the_bound_and_the_bound_is_the_optimum(ranks: int) -> None:
    loads = loads_of(seed=1)
    balance = judge(cpu_plan(ranks, loads), loads)
    assert balance is not None
    assert balance.planned == pytest.approx(balance.bound)
    first = loads.tokens[0]
    best = brute_force(first, 2) if ranks == 2 else None
    if best is not None:
        assert layer_bound(first, expert_partitions_of(cpu_plan(ranks, loads))[0]) == pytest.approx(best)


def test_a_plan_without_a_trace_is_linear() -> None:
    balance = judge(cpu_plan(2, None), loads_of(seed=2))
    assert balance is not None
    assert balance.planned == balance.linear


def test_copies_share_the_tokens_of_their_expert() -> None:
    tokens = (60, 20, 20, 20)
    alone: Partition = ((0, 1), (2, 3))
    copied: Partition = ((0, 1, 2), (0, 2, 3))
    assert layer_imbalance(tokens, alone) == imbalance(tokens, alone) == pytest.approx(80 / 60)
    assert layer_imbalance(tokens, copied) == pytest.approx((30 + 20 + 10) / 60)
    assert layer_bound(tokens, copied) == 1.0


def test_redundant_experts_bring_the_load_below_the_best_plan_without_them() -> None:
    loads, other = loads_of(seed=1), loads_of(seed=2)
    plain, made = judge(gpu_plan(4, loads, 0), other), judge(gpu_plan(4, loads, 4), other)
    assert plain is not None and made is not None
    assert made.planned < plain.bound
    assert made.bound <= made.planned


def test_the_experts_that_are_copied_are_the_busy_ones() -> None:
    hot = ExpertLoads("small", ((5, 5, 500, 5, 5, 5, 5, 5),) * SMALL.num_layers)
    made = gpu_plan(4, hot, 4)
    assert all(2 in experts for held in expert_partitions_of(made) for experts in held)
    copied = copied_experts(made)
    assert copied[2] == SMALL.num_layers
    assert len(copied) == 2, "three copies of the busy expert, and one of another"
    assert copied_experts(gpu_plan(4, hot, 0)) == {}


def test_copies_on_cpu_nodes_are_refused() -> None:
    nodes = Topology(tuple(Node(f"n{index}", 2, 16 * GIB) for index in range(4)))
    request = PlanRequest(SMALL, Workload(2048, 4), data=4, loads=loads_of(1), redundant_experts=4)
    with pytest.raises(PlanError, match="Redundant experts need GPUs"):
        plan(nodes, request)


def test_loads_of_another_model_judge_nothing() -> None:
    with pytest.raises(PlanError, match="of the model 'other'"):
        judge(cpu_plan(2, None), ExpertLoads("other", loads_of(1).tokens))


def test_one_rank_has_nothing_to_balance() -> None:
    nodes = Topology((Node("n", 2, 16 * GIB),))
    assert judge(plan(nodes, PlanRequest(SMALL, Workload(2048, 4), data=1)), loads_of(1)) is None
