"""Spread experts in real engines against single-process Transformers: the short form of every part of the plugin.

Two engines with two ranks each: one that shares its attention out (tensor parallel) under a planned placement, and a
data-parallel gang. The other ways to spread experts are in `test_expert_ways.py`.
"""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from cluster.engines.parallelism import Parallelism
from cluster.weights.dense_twins import sliding_window_twin
from tests.cluster.vllm_plugin.small_mixtures import (
    ANSWER,
    EXPERTS,
    LAYERS,
    PLACEMENT,
    SHORT,
    WINDOW,
    assert_pairs_exact,
    engine,
    files_of_packages,
    prompts,
)
from tests.engine_process import Replica, gang
from tests.expert_oracle import Reference, swap_map_entries
from tests.test_packages import PACKAGES, ROOT

pytestmark = [pytest.mark.integration, pytest.mark.requires("vllm"), pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def two_ranks(distinct: Path) -> Iterator[Replica]:
    """Two tensor-parallel ranks in one engine, which hold the experts of `PLACEMENT`."""
    parallelism = Parallelism(2, enable_expert_parallel=True, expert_placement=PLACEMENT, count_experts=True)
    with engine(distinct, parallelism) as made:
        yield made


@pytest.fixture(scope="module")
def gang_of_two(distinct: Path) -> Iterator[Replica]:
    """Two engines of one rank each; the experts lie on both, linearly."""
    with engine(distinct, gang(2, count_experts=True)) as made:
        yield made


def test_planned_placement_answers_exactly_and_counts_what_transformers_routes(
    two_ranks: Replica, oracle: Reference
) -> None:
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


def test_the_packages_in_an_engines_processes_are_ours(two_ranks: Replica) -> None:
    ours = [str(ROOT / name / "__init__.py") for name in PACKAGES]
    assert two_ranks.call(files_of_packages, PACKAGES) == [ours, ours]


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


def test_a_gang_answers_exactly(gang_of_two: Replica, oracle: Reference) -> None:
    gang_of_two.ask("windfarm_reset_expert_counts")
    answers = gang_of_two.generate(SHORT, ANSWER)
    assert oracle.judge(SHORT, answers).differences == []
    loads = gang_of_two.loads()
    assert sum(load.tokens for load in loads).tolist() == oracle.routed(SHORT, answers)
    assert len({load.gang for load in loads}) == 1
    half = EXPERTS // 2
    held = gang_of_two.ask("windfarm_held_experts")
    assert held == [[list(range(half))] * LAYERS, [list(range(half, EXPERTS))] * LAYERS]
    assert_pairs_exact(gang_of_two)


def test_an_idle_rank_of_a_gang_computes_for_the_other_and_counts_nothing_of_its_own(
    gang_of_two: Replica, oracle: Reference
) -> None:
    gang_of_two.ask("windfarm_reset_expert_counts")
    answers = gang_of_two.generate(SHORT, ANSWER, at=1)
    assert oracle.judge(SHORT, answers).differences == []
    idle, busy = gang_of_two.loads()
    assert idle.tokens.sum() == 0
    assert busy.tokens.tolist() == oracle.routed(SHORT, answers)
    counts = gang_of_two.ask("windfarm_expert_counts")
    assert np.sum(counts[0]["filling"]) > 0
    assert np.sum(counts[0]["computed"]) > 0
    assert_pairs_exact(gang_of_two)


def test_a_killed_starter_takes_its_ranks_along(gang_of_two: Replica) -> None:
    """The last use of this gang."""
    starters = [psutil.Process(engine.pid) for engine in gang_of_two.engines]
    children = [child for starter in starters for child in starter.children(recursive=True)]
    assert sum(child.name().startswith("VLLM::") for child in children) >= 4
    for starter in starters:
        os.kill(starter.pid, signal.SIGKILL)
    _, left = psutil.wait_procs(children, timeout=20)
    # Ended processes whose new parent has not asked for them yet are still listed.
    assert [child for child in left if child.status() != psutil.STATUS_ZOMBIE] == []


def test_a_sliding_window_answers_as_transformers_beyond_the_window(parent: Path) -> None:
    folder = parent.parent / "window"
    sliding_window_twin(parent, folder, WINDOW, dtype="float32")
    long = prompts(3, 3 * WINDOW)
    with engine(folder, Parallelism()) as replica:
        answers = replica.generate(long, ANSWER)
    assert Reference(folder).judge(long, answers).differences == []
    # Without the window the answers would be others.
    assert Reference(parent).judge(long, answers).exact < len(long)
