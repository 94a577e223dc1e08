"""What a plan means on Kubernetes: which pods there are, how large each is, and what one rank asks Ray for.

Pure. A pod of a worker group takes the larger part of one node, so that a node never holds two of them; the head and
the pod of the platform (endpoint, page, documents) are small and go where there is room.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from cluster.engines.parallelism import ExpertRanks, placement_of_partitions
from cluster.errors import PlanError
from cluster.expert_balance import Partition, linear_partition
from cluster.plan import Plan
from cluster.plan_judgement import expert_partitions_of
from cluster.sizing import Workload
from cluster.topology import GB, GIB, Node, Topology

SOURCES: Mapping[str, str] = {
    "mistral-7b": "hf:mistralai/Mistral-7B-Instruct-v0.1",
    "mixtral-8x7b": "hf:mistralai/Mixtral-8x7B-Instruct-v0.1",
    "llama-2-70b": "hf:meta-llama/Llama-2-70b-chat-hf",
}
"""Where the pods fetch a planned model: the instruction-tuned checkpoint of that shape."""

# What a model's pod takes of its node. The rest is for the system, and on nodes with GPUs also for head and platform.
GPU_NODE_CORES, GPU_NODE_MEMORY = 5 / 8, 3 / 4
CPU_NODE_CORES, CPU_NODE_MEMORY = 7 / 8, 7 / 8
RUNTIME_BYTES = 2 * GIB
"""What the processes of one rank hold in main memory beside the model."""


@dataclass(frozen=True, slots=True)
class WorkerGroup:
    """Equal pods that hold the ranks of a model, one pod per node. `accelerator` is empty on CPU nodes."""

    min_pods: int
    max_pods: int
    cores: int
    memory_gib: int
    num_gpus: int
    accelerator: str
    accelerator_gb: int
    ranks_per_pod: int
    num_zones: int


@dataclass(frozen=True, slots=True)
class Deployment:
    """One windfarm on Kubernetes. A replica of Ray Serve is one tensor-parallel group: one data-parallel rank."""

    model: str
    source: str
    context: int
    tensor: int
    data: int
    is_sparse: bool
    num_copies: int
    requests_per_replica: int
    num_redundant_experts: int | None
    """Copies of experts in each layer for vLLM's balancer on GPUs; none: experts stay where they are placed."""
    expert_ranks: ExpertRanks | None
    """Who holds which experts on CPU nodes; none: they are placed linearly."""
    replica_cpus: int
    replica_memory: int
    group: WorkerGroup

    @property
    def uses_gpus(self) -> bool:
        return self.group.num_gpus > 0

    @property
    def min_replicas(self) -> int:
        """Serve replicas of one copy of the model: scaling never goes below one whole copy."""
        return self.data

    @property
    def max_replicas(self) -> int:
        return self.data * self.num_copies


def deployment_of(topology: Topology, plan: Plan, work: Workload) -> Deployment:
    """Raises `PlanError` for a plan that cannot be deployed so, with the reason and what to do."""
    parallel = plan.parallel
    if parallel.pipeline > 1:
        raise PlanError(
            f"This plan has {parallel.pipeline} pipeline stages; windfarm runs tensor-parallel groups and gangs of "
            "data-parallel ranks, but no pipelines. Ask for another cut with --data or --tensor, or for a shorter "
            "--context."
        )
    group = _worker_group(topology, plan)
    replicas_per_pod = group.ranks_per_pod // parallel.tensor
    return Deployment(
        model=plan.shape.name,
        source=_source(plan.shape.name),
        context=work.context,
        tensor=parallel.tensor,
        data=parallel.data,
        is_sparse=plan.shape.is_sparse,
        num_copies=len(plan.replicas),
        requests_per_replica=max(1, -(-work.num_sequences // parallel.data)),
        num_redundant_experts=_balanced_copies(plan) if group.num_gpus else None,
        expert_ranks=None if group.num_gpus else _expert_ranks(plan),
        replica_cpus=group.cores // replicas_per_pod,
        replica_memory=_replica_memory(plan, group),
        group=group,
    )


def _balanced_copies(plan: Plan) -> int | None:
    """What vLLM's balancer gets on GPUs; nothing where experts are where the engines put them by themselves."""
    held = _planned_experts(plan)
    return sum(len(experts) for experts in held[0]) - plan.shape.num_experts if held else None


def _expert_ranks(plan: Plan) -> ExpertRanks | None:
    """Pods have no trace and no plan to read, so what was planned from it stands in the model's section."""
    held = _planned_experts(plan)
    return placement_of_partitions(held) if held else None


def _planned_experts(plan: Plan) -> tuple[Partition, ...]:
    """For each layer the experts of each rank; empty where that is the linear placement."""
    ranks = plan.parallel.num_expert_ranks
    if not plan.shape.is_sparse or ranks == 1:
        return ()
    linear = linear_partition(plan.shape.num_experts, ranks)
    held = expert_partitions_of(plan)
    return () if all(layer == linear for layer in held) else held


def _source(model: str) -> str:
    if model not in SOURCES:
        raise PlanError(
            f"No hub is known from which pods could fetch {model!r}. Known: {', '.join(SOURCES)}. For another model "
            "write the manifests for one of its size, then set `source` in serveConfigV2."
        )
    return SOURCES[model]


def _worker_group(topology: Topology, plan: Plan) -> WorkerGroup:
    nodes = {node.name: node for node in topology.nodes}
    used = [nodes[name] for name in dict.fromkeys(name for replica in plan.replicas for name in replica.nodes)]
    first = used[0]
    other = next((node for node in used if _hardware(node) != _hardware(first)), None)
    if other is not None:
        raise PlanError(
            f"The plan uses unlike nodes ({first.name} and {other.name}); the pods of a worker group are alike. "
            "Describe equal nodes in the --nodes file."
        )
    per_node = Counter(rank.node for replica in plan.replicas for rank in replica.ranks)
    on_gpus = first.has_accelerators
    cores = int(first.num_cores * (GPU_NODE_CORES if on_gpus else CPU_NODE_CORES))
    return WorkerGroup(
        min_pods=len(plan.replicas[0].nodes),
        max_pods=len(used),
        cores=max(1, cores),
        memory_gib=int(first.memory_bytes * (GPU_NODE_MEMORY if on_gpus else CPU_NODE_MEMORY) / GIB),
        num_gpus=len(first.accelerators),
        accelerator=first.accelerators[0].kind if on_gpus else "",
        accelerator_gb=first.accelerators[0].memory_bytes // GB if on_gpus else 0,
        ranks_per_pod=len(first.accelerators) or max(per_node.values()),
        num_zones=len({node.zone for node in used if node.zone is not None}),
    )


def _hardware(node: Node) -> tuple[object, ...]:
    return (node.num_cores, node.memory_bytes, node.accelerators)


def _replica_memory(plan: Plan, group: WorkerGroup) -> int:
    """Main memory in bytes that one Serve replica asks for: the model too, where it lies there."""
    rank = plan.replicas[0].ranks[0]
    needs = RUNTIME_BYTES if group.num_gpus else rank.needs.total - rank.needs.runtime + RUNTIME_BYTES
    offered = group.memory_gib * GIB // group.ranks_per_pod
    if needs > offered:
        raise PlanError(
            f"A rank needs {needs} bytes with its processes, a pod of {group.memory_gib} GiB offers {offered} to each "
            f"of its {group.ranks_per_pod} ranks: {needs - offered} bytes short. Use nodes with more memory, a shorter "
            "--context or fewer --sequences."
        )
    return needs * plan.parallel.tensor
