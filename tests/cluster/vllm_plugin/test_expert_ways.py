"""More ways to spread experts in real engines against single-process Transformers: placements, four ranks, compiled,
bfloat16.

Minutes on two cores, so `make test-ranks` runs them; `test_expert_parallel.py` is the short form.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.engines.parallelism import ExpertRanks, Parallelism
from cluster.weights.upcycle import MixtureRecipe, upcycle
from tests.cluster.vllm_plugin.small_mixtures import (
    ANSWER,
    EXPERTS,
    LAYERS,
    PLACEMENT,
    SHORT,
    assert_pairs_exact,
    engine,
    placement_by_chance,
)
from tests.engine_process import Replica, gang
from tests.expert_oracle import Reference, num_compiled_graphs, swap_map_entries

pytestmark = [pytest.mark.integration, pytest.mark.ranks, pytest.mark.requires("vllm"), pytest.mark.timeout(400)]

PLANNED = Parallelism(2, enable_expert_parallel=True, expert_placement=PLACEMENT, count_experts=True)
PLANNED_GANG = gang(2, expert_placement=PLACEMENT, count_experts=True)


def placed(seed: int, *, data: int, tensor: int) -> Parallelism:
    """Ranks that hold experts as chance deals them out; `data` engines of `tensor` ranks each."""
    experts = placement_by_chance(seed, data * tensor)
    if data == 1:
        return Parallelism(tensor, enable_expert_parallel=True, expert_placement=experts, count_experts=True)
    return gang(data, tensor=tensor, expert_placement=experts, count_experts=True)


def held_by(placement: ExpertRanks, num_ranks: int) -> list[list[list[int]]]:
    """Experts as [rank][layer]."""
    return [
        [[expert for expert in range(EXPERTS) if layer[expert] == rank] for layer in placement]
        for rank in range(num_ranks)
    ]


# Each has a placement of its own: what is exact must be so for any.
PLACED: dict[str, tuple[Parallelism, dict[str, Any]]] = {
    "two ranks, one engine": (placed(1, data=1, tensor=2), {}),
    "two ranks, gang": (placed(2, data=2, tensor=1), {}),
    "four ranks, one engine": (placed(3, data=1, tensor=4), {}),
    "four ranks, gang of four engines": (placed(4, data=4, tensor=1), {}),
    "four ranks, gang of two engines": (placed(5, data=2, tensor=2), {}),
    "four ranks, one engine, compiled": (placed(6, data=1, tensor=4), {"enforce_eager": False}),
    "four ranks, gang of two engines, compiled": (placed(7, data=2, tensor=2), {"enforce_eager": False}),
    "four ranks, gang of four engines, compiled": (placed(8, data=4, tensor=1), {"enforce_eager": False}),
}


@pytest.mark.parametrize("way", PLACED)
def test_ranks_hold_what_any_placement_gives_them_and_answer_exactly(
    way: str, distinct: Path, oracle: Reference
) -> None:
    parallelism, options = PLACED[way]
    assert parallelism.expert_placement is not None
    with engine(distinct, parallelism, **options) as replica:
        answers = replica.generate(SHORT, ANSWER)
        assert oracle.judge(SHORT, answers).differences == []
        assert (min(replica.call(num_compiled_graphs)) > 0) == bool(options)
        held = replica.ask("windfarm_held_experts")
        assert held == held_by(parallelism.expert_placement, parallelism.num_ranks)
        assert sum(load.tokens for load in replica.loads()).tolist() == oracle.routed(SHORT, answers)
        assert_pairs_exact(replica)


@pytest.fixture(scope="module")
def gang_of_four(distinct: Path) -> Iterator[Replica]:
    """Two engines of two tensor-parallel ranks each; the experts lie on all four, two on each, linearly."""
    with engine(distinct, gang(2, tensor=2, count_experts=True)) as made:
        yield made


def test_a_gang_of_four_ranks_answers_exactly(gang_of_four: Replica, oracle: Reference) -> None:
    gang_of_four.ask("windfarm_reset_expert_counts")
    answers = gang_of_four.generate(SHORT, ANSWER)
    assert oracle.judge(SHORT, answers).differences == []
    loads = gang_of_four.loads()
    assert sum(load.tokens for load in loads).tolist() == oracle.routed(SHORT, answers)
    assert len({load.gang for load in loads}) == 1
    held = gang_of_four.ask("windfarm_held_experts")
    assert held == [[[2 * rank, 2 * rank + 1]] * LAYERS for rank in range(4)]
    assert_pairs_exact(gang_of_four)


def test_identical_experts_answer_as_their_dense_parent(parent: Path) -> None:
    folder = parent.parent / "identical"
    upcycle(parent, folder, MixtureRecipe(dtype="float32"))
    with engine(folder, Parallelism(2, enable_expert_parallel=True)) as replica:
        verdict = Reference(parent).judge(SHORT, replica.generate(SHORT, ANSWER))
    assert verdict.differences == []


@pytest.mark.parametrize("parallelism", [PLANNED, gang(2, count_experts=True)], ids=["one engine", "gang"])
def test_compiled_ranks_answer_exactly(parallelism: Parallelism, distinct: Path, oracle: Reference) -> None:
    with engine(distinct, parallelism, enforce_eager=False) as replica:
        assert min(replica.call(num_compiled_graphs)) > 0
        assert oracle.judge(SHORT, replica.generate(SHORT, ANSWER)).differences == []
        assert_pairs_exact(replica)


# Of ranks that compute in half precision.
HALF: dict[str, tuple[Parallelism, dict[str, Any]]] = {
    "two ranks, one engine": (PLANNED, {}),
    "two ranks, gang": (PLANNED_GANG, {}),
    "two ranks, one engine, compiled": (PLANNED, {"enforce_eager": False}),
    "four ranks, one engine": (placed(9, data=1, tensor=4), {}),
}


@pytest.mark.parametrize("way", HALF)
def test_half_precision_takes_tokens_near_the_best_and_wrong_experts_do_not(
    way: str, distinct: Path, oracle: Reference
) -> None:
    """Rounding moves a logit by hundredths; two swapped experts move it by more than ten times as much."""
    parallelism, options = HALF[way]
    assert parallelism.expert_placement is not None
    with engine(distinct, parallelism, dtype="bfloat16", **options) as replica:
        assert (min(replica.call(num_compiled_graphs)) > 0) == bool(options)
        gap = oracle.judge(SHORT, replica.generate(SHORT, ANSWER)).largest_gap
        experts = [expert for expert, rank in enumerate(parallelism.expert_placement[1]) if rank == 0][:2]
        replica.call(swap_map_entries, 1, *experts)
        gap_of_wrong = oracle.judge(SHORT, replica.generate(SHORT, ANSWER)).largest_gap
    assert gap < 0.3 < gap_of_wrong
