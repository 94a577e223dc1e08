"""From nodes, a model and measured expert load to a plan: sizes, replicas, and which rank holds which experts where.

Pure: nothing is started or asked. `plan` tries the ways to cut a replica from the cheapest on and seats its ranks
(`cluster/seating.py`). Where nothing fits, `NoFit` says what is short and what would do.

Pipelines are planned only where they are asked for: windfarm starts tensor-parallel groups and gangs of data-parallel
ranks, but no stages that wait for each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from cluster.errors import NoFit
from cluster.expert_balance import Partition, balanced_partition, linear_partition, redundant_placement
from cluster.plan import Plan, PlanRequest, ReplicaPlan
from cluster.plan_checks import check_request
from cluster.seating import free_space, num_by_cores, place_replicas, seat_ranks
from cluster.sizing import ModelShape, Parallelism, RankBytes, rank_bytes
from cluster.topology import Topology

# Most stages of a pipeline that is named as a way out.
MAX_PIPELINE = 8
# Tokens: the shortest context that is named as a way out, and the shortest that is taken where none was asked for.
LEAST_CONTEXT = 512
LEAST_CHOSEN_CONTEXT = 2048


def plan(topology: Topology, request: PlanRequest) -> Plan:
    """The cheapest plan that fits; raises `NoFit` or `PlanError` with the cause and what would do."""
    check_request(topology, request)
    made, shortfalls = _try_all(topology, request)
    if made is None:
        raise NoFit(_nothing_fits(topology, request, shortfalls))
    return made


def plan_with_fitting_context(topology: Topology, request: PlanRequest) -> tuple[Plan, PlanRequest]:
    """For a context that nobody asked for: that of the request, or the longest half, quarter, ... of it that fits.

    Returns the plan, which says where it took less, and the request that it answers. Raises as `plan` does.
    """
    check_request(topology, request)
    wanted = request.work.context
    for shorter in [request, *_shorter_contexts(request, LEAST_CHOSEN_CONTEXT)]:
        made, _ = _try_all(topology, shorter)
        if made is None:
            continue
        if shorter is request:
            break
        reason = (
            f"{wanted} tokens per sequence do not fit, {shorter.work.context} do, and are planned with; --context asks "
            "for another length."
        )
        return replace(made, reasons=(*made.reasons, reason)), shorter
    return plan(topology, request), request


def _try_all(topology: Topology, request: PlanRequest) -> tuple[Plan | None, list[_Shortfall]]:
    """The first way to cut a replica that fits, or why each does not."""
    shortfalls: list[_Shortfall] = []
    for parallel in _candidates(topology, request):
        needs = _needs(topology, request, parallel)
        space = free_space(topology, request, parallel, needs)
        replicas = place_replicas(space, request, parallel, needs)
        if len(replicas) == request.replicas:
            experts = expert_partitions(request, parallel)
            placed = tuple(seat_ranks(replica, parallel, needs, experts) for replica in replicas)
            free = {name: len(slots) for name, slots in space.slots.items()}
            reasons = _reasons(topology, request, parallel, needs) + _exchange_reasons(topology, placed)
            return Plan(request.shape, parallel, placed, free, reasons), []
        shortfalls.append(_shortfall(topology, request, parallel, needs, len(replicas)))
    return None, shortfalls


def _shorter_contexts(request: PlanRequest, least: int) -> Iterator[PlanRequest]:
    context = request.work.context // 2
    while context >= least:
        yield replace(request, work=replace(request.work, context=context))
        context //= 2


def expert_partitions(request: PlanRequest, parallel: Parallelism) -> tuple[Partition, ...]:
    """For each layer which rank holds which experts: planned from the load where it was measured, else linear."""
    shape = request.shape
    ranks = parallel.num_expert_ranks
    if not shape.is_sparse or ranks == 1:
        return ()
    if request.loads is None:
        return (linear_partition(shape.num_experts, ranks),) * shape.num_layers
    if request.redundant_experts:
        return tuple(
            redundant_placement(layer, ranks, request.redundant_experts).slots for layer in request.loads.tokens
        )
    return tuple(balanced_partition(layer, ranks) for layer in request.loads.tokens)


def _candidates(topology: Topology, request: PlanRequest) -> Iterator[Parallelism]:
    """Ways to cut a replica: the fewest ranks first, then data-parallel attention with expert parallelism before tensor
    parallelism (less communication)."""
    shape = request.shape
    tensors = [request.tensor] if request.tensor else _tensor_sizes(topology, shape)
    pipeline = request.pipeline or 1
    datas = [request.data] if request.data else _data_sizes(topology, request)
    found = [
        Parallelism(tensor, pipeline, data, is_expert_parallel=shape.is_sparse and tensor * data > 1)
        for tensor in tensors
        for data in datas
        if _is_sensible(shape, tensor, pipeline, data, request)
    ]
    places = _num_places(topology, request)
    fitting = [parallel for parallel in found if parallel.num_ranks <= places]
    return iter(sorted(fitting or found[:1], key=lambda p: (p.num_ranks, -p.data, p.tensor)))


def _num_places(topology: Topology, request: PlanRequest) -> int:
    if topology.has_accelerators:
        return sum(len(node.accelerators) for node in topology.nodes)
    return sum(num_by_cores(node, request) for node in topology.nodes)


def _is_sensible(shape: ModelShape, tensor: int, pipeline: int, data: int, request: PlanRequest) -> bool:
    if pipeline > 1 and data > 1:
        return False  # vLLM runs expert parallelism over data-parallel ranks within one stage
    if not shape.is_sparse:
        return data == 1
    slots = shape.num_experts + request.redundant_experts
    return tensor * data <= slots and slots % (tensor * data) == 0


def _tensor_sizes(topology: Topology, shape: ModelShape) -> list[int]:
    most = max((len(node.accelerators) for node in topology.nodes), default=0)
    if not topology.has_accelerators:
        most = 1  # on CPU nodes sockets of one node share memory bandwidth: ranks go to other nodes
    divides = [size for size in range(1, max(1, most) + 1) if shape.num_heads % size == 0]
    return [size for size in divides if shape.num_kv_heads % size == 0 or size % shape.num_kv_heads == 0]


def _data_sizes(topology: Topology, request: PlanRequest) -> list[int]:
    if not request.shape.is_sparse:
        return [1]
    places = sum(len(node.accelerators) for node in topology.nodes) or len(topology.nodes)
    return list(range(1, min(request.shape.num_experts, max(1, places)) + 1))


def _needs(topology: Topology, request: PlanRequest, parallel: Parallelism) -> RankBytes:
    slots = request.shape.num_experts + (request.redundant_experts if parallel.is_expert_parallel else 0)
    experts = -(-slots // parallel.num_expert_ranks)
    is_on_cpu = not topology.has_accelerators
    needs = rank_bytes(request.shape, parallel, request.work, num_experts_here=experts, is_on_cpu=is_on_cpu)
    return replace(needs, runtime=request.runtime_bytes) if is_on_cpu else needs


def _who_assigns(topology: Topology, request: PlanRequest) -> str:
    if request.loads is None:
        return "Experts are assigned linearly, since no load was measured."
    if not topology.has_accelerators:
        return "Experts are assigned by measured load."
    copies = f"{request.redundant_experts} copies in each layer" if request.redundant_experts else "no copies"
    return (
        f"On GPUs vLLM's own balancer (EPLB, {copies}) assigns experts by the load that it sees; shown is where the "
        "load that this plan was made from would bring them."
    )


def _reasons(topology: Topology, request: PlanRequest, parallel: Parallelism, needs: RankBytes) -> tuple[str, ...]:
    where = "accelerator" if topology.has_accelerators else "process on a CPU node"
    sizes = f"weights {_gb(needs.weights)}, KV cache {_gb(needs.kv_cache)}, activations {_gb(needs.activations)}"
    sizes += f", its processes {_gb(needs.runtime)}" if needs.runtime else ""
    reasons = [f"Each rank is one {where} and needs {_gb(needs.total)}: {sizes}."]
    if parallel.num_ranks == 1:
        reasons.append(f"{request.shape.name} fits one {where}, so replicas need no communication.")
    if parallel.tensor > 1:
        reasons.append(f"{parallel.tensor} tensor-parallel ranks, since fewer do not hold it; they share one node.")
    if parallel.is_expert_parallel:
        share = request.shape.num_experts // parallel.num_expert_ranks
        reasons.append(f"Experts are spread: {share} of {request.shape.num_experts} per rank and layer.")
        reasons.append(_who_assigns(topology, request))
    if parallel.pipeline > 1:
        reasons.append(
            f"{parallel.pipeline} pipeline stages, as asked for. windfarm starts no pipelines: this plan shows what "
            "one would take and cannot be applied."
        )
    return tuple(reasons)


def _exchange_reasons(topology: Topology, replicas: Sequence[ReplicaPlan]) -> tuple[str, ...]:
    """What ranks on different nodes exchange over, where the nodes' links are known."""
    links = {node.name: node.link_gbit_s for node in topology.nodes}
    used = [links[name] for replica in replicas if len(replica.nodes) > 1 for name in replica.nodes]
    known = [link for link in used if link is not None]
    if not known or len(known) < len(used):
        return ()
    return (f"Ranks on different nodes exchange over the network: {min(known):g} Gbit/s at its slowest.",)


@dataclass(frozen=True, slots=True, order=True)
class _Shortfall:
    """Why one way to cut a replica does not fit; sorted, the nearest to fitting comes first."""

    missing_bytes: int
    num_ranks: int
    sentence: str


def _shortfall(
    topology: Topology, request: PlanRequest, parallel: Parallelism, needs: RankBytes, num_placed: int
) -> _Shortfall:
    if topology.has_accelerators:
        most = max(
            int(card.memory_bytes * request.gpu_memory_share) for node in topology.nodes for card in node.accelerators
        )
    else:
        most = max(int(node.memory_bytes * request.node_memory_share) for node in topology.nodes)
    cut = f"tensor {parallel.tensor} x pipeline {parallel.pipeline} x data {parallel.data}"
    if needs.total > most:
        short = needs.total - most
        text = (
            f"{cut}: a rank needs {needs.total} bytes ({_gb(needs.total)}), the largest device offers {most} "
            f"({_gb(most)}): {short} bytes short"
        )
        return _Shortfall(short, parallel.num_ranks, text)
    text = f"{cut}: room for {num_placed} of {request.replicas} replicas of {parallel.num_ranks} ranks"
    if topology.has_accelerators:
        return _Shortfall(0, parallel.num_ranks, text)
    short, why = _missing_on_nodes(topology, request, parallel, needs)
    return _Shortfall(short, parallel.num_ranks, f"{text}; {why}")


def _missing_on_nodes(
    topology: Topology, request: PlanRequest, parallel: Parallelism, needs: RankBytes
) -> tuple[int, str]:
    """What CPU nodes lack that could hold a rank each by memory: cores, or bytes for one rank more."""
    wanted = request.replicas * parallel.num_ranks
    cores = sum(node.num_cores for node in topology.nodes)
    if sum(num_by_cores(node, request) for node in topology.nodes) < wanted:
        return 0, f"{wanted} ranks of {request.cores_per_rank:g} cores each, the nodes have {cores:g} cores"
    missing = []
    for node in topology.nodes:
        usable = int(node.memory_bytes * request.node_memory_share)
        if usable // needs.total < num_by_cores(node, request):
            missing.append((needs.total - usable % needs.total, node.name))
    if not missing:
        return 0, "tensor-parallel ranks of a replica must share a node"
    short, name = min(missing)
    return short, f"for one rank more of {needs.total} bytes the node {name} is {short} bytes short of memory"


def _nothing_fits(topology: Topology, request: PlanRequest, shortfalls: Sequence[_Shortfall]) -> str:
    shown = "\n".join(f"  {item.sentence}" for item in sorted(shortfalls)[:3])
    replicas = "one replica" if request.replicas == 1 else f"{request.replicas} replicas"
    remedies = [*_remedies(topology, request), "more or larger devices", "quantized weights"]
    if request.replicas > 1:
        remedies.append("fewer replicas")
    if request.redundant_experts:
        remedies.append("fewer copies of experts")
    if request.work.num_sequences > 1:
        remedies.append("fewer sequences at once")
    return (
        f"{request.shape.name} does not fit ({replicas}, {request.work.num_sequences} sequences of "
        f"{request.work.context} tokens each):\n{shown}\nWhat would do: {', '.join(remedies)}."
        f"{_pipeline_that_fits(topology, request)}"
    )


def _pipeline_that_fits(topology: Topology, request: PlanRequest) -> str:
    """A sentence on its own line, where nobody asked for a number of stages and one would hold the model."""
    if request.pipeline is not None or (request.data or 1) > 1:
        return ""
    for stages in range(2, min(MAX_PIPELINE, request.shape.num_layers) + 1):
        if _try_all(topology, replace(request, pipeline=stages))[0] is not None:
            return (
                f"\n{stages} pipeline stages would hold it (--pipeline {stages} shows them), but windfarm starts none."
            )
    return ""


def _remedies(topology: Topology, request: PlanRequest) -> list[str]:
    """What was tried and fits."""
    for shorter in _shorter_contexts(request, LEAST_CONTEXT):
        made, _ = _try_all(topology, shorter)
        if made is not None:
            return [f"a shorter context ({shorter.work.context} tokens fit: {_cut_in_words(made)})"]
    return []


def _cut_in_words(made: Plan) -> str:
    parallel = made.parallel
    if parallel.num_ranks == 1:
        return "one rank holds all of it"
    if not parallel.is_expert_parallel:
        return f"{parallel.num_ranks} ranks hold a slice of each layer"
    share = made.shape.num_experts // parallel.num_expert_ranks
    return f"{parallel.num_ranks} ranks hold {share} of {made.shape.num_experts} experts each"


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB"
