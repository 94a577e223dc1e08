"""More ways to spread experts in real engines against single-process Transformers: four ranks, compiled, bfloat16.

Minutes on two cores, so `make test-ranks` runs them; `test_expert_parallel.py` is the short form.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.engines.parallelism import Parallelism
from cluster.weights.upcycle import MixtureRecipe, upcycle
from tests.cluster.vllm_plugin.small_mixtures import ANSWER, LAYERS, PLACEMENT, SHORT, assert_pairs_exact, engine
from tests.engine_process import Replica, gang
from tests.expert_oracle import Reference, num_compiled_graphs, swap_map_entries

pytestmark = [pytest.mark.integration, pytest.mark.ranks, pytest.mark.requires("vllm"), pytest.mark.timeout(400)]

PLANNED = Parallelism(2, enable_expert_parallel=True, expert_placement=PLACEMENT, count_experts=True)


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


def test_half_precision_takes_tokens_near_the_best_and_wrong_experts_do_not(distinct: Path, oracle: Reference) -> None:
    """Rounding moves a logit by hundredths; two swapped experts move it by more than ten times as much."""
    with engine(distinct, PLANNED, dtype="bfloat16") as replica:
        gap = oracle.judge(SHORT, replica.generate(SHORT, ANSWER)).largest_gap
        experts = [expert for expert, rank in enumerate(PLACEMENT[1]) if rank == 0][:2]
        replica.call(swap_map_entries, 1, *experts)
        gap_of_wrong = oracle.judge(SHORT, replica.generate(SHORT, ANSWER)).largest_gap
    assert gap < 0.3 < gap_of_wrong
