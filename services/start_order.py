"""In which order applications are submitted: what can run on the head alone goes first where there are several nodes.

Serve places replicas as their applications are built, and those of models may lie on any node. Once they have filled
the head, the store and the endpoint, which can run nowhere else, would wait for ever.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from services.preflight import FIXED

HEAD_APPLICATIONS = frozenset(app for (app, _), resources in FIXED.items() if resources.is_on_head)


def submissions(config: Mapping[str, Any], num_nodes: int) -> Iterator[dict[str, Any]]:
    """The Serve configs to submit one after the other, each when the one before `is_placed`; the last one is whole."""
    if num_nodes > 1:
        on_head = [app for app in config["applications"] if app["name"] in HEAD_APPLICATIONS]
        yield {**config, "applications": on_head}
    yield dict(config)


def is_placed(submitted: Mapping[str, Any], status: Mapping[str, Any]) -> bool:
    """Whether every replica of these applications has its place, from the status that the conductor tells."""
    names = {app["name"] for app in submitted["applications"]}
    applications = status.get("applications", {})
    known = names <= applications.keys() and all(
        app["deployments"] and all(deployment["replicas"] for deployment in app["deployments"].values())
        for app in (applications[name] for name in names)
    )
    return known and not any(waiting["application"] in names for waiting in status.get("pending", ()))
