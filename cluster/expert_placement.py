"""From nodes, a model and measured expert load to a plan: sizes, replicas, and which rank holds which experts where.

Pure: nothing is started or asked. `plan` tries the ways to cut a replica from the cheapest on, places its ranks (a
tensor-parallel group never leaves its node, a gang stays as close together as it can, replicas go to different nodes
and zones where there is a choice), and never gives a rank more than its memory holds. Where nothing fits, `NoFit` says
what is short and what would do.

Pipelines are planned only where they are asked for: windfarm starts tensor-parallel groups and gangs of data-parallel
ranks, but no stages that wait for each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from cluster.errors import NoFit, PlanError
from cluster.expert_balance import Partition, balanced_partition, linear_partition, redundant_placement
from cluster.sizing import ModelShape, Parallelism, RankBytes, Workload, rank_bytes
from cluster.topology import Node, Topology

# Shares of a device that the planner uses; the rest is for the runtime, fragmentation and the system.
GPU_MEMORY_SHARE = 0.9
NODE_MEMORY_SHARE = 0.8
# Most stages of a pipeline that is named as a way out.
MAX_PIPELINE = 8
# Tokens: the shortest context that is named as a way out, and the shortest that is taken where none was asked for.
LEAST_CONTEXT = 512
LEAST_CHOSEN_CONTEXT = 2048


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


@dataclass(slots=True)
class _Slot:
    """One place for a rank: an accelerator, or a share of a CPU node."""

    node: Node
    accelerator: int | None
    capacity: int


@dataclass(slots=True)
class _Space:
    """What is still free while replicas are placed."""

    slots: dict[str, list[_Slot]]
    nodes: dict[str, Node]
    used: dict[str, int] = field(default_factory=dict)
    zones_used: dict[str | None, int] = field(default_factory=dict)

    def take(self, slots: Sequence[_Slot]) -> None:
        for slot in slots:
            self.slots[slot.node.name].remove(slot)
        for name in {slot.node.name for slot in slots}:
            self.used[name] = self.used.get(name, 0) + 1
            zone = self.nodes[name].zone
            self.zones_used[zone] = self.zones_used.get(zone, 0) + 1


def plan(topology: Topology, request: PlanRequest) -> Plan:
    """The cheapest plan that fits; raises `NoFit` or `PlanError` with the cause and what would do."""
    _check_request(topology, request)
    made, shortfalls = _try_all(topology, request)
    if made is None:
        raise NoFit(_nothing_fits(topology, request, shortfalls))
    return made


def plan_with_fitting_context(topology: Topology, request: PlanRequest) -> tuple[Plan, PlanRequest]:
    """For a context that nobody asked for: that of the request, or the longest half, quarter, ... of it that fits.

    Returns the plan, which says where it took less, and the request that it answers. Raises as `plan` does.
    """
    _check_request(topology, request)
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
        space = _free_space(topology, request, parallel, needs)
        replicas = _place_replicas(space, request, parallel, needs)
        if len(replicas) == request.replicas:
            experts = expert_partitions(request, parallel)
            placed = tuple(_finish(replica, parallel, needs, experts) for replica in replicas)
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


def _check_request(topology: Topology, request: PlanRequest) -> None:
    shape = request.shape
    if request.replicas < 1:
        raise PlanError(f"At least one replica is needed, not {request.replicas}.")
    if request.work.context > shape.max_context:
        raise PlanError(
            f"{shape.name} takes at most {shape.max_context} tokens of context; {request.work.context} were asked for."
        )
    tensor = request.tensor or 1
    if shape.num_heads % tensor:
        divisors = [size for size in range(1, shape.num_heads + 1) if shape.num_heads % size == 0]
        raise PlanError(
            f"{tensor} tensor-parallel ranks do not divide the {shape.num_heads} attention heads of {shape.name}; "
            f"use one of {', '.join(map(str, divisors))}."
        )
    _check_kv_heads(shape, tensor)
    if (request.pipeline or 1) > 1 and (request.data or 1) > 1:
        raise PlanError("A gang of data-parallel ranks has one pipeline stage: leave pipeline or data out.")
    ranks = tensor * (request.data or 1)
    if shape.is_sparse and ranks > shape.num_experts + request.redundant_experts:
        raise PlanError(
            f"{ranks} ranks are more than the {shape.num_experts} experts of {shape.name}; "
            f"use at most {shape.num_experts}."
        )
    slots = shape.num_experts + request.redundant_experts
    if shape.is_sparse and (request.tensor or request.data) and slots % ranks:
        what = "experts with their copies" if request.redundant_experts else "experts"
        raise PlanError(
            f"The {slots} {what} of {shape.name} cannot be spread evenly over {ranks} ranks; use a divisor."
        )
    if request.data and request.data > 1 and not shape.is_sparse:
        raise PlanError(f"{shape.name} is dense: use replicas instead of {request.data} data-parallel ranks.")
    if request.loads is not None:
        if not shape.is_sparse:
            raise PlanError(f"{shape.name} has no experts, so there is no expert load to plan with.")
        request.loads.check(shape)
    if request.redundant_experts and request.loads is None:
        raise PlanError("Redundant experts are chosen by their load: give a routing trace as well.")
    if request.redundant_experts and not topology.has_accelerators:
        raise PlanError("Redundant experts need GPUs: on CPU nodes each expert of a gang lies on one rank.")


def _check_kv_heads(shape: ModelShape, tensor: int) -> None:
    if shape.num_kv_heads % tensor and tensor % shape.num_kv_heads:
        raise PlanError(
            f"{tensor} tensor-parallel ranks and the {shape.num_kv_heads} key-value heads of {shape.name} do not "
            "divide each other."
        )


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
    return sum(_num_by_cores(node, request) for node in topology.nodes)


def _num_by_cores(node: Node, request: PlanRequest) -> int:
    """Ranks that a node's cores are enough for; shares such as 0.1 are no exact binary fractions."""
    return int(node.num_cores / request.cores_per_rank + 1e-9)


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
    needs = rank_bytes(request.shape, parallel, request.work, num_experts_here=experts)
    return needs if topology.has_accelerators else replace(needs, runtime=request.runtime_bytes)


def _free_space(topology: Topology, request: PlanRequest, parallel: Parallelism, needs: RankBytes) -> _Space:
    slots: dict[str, list[_Slot]] = {}
    for node in topology.nodes:
        if topology.has_accelerators:
            slots[node.name] = [
                _Slot(node, index, int(card.memory_bytes * GPU_MEMORY_SHARE))
                for index, card in enumerate(node.accelerators)
                if int(card.memory_bytes * GPU_MEMORY_SHARE) >= needs.total
            ]
        else:
            slots[node.name] = _cpu_slots(node, request, needs)
    return _Space(slots, {node.name: node for node in topology.nodes})


def _cpu_slots(node: Node, request: PlanRequest, needs: RankBytes) -> list[_Slot]:
    usable = int(node.memory_bytes * request.node_memory_share)
    by_memory = usable // needs.total if needs.total else 0
    by_cores = _num_by_cores(node, request)
    count = min(by_memory, by_cores)
    return [_Slot(node, None, usable // count) for _ in range(count)]


def _place_replicas(space: _Space, request: PlanRequest, parallel: Parallelism, needs: RankBytes) -> list[list[_Slot]]:
    placed: list[list[_Slot]] = []
    while len(placed) < request.replicas:
        chosen = _place_one(space, parallel)
        if chosen is None:
            break
        space.take(chosen)
        placed.append(chosen)
    return placed


def _place_one(space: _Space, parallel: Parallelism) -> list[_Slot] | None:
    """Slots for one replica, in rank order: (data, pipeline) groups of `tensor` slots, each group on one node."""
    groups = parallel.data * parallel.pipeline
    on_one = [name for name, free in space.slots.items() if len(free) >= groups * parallel.tensor]
    if on_one and (space.nodes[on_one[0]].has_accelerators or groups == 1):
        name = min(on_one, key=lambda n: _preference(space, n))
        return space.slots[name][: groups * parallel.tensor]
    return _spread_over_nodes(space, parallel.tensor, groups)


def _preference(space: _Space, name: str) -> tuple[int, int, int, str]:
    """Nodes without a replica of this model first, then zones without one, then the fullest that still holds it."""
    node = space.nodes[name]
    return (space.used.get(name, 0), space.zones_used.get(node.zone, 0), len(space.slots[name]), name)


def _spread_over_nodes(space: _Space, tensor: int, groups: int) -> list[_Slot] | None:
    """A gang over several nodes: within one zone if one has room, on as few nodes as possible (GPUs), evenly (CPU)."""
    zones = {node.zone for node in space.nodes.values()}
    for allowed in [*sorted(({zone} for zone in zones), key=lambda z: _zone_order(space, z)), zones]:
        names = [name for name, node in space.nodes.items() if node.zone in allowed]
        chosen = _fill(space, names, tensor, groups)
        if chosen is not None:
            return chosen
    return None


def _zone_order(space: _Space, zone: set[str | None]) -> tuple[int, str]:
    (name,) = zone
    return (space.zones_used.get(name, 0), name or "")


def _fill(space: _Space, names: Sequence[str], tensor: int, groups: int) -> list[_Slot] | None:
    """Among nodes that are otherwise alike those with the faster network, since the gang exchanges over it."""
    room = {name: len(space.slots[name]) // tensor for name in names}
    if sum(room.values()) < groups:
        return None
    per_node: dict[str, int] = {}
    if any(space.nodes[name].has_accelerators for name in names):
        for name in sorted(names, key=lambda n: (space.used.get(n, 0), -room[n], -_link(space, n), n)):
            per_node[name] = min(room[name], groups - sum(per_node.values()))
    else:
        while sum(per_node.values()) < groups:
            open_names = [name for name in names if per_node.get(name, 0) < room[name]]
            name = min(open_names, key=lambda n: (per_node.get(n, 0), space.used.get(n, 0), -_link(space, n), n))
            per_node[name] = per_node.get(name, 0) + 1
    return [slot for name, count in per_node.items() for slot in space.slots[name][: count * tensor]]


def _link(space: _Space, name: str) -> float:
    return space.nodes[name].link_gbit_s or 0.0


def _finish(
    slots: Sequence[_Slot], parallel: Parallelism, needs: RankBytes, experts: Sequence[Partition]
) -> ReplicaPlan:
    ranks = []
    for index, slot in enumerate(slots):
        group, tensor_rank = divmod(index, parallel.tensor)
        data_rank, pipeline_rank = divmod(group, parallel.pipeline)
        rank = RankPlan(
            node=slot.node.name,
            accelerator=slot.accelerator,
            tensor_rank=tensor_rank,
            pipeline_rank=pipeline_rank,
            data_rank=data_rank,
            needs=needs,
            capacity=slot.capacity,
        )
        expert_rank = data_rank * parallel.tensor + tensor_rank
        ranks.append(replace(rank, experts=tuple(layer[expert_rank] for layer in experts)))
    return ReplicaPlan(tuple(ranks))


def _reasons(topology: Topology, request: PlanRequest, parallel: Parallelism, needs: RankBytes) -> tuple[str, ...]:
    where = "accelerator" if topology.has_accelerators else "process on a CPU node"
    sizes = f"weights {_gb(needs.weights)}, KV cache {_gb(needs.kv_cache)}, activations {_gb(needs.activations)}"
    reasons = [f"Each rank is one {where} and needs {_gb(needs.total)}: {sizes}."]
    if parallel.num_ranks == 1:
        reasons.append(f"{request.shape.name} fits one {where}, so replicas need no communication.")
    if parallel.tensor > 1:
        reasons.append(f"{parallel.tensor} tensor-parallel ranks, since fewer do not hold it; they share one node.")
    if parallel.is_expert_parallel:
        share = request.shape.num_experts // parallel.num_expert_ranks
        reasons.append(f"Experts are spread: {share} of {request.shape.num_experts} per rank and layer.")
        how = "by measured load" if request.loads else "linearly, since no load was measured"
        reasons.append(f"Experts are assigned {how}.")
        if topology.has_accelerators and request.loads:
            copies = f"{request.redundant_experts} copies in each layer" if request.redundant_experts else "no copies"
            reasons.append(
                f"On GPUs vLLM's own balancer (EPLB, {copies}) moves them by the load that it sees; this is where such "
                "a load would bring them."
            )
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
        most = max(int(card.memory_bytes * GPU_MEMORY_SHARE) for node in topology.nodes for card in node.accelerators)
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
    if sum(_num_by_cores(node, request) for node in topology.nodes) < wanted:
        return 0, f"{wanted} ranks of {request.cores_per_rank:g} cores each, the nodes have {cores:g} cores"
    missing = []
    for node in topology.nodes:
        usable = int(node.memory_bytes * request.node_memory_share)
        if usable // needs.total < _num_by_cores(node, request):
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
