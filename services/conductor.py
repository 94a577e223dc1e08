"""The process that owns windfarm's Ray: starts its head, is its only driver, and takes commands from the CLI.

It ends when it is told to, when its guardian dies, or when a process of Ray's head ends; the head's processes end with
it. What remains after that (workers, engines) is the guardian's to end.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Any

from services import ray_adapter
from services.control import ControlServer
from services.ray_status import summarize

PR_SET_PDEATHSIG = 1
CHECK_EVERY_S = 0.25
SERVE_STOP_S = 7.0

_log = logging.getLogger("windfarm.conductor")


class Conductor:
    """State of this process: which phase of the start it is in, then Serve's client."""

    def __init__(self, options: ray_adapter.HeadOptions) -> None:
        self._options = options
        self._phase = "starting Ray"
        self._client: Any = None
        self._address: str | None = None
        self._lock = threading.Lock()
        self.should_end = threading.Event()

    def handle(self, request: dict[str, Any]) -> dict[str, Any]:
        """One command of the control socket."""
        match request.get("do"):
            case "status":
                return self._status()
            case "apply":
                return self._apply(request["config"])
            case other:
                raise ValueError(f"unknown command {other!r}")

    def run(self) -> int:
        """Start everything, then watch it; returns the exit code."""
        importlib.import_module("ray")  # two threads must not be the first to import it
        preload = threading.Thread(target=ray_adapter.import_serve, name="preload", daemon=True)
        preload.start()
        # In the main thread: the kernel ends the head's processes with the thread that started them.
        node = ray_adapter.start_head(self._options)
        preload.join()
        self._phase, self._address = "starting Serve", node.address
        self._client = ray_adapter.start_serve(node.address)
        self.end_on_signals()  # again: Ray put its own handlers in their place
        self._phase = "ready"
        while not self.should_end.wait(CHECK_EVERY_S):
            if dead := ray_adapter.dead_processes(node):
                _log.error("Ray's %s ended unexpectedly", ", ".join(dead))
                os._exit(3)  # nothing of Ray answers any more, an orderly end would only hang
        self._stop_serve()
        ray_adapter.stop_head(node)
        return 0

    def end_on_signals(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self.should_end.set())

    def _status(self) -> dict[str, Any]:
        base = {"phase": self._phase, "ray_address": self._address}
        if self._client is None:
            return base
        import ray

        details = ray_adapter.serve_details(self._client)
        return base | summarize(details, ray.nodes(), ray.available_resources())

    def _apply(self, config: dict[str, Any]) -> dict[str, Any]:
        if self._client is None:
            raise RuntimeError(f"still {self._phase}; try again in a few seconds")
        with self._lock:
            ray_adapter.deploy(self._client, config)
        return {"applied": True}

    def _stop_serve(self) -> None:
        """Replicas get their time to finish: models answer, the store closes its folder."""
        stopping = threading.Thread(target=self._client.shutdown, kwargs={"timeout_s": SERVE_STOP_S}, daemon=True)
        stopping.start()
        stopping.join(SERVE_STOP_S)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="windfarm-conductor")
    parser.add_argument("--control", required=True)
    parser.add_argument("--head", required=True, type=json.loads, help="fields of HeadOptions as JSON")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    _end_with_parent()
    conductor = Conductor(ray_adapter.HeadOptions(**options.head))
    conductor.end_on_signals()
    control = ControlServer(options.control, conductor.handle)
    try:
        return conductor.run()
    finally:
        control.close()


def _end_with_parent() -> None:
    """Ask the kernel for SIGTERM when the guardian dies."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
