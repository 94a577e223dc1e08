"""Contract with the pinned Ray: every private name that the adapter touches is there and means what we think."""

import inspect
import os
from types import SimpleNamespace

import pytest
import ray
from ray._private import ray_constants, utils
from ray._private.node import Node
from ray._private.parameter import RayParams
from ray.serve._private import replica
from ray.serve._private.api import serve_start
from ray.serve._private.client import ServeControllerClient

from services import ray_adapter


def test_ray_is_the_version_that_the_adapter_was_written_for() -> None:
    assert ray.__version__ == ray_adapter.SUPPORTED_RAY


def test_a_node_takes_the_options_that_the_adapter_gives() -> None:
    wanted = {"head", "shutdown_at_exit", "spawn_reaper"}
    assert wanted <= set(inspect.signature(Node.__init__).parameters)
    wanted = {"gcs_server_port", "include_log_monitor", "no_monitor", "_system_config", "object_store_memory", "labels"}
    assert wanted <= set(inspect.signature(RayParams.__init__).parameters)
    assert {"include_dashboard", "raise_on_failure"} <= set(inspect.signature(Node.start_api_server).parameters)
    assert {"check_alive", "allow_graceful"} <= set(inspect.signature(Node.kill_all_processes).parameters)
    assert callable(Node.dead_processes)


def test_the_agent_goes_without_ports_where_its_packages_are_missing() -> None:
    """The raylet's command is built with `--minimal` exactly when this function names a missing package."""
    from ray._private import services

    assert "get_dashboard_dependency_error()" in inspect.getsource(services.start_raylet)
    assert callable(utils.get_dashboard_dependency_error)


def test_loopback_stays_loopback_where_clusters_are_off() -> None:
    assert ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR in ray_adapter.RAY_VARIABLES


def test_replicas_open_their_port_through_the_name_that_is_replaced() -> None:
    source = inspect.getsource(replica)
    assert 'add_port_to_grpc_server(self._server, "[::]:0")' in source
    assert callable(replica.add_port_to_grpc_server)


def test_serves_own_ways_in_stay_closed_whatever_the_callers_shell_says() -> None:
    """Serve's front proxy and its direct ingress would listen on all interfaces."""
    from ray.serve._private import constants

    source = inspect.getsource(constants)
    for name in ("RAY_SERVE_ENABLE_HA_PROXY", "RAY_SERVE_ENABLE_DIRECT_INGRESS"):
        assert f'os.environ.get("{name}", "0") == "1"' in source
        assert ray_adapter.RAY_VARIABLES[name] == "0"


def test_serve_can_be_started_and_asked() -> None:
    assert "http_options" in inspect.signature(serve_start).parameters
    for name in ("deploy_apps", "get_serve_details", "shutdown"):
        assert callable(getattr(ServeControllerClient, name))


@pytest.mark.parametrize(("given", "visible"), [([], ""), (["1"], "1")])
def test_a_replica_sees_no_gpu_that_it_did_not_ask_for(
    given: list[str], visible: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray names the cards of a replica that asked for some, and hides none from one that did not."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    context = SimpleNamespace(get_accelerator_ids=lambda: {"GPU": given, "TPU": []})
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    ray_adapter.hide_foreign_gpus()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == visible
