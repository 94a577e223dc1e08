"""`windfarm status` as tables for a person."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from services.cli.output import say
from services.cli.tuning import error_text
from services.resources import GIB
from services.setup_errors import ConfigError


def render(status: Mapping[str, Any]) -> None:
    console = Console()
    ready = "[green]ready[/]" if status["is_ready"] else "[yellow]not ready yet[/]"
    console.print(f"{status['api']}  {ready}")
    if status["phase"] != "ready":
        console.print(f"  {status['phase']}")
        return
    console.print(_applications(status["applications"]))
    if len(codes := _codes(status["applications"])) > 1:
        shown = "; ".join(f"{code} {', '.join(names)}" for code, names in codes.items())
        console.print(f"code: {shown}. `windfarm apply` brings one code to all.", highlight=False)
    if gangs := status.get("gangs"):
        console.print(_gangs(gangs))
        for app, value in gangs.items():
            for restart in value["restarts"]:
                console.print(f"{app}: {_restart(restart)}", highlight=False)
    console.print(_nodes(status["nodes"], status["free"]))
    if collections := status.get("collections"):
        console.print(_collections(collections))
    for item in status["pending"]:
        console.print(f"pending: {item['application']}/{item['deployment']} ({item['replicas']}): {item['reason']}")


def _codes(applications: Mapping[str, Any]) -> dict[str, list[str]]:
    """Names of applications by the version of their code."""
    codes: dict[str, list[str]] = {}
    for name, app in applications.items():
        if "code" in app:
            codes.setdefault(app["code"], []).append(name)
    return codes


def collections_of(home: Path | None) -> list[dict[str, Any]]:
    """What the endpoint knows of them; none where nobody can be asked: what runs is to be shown all the same."""
    from services.api_client import ApiFailed
    from services.cli.client import open_client

    try:
        with open_client(home, None, None) as client:
            return client.collections()
    except (ApiFailed, ConfigError) as error:
        say(f"Note: collections are not shown: {error}")
        return []


def _collections(collections: list[Mapping[str, Any]]) -> Table:
    table = Table("collection", "documents", "passages", "refusals", box=None)
    for item in collections:
        tuning = item.get("tuning")
        refusals = f"threshold {tuning['evidence_threshold']:.3f}: {error_text(tuning)}" if tuning else "not tuned"
        table.add_row(item["name"], str(item["num_documents"]), str(item["num_chunks"]), refusals)
    return table


def _applications(applications: Mapping[str, Any]) -> Table:
    table = Table("application", "deployment", "state", "replicas", "process", box=None)
    for name, app in applications.items():
        for deployment_name, deployment in app["deployments"].items():
            replicas = deployment["replicas"]
            running = sum(replica["state"] == "RUNNING" for replica in replicas)
            pids = " ".join(str(replica["pid"]) for replica in replicas if replica["pid"])
            state = deployment["status"].lower()
            table.add_row(name, deployment_name, state, f"{running}/{deployment['target_replicas']}", pids)
        if app["message"]:
            table.add_row("", app["message"].strip().splitlines()[-1])
    return table


def _gangs(gangs: Mapping[str, Any]) -> Table:
    """One line per rank."""
    table = Table("application", "gang", "state", "rank", "node", "process", "running", box=None)
    for app, value in gangs.items():
        for gang, facts in value["gangs"].items():
            state = "serves" if facts["is_complete"] else f"{len(facts['ranks'])} of {facts['size']} ranks"
            for rank in facts["ranks"]:
                row = (str(rank["rank"]), rank["node"], str(rank["pid"]), str(rank["running"]))
                table.add_row(app, gang, state, *row)
    return table


def _restart(restart: Mapping[str, Any]) -> str:
    at = time.strftime("%H:%M:%S", time.localtime(restart["lost_at"]))
    return (
        f"gang {restart['lost_gang']} lost rank {restart['rank']} at {at} ({restart['reason']}); "
        f"{restart['gang']} served in its place {restart['seconds']:.1f} s later"
    )


def _nodes(nodes: list[Mapping[str, Any]], free: Mapping[str, float]) -> Table:
    table = Table("node", "state", "CPU", "GPU", "memory", box=None)
    for node in nodes:
        state = "alive" if node["alive"] else "dead"
        table.add_row(node["address"], state, f"{node['CPU']:g}", f"{node['GPU']:g}", f"{node['memory'] / GIB:.1f} GiB")
    table.add_row("free", "", f"{free['CPU']:g}", f"{free['GPU']:g}", f"{free['memory'] / GIB:.1f} GiB")
    return table
