"""What is private of Ray and needed to run a Ray of our own; contract tests hold it to the pinned version.

Five more files know private parts of Ray: the key-value store (`services/beats.py`), Serve's scheduler
(`services/zone_scheduler.py`), and names of its modules and scripts (`services/fork_server.py`,
`services/ray_worker.py`, `services/startup/sitecustomize.py`).

A head started here opens no dashboard, no client server and no metrics port: the conductor is the only driver, and
statistics come from the public endpoint. With a node address of 127.0.0.1 all that is left listens on loopback and
demands Ray's token.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from services import ray_worker

if TYPE_CHECKING:
    from ray._private.node import Node

SUPPORTED_RAY = "2.60.0"

RAY_VARIABLES: Mapping[str, str] = {
    "RAY_AUTH_MODE": "token",
    # Otherwise Ray replaces 127.0.0.1 by the machine's outer address, in the head as well as in drivers.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray would run replicas at niceness 15: any other program of the machine would slow every answer.
    "RAY_worker_niceness": "0",
    "RAY_DEDUP_LOGS": "0",
    # Off unless the caller's shell says otherwise: both open ports of Serve on all interfaces.
    "RAY_SERVE_ENABLE_HA_PROXY": "0",
    "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0",
    "RAY_SERVE_ENABLE_TASK_EVENTS": "0",
    # Its controller looks ten times a second otherwise, and takes 6 % of a core from the models for that.
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.25",
    # Its controller calls this when it starts; it has Serve place by zones.
    "RAY_SERVE_CONTROLLER_CALLBACK_IMPORT_PATH": "services.zone_scheduler.install",
    "RAY_TASK_EVENTS_REPORT_INTERVAL_MS": "0",
    "RAY_task_events_report_interval_ms": "0",
}
"""Set for every process before Ray is imported."""

SYSTEM_CONFIG: Mapping[str, Any] = {
    "enable_metrics_collection": False,
    # Workers that a raylet starts before it knows a job cannot be forks, and each would import Ray for itself.
    "prestart_worker_first_driver": False,
}


@dataclass(frozen=True, slots=True)
class NodeOptions:
    """How to start one of Ray's nodes. `memory_bytes` is what replicas may ask for, beside the object store; `labels`
    are added to those that Ray finds by itself."""

    node_ip: str
    temp_folder: str
    num_cpus: int
    num_gpus: int | None
    memory_bytes: int
    object_store_bytes: int
    labels: Mapping[str, str] = field(default_factory=dict)


def start_head(options: NodeOptions) -> Node:
    """Start GCS and raylet as children that end with this process; returns when both answer."""
    from ray._private.node import Node

    class HeadNode(Node):
        def start_api_server(self, *, include_dashboard: bool | None, raise_on_failure: bool) -> None:
            self._webui_url = ""

    parameters = _parameters(options, gcs_server_port=0, _system_config=dict(SYSTEM_CONFIG))
    return HeadNode(parameters, head=True, shutdown_at_exit=True, spawn_reaper=True)


def start_node(options: NodeOptions, head: str) -> Node:
    """Start a raylet that joins the head at `host:port`, as a child that ends with this process."""
    from ray._private.node import Node

    return Node(_parameters(options, gcs_address=head), head=False, shutdown_at_exit=True, spawn_reaper=True)


def _parameters(options: NodeOptions, **others: Any) -> Any:
    from ray._private.parameter import RayParams
    from ray._private import utils  # isort: skip  # cannot be the first to be imported

    # Ray's own switch for an agent without HTTP, gRPC and metrics ports is that its packages are missing.
    utils.get_dashboard_dependency_error = lambda: "not wanted"
    return RayParams(
        setup_worker_path=ray_worker.__file__,
        node_ip_address=options.node_ip,
        node_name=options.node_ip,
        include_dashboard=False,
        include_log_monitor=False,
        no_monitor=True,
        num_cpus=options.num_cpus,
        num_gpus=options.num_gpus,
        memory=options.memory_bytes,
        object_store_memory=options.object_store_bytes,
        temp_dir=options.temp_folder,
        labels=dict(options.labels),
        **others,
    )


def dead_processes(node: Node) -> list[str]:
    """Names of processes of the head that have ended."""
    return [str(name) for name, _ in node.dead_processes()]


def stop_head(node: Node) -> None:
    node.kill_all_processes(check_alive=False, allow_graceful=True)


def import_serve() -> None:
    """Importing Serve takes a second or two: done while Ray's head starts."""
    importlib.import_module("ray.serve.schema")
    importlib.import_module("ray.serve._private.api")


def start_serve(address: str) -> Any:
    """Connect to Ray as its driver and start Serve without a proxy; returns Serve's client."""
    import ray
    from ray.serve._private.api import serve_start

    ray.init(address=address, namespace="serve", log_to_driver=False, logging_level="warning")
    return serve_start(http_options={"location": "NoServer"})


def deploy(client: Any, config: Mapping[str, Any]) -> None:
    """Make the running applications those of a Serve config; returns at once."""
    from ray.serve.schema import ServeDeploySchema

    client.deploy_apps(ServeDeploySchema.model_validate(config))


def connected_client() -> Any:
    """Serve's client in a process that is connected to Ray, as replicas are."""
    from ray.serve.context import _get_global_client

    return _get_global_client()


def serve_details(client: Any) -> dict[str, Any]:
    """Applications, deployments and replicas as Serve's schema `ServeInstanceDetails` has them."""
    details: dict[str, Any] = client.get_serve_details()
    return details


def close_replica_ports() -> None:
    """Keep this replica from opening Serve's port for direct calls between deployments.

    That port listens on all interfaces, asks for no token and unpickles what it gets. Calls between our deployments
    take Ray's own authenticated way, so nothing needs it. To be called in the constructor of each deployment.
    """
    from ray.serve._private import replica

    replica.add_port_to_grpc_server = lambda server, address: 0


def hide_foreign_gpus() -> None:
    """Hide the node's GPUs from this replica where it asked for none, since Ray leaves them all visible then.

    Libraries would take a card that Ray counts as free, or as another replica's.
    """
    import ray

    if not ray.get_runtime_context().get_accelerator_ids().get("GPU"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
