"""What runs where in a product of several nodes, as its status says."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from services import supervisor
from services.control import read_state
from services.processes import Process, descendants, tagged
from tests.e2e.story_client import WAIT_S
from tests.e2e.test_closed import title
from tests.product import Product

_tags: dict[int, str] = {}


def tag_of(product: Product) -> str:
    """Remembered: the file that says it goes with the product."""
    state = read_state(product.home / "run")
    if state is not None:
        _tags[product.port] = state.instance
    return _tags[product.port]


def status_of(product: Product) -> dict[str, Any]:
    """What `windfarm status --json` prints, without a new process for each look: those would take a core."""
    tag_of(product)
    return supervisor.status(product.home)


def wait_for(product: Product, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    deadline = time.monotonic() + WAIT_S
    while not condition(status := status_of(product)):
        assert time.monotonic() < deadline, f"It did not happen within {WAIT_S} s: {json.dumps(status, indent=1)}"
        time.sleep(0.5)
    return status


def gangs_of(status: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = status["gangs"].get("llm-mixture", {"gangs": {}})["gangs"]
    return {name: gang for name, gang in found.items() if gang["is_complete"]}


def num_whole(status: dict[str, Any]) -> int:
    return len(gangs_of(status))


def replicas_of(status: dict[str, Any], application: str) -> list[dict[str, Any]]:
    """Of a model, whatever their state."""
    deployments = status["applications"].get(application, {"deployments": {}})["deployments"]
    found: list[dict[str, Any]] = deployments.get("ModelServer", {"replicas": []})["replicas"]
    return found


def num_running(status: dict[str, Any], application: str) -> int:
    return sum(replica["state"] == "RUNNING" for replica in replicas_of(status, application))


def process_of_node(product: Product, address: str) -> Process:
    """The process that has started the node's raylet and ends with it."""
    found = [p for p in tagged(tag_of(product)) if "services.local_node" in title(p) and address in title(p)]
    # Its fork server has the same title.
    (process,) = {*found} - {below for process in found for below in descendants(process.pid)}
    return process
