"""Ray Serve's scheduler with zones: which node a replica is started on, and which zone a gang, where there are several.

Serve knows no zones: it spreads replicas over nodes, and gives a gang the nodes with most room. Its controller calls
`install` when it starts (`CALLBACK` names it), which puts a scheduler in place that chooses by the planner's rules and
leaves all else to Serve's own. In a cluster of one zone nothing is different. A choice is given up where somebody else
was faster; what finds no room now waits as it does in Serve, a gang for a zone that holds all of it.

This file knows private parts of Ray; a contract test holds it to the pinned version.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cluster.zones import (
    NODE_ID_LABEL,
    Amounts,
    LiveNode,
    how_often,
    node_for_replica,
    nodes_of_selector,
    num_zones,
    selector_of_nodes,
    zone_label,
    zones_for_gang,
)
from services.environment import has_elastic_nodes

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup

CALLBACK = "services.zone_scheduler.install"
_PATIENCE_S = 2.0
"""How long Ray may take to reserve a gang where there is room for it; it takes milliseconds."""

_log = logging.getLogger("ray.serve")


def install() -> None:
    """Have this process, Serve's controller, place by zones. Called before it makes its scheduler."""
    from ray.serve._private import default_impl

    default_impl.DeploymentScheduler = _with_zones(default_impl.DeploymentScheduler)


def _with_zones(base: Any) -> Any:
    """A class, made here because Serve may be imported only once its variables are set."""
    from ray.serve._private.common import GANG_PG_NAME_PREFIX

    class ZoneScheduler(base):  # type: ignore[misc]  # a private class of Serve
        def __init__(self, cluster_node_info_cache: Any, head_node_id: str, create_placement_group_fn: Any) -> None:
            self._reserve_as_serve_does = create_placement_group_fn
            super().__init__(cluster_node_info_cache, head_node_id, create_placement_group_fn=self._reserve)

        def _schedule_replica(
            self,
            scheduling_request: Any,
            default_scheduling_strategy: str,
            target_node_id: str | None = None,
            target_labels: Any = None,
        ) -> bool:
            is_free = (
                target_node_id is None
                and target_labels is None
                and scheduling_request.target_node_id is None
                and scheduling_request.gang_placement_group is None
                and scheduling_request.placement_group_bundles is None
                and not scheduling_request.actor_options.get("label_selector")
            )
            if is_free:
                target_node_id = self._node_for(scheduling_request)
            return bool(
                super()._schedule_replica(
                    scheduling_request, default_scheduling_strategy, target_node_id, target_labels
                )
            )

        def _node_for(self, request: Any) -> str | None:
            """None leaves it to Serve: one zone, or no room now."""
            needs = request.actor_resources  # without what Serve adds for `max_replicas_per_node`
            nodes = self._nodes_for(needs, self._get_available_resources_per_node())
            if num_zones(nodes) < 2:
                return None
            copies, load = Counter[str](), Counter[str]()
            for deployment, node_ids in self._nodes_of_replicas():
                load.update(node_ids)
                if deployment == request.replica_id.deployment_id:
                    copies.update(node_ids)
            return node_for_replica(nodes, needs, copies, load)

        def _nodes_of_replicas(self) -> list[tuple[Any, list[str]]]:
            """By deployment, also those that start on a node that was chosen for them."""
            running = [(deployment, list(replicas.values())) for deployment, replicas in self._running_replicas.items()]
            launching = [
                (deployment, [info.target_node_id for info in replicas.values() if info.target_node_id])
                for deployment, replicas in self._launching_replicas.items()
            ]
            return running + launching

        def _nodes_for(self, needs: Amounts, free: Mapping[str, Amounts]) -> list[LiveNode]:
            """Those that could hold it if they were empty, so a head without GPUs or cores is no further zone."""
            cache = self._cluster_node_info_cache
            total = cache.get_total_resources_per_node()
            return [
                LiveNode(node, cache.get_node_labels(node), free.get(node, {}), total[node])
                for node in sorted(cache.get_active_node_ids())
                if node in total and how_often(total[node], needs)
            ]

        def _reserve(self, request: Any) -> PlacementGroup:
            """A placement group: for a gang in one zone where one holds it, others as Serve makes them."""
            from ray._private.state import available_resources_per_node

            rank, *others = request.bundles
            is_gang = request.name.startswith(GANG_PG_NAME_PREFIX) and all(other == rank for other in others)
            # Asked anew for each gang: the cache is as old as this round of the controller.
            nodes = self._nodes_for(rank, available_resources_per_node()) if is_gang else []
            if selectors := request.bundle_label_selector:
                pinned = nodes_of_selector(selectors[0]) if all(each == selectors[0] for each in selectors) else None
                nodes = [node for node in nodes if pinned and node.id in pinned]
            if num_zones(nodes) < 2:
                return self._reserve_as_serve_does(request)
            return self._reserve_in_one_zone(request, nodes, rank)

        def _reserve_in_one_zone(self, request: Any, nodes: list[LiveNode], rank: Amounts) -> PlacementGroup:
            size = len(request.bundles)
            for node_ids in zones_for_gang(nodes, rank, size, _ranks_of_other_gangs(request.name)):
                selectors = [selector_of_nodes(node_ids)] * size
                group = self._reserve_as_serve_does(replace(request, bundle_label_selector=selectors))
                if group.wait(_PATIENCE_S):
                    return group
                _log.info("%s found no room on %s after all.", request.name, ", ".join(node_ids))
                _remove(group)
            # A gang that waits brings new nodes, which only a plain one is sure to do.
            label = None if has_elastic_nodes() else zone_label(nodes, rank, size)
            return _wait_for_a_zone(request, label) if label else self._reserve_as_serve_does(request)

    return ZoneScheduler


def _ranks_of_other_gangs(name: str) -> Counter[str]:
    """By node, the ranks of the gangs that are placed for the deployment which the gang `name` is of."""
    from ray.util.placement_group import placement_group_table

    deployment = name.rsplit("_", 2)[0] + "_"  # then come the gang's number and its own id
    found = Counter[str]()
    for group in placement_group_table().values():
        if group["name"].rsplit("_", 2)[0] + "_" == deployment and group["state"] == "CREATED":
            found.update(group["bundles_to_node_id"].values())
    return found


def _wait_for_a_zone(request: Any, label: str) -> PlacementGroup:
    """Reserved when a zone has room for the whole gang; Ray chooses which, and does not mix them meanwhile."""
    import ray

    return ray.util.placement_group(
        request.bundles,
        name=request.name,
        lifetime="detached",
        bundle_label_selector=request.bundle_label_selector,
        topology_strategy={NODE_ID_LABEL: request.strategy, label: "STRICT_PACK"},
    )


def _remove(group: PlacementGroup) -> None:
    from ray.util.placement_group import remove_placement_group

    remove_placement_group(group)
