"""Brings a plan to Ray: what the ranks of a gang reserve, how they are spread, on which nodes, and who holds what.

A gang is one copy of a model that is cut into data-parallel ranks; each rank is one replica of Ray Serve, and Serve
starts, stops and restarts a gang as a whole. A rank's tensor-parallel group lives inside its replica and so on one
node. Deciding is the planner's business; here a plan becomes the options of a deployment.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cluster.engines.parallelism import ExpertRanks, placement_of_partitions
from cluster.errors import PlanError
from cluster.expert_balance import Partition
from cluster.plan import Plan, PlanRequest
from cluster.topology import Topology
from cluster.zones import selector_of_nodes

Strategy = Literal["PACK", "SPREAD"]


@dataclass(frozen=True, slots=True)
class Reservation:
    """What one replica (a rank with its tensor-parallel group) reserves on its node; memory in bytes."""

    num_cpus: float
    memory: int
    num_gpus: float = 0.0

    def actor_options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"num_cpus": self.num_cpus, "memory": self.memory}
        return options | ({"num_gpus": self.num_gpus} if self.num_gpus else {})

    def bundle(self) -> dict[str, float]:
        """The same as a bundle of a placement group."""
        bundle = {"CPU": self.num_cpus, "memory": float(self.memory)}
        return bundle | ({"GPU": self.num_gpus} if self.num_gpus else {})


@dataclass(frozen=True, slots=True)
class Placement:
    """A plan as Ray Serve takes it. `nodes` are names of the only nodes that may hold ranks; empty: any.

    Serve places all gangs of a deployment by the same rule, so there is no word for "this gang here, that one there".
    Ray gives a gang the emptiest node that holds it, so gangs go to different nodes while there are any; zones are
    kept by `services/zone_scheduler.py`, the nodes of one particular gang only as far as `nodes` leaves no choice.
    """

    gang_size: int
    num_gangs: int
    strategy: Strategy
    rank: Reservation
    expert_ranks: ExpertRanks | None = None
    nodes: tuple[str, ...] = ()
    num_redundant_experts: int = 0
    """Copies of experts in each layer, which vLLM's balancer places on GPUs; `expert_ranks` is empty then."""

    def deployment_options(self, node_ids: Mapping[str, str]) -> dict[str, Any]:
        """Options of the deployment, one Serve replica per rank. `node_ids` are Ray's ids by the names of the nodes."""
        options: dict[str, Any] = {
            "ray_actor_options": self.rank.actor_options(),
            "num_replicas": self.num_gangs * self.gang_size,
        }
        if self.gang_size > 1:
            from ray.serve.config import GangPlacementStrategy, GangRuntimeFailurePolicy, GangSchedulingConfig

            options["gang_scheduling_config"] = GangSchedulingConfig(
                gang_size=self.gang_size,
                gang_placement_strategy=GangPlacementStrategy(self.strategy),
                runtime_failure_policy=GangRuntimeFailurePolicy.RESTART_GANG,
            )
        if self.nodes:
            options["placement_group_bundles"] = [self.rank.bundle()]
            options["placement_group_bundle_label_selector"] = [selector_of_nodes([node_ids[n] for n in self.nodes])]
        return options


def place(plan: Plan, reservation: Reservation) -> Placement:
    """The plan's gangs. On which nodes they are is left to Ray here, so that a gang can come back on others.

    `reservation` is that of one rank with its whole tensor-parallel group.
    """
    first = plan.replicas[0]
    experts = [rank.experts for rank in first.ranks]
    partitions = [[rank[layer] for rank in experts] for layer in range(len(experts[0]))]
    copies = _num_redundant(experts, plan.shape.num_experts)
    is_cpu = first.ranks[0].accelerator is None
    return Placement(
        gang_size=plan.parallel.data,
        num_gangs=len(plan.replicas),
        strategy=strategy_of([rank.node for rank in first.ranks if rank.tensor_rank == 0], is_cpu=is_cpu),
        rank=reservation,
        expert_ranks=placement_of_partitions(partitions) if partitions and not copies else None,
        num_redundant_experts=copies,
    )


def strategy_of(nodes: Sequence[str], *, is_cpu: bool) -> Strategy:
    """How Ray comes to what a plan has: `nodes` has the node of each data-parallel rank of one gang.

    On GPU nodes gangs fill one node after the other, which is PACK. On CPU nodes they go over the nodes evenly, which
    is SPREAD: it takes each node once before it takes any twice, the emptier one first. PACK would fill the first.
    """
    per_node = Counter(nodes).values()
    is_even = max(per_node) - min(per_node) <= 1
    return "SPREAD" if is_cpu and len(per_node) > 1 and is_even else "PACK"


def _num_redundant(experts: Sequence[Partition], num_experts: int) -> int:
    """Copies in each layer, where `experts[rank][layer]` are held by the ranks of one replica."""
    return sum(len(rank[0]) for rank in experts) - num_experts if experts[0] else 0


@dataclass(frozen=True, slots=True)
class SavedPlan:
    """What is used of a plan that `windfarm plan --json` wrote."""

    model: str
    tensor: int
    data: int
    num_gangs: int
    nodes: tuple[str, ...]
    strategy: Strategy
    expert_ranks: ExpertRanks | None
    num_redundant_experts: int = 0


def read_plan(path: Path) -> SavedPlan:
    """Raises `PlanError` for a file that holds no plan."""
    try:
        value: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        replicas = [replica["ranks"] for replica in value["replicas"]]
        parallel = value["parallel"]
        if parallel["pipeline"] != 1:
            raise PlanError(f"{path} has {parallel['pipeline']} pipeline stages; only plans with one can be applied.")
        experts = [rank["experts"] for rank in replicas[0]]
        partitions = [[rank[layer] for rank in experts] for layer in range(len(experts[0]))]
        num_experts = len({expert for held in partitions[0] for expert in held}) if partitions else 0
        copies = _num_redundant(experts, num_experts)
        return SavedPlan(
            model=value["model"],
            tensor=parallel["tensor"],
            data=parallel["data"],
            num_gangs=len(replicas),
            nodes=tuple(dict.fromkeys(rank["node"] for ranks in replicas for rank in ranks)),
            strategy=strategy_of(
                [rank["node"] for rank in replicas[0] if rank["tensor_rank"] == 0],
                is_cpu=replicas[0][0]["accelerator"] is None,
            ),
            expert_ranks=placement_of_partitions(partitions) if partitions and not copies else None,
            num_redundant_experts=copies,
        )
    except OSError as error:
        raise PlanError(
            f"Cannot read the plan {path}: {error.strerror}. Write it with `windfarm plan --json`."
        ) from error
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise PlanError(f"{path} is no plan ({error!r}). Write it with `windfarm plan --json`.") from error


def check_plan(saved: SavedPlan, request: PlanRequest, topology: Topology) -> None:
    """Refuse a plan of another model, other sizes, or nodes that are not there (any more)."""
    if saved.model != request.shape.name:
        raise PlanError(f"The plan is for the model {saved.model!r}, not {request.shape.name!r}. Plan again.")
    if (saved.tensor, saved.data) != (request.tensor, request.data):
        raise PlanError(
            f"The plan has {saved.data} data-parallel and {saved.tensor} tensor-parallel ranks, the configuration "
            f"{request.data} and {request.tensor}. Make them alike."
        )
    there = {node.name for node in topology.nodes}
    if gone := [name for name in saved.nodes if name not in there]:
        raise PlanError(
            f"The plan puts ranks on {', '.join(gone)}, which is not in the cluster (nodes: "
            f"{', '.join(sorted(there))}). Bring the node back, or plan again with `windfarm plan`."
        )
