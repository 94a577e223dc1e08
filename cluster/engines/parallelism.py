"""How one engine is cut into ranks, and which rank holds which expert: values, decided before the engine starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cluster.errors import PlanError

ExpertRanks = tuple[tuple[int, ...], ...]
"""`placement[layer][expert]` is the expert-parallel rank that holds the expert, for each layer of the model."""


@dataclass(frozen=True, slots=True)
class Parallelism:
    """Sizes of one replica, and the place of this engine in it.

    A gang of `data_parallel_size` engines is one replica: each engine is one data-parallel rank in a process tree of
    its own, on any node, and gets requests of its own ("external load balancing" in vLLM). `data_parallel_address`
    and `data_parallel_rpc_port` are where rank 0 waits for the others: an address of rank 0's node that all nodes
    reach, and a port that is free there.

    Experts are spread over `num_expert_ranks` ranks where `enable_expert_parallel` is set; the expert-parallel rank of
    a worker is `data_parallel_rank * tensor_parallel_size + its tensor-parallel rank`. Without a placement experts
    are placed linearly. `count_experts` turns the counters of routed tokens on.
    """

    tensor_parallel_size: int = 1
    data_parallel_size: int = 1
    data_parallel_rank: int = 0
    data_parallel_address: str = "127.0.0.1"
    data_parallel_rpc_port: int = 0
    enable_expert_parallel: bool = False
    expert_placement: ExpertRanks | None = None
    count_experts: bool = False

    @property
    def num_ranks(self) -> int:
        return self.tensor_parallel_size * self.data_parallel_size

    @property
    def num_expert_ranks(self) -> int:
        return self.num_ranks if self.enable_expert_parallel else 1

    def expert_ranks(self, num_layers: int, num_experts: int) -> ExpertRanks:
        """The rank of each expert per layer, with this placement or the linear one."""
        if self.expert_placement is not None:
            return self.expert_placement
        share = num_experts // self.num_expert_ranks
        return (tuple(expert // share for expert in range(num_experts)),) * num_layers

    def check(
        self, *, num_layers: int, num_experts: int, num_heads: int, num_kv_heads: int, num_redundant_experts: int = 0
    ) -> None:
        """Raises `PlanError` for sizes that the model with these layers, experts (0: dense) and heads cannot have.

        `num_redundant_experts` are the copies in each layer that vLLM's balancer places on GPUs.
        """
        if self.tensor_parallel_size < 1 or self.data_parallel_size < 1:
            raise PlanError("tensor_parallel_size and data_parallel_size are at least 1.")
        if not 0 <= self.data_parallel_rank < self.data_parallel_size:
            raise PlanError(
                f"data_parallel_rank {self.data_parallel_rank} is not one of the {self.data_parallel_size} ranks."
            )
        if self.data_parallel_size > 1 and not 0 < self.data_parallel_rpc_port < 65536:
            raise PlanError("A gang needs data_parallel_rpc_port: a port that is free on the node of rank 0.")
        if num_heads % self.tensor_parallel_size:
            raise PlanError(
                f"{self.tensor_parallel_size} tensor-parallel ranks do not divide the model's {num_heads} attention "
                "heads. Use a number of ranks that does."
            )
        if num_kv_heads % self.tensor_parallel_size and self.tensor_parallel_size % num_kv_heads:
            raise PlanError(
                f"{self.tensor_parallel_size} tensor-parallel ranks and the model's {num_kv_heads} key-value heads do "
                "not divide each other. Use a number of ranks that divides them, or a multiple of them."
            )
        if self.data_parallel_size > 1 and not num_experts:
            raise PlanError("A gang of data-parallel ranks is for mixtures of experts; a dense model gets replicas.")
        if self.enable_expert_parallel:
            self._check_experts(num_layers, num_experts, num_redundant_experts)
        elif self.expert_placement is not None:
            raise PlanError("An expert placement needs enable_expert_parallel.")

    def _check_experts(self, num_layers: int, num_experts: int, num_redundant_experts: int) -> None:
        if not num_experts:
            raise PlanError("enable_expert_parallel is for mixtures of experts; this model has none.")
        slots = num_experts + num_redundant_experts
        what = "experts with their copies" if num_redundant_experts else "experts"
        if self.num_expert_ranks > slots:
            raise PlanError(f"{self.num_expert_ranks} ranks are more than the model's {slots} {what}.")
        if slots % self.num_expert_ranks:
            raise PlanError(f"{slots} {what} cannot be spread evenly over {self.num_expert_ranks} ranks.")
        if self.expert_placement is None:
            return
        if len(self.expert_placement) != num_layers:
            raise PlanError(
                f"The expert placement has {len(self.expert_placement)} layers, the model {num_layers}. It was planned "
                "for another model."
            )
        share = num_experts // self.num_expert_ranks
        for layer, ranks in enumerate(self.expert_placement):
            if len(ranks) != num_experts:
                raise PlanError(f"The expert placement of layer {layer} has {len(ranks)} experts, not {num_experts}.")
            if any(ranks.count(rank) != share for rank in range(self.num_expert_ranks)):
                raise PlanError(f"The expert placement of layer {layer} does not give each rank {share} experts.")

    def engine_arguments(self) -> dict[str, Any]:
        """The fields of vLLM's `EngineArgs` that say the same."""
        arguments: dict[str, Any] = {"tensor_parallel_size": self.tensor_parallel_size}
        if self.enable_expert_parallel:
            arguments["enable_expert_parallel"] = True
        if self.data_parallel_size > 1:
            arguments |= {
                "data_parallel_size": self.data_parallel_size,
                "data_parallel_rank": self.data_parallel_rank,
                "data_parallel_address": self.data_parallel_address,
                "data_parallel_rpc_port": self.data_parallel_rpc_port,
                "data_parallel_external_lb": True,
            }
        return arguments


def placement_of_partitions(partitions: Sequence[Sequence[Sequence[int]]]) -> ExpertRanks:
    """`partitions[layer][rank]` lists experts, as the planner has it; returns the rank of each expert per layer."""
    placement = []
    for layer in partitions:
        rank_of = {expert: rank for rank, experts in enumerate(layer) for expert in experts}
        placement.append(tuple(rank_of[expert] for expert in range(len(rank_of))))
    return tuple(placement)
