"""Exactness, pairs and balance: whether spread experts compute what they should, and how evenly."""

from __future__ import annotations

import secrets
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import combinations
from random import Random
from typing import Any

import numpy as np

from cluster.engines.parallelism import Parallelism
from cluster.expert_balance import balanced_partition, imbalance, imbalance_bound, linear_partition
from services.local_network import Seat, delete_network, make_network, namespace_seats, why_no_network
from tests.bench.expert_parts import Models, planned, questions, replica, tell
from tests.engine_process import Replica, gang
from tests.expert_oracle import Reference

RANKS = (2, 4)
SWAPS = ("swaps", "swaps_noticed", "swaps_unnoticed")
SWAPS_PER_LAYER = 2
Keep = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class Way:
    """One way to spread the experts: `data` engines of `tensor` ranks each."""

    name: str
    data: int = 1
    tensor: int = 1
    is_planned: bool = False
    is_compiled: bool = False
    is_on_nodes: bool = False

    @property
    def why_not(self) -> str | None:
        """What this machine lacks for it."""
        return why_no_network() if self.is_on_nodes else None

    def parallelism(self, loads: Sequence[Sequence[int]]) -> Parallelism:
        """Planned by these loads, [layer][expert]."""
        ranks = self.data * self.tensor
        experts = planned(loads, ranks) if self.is_planned else None
        if self.data > 1:
            return gang(self.data, tensor=self.tensor, count_experts=True, expert_placement=experts)
        is_spread = ranks > 1
        return Parallelism(ranks, enable_expert_parallel=is_spread, count_experts=True, expert_placement=experts)


# It measures the loads that the planned placements are made from, and so it comes first.
ONE_RANK = Way("1 rank")
WAYS = (
    ONE_RANK,
    Way("2 ranks, one engine, linear", tensor=2),
    Way("2 ranks, gang, linear", data=2),
    Way("2 ranks, one engine, planned", tensor=2, is_planned=True),
    Way("2 ranks, gang, planned", data=2, is_planned=True),
    Way("4 ranks, one engine, linear", tensor=4),
    Way("4 ranks, gang, linear", data=4),
    Way("4 ranks, one engine, planned", tensor=4, is_planned=True),
    Way("4 ranks, gang, planned", data=4, is_planned=True),
    Way("2 ranks, one engine, planned, compiled", tensor=2, is_planned=True, is_compiled=True),
    Way("2 ranks, gang, planned, compiled", data=2, is_planned=True, is_compiled=True),
    Way("4 ranks, gang of 2 engines, planned", data=2, tensor=2, is_planned=True),
    Way("2 ranks, gang, linear, on 2 nodes", data=2, is_on_nodes=True),
    Way("2 ranks, gang, planned, on 2 nodes", data=2, is_planned=True, is_on_nodes=True),
)


def measure_exactness(
    models: Models, number: int, answer: int, only: Sequence[str], earlier: Mapping[str, Any], keep: Keep
) -> dict[str, Any]:
    """`exact` is the smallest number over all ways to spread the experts; greedy, float32. `left_out` has the ways that
    it says nothing about, each with the reason.

    `swaps_noticed` of `swaps` pairs of experts, two in each layer, change one of the reference's own answers when they
    are swapped in it: what is exact could not have been so with such a pair in each other's place.

    Ways that `earlier` results have, for as many prompts and tokens, are not run again; `keep` is called after each.
    """
    asked = {"prompts": number, "answer_tokens": answer}
    if any(earlier.get(name, value) != value for name, value in asked.items()):
        earlier = {}
    ways: dict[str, dict[str, Any]] = dict(earlier.get("exact_each", {}))
    loads: list[list[int]] = list(earlier.get("distinct_load", ()))
    swaps = {name: earlier[name] for name in SWAPS if name in earlier}
    prompts = questions(models.distinct, number)
    reference = Reference(models.distinct)

    def so_far() -> dict[str, Any]:
        return asked | _worst(ways) | swaps | {"distinct_load": loads}

    for way in WAYS:
        is_wanted = not only or way.name in only or (way is ONE_RANK and not loads)
        is_known = way.name in ways and (way is not ONE_RANK or bool(swaps))
        if is_known or not is_wanted or way.why_not is not None:
            continue
        with _started(models, way, loads) as running:
            answers = running.generate(prompts, answer)
            if not loads:
                loads.extend(running.loads()[0].tokens.tolist())
            pairs = pairs_exact(running)
        verdict = reference.judge(prompts, answers)
        ways[way.name] = {"exact": verdict.exact, "near_ties": verdict.near_ties, "pairs_exact": pairs}
        tell(f"{way.name}: {ways[way.name]}")
        for difference in verdict.differences:
            tell(f"  {difference}")
        if way is ONE_RANK and verdict.exact == len(prompts):
            swaps = measure_swaps(reference, prompts, answers, len(loads), len(loads[0]))
            tell(f"  {swaps}")
        keep(so_far())
    return so_far()


@contextmanager
def _started(models: Models, way: Way, loads: Sequence[Sequence[int]]) -> Iterator[Replica]:
    options = {"enforce_eager": False} if way.is_compiled else {}
    with ExitStack() as stack:
        seats = stack.enter_context(two_nodes()) if way.is_on_nodes else ()
        parallelism = way.parallelism(loads)
        yield stack.enter_context(replica(models.distinct, parallelism, seats=seats, dtype="float32", **options))


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


def _worst(ways: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "exact": min(way["exact"] for way in ways.values()),
        "near_ties": sum(way["near_ties"] for way in ways.values()),
        "pairs_exact": min(way["pairs_exact"] for way in ways.values()),
        "exact_each": dict(ways),
        "left_out": {way.name: way.why_not or "not run" for way in WAYS if way.name not in ways},
    }


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
