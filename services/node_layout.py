"""The nodes of a windfarm on this machine: where they run, what each offers, and what their processes are told."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.catalogue import resolve
from cluster.errors import TopologyError
from cluster.topology import ACCELERATOR_MEMORY_LABEL, Topology, topology_from_ray
from services.environment import INTERNAL_HOST_VARIABLE, LOOPBACK, NAMESPACES_VARIABLE, database_url, url_of
from services.graphics_cards import label_of, read_cards
from services.local_network import Seat, loopback_seats, namespace_seats, why_no_network
from services.preflight import OBJECT_STORE_BYTES, OVERHEAD_BYTES, Machine
from services.process_environment import uses_hub
from services.ray_adapter import NodeOptions
from services.ray_config import RayConfig
from services.setup_errors import StartRefused
from services.up_options import UpOptions

Say = Callable[[str], None]


def choose_seats(options: UpOptions, instance: str, say: Say) -> list[Seat]:
    """Where the nodes run. Networks of their own lead nowhere, so what needs the outside gets none."""
    count = options.num_local_nodes
    if count == 1:
        return loopback_seats(1)
    reason = "as asked" if options.use_namespaces is False else _why_outside(options.config) or why_no_network()
    if reason is None:
        return namespace_seats(instance, count)
    if options.use_namespaces:
        raise StartRefused(f"The nodes can get no networks of their own: {reason}. Use --no-namespaces.")
    say(f"{count} nodes on loopback addresses, without networks of their own: {reason}")
    return loopback_seats(count)


def _why_outside(config: RayConfig) -> str | None:
    """What of the configuration lies outside of this machine."""
    remote = [model.id for model in config.app.models.values() if resolve(model.source).origin == "remote"]
    if remote:
        return f"the model {remote[0]} is a remote API"
    if config.app.store.qdrant.url is not None or os.environ.get("WINDFARM_QDRANT_URL"):
        return "Qdrant is a server"
    if not database_url().startswith("sqlite"):
        return "the database is a server"
    return "a model comes from a hub" if uses_hub(config) else None


def head_labels(machine: Machine, given: Mapping[str, str], say: Say) -> dict[str, str]:
    """Labels of the node that has the GPUs: those that were given, and the memory of its cards where that can be read.

    Where it cannot, that is only said: a model that is cut into ranks over these cards is refused later.
    """
    if not machine.num_gpus or ACCELERATOR_MEMORY_LABEL in given:
        return dict(given)
    try:
        return label_of(read_cards(machine.num_gpus)) | dict(given)
    except TopologyError as error:
        say(str(error))
        return dict(given)


def node_options(
    machine: Machine, folder: Path, seats: Sequence[Seat], labels: Mapping[str, str] | None = None
) -> list[NodeOptions]:
    """The head first, with the GPUs and these labels. Nodes on one machine share its cores and memory evenly, but each
    has a core at least."""
    count = len(seats)
    free = machine.free_memory - OVERHEAD_BYTES - count * OBJECT_STORE_BYTES
    return [
        NodeOptions(
            node_ip=seat.address,
            temp_folder=str(folder),
            num_cpus=cores_of_node(machine, count),
            num_gpus=(machine.num_gpus or None) if seat is seats[0] else 0,
            memory_bytes=max(0, free // count),
            object_store_bytes=OBJECT_STORE_BYTES,
            labels=dict(labels or {}) if seat is seats[0] else {},
        )
        for seat in seats
    ]


def cores_of_node(machine: Machine, count: int) -> int:
    return max(1, machine.num_cpus // count)


def node_variables(
    seats: Sequence[Seat], nodes: Sequence[NodeOptions], port: int, options: UpOptions
) -> dict[str, str]:
    """What processes have to know of several nodes on one machine."""
    if len(seats) == 1:
        return {}
    variables = {INTERNAL_HOST_VARIABLE: seats[0].address}
    if options.threads is None:
        variables["WINDFARM_THREADS"] = str(nodes[0].num_cpus)
    if seats[0].namespace is not None:
        # The page runs in the head's namespace; there the endpoint listens on loopback.
        variables |= {NAMESPACES_VARIABLE: "1", "WINDFARM_PUBLIC_URL": url_of(LOOPBACK, port)}
    return variables


def planned_topology(nodes: Sequence[NodeOptions]) -> Topology:
    """As Ray will describe them when they run, the head first. Raises `TopologyError` for GPUs whose memory no label
    says."""
    return topology_from_ray(
        [
            {
                "Alive": True,
                "NodeName": node.node_ip,
                "Labels": node.labels,
                "Resources": {"CPU": node.num_cpus, "GPU": node.num_gpus or 0, "memory": node.memory_bytes},
            }
            for node in nodes
        ]
    )


def running_topology(status: Mapping[str, Any]) -> Topology:
    """The nodes of a running windfarm, from what its status says, the head first; lost ones are left out."""
    return topology_from_ray(
        [
            {
                "Alive": node["alive"],
                "NodeName": node["name"],
                "Labels": node["labels"],
                "Resources": {name: node[name] for name in ("CPU", "GPU", "memory")},
            }
            for node in sorted(status.get("nodes", ()), key=lambda node: not node.get("is_head"))
        ]
    )
