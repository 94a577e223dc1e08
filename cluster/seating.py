"""Where the ranks of replicas sit: on which nodes, at which accelerators, within the memory that is there.

A tensor-parallel group never leaves its node, a gang stays as close together as it can, and replicas go to different
nodes and zones where there is a choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from cluster.expert_balance import Partition
from cluster.plan import PlanRequest, RankPlan, ReplicaPlan
from cluster.sizing import Parallelism, RankBytes
from cluster.topology import Node, Topology


@dataclass(slots=True)
class Slot:
    """One place for a rank: an accelerator, or a share of a CPU node."""

    node: Node
    accelerator: int | None
    capacity: int


@dataclass(slots=True)
class Space:
    """What is still free while replicas are placed."""

    slots: dict[str, list[Slot]]
    nodes: dict[str, Node]
    used: dict[str, int] = field(default_factory=dict)
    zones_used: dict[str | None, int] = field(default_factory=dict)

    def take(self, slots: Sequence[Slot]) -> None:
        for slot in slots:
            self.slots[slot.node.name].remove(slot)
        for name in {slot.node.name for slot in slots}:
            self.used[name] = self.used.get(name, 0) + 1
            zone = self.nodes[name].zone
            self.zones_used[zone] = self.zones_used.get(zone, 0) + 1


def num_by_cores(node: Node, request: PlanRequest) -> int:
    """Ranks that a node's cores are enough for; shares such as 0.1 are no exact binary fractions."""
    return int(node.num_cores / request.cores_per_rank + 1e-9)


def free_space(topology: Topology, request: PlanRequest, parallel: Parallelism, needs: RankBytes) -> Space:
    slots: dict[str, list[Slot]] = {}
    for node in topology.nodes:
        if topology.has_accelerators:
            slots[node.name] = [
                Slot(node, index, int(card.memory_bytes * request.gpu_memory_share))
                for index, card in enumerate(node.accelerators)
                if int(card.memory_bytes * request.gpu_memory_share) >= needs.total
            ]
        else:
            slots[node.name] = _cpu_slots(node, request, needs)
    return Space(slots, {node.name: node for node in topology.nodes})


def _cpu_slots(node: Node, request: PlanRequest, needs: RankBytes) -> list[Slot]:
    usable = int(node.memory_bytes * request.node_memory_share)
    by_memory = usable // needs.total if needs.total else 0
    by_cores = num_by_cores(node, request)
    count = min(by_memory, by_cores)
    return [Slot(node, None, usable // count) for _ in range(count)]


def place_replicas(space: Space, request: PlanRequest, parallel: Parallelism, needs: RankBytes) -> list[list[Slot]]:
    placed: list[list[Slot]] = []
    while len(placed) < request.replicas:
        chosen = _place_one(space, parallel)
        if chosen is None:
            break
        space.take(chosen)
        placed.append(chosen)
    return placed


def _place_one(space: Space, parallel: Parallelism) -> list[Slot] | None:
    """Slots for one replica, in rank order: (data, pipeline) groups of `tensor` slots, each group on one node."""
    groups = parallel.data * parallel.pipeline
    on_one = [name for name, free in space.slots.items() if len(free) >= groups * parallel.tensor]
    if on_one and (space.nodes[on_one[0]].has_accelerators or groups == 1):
        name = min(on_one, key=lambda n: _preference(space, n))
        return space.slots[name][: groups * parallel.tensor]
    return _spread_over_nodes(space, parallel.tensor, groups)


def _preference(space: Space, name: str) -> tuple[int, int, int, str]:
    """Nodes without a replica of this model first, then zones without one, then the fullest that still holds it."""
    node = space.nodes[name]
    return (space.used.get(name, 0), space.zones_used.get(node.zone, 0), len(space.slots[name]), name)


def _spread_over_nodes(space: Space, tensor: int, groups: int) -> list[Slot] | None:
    """A gang over several nodes: within one zone if one has room, on as few nodes as possible (GPUs), evenly (CPU)."""
    zones = {node.zone for node in space.nodes.values()}
    for allowed in [*sorted(({zone} for zone in zones), key=lambda z: _zone_order(space, z)), zones]:
        names = [name for name, node in space.nodes.items() if node.zone in allowed]
        chosen = _fill(space, names, tensor, groups)
        if chosen is not None:
            return chosen
    return None


def _zone_order(space: Space, zone: set[str | None]) -> tuple[int, str]:
    (name,) = zone
    return (space.zones_used.get(name, 0), name or "")


def _fill(space: Space, names: Sequence[str], tensor: int, groups: int) -> list[Slot] | None:
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


def _link(space: Space, name: str) -> float:
    return space.nodes[name].link_gbit_s or 0.0


def seat_ranks(
    slots: Sequence[Slot], parallel: Parallelism, needs: RankBytes, experts: Sequence[Partition]
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
