"""One more node of a Ray on the same machine: a process that starts a raylet, says so, and ends it with itself.

Run inside the node's network namespace where it has one. What runs on the node finds its address in the environment.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from services import ray_adapter
from services.fork_server import start_fork_server
from services.local_network import Seat
from services.processes import end_with_parent
from services.ray_worker import SOCKET_VARIABLE

CHECK_EVERY_S = 0.5
STARTED = "started"
"""Printed when the raylet answers: only one node at a time may choose its sockets' names."""


@dataclass(frozen=True, slots=True)
class LocalNode:
    """A node of this Ray beside the head, on this machine."""

    options: ray_adapter.NodeOptions
    seat: Seat


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="windfarm-node")
    parser.add_argument("--head", required=True, help="host:port of Ray's head")
    parser.add_argument("--parent", required=True, type=int, help="process id of the conductor that starts it")
    parser.add_argument("--node", required=True, type=json.loads, help="fields of NodeOptions as JSON")
    options = parser.parse_args(arguments)
    end_with_parent(options.parent)
    start_fork_server(os.environ[SOCKET_VARIABLE])
    node = ray_adapter.start_node(ray_adapter.NodeOptions(**options.node), options.head)
    should_end = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):  # in place of Ray's own handlers, which drain for 30 s
        signal.signal(number, lambda *_: should_end.set())
    sys.stdout.write(f"{STARTED}\n")
    sys.stdout.flush()
    while not should_end.wait(CHECK_EVERY_S):
        if ray_adapter.dead_processes(node):
            return 1
    ray_adapter.stop_head(node)
    return 0


if __name__ == "__main__":
    sys.exit(main())
