"""What is planned and what a plan is: a request, the measured load of experts, and the ranks of every replica."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cluster.errors import PlanError
from cluster.expert_balance import Partition
from cluster.sizing import ModelShape, Parallelism, RankBytes, Workload

# Shares of a device that the planner uses; the rest is for the runtime, fragmentation and the system.
GPU_MEMORY_SHARE = 0.9
NODE_MEMORY_SHARE = 0.8


@dataclass(frozen=True, slots=True)
class ExpertLoads:
    """Tokens routed to each expert: `tokens[layer][expert]`, measured on the model named `model`."""

    model: str
    tokens: tuple[tuple[int, ...], ...]

    def check(self, shape: ModelShape) -> None:
        """Refuse a trace of another model."""
        if self.model != shape.name:
            raise PlanError(f"This routing trace is of the model {self.model!r}, not {shape.name!r}; record one of it.")
        widths = {len(layer) for layer in self.tokens}
        if len(self.tokens) != shape.num_layers or widths != {shape.num_experts}:
            raise PlanError(
                f"This routing trace has {len(self.tokens)} layers of {sorted(widths)} experts; {shape.name} has "
                f"{shape.num_layers} layers of {shape.num_experts}. Record one of this model."
            )


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """What to plan. `None` for a size lets the planner choose it; it chooses no pipeline."""

    shape: ModelShape
    work: Workload
    replicas: int = 1
    tensor: int | None = None
    pipeline: int | None = None
    data: int | None = None
    loads: ExpertLoads | None = None
    redundant_experts: int = 0
    cores_per_rank: float = 1.0
    """CPU cores that a rank needs where it runs on a CPU node."""
    runtime_bytes: int = 0
    """What a rank's processes hold on a CPU node beside the model."""
    gpu_memory_share: float = GPU_MEMORY_SHARE
    """Share of a GPU's memory that a rank may take: what vLLM is told to take of it."""
    node_memory_share: float = NODE_MEMORY_SHARE
    """Share of a CPU node's memory that ranks may take; 1.0 where the rest was taken off already."""


@dataclass(frozen=True, slots=True)
class RankPlan:
    """One rank of a replica. `experts[layer]` are the experts it holds; empty for a dense model."""

    node: str
    accelerator: int | None
    tensor_rank: int
    pipeline_rank: int
    data_rank: int
    needs: RankBytes
    capacity: int
    experts: Partition = ()

    @property
    def free(self) -> int:
        return self.capacity - self.needs.total


@dataclass(frozen=True, slots=True)
class ReplicaPlan:
    ranks: tuple[RankPlan, ...]

    @property
    def nodes(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(rank.node for rank in self.ranks))


@dataclass(frozen=True, slots=True)
class Plan:
    """`reasons` are sentences for people. `free_slots[node]` are accelerators (or CPU ranks) that nothing uses."""

    shape: ModelShape
    parallel: Parallelism
    replicas: tuple[ReplicaPlan, ...]
    free_slots: Mapping[str, int]
    reasons: tuple[str, ...] = ()
