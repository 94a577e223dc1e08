"""Spread experts in real engines against single-process Transformers: tensor-parallel ranks, gangs, any placement.

The checkpoints are the first layers of the bundled model and mixtures made of them, so that engines start quickly.
"""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.engines.parallelism import Parallelism
from cluster.engines.settings import EngineSettings
from cluster.home import open_home
from cluster.weights.dense_twins import sliding_window_twin
from cluster.weights.prepare import prepare
from cluster.weights.upcycle import MixtureRecipe, upcycle
from tests.engine_process import Replica, gang
from tests.expert_oracle import Reference, num_compiled_graphs, shortened, swap_map_entries

pytestmark = [pytest.mark.integration, pytest.mark.ranks, pytest.mark.requires("vllm"), pytest.mark.timeout(400)]

LAYERS, EXPERTS, ANSWER = 3, 8, 12
WINDOW = 48
# Experts of each layer in no order that vLLM could choose itself.
PLACEMENT = ((1, 0, 0, 1, 1, 0, 1, 0), (0, 1, 1, 1, 0, 0, 0, 1), (1, 1, 0, 0, 1, 0, 0, 1))


def prompts(number: int, length: int) -> list[list[int]]:
    source = random.Random(length)
    return [[source.randrange(200, 40_000) for _ in range(length + index)] for index in range(number)]


SHORT = prompts(6, 9)


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shortened(prepare("tiny", "hf", open_home()), tmp_path_factory.mktemp("parent") / "dense", LAYERS)


@pytest.fixture(scope="module")
def distinct(parent: Path) -> Path:
    upcycle(parent, parent.parent / "distinct", MixtureRecipe(variant="distinct", noise=0.5, dtype="float32"))
    return parent.parent / "distinct"


@pytest.fixture(scope="module")
def oracle(distinct: Path) -> Reference:
    return Reference(distinct)


def engine(folder: Path, parallelism: Parallelism, **options: Any) -> Replica:
    settings = EngineSettings(
        "m",
        folder,
        max_context=256,
        parallel_requests=8,
        threads=parallelism.tensor_parallel_size,
        options={"dtype": "float32", **options},
        parallelism=parallelism,
    )
    return Replica(settings, folder.parent / "engine.log", {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"})


@pytest.fixture(scope="module")
def two_ranks(distinct: Path) -> Iterator[Replica]:
    """Two tensor-parallel ranks that hold the experts of `PLACEMENT`, in one engine that compiles."""
    with engine(
        distinct,
        Parallelism(2, enable_expert_parallel=True, expert_placement=PLACEMENT, count_experts=True),
        enforce_eager=False,
    ) as made:
        yield made


@pytest.fixture(scope="module")
def gang_of_four(distinct: Path) -> Iterator[Replica]:
    """Two engines of two tensor-parallel ranks each; the experts lie on all four, two on each, linearly."""
    with engine(distinct, gang(2, tensor=2, count_experts=True)) as made:
        yield made


def test_planned_placement_answers_exactly_and_counts_what_transformers_routes(
    two_ranks: Replica, oracle: Reference
) -> None:
    assert min(two_ranks.call(num_compiled_graphs)) > 0
    two_ranks.ask("windfarm_reset_expert_counts")
    answers = two_ranks.generate(SHORT, ANSWER)
    verdict = oracle.judge(SHORT, answers)
    assert verdict.differences == []
    assert len({tuple(answer) for answer in answers}) == len(SHORT), "answers that are all alike show nothing"
    (load,) = two_ranks.loads()
    assert load.tokens.tolist() == oracle.routed(SHORT, answers)
    assert load.rank_of.tolist() == [list(layer) for layer in PLACEMENT]


def test_each_rank_holds_its_experts_and_computes_exactly_their_pairs(two_ranks: Replica) -> None:
    held = two_ranks.ask("windfarm_held_experts")
    for rank in (0, 1):
        assert held[rank] == [[expert for expert in range(EXPERTS) if layer[expert] == rank] for layer in PLACEMENT]
    assert_pairs_exact(two_ranks)
    assert two_ranks.loads()[0].rank_tokens().sum() > 0


def test_swapped_entries_of_an_expert_map_are_noticed(two_ranks: Replica, oracle: Reference) -> None:
    """The mutation: the oracle must fail for two experts of one rank swapped, and for a lost pair."""
    layer, rank = 1, 0
    here = [expert for expert in range(EXPERTS) if PLACEMENT[layer][expert] == rank]
    there = next(expert for expert in range(EXPERTS) if PLACEMENT[layer][expert] != rank)
    for swapped in ((here[0], here[1]), (here[0], there)):
        two_ranks.call(swap_map_entries, layer, *swapped)
        try:
            verdict = oracle.judge(SHORT, two_ranks.generate(SHORT, ANSWER))
        finally:
            two_ranks.call(swap_map_entries, layer, *swapped)
        assert verdict.exact < verdict.prompts, f"nobody noticed that experts {swapped} were swapped"
    assert oracle.judge(SHORT, two_ranks.generate(SHORT, ANSWER)).differences == []


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


def test_an_idle_rank_of_a_gang_computes_for_the_other_and_counts_nothing_of_its_own(
    gang_of_four: Replica, oracle: Reference
) -> None:
    gang_of_four.ask("windfarm_reset_expert_counts")
    answers = gang_of_four.generate(SHORT, ANSWER, at=1)
    assert oracle.judge(SHORT, answers).differences == []
    idle, busy = gang_of_four.loads()
    assert idle.tokens.sum() == 0
    assert busy.tokens.tolist() == oracle.routed(SHORT, answers)
    counts = gang_of_four.ask("windfarm_expert_counts")
    assert np.sum(counts[0]["filling"]) > 0
    assert np.sum(counts[0]["computed"]) > 0
    assert_pairs_exact(gang_of_four)


def test_identical_experts_answer_as_their_dense_parent(parent: Path) -> None:
    folder = parent.parent / "identical"
    upcycle(parent, folder, MixtureRecipe(dtype="float32"))
    with engine(folder, Parallelism(2, enable_expert_parallel=True)) as replica:
        verdict = Reference(parent).judge(SHORT, replica.generate(SHORT, ANSWER))
    assert verdict.differences == []


def test_a_sliding_window_answers_as_transformers_beyond_the_window(parent: Path) -> None:
    folder = parent.parent / "window"
    sliding_window_twin(parent, folder, WINDOW, dtype="float32")
    long = prompts(3, 3 * WINDOW)
    with engine(folder, Parallelism()) as replica:
        answers = replica.generate(long, ANSWER)
    assert Reference(folder).judge(long, answers).differences == []
    # Without the window the answers would be others.
    assert Reference(parent).judge(long, answers).exact < len(long)


def assert_pairs_exact(replica: Replica) -> None:
    """What the ranks computed of each expert is what the routers sent to it, rows that fill batches included."""
    counts, held = replica.ask("windfarm_expert_counts"), replica.ask("windfarm_held_experts")
    tensor = len(counts) // len(replica.engines)
    routers = counts[::tensor]  # the tensor-parallel ranks of an engine all see its tokens
    routed = sum(np.einsum("lee->le", np.array(router["together"])) + np.array(router["filling"]) for router in routers)
    for rank, count in enumerate(counts):
        computed = np.array(count["computed"])
        for layer, experts in enumerate(held[rank]):
            assert computed[layer, experts].tolist() == routed[layer, experts].tolist()
            assert computed[layer].sum() == routed[layer, experts].sum(), "pairs of experts that it does not hold"
    assert sum(np.sum(count["computed"]) for count in counts) == routed.sum()
