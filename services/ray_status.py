"""Turns what Serve and Ray know into the few facts that people ask for: what runs where, what waits and why.

Pure functions on plain dictionaries (Serve's `ServeInstanceDetails`, `ray.nodes()`, `ray.available_resources()`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from services.resources import HEAD_MARK

WAITING_STATES = ("STARTING", "PENDING_ALLOCATION")
COUNTED = (("num_cpus", "CPU"), ("num_gpus", "GPU"), ("memory", "memory"))


def summarize(
    details: Mapping[str, Any], nodes: Sequence[Mapping[str, Any]], free: Mapping[str, float]
) -> dict[str, Any]:
    """The answer of `windfarm status`: applications, nodes, and what is pending."""
    applications = {name: _application(value) for name, value in details.get("applications", {}).items()}
    return {
        "applications": applications,
        "nodes": [_node(node) for node in nodes],
        "free": {"CPU": free.get("CPU", 0.0), "GPU": free.get("GPU", 0.0), "memory": free.get("memory", 0.0)},
        "pending": list(_pending(details.get("applications", {}), free)),
    }


def count_running(details: Mapping[str, Any], application: str, deployment: str) -> int:
    """Replicas that serve; 0 where there is no such deployment."""
    deployments = details.get("applications", {}).get(application, {}).get("deployments", {})
    replicas = deployments.get(deployment, {}).get("replicas", [])
    return sum(_text(replica.get("state")) == "RUNNING" for replica in replicas)


def _application(value: Mapping[str, Any]) -> dict[str, Any]:
    deployments = value.get("deployments", {})
    return {
        "status": _text(value.get("status")),
        "message": _message(value, deployments),
        "deployments": {name: _deployment(item) for name, item in deployments.items()},
    }


def _message(app: Mapping[str, Any], deployments: Mapping[str, Any]) -> str:
    """What Serve says of the application and of its deployments that are not healthy: the reason stands there."""
    troubled = [item for item in deployments.values() if _text(item.get("status")) != "HEALTHY"]
    messages = [app.get("message"), *(item.get("message") for item in troubled)]
    return "\n".join(dict.fromkeys(message.strip() for message in messages if message))


def _deployment(value: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "status": _text(value.get("status")),
        "message": value.get("message", ""),
        "target_replicas": value.get("target_num_replicas"),
        "replicas": [
            {
                "id": replica.get("replica_id"),
                "state": _text(replica.get("state")),
                "pid": replica.get("pid"),
                "node": replica.get("node_ip"),
                "started": replica.get("start_time_s"),
            }
            for replica in value.get("replicas", [])
        ],
    }


def _node(node: Mapping[str, Any]) -> dict[str, Any]:
    total = node.get("Resources", {})
    return {
        "id": node.get("NodeID"),
        "address": node.get("NodeManagerAddress"),
        "name": node.get("NodeName"),
        "labels": dict(node.get("Labels", {})),
        "alive": node.get("Alive"),
        "is_head": HEAD_MARK in total,
        "CPU": total.get("CPU", 0.0),
        "GPU": total.get("GPU", 0.0),
        "memory": total.get("memory", 0.0),
    }


def _pending(applications: Mapping[str, Any], free: Mapping[str, float]) -> Iterator[dict[str, Any]]:
    for app_name, app in applications.items():
        for name, deployment in app.get("deployments", {}).items():
            waiting = [replica for replica in deployment.get("replicas", []) if _is_waiting(replica)]
            if waiting:
                options = (deployment.get("deployment_config") or {}).get("ray_actor_options") or {}
                yield {
                    "application": app_name,
                    "deployment": name,
                    "replicas": len(waiting),
                    "reason": explain_wait(options, free),
                }


def _is_waiting(replica: Mapping[str, Any]) -> bool:
    return _text(replica.get("state")) in WAITING_STATES and not replica.get("pid")


def explain_wait(options: Mapping[str, Any], free: Mapping[str, float]) -> str:
    """Why a replica with these resources is not placed: the first resource that is short, or that it is on its way."""
    for option, resource in COUNTED:
        needed, left = options.get(option) or 0.0, free.get(resource, 0.0)
        if needed > left + 1e-6:
            return (
                f"needs {_amount(resource, needed)}, only {_amount(resource, left)} free: "
                "give it less in ray_config.yaml, or stop or shrink another application"
            )
    return "its process is being started"


def _amount(resource: str, value: float) -> str:
    if resource == "memory":
        return f"{value / 2**30:.1f} GiB memory"
    return f"{value:g} {resource}"


def _text(value: Any) -> str:
    return str(getattr(value, "value", value))
