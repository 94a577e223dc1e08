"""Where Ray puts gangs that are described as `Placement` describes them: together, apart, and evenly, as planned."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator
from dataclasses import replace

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

from cluster.expert_placement import plan
from cluster.placement import Placement, Reservation, place
from cluster.plan import PlanRequest
from cluster.sizing import ModelShape, Workload
from cluster.topology import GIB, Accelerator, Node, Topology, topology_from_ray

pytestmark = pytest.mark.ranks

MIXTURE = ModelShape("mixture", 3, 64, 128, 8, 4, 8, 1000, 512, num_experts=8, experts_per_token=2)
LABELS = {"windfarm/link-gbit-s": "25", "windfarm/accelerator-memory-gb": "80"}
RANK = Reservation(1.0, 1024**2)


@pytest.fixture(scope="module")
def nodes() -> Generator[dict[str, str]]:
    """Ray's ids of three equal nodes by their names, each with room for four ranks."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(3):
            cluster.add_node(num_cpus=4, num_gpus=4, memory=GIB, labels=LABELS)
        ray.init(address=cluster.address, log_to_driver=False, configure_logging=False)
        cluster.wait_for_nodes()
        ids = {f"n{number}": node["NodeID"] for number, node in enumerate(ray.nodes()) if node["Resources"].get("CPU")}
        assert len(ids) == 3
        yield ids
    finally:
        ray.shutdown()
        cluster.shutdown()


def topology(names: list[str], *, has_gpus: bool = False) -> Topology:
    cards = (Accelerator("H100", 80 * 10**9),) * 4 if has_gpus else ()
    return Topology(tuple(Node(name, 4, GIB, cards) for name in names))


def start_gangs(placement: Placement, ids: dict[str, str], number: int) -> list[Counter[str]]:
    """How many ranks of each gang Ray puts on which node, with the placement groups that Serve makes of the options."""
    options = placement.deployment_options(ids)
    names = {node_id: name for name, node_id in ids.items()}
    bundles = options.get("placement_group_bundles", [placement.rank.bundle()])
    selectors = options.get("placement_group_bundle_label_selector", [{}])
    groups: list[PlacementGroup] = []
    try:
        for _ in range(number):
            group = placement_group(
                bundles * placement.gang_size,
                strategy=options["gang_scheduling_config"].gang_placement_strategy.value,
                bundle_label_selector=selectors * placement.gang_size,
            )
            groups.append(group)
            ray.get(group.ready(), timeout=60)
        return [
            Counter(names[id_] for id_ in placement_group_table(each)["bundles_to_node_id"].values()) for each in groups
        ]
    finally:
        for group in groups:
            remove_placement_group(group)


def planned(names: list[str], data: int, *, has_gpus: bool = False) -> Placement:
    request = PlanRequest(MIXTURE, Workload(256, 4), tensor=1, data=data)
    reservation = Reservation(1.0, 1024**2, 1.0) if has_gpus else RANK
    return place(plan(topology(names, has_gpus=has_gpus), request), reservation)


def test_gangs_stay_together_and_take_different_nodes_while_there_are_any(nodes: dict[str, str]) -> None:
    gangs = start_gangs(planned(list(nodes), 2, has_gpus=True), nodes, 3)
    assert sorted(gang.total() for gang in gangs) == [2, 2, 2]
    assert {len(gang) for gang in gangs} == {1}
    assert len({name for gang in gangs for name in gang}) == 3


def test_cpu_ranks_go_over_the_nodes_evenly(nodes: dict[str, str]) -> None:
    (gang,) = start_gangs(planned(list(nodes), 2), nodes, 1)
    assert sorted(gang.values()) == [1, 1]


def test_ranks_that_share_two_nodes_get_two_each(nodes: dict[str, str]) -> None:
    two = list(nodes)[:2]
    (gang,) = start_gangs(replace(planned(two, 4), nodes=tuple(two)), nodes, 1)
    assert gang == dict.fromkeys(two, 2)


def test_the_label_of_a_nodes_network_is_read(nodes: dict[str, str]) -> None:
    # One by one: the nodes of this cluster share an address, and nodes are named by theirs.
    read = [topology_from_ray([node]).nodes for node in ray.nodes()]
    assert {node.link_gbit_s for (node,) in read if node.has_accelerators} == {25.0}
