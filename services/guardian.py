"""The parent of everything that runs: starts the conductor and sees to it that nothing of ours outlives it.

It ends all when it is asked to (SIGTERM), when the conductor or its Ray ends, and when the starter is gone that did not
say to keep it. As a sub-reaper it inherits every orphan of its descendants, so that none can slip away. Standard
library only.
"""

import argparse
import ctypes
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from services.local_network import delete_network
from services.processes import INSTANCE_VARIABLE, descendants, end_all, reap_children, tagged

PR_SET_CHILD_SUBREAPER = 36
CHECK_EVERY_S = 0.5
CONDUCTOR_STOP_S = 9.0
GRACE_S = 1.0
GUARDIAN_VARIABLE = "WINDFARM_GUARDIAN"
KEEP = b"k"
"""What a starter writes into its pipe before it leaves: go on without me."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="windfarm-guardian")
    parser.add_argument("--starter-fd", type=int, required=True, help="read end of a pipe that the starter holds")
    parser.add_argument("command", nargs="+", help="the conductor")
    options = parser.parse_args(arguments)
    _become_subreaper()
    wake = _wake_on_signals()
    conductor = subprocess.Popen(options.command, env={**os.environ, GUARDIAN_VARIABLE: str(os.getpid())})
    reason = _watch(conductor.pid, options.starter_fd, wake)
    _say(f"ending: {reason}")
    _end_everything(conductor.pid, ask_first=not reason.startswith("the conductor"))
    if instance := os.environ.get(INSTANCE_VARIABLE):
        delete_network(instance)
    return 0 if reason == "asked to" else 1


def _watch(conductor: int, starter_fd: int, wake: socket.socket) -> str:
    """Wait until there is a reason to end everything."""
    watched: list[socket.socket | int] = [wake, starter_fd]
    while True:
        readable: list[socket.socket | int] = select.select(watched, [], [], CHECK_EVERY_S)[0]
        if wake in readable and any(number in _ENDING for number in wake.recv(64)):
            return "asked to"
        if starter_fd in readable:
            if os.read(starter_fd, 1) != KEEP:
                return "the starter is gone"
            watched.remove(starter_fd)
        for pid, status in reap_children():
            if pid == conductor:
                return f"the conductor ended with {os.waitstatus_to_exitcode(status)}"


def _end_everything(conductor: int, *, ask_first: bool) -> None:
    if ask_first:
        _stop_conductor(conductor)
    instance = os.environ.get(INSTANCE_VARIABLE)
    for _ in range(10):
        ours = {process.pid: process for process in descendants(os.getpid())}
        if instance:
            ours |= {process.pid: process for process in tagged(instance)}
        if not ours:
            return
        _say(f"ending {len(ours)} processes")
        end_all(ours.values(), GRACE_S)
        reap_children()


def _stop_conductor(conductor: int) -> None:
    """The conductor lets the applications finish and stops Ray; it gets a limited time for it."""
    try:
        os.kill(conductor, signal.SIGTERM)
    except ProcessLookupError:
        return
    deadline = time.monotonic() + CONDUCTOR_STOP_S
    while time.monotonic() < deadline:
        if conductor in [pid for pid, _ in reap_children()]:
            return
        time.sleep(0.05)  # orphans have to be collected as well, so no single process can be waited for


def _become_subreaper() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "cannot become the reaper of orphans")


_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def _wake_on_signals() -> socket.socket:
    """A socket on which the number of each arriving signal can be read."""
    wake, writer = socket.socketpair()
    wake.setblocking(False)
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.detach())
    for number in (*_ENDING, signal.SIGCHLD):
        signal.signal(number, lambda *_: None)
    return wake


def _say(message: str) -> None:
    sys.stderr.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} guardian {os.getpid()}: {message}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
