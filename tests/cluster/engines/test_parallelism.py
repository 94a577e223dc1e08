"""Sizes that a model cannot have are refused before anything starts, and a plan becomes vLLM's arguments."""

from dataclasses import replace
from typing import Any

import pytest

from cluster.engines.parallelism import Parallelism, placement_of_partitions
from cluster.errors import PlanError
from cluster.expert_balance import linear_partition, round_robin_partition

MIXTRAL = {"num_layers": 2, "num_experts": 8, "num_heads": 12, "num_kv_heads": 4}
DENSE = MIXTRAL | {"num_experts": 0}
PAIR = Parallelism(data_parallel_size=2, data_parallel_rpc_port=5000, enable_expert_parallel=True)
LINEAR = placement_of_partitions([linear_partition(8, 2)] * 2)


@pytest.mark.parametrize(
    ("parallelism", "model", "complaint"),
    [
        (Parallelism(tensor_parallel_size=0), MIXTRAL, "at least 1"),
        (Parallelism(tensor_parallel_size=5), MIXTRAL, "do not divide the model's 12 attention heads"),
        (Parallelism(tensor_parallel_size=3), MIXTRAL, "3 tensor-parallel ranks and the model's 4 key-value heads"),
        (replace(PAIR, data_parallel_rank=2), MIXTRAL, "rank 2 is not one of the 2 ranks"),
        (replace(PAIR, data_parallel_rpc_port=0), MIXTRAL, "data_parallel_rpc_port"),
        (PAIR, DENSE, "a dense model gets replicas"),
        (Parallelism(enable_expert_parallel=True), DENSE, "this model has none"),
        (replace(PAIR, data_parallel_size=16), MIXTRAL, "16 ranks are more than the model's 8 experts"),
        (replace(PAIR, data_parallel_size=3), MIXTRAL, "evenly over 3 ranks"),
        (replace(PAIR, expert_placement=LINEAR[:1]), MIXTRAL, "1 layers, the model 2"),
        (replace(PAIR, expert_placement=(LINEAR[0], (0, 1))), MIXTRAL, "layer 1 has 2 experts, not 8"),
        (replace(PAIR, expert_placement=(LINEAR[0], (0,) * 8)), MIXTRAL, "layer 1 does not give each rank 4"),
        (Parallelism(expert_placement=LINEAR), MIXTRAL, "needs enable_expert_parallel"),
    ],
)
def test_impossible_sizes_are_refused(parallelism: Parallelism, model: dict[str, Any], complaint: str) -> None:
    with pytest.raises(PlanError, match=complaint):
        parallelism.check(**model)


def test_a_gang_of_tensor_parallel_ranks_spreads_experts_over_all_of_them() -> None:
    parallelism = replace(PAIR, tensor_parallel_size=2)
    parallelism.check(**MIXTRAL)
    assert parallelism.num_expert_ranks == 4
    assert parallelism.engine_arguments() == {
        "tensor_parallel_size": 2,
        "enable_expert_parallel": True,
        "data_parallel_size": 2,
        "data_parallel_rank": 0,
        "data_parallel_address": "127.0.0.1",
        "data_parallel_rpc_port": 5000,
        "data_parallel_external_lb": True,
    }


def test_one_rank_asks_vllm_for_nothing_special() -> None:
    assert Parallelism().engine_arguments() == {"tensor_parallel_size": 1}


def test_a_placement_names_the_rank_of_each_expert() -> None:
    assert placement_of_partitions([linear_partition(4, 2), round_robin_partition(4, 2)]) == (
        (0, 0, 1, 1),
        (0, 1, 0, 1),
    )
