"""The nodes that models can run on, as plain data: cores, memory, accelerators, zones, links.

Read either from Ray's node records or from a YAML file that describes machines which are not there. Nothing here asks
a machine anything; the planner works on these records alone. Zones and links of Ray's nodes are labels that their
operator gives them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cluster.errors import TopologyError

GIB = 1024**3
GB = 10**9

ZONE_LABELS = ("ray.io/availability-zone", "topology.kubernetes.io/zone", "zone")
ACCELERATOR_LABEL = "ray.io/accelerator-type"
ACCELERATOR_MEMORY_LABEL = "windfarm/accelerator-memory-gb"
LINK_LABEL = "windfarm/link-gbit-s"

# Memory of one accelerator in GB as the vendors name it, by Ray's accelerator type.
ACCELERATOR_MEMORY_GB: Mapping[str, int] = {
    "V100": 16,
    "T4": 16,
    "L4": 24,
    "A10G": 24,
    "RTX-4090": 24,
    "A100-40G": 40,
    "L40S": 48,
    "A100": 80,
    "A100-80G": 80,
    "H100": 80,
    "H200": 141,
    "B200": 180,
}


@dataclass(frozen=True, slots=True)
class Accelerator:
    """One GPU. `memory_bytes` is all that it has, before anything is loaded."""

    kind: str
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Node:
    """One machine. `link_gbit_s` is its network to the other nodes, none where nobody said; accelerators inside a node
    share faster links, which nobody needs to describe."""

    name: str
    num_cores: float
    memory_bytes: int
    accelerators: tuple[Accelerator, ...] = ()
    zone: str | None = None
    link_gbit_s: float | None = None

    @property
    def has_accelerators(self) -> bool:
        return bool(self.accelerators)


@dataclass(frozen=True, slots=True)
class Topology:
    nodes: tuple[Node, ...]

    def __post_init__(self) -> None:
        names = [node.name for node in self.nodes]
        double = sorted({name for name in names if names.count(name) > 1})
        if double:
            raise TopologyError(f"Node names must be unique; {', '.join(double)} stands more than once.")

    @property
    def has_accelerators(self) -> bool:
        return any(node.has_accelerators for node in self.nodes)


def topology_from_ray(records: Sequence[Mapping[str, Any]]) -> Topology:
    """Topology of a running cluster from what `ray.nodes()` returns; dead nodes are left out."""
    return Topology(tuple(_node_from_ray(record) for record in records if record.get("Alive", record.get("alive"))))


def _node_from_ray(record: Mapping[str, Any]) -> Node:
    resources = record.get("Resources", {})
    labels = record.get("Labels", {})
    name = record.get("NodeName") or record.get("NodeManagerAddress") or record["NodeID"]
    num_gpus = int(resources.get("GPU", 0))
    accelerators: tuple[Accelerator, ...] = ()
    if num_gpus:
        kind = labels.get(ACCELERATOR_LABEL) or _accelerator_resource(resources)
        place = f"The label {ACCELERATOR_MEMORY_LABEL} of the node {name}"
        memory = _accelerator_memory(kind, labels.get(ACCELERATOR_MEMORY_LABEL), place)
        accelerators = (Accelerator(kind, memory),) * num_gpus
    return Node(
        name=name,
        num_cores=float(resources.get("CPU", 0)),
        memory_bytes=int(resources.get("memory", 0)),
        accelerators=accelerators,
        zone=next((labels[label] for label in ZONE_LABELS if label in labels), None),
        link_gbit_s=_labelled_link(name, labels),
    )


def _labelled_link(name: str, labels: Mapping[str, str]) -> float | None:
    if LINK_LABEL not in labels:
        return None
    place = f"The label {LINK_LABEL} of the node {name}"
    return _above_zero(labels[LINK_LABEL], place, "how many gigabits per second its network carries")


def _above_zero(text: str, place: str, meaning: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise TopologyError(f"{place} is {text!r}; it is a number above 0: {meaning}.")
    return number


def _accelerator_resource(resources: Mapping[str, Any]) -> str:
    prefix = "accelerator_type:"
    return next((key.removeprefix(prefix) for key in resources if key.startswith(prefix)), "unknown")


def _accelerator_memory(kind: str, gigabytes: str | None, place: str) -> int:
    """Bytes of one; `gigabytes` is what `place` says of it, if anything."""
    if gigabytes is not None:
        return round(_above_zero(gigabytes, place, "how many gigabytes one of its accelerators has") * GB)
    if kind not in ACCELERATOR_MEMORY_GB:
        known = ", ".join(sorted(ACCELERATOR_MEMORY_GB))
        raise TopologyError(
            f"The memory of accelerator type {kind!r} is not known (known: {known}). "
            f"Start its node with the label {ACCELERATOR_MEMORY_LABEL}=<GB>."
        )
    return ACCELERATOR_MEMORY_GB[kind] * GB


def read_topology(path: Path) -> Topology:
    """Topology from a YAML file.

    ```yaml
    nodes:
      - name: gpu           # with count > 1 the nodes are named gpu-1, gpu-2, ...
        count: 2
        cores: 64
        memory_gib: 512
        zone: a
        link_gbit_s: 100
        accelerators: {kind: H100, count: 8, memory_gb: 80}   # memory_gb only for kinds that are not known
    ```
    """
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TopologyError(f"Cannot read {path}: {error.strerror}.") from error
    except yaml.YAMLError as error:
        raise TopologyError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(value, dict) or not isinstance(value.get("nodes"), list) or not value["nodes"]:
        raise TopologyError(f"{path} names no nodes; expected a list under the key `nodes`.")
    _refuse_unknown(value, {"nodes"}, str(path))
    nodes: list[Node] = []
    for index, entry in enumerate(value["nodes"]):
        nodes += _nodes_from_entry(entry, f"{path}, nodes[{index}]")
    return Topology(tuple(nodes))


_NODE_KEYS = {"name", "count", "cores", "memory_gib", "zone", "link_gbit_s", "accelerators"}
_ACCELERATOR_KEYS = {"kind", "count", "memory_gb"}


def _nodes_from_entry(entry: Any, place: str) -> list[Node]:
    if not isinstance(entry, dict):
        raise TopologyError(f"{place}: a node is a mapping with name, cores and memory_gib.")
    _refuse_unknown(entry, _NODE_KEYS, place)
    count = int(_number(entry, "count", place, default=1))
    if count < 1:
        raise TopologyError(f"{place}: count must be at least 1, not {count}.")
    name = str(entry.get("name") or f"node-{place.rsplit('[', 1)[1].rstrip(']')}")
    link = _number(entry, "link_gbit_s", place, default=0)
    template = Node(
        name=name,
        num_cores=_number(entry, "cores", place),
        memory_bytes=int(_number(entry, "memory_gib", place) * GIB),
        accelerators=_accelerators(entry.get("accelerators"), place),
        zone=str(entry["zone"]) if entry.get("zone") is not None else None,
        link_gbit_s=link or None,
    )
    if count == 1:
        return [template]
    return [_renamed(template, f"{name}-{number}") for number in range(1, count + 1)]


def _renamed(node: Node, name: str) -> Node:
    return Node(name, node.num_cores, node.memory_bytes, node.accelerators, node.zone, node.link_gbit_s)


def _accelerators(entry: Any, place: str) -> tuple[Accelerator, ...]:
    if entry is None:
        return ()
    if not isinstance(entry, dict) or "kind" not in entry:
        raise TopologyError(f"{place}: accelerators is a mapping with kind and count.")
    _refuse_unknown(entry, _ACCELERATOR_KEYS, f"{place}.accelerators")
    kind = str(entry["kind"])
    gigabytes = str(entry["memory_gb"]) if "memory_gb" in entry else None
    count = int(_number(entry, "count", f"{place}.accelerators", default=1))
    return (Accelerator(kind, _accelerator_memory(kind, gigabytes, f"{place}.accelerators: memory_gb")),) * count


def _number(entry: Mapping[str, Any], key: str, place: str, *, default: float | None = None) -> float:
    value = entry.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise TopologyError(f"{place}: {key} must be a number of at least 0, not {value!r}.")
    return float(value)


def _refuse_unknown(entry: Mapping[str, Any], known: set[str], place: str) -> None:
    unknown = sorted(set(entry) - known)
    if unknown:
        raise TopologyError(f"{place}: unknown key {unknown[0]!r}; valid keys: {', '.join(sorted(known))}.")
