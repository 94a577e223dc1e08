"""The process that owns windfarm's Ray: starts its head, is its only driver, and takes commands from the CLI.

It ends when it is told to, when its guardian dies, or when a process of Ray's head ends; the head's processes end with
it. What remains after that (workers, engines) is the guardian's to end.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from services import ray_adapter
from services.beats import RayBeatStore
from services.code_change import code_of
from services.code_servers import CodeServers
from services.control import ControlServer
from services.environment import INTERNAL_HOST_VARIABLE, PORTS_VARIABLE
from services.fork_server import start_fork_server
from services.gang_tracker import GangTracker
from services.guardian import GUARDIAN_VARIABLE
from services.local_network import Seat
from services.local_node import STARTED, LocalNode
from services.processes import end_with_parent
from services.public_port import PortLender
from services.ray_status import summarize
from services.ray_worker import CODE_VARIABLE, SOCKET_VARIABLE

CHECK_EVERY_S = 0.25
SERVE_STOP_S = 7.0

_log = logging.getLogger("windfarm.conductor")


class Conductor:
    """State of this process: which phase of the start it is in, then Serve's client."""

    def __init__(self, options: ray_adapter.NodeOptions, local_nodes: Sequence[LocalNode] = ()) -> None:
        self._options = options
        self._local_nodes = local_nodes
        self._node_processes: dict[str, subprocess.Popen[str]] = {}
        self._phase = "starting Ray"
        self._client: Any = None
        self._address: str | None = None
        self._lock = threading.Lock()
        self._code_servers = CodeServers()
        self._gangs = GangTracker(RayBeatStore())
        self._gang_watch: threading.Thread | None = None
        self._applied: dict[str, Any] = {"applications": []}
        self.should_end = threading.Event()

    def handle(self, request: dict[str, Any]) -> dict[str, Any]:
        """One command of the control socket."""
        match request.get("do"):
            case "status":
                return self._status()
            case "apply":
                return self._apply(request["config"])
            case "applied":
                return {"config": self._applied}
            case other:
                raise ValueError(f"unknown command {other!r}")

    def run(self) -> int:
        """Start everything, then watch it; returns the exit code."""
        preload = threading.Thread(target=ray_adapter.import_serve, name="preload", daemon=True)
        preload.start()
        # In the main thread: the kernel ends the head's processes with the thread that started them.
        node = ray_adapter.start_head(self._options)
        for local in self._local_nodes:
            self._phase = f"starting the node {local.seat.address}"
            self._node_processes[local.seat.address] = _start_local_node(local, node.address)
        preload.join()
        self._phase, self._address = "starting Serve", node.address
        self._client = ray_adapter.start_serve(node.address)
        self.end_on_signals()  # again: Ray put its own handlers in their place
        self._phase = "ready"
        while not self.should_end.wait(CHECK_EVERY_S):
            if dead := ray_adapter.dead_processes(node):
                _log.error("Ray's %s ended unexpectedly", ", ".join(dead))
                os._exit(3)  # nothing of Ray answers any more, an orderly end would only hang
            self._note_lost_nodes()
            self._code_servers.tend()
        self._code_servers.close()
        self._stop_serve()
        for process in self._node_processes.values():
            process.terminate()
        ray_adapter.stop_head(node)
        return 0

    def _note_lost_nodes(self) -> None:
        """A node that ends takes only its replicas with it; Serve starts them elsewhere where there is room."""
        for address, process in list(self._node_processes.items()):
            if process.poll() is not None:
                _log.error("The node %s ended with %d", address, process.returncode)
                del self._node_processes[address]

    def end_on_signals(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self.should_end.set())

    def _status(self) -> dict[str, Any]:
        base = {"phase": self._phase, "ray_address": self._address}
        if self._client is None:
            return base
        import ray

        details = ray_adapter.serve_details(self._client)
        answer = base | summarize(details, ray.nodes(), ray.available_resources()) | {"gangs": self._gangs.summary()}
        for name, entry in _by_name(self._applied).items():
            if name in answer["applications"]:
                answer["applications"][name]["code"] = code_of(entry, os.environ[CODE_VARIABLE])
        return answer

    def _apply(self, config: dict[str, Any]) -> dict[str, Any]:
        if self._client is None:
            raise RuntimeError(f"still {self._phase}; try again in a few seconds")
        with self._lock:
            before, applications = _by_name(self._applied), _by_name(config)
            for name in before.keys() | applications.keys():
                if before.get(name) != applications.get(name):
                    self._gangs.expect_change(name)
            self._watch_gangs(applications)
            self._code_servers.want(config["applications"])
            ray_adapter.deploy(self._client, config)
            self._applied = config
        return {"applied": True}

    def _watch_gangs(self, applications: Mapping[str, Any]) -> None:
        """From the first model with gangs on; without one there is nothing to look for twice a second."""
        has_gangs = any((entry.get("args") or {}).get("data_parallel_size", 1) > 1 for entry in applications.values())
        if has_gangs and self._gang_watch is None:
            self._gang_watch = threading.Thread(
                target=self._gangs.run, args=[self.should_end], name="gangs", daemon=True
            )
            self._gang_watch.start()

    def _stop_serve(self) -> None:
        """Replicas get their time to finish: models answer, the store closes its folder."""
        stopping = threading.Thread(target=self._client.shutdown, kwargs={"timeout_s": SERVE_STOP_S}, daemon=True)
        stopping.start()
        stopping.join(SERVE_STOP_S)


def _by_name(config: Mapping[str, Any]) -> dict[str, Any]:
    return {entry["name"]: entry for entry in config["applications"]}


def _start_local_node(local: LocalNode, head: str) -> subprocess.Popen[str]:
    """Returns when it has joined. From the main thread, for the same reason as the head."""
    # One fork server per node: its forks are in the node's network namespace.
    fork_server = f"{os.environ[SOCKET_VARIABLE]}.{local.seat.address}"
    command = [sys.executable, "-m", "services.local_node", "--head", head, "--parent", str(os.getpid())]
    command += ["--node", json.dumps(asdict(local.options))]
    process = subprocess.Popen(
        local.seat.command(command),
        env={**os.environ, INTERNAL_HOST_VARIABLE: local.seat.address, SOCKET_VARIABLE: fork_server},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == STARTED:
            return process
    raise RuntimeError(f"the node {local.seat.address} did not start; see above")


def _read_local_node(text: str) -> LocalNode:
    value = json.loads(text)
    return LocalNode(ray_adapter.NodeOptions(**value["options"]), Seat(**value["seat"]))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="windfarm-conductor")
    parser.add_argument("--control", required=True)
    parser.add_argument("--head", required=True, type=json.loads, help="fields of NodeOptions as JSON")
    parser.add_argument("--node", action="append", default=[], type=_read_local_node, help="a LocalNode as JSON")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    end_with_parent(int(os.environ[GUARDIAN_VARIABLE]))
    ports = PortLender(Path(options.control).with_name("ports.sock"))
    os.environ[PORTS_VARIABLE] = str(ports.path)  # before anything that may borrow from it is started
    start_fork_server(os.environ[SOCKET_VARIABLE])
    conductor = Conductor(ray_adapter.NodeOptions(**options.head), options.node)
    conductor.end_on_signals()
    control = ControlServer(options.control, conductor.handle)
    try:
        return conductor.run()
    finally:
        control.close()
        ports.close()


if __name__ == "__main__":
    sys.exit(main())
