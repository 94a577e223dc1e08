"""A Ray whose nodes come and go by demand, on this machine: Ray's autoscaler (version 2) with its own fake provider.

Ray's `AutoscalingCluster` does the same, but its template is not among the installed files, and it begins and ends with
`ray stop --force`, which ends every Ray of the machine. This one ends what it started and nothing else.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID, FAKE_HEAD_NODE_TYPE

from services.ray_adapter import RAY_VARIABLES
from tests.product import ROOT, free_port

IDLE_MINUTES = 0.1
"""After this time without work a node is taken away."""
_PATIENCE_S = 15


@contextmanager
def elastic_ray(node_types: Mapping[str, Mapping[str, Any]], variables: Mapping[str, str]) -> Iterator[str]:
    """Address of a head on which the autoscaler knows these types of nodes. `variables` reach all of its processes."""
    with tempfile.TemporaryDirectory(prefix="wf-") as folder:  # short: Ray opens sockets below it
        config = Path(folder, "autoscaling.json")
        config.write_text(json.dumps(_autoscaling(node_types)), encoding="utf-8")
        port = free_port()
        command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--disable-usage-stats"]
        command += [f"--autoscaling-config={config}", f"--port={port}", "--node-ip-address=127.0.0.1", "--num-cpus=2"]
        command += [f"--temp-dir={folder}/ray", "--include-dashboard=false", "--object-store-memory=100000000"]
        command += [f"--ray-client-server-port={free_port()}", "--dashboard-agent-listen-port=0"]
        log = Path(folder, "head.log")
        with log.open("w") as output:
            head = subprocess.Popen(command, env=_environment(variables), stdout=output, stderr=subprocess.STDOUT)
        try:
            yield f"127.0.0.1:{port}"
        except BaseException:
            sys.stderr.write(log.read_text() + _monitor_log(Path(folder, "ray")))
            raise
        finally:
            _end(head)


def _autoscaling(node_types: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    head = {"resources": {"CPU": 2}, "node_config": {}, "max_workers": 0}
    return {
        "cluster_name": "elastic",
        "max_workers": 8,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": IDLE_MINUTES,
        "provider": {
            "type": "fake_multinode",
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "launch_multiple": True,
            "head_node_id": FAKE_HEAD_NODE_ID,
        },
        "available_node_types": {**node_types, FAKE_HEAD_NODE_TYPE: head},
        "head_node_type": FAKE_HEAD_NODE_TYPE,
    }


def _environment(variables: Mapping[str, str]) -> dict[str, str]:
    return {
        **os.environ,
        **{name: value for name, value in RAY_VARIABLES.items() if name != "RAY_AUTH_MODE"},
        "PYTHONPATH": str(ROOT),
        "RAY_FAKE_CLUSTER": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
        **variables,
    }


def _monitor_log(folder: Path) -> str:
    return "".join(path.read_text(errors="replace")[-3000:] for path in folder.rglob("monitor*.*"))


def _end(head: "subprocess.Popen[bytes]") -> None:
    """The head, its nodes and their workers."""
    children = psutil.Process(head.pid).children(recursive=True) if head.poll() is None else []
    head.terminate()
    try:
        head.wait(_PATIENCE_S)
    except subprocess.TimeoutExpired:
        head.kill()
        head.wait()
    for process in psutil.wait_procs(children, timeout=3)[1]:
        if process.is_running():  # the same process, not another one with its number
            process.kill()
    psutil.wait_procs(children, timeout=5)
