"""A real Ray of nodes in two zones, whose Serve is told to place by zones."""

from __future__ import annotations

import inspect
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from services import ray_adapter, zone_scheduler

ZONES = {"a1": (3, "a"), "a2": (1, "a"), "a3": (1, "a"), "b1": (3, "b")}
"""Cores and zone of each node. Ray would spread a gang of two over a1 and b1, which have most room."""
LABEL = "ray.io/availability-zone"
CALLBACK = "RAY_SERVE_CONTROLLER_CALLBACK_IMPORT_PATH"


def test_serve_calls_us_and_its_scheduler_is_as_we_know_it() -> None:
    from ray.serve._private import controller, default_impl
    from ray.serve._private.cluster_node_info_cache import ClusterNodeInfoCache
    from ray.serve._private.common import CreatePlacementGroupRequest
    from ray.serve._private.deployment_scheduler import ReplicaSchedulingRequest

    assert ray_adapter.RAY_VARIABLES[CALLBACK] == zone_scheduler.CALLBACK
    source = inspect.getsource(controller)
    called, made = source.index("call_function_from_import_path("), source.index("self.deployment_state_manager =")
    assert called < made, "before the scheduler is made"
    base = default_impl.DeploymentScheduler
    made_by = inspect.getsource(default_impl.create_deployment_scheduler)
    assert "DeploymentScheduler(" in made_by and "create_placement_group_fn=" in made_by
    assert list(inspect.signature(base.__init__).parameters)[1:] == [
        "cluster_node_info_cache",
        "head_node_id",
        "create_placement_group_fn",
    ]
    ours = zone_scheduler._with_zones(base)
    known, own = (list(inspect.signature(each._schedule_replica).parameters) for each in (base, ours))
    assert known == own
    for name in ("_running_replicas", "_launching_replicas", "_get_available_resources_per_node"):
        assert name in inspect.getsource(base)
    for name in ("get_total_resources_per_node", "get_node_labels", "get_active_node_ids"):
        assert callable(getattr(ClusterNodeInfoCache, name))
    wanted = {"bundles", "strategy", "name", "bundle_label_selector"}
    assert wanted <= CreatePlacementGroupRequest.__annotations__.keys()
    wanted = {"target_node_id", "gang_placement_group", "placement_group_bundles", "actor_options", "actor_resources"}
    assert wanted <= ReplicaSchedulingRequest.__annotations__.keys()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    import ray
    from ray import serve
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patched:
        patched.setenv(CALLBACK, zone_scheduler.CALLBACK)
        patched.setenv("RAY_SERVE_CONTROL_LOOP_INTERVAL_S", "0.25")
        patched.setenv("PYTHONPATH", os.getcwd())
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        try:
            for cores, zone in ZONES.values():
                made.add_node(num_cpus=cores, labels={LABEL: zone})
            ray.init(address=made.address, log_to_driver=False, configure_logging=False)
            made.wait_for_nodes()
            serve.start(http_options={"location": "NoServer"})
            yield made
        finally:
            serve.shutdown()
            ray.shutdown()
            made.shutdown()


def zones() -> dict[str, str]:
    """By Ray's id of the node."""
    import ray

    return {node["NodeID"]: node["Labels"].get(LABEL, "head") for node in ray.nodes()}


def gangs() -> list[str]:
    """For each gang the zones of its ranks, such as "aa"; "" for one that waits."""
    from ray.util.placement_group import placement_group_table

    zone_of = zones()
    return sorted(
        "".join(sorted(zone_of[node] for node in group["bundles_to_node_id"].values()))
        if group["state"] == "CREATED"
        else ""
        for group in placement_group_table().values()
        if group["name"].startswith("SERVE_GANG::") and group["state"] != "REMOVED"
    )


def nodes_of(application: str) -> list[str]:
    """The node of each replica that runs."""
    from ray.serve.context import _get_global_client

    deployed = _get_global_client().get_serve_details()["applications"].get(application, {"deployments": {}})
    return [
        replica["node_id"]
        for deployment in deployed["deployments"].values()
        for replica in deployment["replicas"]
        if replica["state"] == "RUNNING"
    ]


def deploy(name: str, num_replicas: int, gang_size: int = 1, **more: Any) -> None:
    from ray import serve
    from ray.serve.config import GangSchedulingConfig

    class Model:
        pass

    options: dict[str, Any] = {"num_replicas": num_replicas, "ray_actor_options": {"num_cpus": 1}, **more}
    if gang_size > 1:
        options["gang_scheduling_config"] = GangSchedulingConfig(gang_size=gang_size, gang_placement_strategy="SPREAD")
    app = serve.deployment(name="Model", **options)(Model).bind()
    serve.run_many([serve.RunTarget(app, name=name, route_prefix=None)], wait_for_applications_running=False)


def until(condition: Callable[[], bool]) -> None:
    """Starting a replica takes seconds on a busy machine."""
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def fits_across_zones() -> bool:
    """Whether Ray has room for two ranks if it may mix zones."""
    from ray.util.placement_group import placement_group, remove_placement_group

    group = placement_group([{"CPU": 1}] * 2, strategy="SPREAD")
    try:
        return bool(group.wait(30))
    finally:
        remove_placement_group(group)


@pytest.mark.integration
def test_replicas_go_to_different_zones(cluster: Any) -> None:
    from ray import serve

    deploy("dense", 2, max_replicas_per_node=1)
    until(lambda: len(nodes_of("dense")) == 2)
    assert {zones()[node] for node in nodes_of("dense")} == {"a", "b"}
    serve.delete("dense")


@pytest.mark.integration
def test_gangs_stay_in_one_zone_each_take_different_ones_and_wait_for_one_with_room(cluster: Any) -> None:
    from ray import serve

    deploy("gangs", 8, gang_size=2)
    until(lambda: len(nodes_of("gangs")) == 6 and len(gangs()) == 4)
    assert fits_across_zones(), "a core is left in each zone"
    assert gangs() == ["", "aa", "aa", "bb"]
    cluster.add_node(num_cpus=1, labels={LABEL: "a"})
    until(lambda: len(nodes_of("gangs")) == 8)
    assert gangs() == ["aa", "aa", "aa", "bb"]
    serve.delete("gangs")
