"""Exactness, pairs and balance: whether spread experts compute what they should, and how evenly."""

from __future__ import annotations

import secrets
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import combinations
from random import Random
from typing import Any

import numpy as np

from cluster.engines.parallelism import ExpertRanks, Parallelism
from cluster.expert_balance import balanced_partition, imbalance, imbalance_bound, linear_partition
from services.local_network import Seat, delete_network, make_network, namespace_seats, why_no_network
from tests.bench.expert_parts import Models, planned, questions, replica, tell
from tests.engine_process import Replica, gang
from tests.expert_oracle import Reference

RANKS = (2, 4)
ON_NODES = "on 2 nodes"
ONE_RANK = "1 rank"
SWAPS = ("swaps", "swaps_noticed", "swaps_unnoticed")
SWAPS_PER_LAYER = 2
Keep = Callable[[dict[str, Any]], None]


def measure_exactness(
    models: Models, number: int, answer: int, only: Sequence[str], earlier: Mapping[str, Any], keep: Keep
) -> dict[str, Any]:
    """`exact` is the smallest number over all ways to spread the experts; greedy, float32.

    `swaps_noticed` of `swaps` pairs of experts, two in each layer, change one of the reference's own answers when they
    are swapped in it: what is exact could not have been so with such a pair in each other's place.

    Ways that `earlier` results have, for as many prompts, are not run again; `keep` is called after each way.
    """
    prompts = questions(models.distinct, number)
    reference = Reference(models.distinct)
    is_same = earlier.get("prompts") == number
    ways: dict[str, dict[str, Any]] = dict(earlier.get("exact_each", {})) if is_same else {}
    loads: list[list[int]] = list(earlier.get("distinct_load", ())) if is_same else []
    swaps = {name: earlier[name] for name in SWAPS if name in earlier} if is_same else {}
    for name, parallelism in _ways(loads):
        is_known = name in ways and (swaps or name != ONE_RANK)
        if is_known or (only and name not in only and name != ONE_RANK):
            continue
        options = {"enforce_eager": False} if "compiled" in name else {}
        with ExitStack() as stack:
            seats = stack.enter_context(two_nodes()) if name.endswith(ON_NODES) else ()
            running = stack.enter_context(
                replica(models.distinct, parallelism, seats=seats, dtype="float32", **options)
            )
            answers = running.generate(prompts, answer)
            if not loads:
                loads.extend(running.loads()[0].tokens.tolist())
            pairs = pairs_exact(running)
        verdict = reference.judge(prompts, answers)
        ways[name] = {"exact": verdict.exact, "near_ties": verdict.near_ties, "pairs_exact": pairs}
        tell(f"{name}: {ways[name]}")
        for difference in verdict.differences:
            tell(f"  {difference}")
        if name == ONE_RANK and verdict.exact == len(prompts):
            swaps = measure_swaps(reference, prompts, answers, len(loads), len(loads[0]))
            tell(f"  {swaps}")
        keep(_worst(ways, len(prompts)) | swaps | {"distinct_load": loads})
    return _worst(ways, len(prompts)) | swaps | {"distinct_load": loads}


def measure_swaps(
    reference: Reference,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    num_layers: int,
    num_experts: int,
) -> dict[str, Any]:
    """A seeded sample of pairs of each layer; `swaps_unnoticed` are [layer, expert, expert]."""
    random = Random(0)
    pairs = list(combinations(range(num_experts), 2))
    sample = [(layer, *pair) for layer in range(num_layers) for pair in random.sample(pairs, SWAPS_PER_LAYER)]
    unnoticed = [list(swap) for swap in sample if not reference.notices_swap(*swap, prompts, answers)]
    return dict(zip(SWAPS, (len(sample), len(sample) - len(unnoticed), unnoticed), strict=True))


def _worst(ways: Mapping[str, Mapping[str, Any]], number: int) -> dict[str, Any]:
    return {
        "exact": min(way["exact"] for way in ways.values()),
        "prompts": number,
        "near_ties": sum(way["near_ties"] for way in ways.values()),
        "pairs_exact": min(way["pairs_exact"] for way in ways.values()),
        "exact_each": dict(ways),
    }


def _ways(loads: list[list[int]]) -> Iterator[tuple[str, Parallelism]]:
    """The first one, on one rank, measures the loads that the planned placements are made from."""
    yield ONE_RANK, Parallelism(count_experts=True)
    for ranks in RANKS:
        placements: dict[str, ExpertRanks | None] = {"linear": None, "planned": planned(loads, ranks)}
        for placement, experts in placements.items():
            more: dict[str, Any] = {"count_experts": True, "expert_placement": experts}
            yield f"{ranks} ranks, one engine, {placement}", Parallelism(ranks, enable_expert_parallel=True, **more)
            yield f"{ranks} ranks, gang, {placement}", gang(ranks, **more)
    more = {"count_experts": True, "expert_placement": planned(loads, 2)}
    yield "2 ranks, one engine, planned, compiled", Parallelism(2, enable_expert_parallel=True, **more)
    yield "2 ranks, gang, planned, compiled", gang(2, **more)
    more = {"count_experts": True, "expert_placement": planned(loads, 4)}
    yield "4 ranks, gang of 2 engines, planned", gang(2, tensor=2, **more)
    if (reason := why_no_network()) is not None:
        tell(f"no gangs {ON_NODES}: {reason}")
        return
    for placement, experts in (("linear", None), ("planned", planned(loads, 2))):
        more = {"count_experts": True, "expert_placement": experts}
        yield f"2 ranks, gang, {placement}, {ON_NODES}", gang(2, **more)


@contextmanager
def two_nodes() -> Iterator[Sequence[Seat]]:
    """Two network namespaces with addresses of their own: what ranks exchange crosses a (virtual) network."""
    tag = secrets.token_hex(4)
    make_network(tag, 2)
    try:
        yield namespace_seats(tag, 2)
    finally:
        delete_network(tag)


def pairs_exact(running: Replica) -> int:
    """1 if each rank computed of each of its experts exactly what the routers sent there, and nothing else.

    Rows that only fill an idle rank's batch are routed and computed as well; they are counted apart and included here.
    """
    counts = running.ask("windfarm_expert_counts")
    held = running.ask("windfarm_held_experts")
    routers = counts[:: len(counts) // len(running.engines)]
    routed = sum(np.einsum("lee->le", np.array(router["together"])) + np.array(router["filling"]) for router in routers)
    expected = np.zeros((len(counts), *routed.shape), np.int64)
    for rank, layers in enumerate(held):
        for layer, experts in enumerate(layers):
            expected[rank, layer, experts] = routed[layer, experts]
    computed = np.array([count["computed"] for count in counts])
    return int(np.array_equal(computed, expected) and computed.sum() == routed.sum())


def measure_imbalance(models: Models, number: int, answer: int) -> dict[str, Any]:
    """On the skewed model: planned from the loads of some prompts, judged on those of others.

    The busiest rank's share against the mean, averaged over the layers; the bound is the best possible placement for
    the loads that it is judged on.
    """
    seen, later = (questions(models.skewed, number, skip=skip) for skip in (0, number))
    with replica(models.skewed, Parallelism(count_experts=True), dtype="bfloat16") as running:
        traces = []
        for prompts in (seen, later):
            running.ask("windfarm_reset_expert_counts")
            running.generate(prompts, answer)
            traces.append(running.loads()[0].tokens.tolist())
    result: dict[str, Any] = {"imbalance_linear": {}, "imbalance_planned": {}, "imbalance_bound": {}}
    for ranks in RANKS:
        layers = list(zip(*traces, strict=True))
        linear = [imbalance(now, linear_partition(len(now), ranks)) for _, now in layers]
        chosen = [imbalance(now, balanced_partition(before, ranks)) for before, now in layers]
        bound = [imbalance_bound(now, ranks) for _, now in layers]
        for key, values in (("linear", linear), ("planned", chosen), ("bound", bound)):
            result[f"imbalance_{key}"][str(ranks)] = round(statistics.mean(values), 4)
    return result | {
        "planned_over_bound": {
            ranks: round(result["imbalance_planned"][ranks] / result["imbalance_bound"][ranks] - 1, 4)
            for ranks in map(str, RANKS)
        },
        "skewed_load": traces[0],
    }
