"""Puts the objects of a windfarm on Kubernetes together and writes them as one YAML file for `kubectl apply`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from cluster.plan import Plan
from cluster.sizing import Workload
from cluster.topology import Topology
from services.kuberay import surroundings
from services.kuberay.deployment import deployment_of
from services.kuberay.ray_service import ray_service


def emit(topology: Topology, plan: Plan, work: Workload, command: str) -> str:
    """The manifests as text; the first line names the `command` that wrote them. Raises `PlanError`."""
    documents = [yaml.dump(item, Dumper=_Dumper, sort_keys=False, width=120) for item in objects(topology, plan, work)]
    return f"# Written by: {command}\n" + "---\n".join(["", *documents]).lstrip("\n")


def objects(topology: Topology, plan: Plan, work: Workload) -> Sequence[dict[str, Any]]:
    """All objects in the order in which they can be made."""
    deployment = deployment_of(topology, plan, work)
    return [
        surroundings.namespace(),
        surroundings.environment(),
        *surroundings.claims(deployment),
        *surroundings.network_policies(),
        *surroundings.disruption_budgets(deployment),
        surroundings.public_service(),
        ray_service(deployment),
    ]


class _Dumper(yaml.SafeDumper):
    """Lists indented below their key, text of several lines as a block, no anchors."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)
