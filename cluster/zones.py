"""Which node a further replica goes to, and which zone a further gang, among the nodes that run: the planner's rules
for zones, applied to what is free at this moment.

Copies of one model go to different nodes and zones where there is a choice, and a gang stays in one zone where one
holds it. Pure: nodes and amounts in, a name out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from cluster.topology import ZONE_LABELS

NODE_ID_LABEL = "ray.io/node-id"
Amounts = Mapping[str, float]
"""Amounts by Ray's names of resources; memory in bytes."""


@dataclass(frozen=True, slots=True)
class LiveNode:
    """A node of the running cluster. `free` is what nobody has reserved of its `total`."""

    id: str
    labels: Mapping[str, str]
    free: Amounts
    total: Amounts

    @property
    def zone(self) -> str | None:
        return next((self.labels[label] for label in ZONE_LABELS if label in self.labels), None)


def num_zones(nodes: Collection[LiveNode]) -> int:
    """Different zones that the nodes are labelled with; nodes without a label are a zone of their own."""
    return len({node.zone for node in nodes})


def node_for_replica(nodes: Sequence[LiveNode], needs: Amounts, copies: Counter[str], load: Counter[str]) -> str | None:
    """The id of the node for one more replica, or none where no node has room.

    `copies` are the replicas of the same model by node, `load` those of all models: nodes without a copy come first,
    among these zones without one, then the node with the fewest replicas.
    """
    in_zone = Counter[str | None]()
    for node in nodes:
        in_zone[node.zone] += copies[node.id]
    fitting = [node for node in nodes if how_often(node.free, needs)]
    best = min(fitting, key=lambda node: (copies[node.id], in_zone[node.zone], load[node.id], node.id), default=None)
    return best.id if best is not None else None


def zones_for_gang(nodes: Sequence[LiveNode], rank: Amounts, size: int, copies: Counter[str]) -> list[list[str]]:
    """Ids of the nodes of each zone that now has room for all `size` ranks, the zone to take first in front.

    `copies` are the ranks of the model's other gangs by node; zones with the fewest come first, then those where most
    further ranks would find room.
    """
    zones: dict[str | None, list[LiveNode]] = {}
    for node in nodes:
        zones.setdefault(node.zone, []).append(node)
    room = {zone: sum(how_often(node.free, rank) for node in held) for zone, held in zones.items()}
    used = {zone: sum(copies[node.id] for node in held) for zone, held in zones.items()}
    order = sorted(zones, key=lambda zone: (used[zone], -room[zone], zone or ""))
    return [[node.id for node in zones[zone]] for zone in order if room[zone] >= size]


def zone_label(nodes: Sequence[LiveNode], rank: Amounts, size: int) -> str | None:
    """The one label by which all nodes name their zones, where an empty zone would hold all `size` ranks."""
    labels = {next((label for label in ZONE_LABELS if label in node.labels), None) for node in nodes}
    empty = [LiveNode(node.id, node.labels, node.total, node.total) for node in nodes]
    return labels.pop() if len(labels) == 1 and zones_for_gang(empty, rank, size, Counter()) else None


def how_often(free: Amounts, needs: Amounts) -> int:
    """How many times `needs` is there; shares such as 0.1 are no exact binary fractions."""
    counts = [int(free.get(name, 0.0) / amount + 1e-9) for name, amount in needs.items() if amount > 0]
    return min(counts, default=1)


def selector_of_nodes(node_ids: Sequence[str]) -> dict[str, str]:
    """Ray's label selector for one bundle that may be on any of these nodes, named by Ray's ids."""
    return {NODE_ID_LABEL: f"in({','.join(node_ids)})"}


def nodes_of_selector(selector: Mapping[str, str]) -> list[str] | None:
    """The ids that `selector_of_nodes` was given; none where the selector is of another kind."""
    value = selector.get(NODE_ID_LABEL, "")
    if len(selector) != 1 or not (value.startswith("in(") and value.endswith(")")):
        return None
    return value.removeprefix("in(").removesuffix(")").split(",")
