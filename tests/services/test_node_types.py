"""Requests bring replicas, replicas bring nodes: Serve, our policy, real engines, Ray's autoscaler with node types."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from services import ray_adapter
from services.beats import RayBeatStore
from services.demand import DEMAND_PREFIX, ModelDemand, encode_demand
from services.discovery import BEATS_PREFIX, Directory, ReplicaEndpoint
from services.scaling_config import SCALING_POLICY
from tests.elastic_ray import elastic_ray
from tests.product import link_models

pytestmark = [pytest.mark.nodes, pytest.mark.integration, pytest.mark.timeout(600)]

NODE = {"resources": {"CPU": 1, "models": 1}, "node_config": {}, "min_workers": 0, "max_workers": 2}
"""A type of node that holds one replica."""
NUM_SLOTS = 2
LIMIT_S = 120


def application() -> dict[str, Any]:
    return {
        "name": "llm-tiny",
        "route_prefix": None,
        "import_path": "services.app:build_model",
        "args": {"id": "tiny", "parallel_requests": NUM_SLOTS, "threads": 1, "max_context": 512},
        "deployments": [
            {
                "name": "ModelServer",
                "autoscaling_config": {
                    "min_replicas": 0,
                    "max_replicas": 2,
                    "upscale_delay_s": 1,
                    "downscale_delay_s": 1,
                    "policy": {"policy_function": SCALING_POLICY},
                },
                "ray_actor_options": {"num_cpus": 1, "memory": 0, "resources": {"models": 1}},
            }
        ],
    }


class Endpoints:
    """In the place of the public endpoint: announces what waits there, and reads which replicas there are."""

    def __init__(self) -> None:
        self.num_waiting = 0
        self._store = RayBeatStore()
        self._directory = Directory(self._store)
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._announce, daemon=True)
        self._thread.start()

    def replicas(self) -> list[ReplicaEndpoint]:
        self._directory.take(self._store.read_all(BEATS_PREFIX))
        return self._directory.replicas("tiny")

    def stop(self) -> None:
        self._is_over.set()
        self._thread.join()

    def _announce(self) -> None:
        beat = 0
        while not self._is_over.wait(0.5):
            beat += 1
            demand = ModelDemand(num_waiting=self.num_waiting)
            self._store.put(f"{DEMAND_PREFIX}test", encode_demand(beat, {"tiny": demand}))


@pytest.fixture
def endpoints(tmp_path: Path) -> Iterator[Endpoints]:
    link_models(tmp_path)
    variables = {"WINDFARM_HOME": str(tmp_path), "WINDFARM_INTERNAL_SECRET": "s3cret-of-this-start"}
    with elastic_ray({"models": NODE}, variables) as address:
        client = until(lambda: connect(address), "a connection to the head")
        found = Endpoints()
        try:
            config = {"proxy_location": "Disabled", "applications": [application()]}
            ray_adapter.deploy(client, config)
            until(lambda: ray_adapter.serve_details(client)["applications"]["llm-tiny"]["status"] == "RUNNING", "Serve")
            yield found
        except BaseException:
            print(json.dumps(ray_adapter.serve_details(client)["applications"], default=str, indent=1))
            raise
        finally:
            found.stop()
            ray.shutdown()


def connect(address: str) -> Any:
    try:
        return ray_adapter.start_serve(address)
    except ConnectionError:
        return None


def until(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + LIMIT_S
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {LIMIT_S} s; nodes: {ray.nodes()}"
        time.sleep(0.25)
    return value


def num_nodes() -> int:
    return sum(node["Alive"] and "models" in node["Resources"] for node in ray.nodes())


def test_nodes_come_for_requests_and_go_without_them(endpoints: Endpoints) -> None:
    assert (num_nodes(), endpoints.replicas()) == (0, [])
    endpoints.num_waiting = 1
    until(lambda: len(endpoints.replicas()) == 1, "a replica for the first request")
    assert num_nodes() == 1
    (replica,) = endpoints.replicas()
    assert replica.info["max_concurrency"] == NUM_SLOTS
    endpoints.num_waiting = 2 * NUM_SLOTS
    until(lambda: len(endpoints.replicas()) == 2, "a second replica")
    assert num_nodes() == 2
    endpoints.num_waiting = 0
    until(lambda: not endpoints.replicas(), "no replica")
    until(lambda: num_nodes() == 0, "no node")
