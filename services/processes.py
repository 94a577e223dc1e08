"""Finds and ends processes that are ours, by reading /proc: descendants of a process, and processes with our tag.

Every process that `windfarm up` starts inherits `WINDFARM_INSTANCE=<id>`; nothing without that tag or without one of
our processes as its ancestor is ever signalled. Standard library only: the guardian has to stay small.
"""

import contextlib
import ctypes
import os
import select
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

INSTANCE_VARIABLE = "WINDFARM_INSTANCE"
PROC = Path("/proc")
LOOK_AGAIN_S = 0.1
PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)  # loaded here: a child that was just forked must not wait for the loader's lock


@dataclass(frozen=True, slots=True)
class Process:
    """A process and when it was started (in clock ticks since boot), so that a reused id is not mistaken for it."""

    pid: int
    started: int

    @property
    def is_alive(self) -> bool:
        status = _status(self.pid)
        return status is not None and status.started == self.started and not status.has_ended

    def signal(self, number: int) -> None:
        """Send a signal unless the process has ended (and its id may belong to another)."""
        try:
            descriptor = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return
        try:
            if self.is_alive:
                signal.pidfd_send_signal(descriptor, number)
        except ProcessLookupError:
            return
        finally:
            os.close(descriptor)

    def wait(self, timeout_s: float) -> bool:
        """Whether the process has ended within the time; it need not be a child."""
        try:
            descriptor = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return True
        deadline = time.monotonic() + timeout_s
        try:
            while self.is_alive:
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                # In slices: on a loaded machine an ended orphan was once not reported by its descriptor.
                select.select([descriptor], [], [], min(left, LOOK_AGAIN_S))
            return True
        finally:
            os.close(descriptor)


@dataclass(frozen=True, slots=True)
class _Status:
    parent: int
    session: int
    state: str
    started: int
    num_threads: int

    @property
    def has_ended(self) -> bool:
        """A zombie with more than one thread is a process whose first thread alone has ended."""
        return self.state in "ZX" and self.num_threads <= 1


def end_with_parent(parent: int) -> None:
    """Ask the kernel for SIGTERM when the thread that started this process ends.

    `parent` is the process id of the starter, as it was told to this process: who asks `os.getppid` may ask when the
    starter is gone already, and would then bind itself to whoever inherited it.
    """
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def find_process(pid: int) -> Process | None:
    status = _status(pid)
    return None if status is None else Process(pid, status.started)


def descendants(root: int) -> list[Process]:
    """Children of `root`, their children and so on, without `root` itself and without ended ones."""
    statuses = {pid: status for pid in _pids() if (status := _status(pid)) is not None}
    children: dict[int, list[int]] = {}
    for pid, status in statuses.items():
        children.setdefault(status.parent, []).append(pid)
    found: list[Process] = []
    waiting = list(children.get(root, []))
    while waiting:
        pid = waiting.pop()
        waiting += children.get(pid, [])
        if not statuses[pid].has_ended:
            found.append(Process(pid, statuses[pid].started))
    return found


def tagged(instance: str) -> list[Process]:
    """Living processes that carry the tag of this instance, except the caller."""
    return started_with(INSTANCE_VARIABLE, instance)


def started_with(variable: str, value: str) -> list[Process]:
    """Living processes that had this variable in their environment when they began, except the caller."""
    wanted = f"{variable}={value}".encode()
    found = []
    for pid in _pids():
        if pid == os.getpid():
            continue
        try:
            variables = (PROC / str(pid) / "environ").read_bytes().split(b"\0")
        except OSError:
            continue  # ended meanwhile, or somebody else's
        process = find_process(pid)
        if wanted in variables and process is not None and process.is_alive:
            found.append(process)
    return found


def in_session(leader: Process) -> list[Process]:
    """Living processes of the session that `leader` opened, whether or not it still lives, except the caller.

    Programs that rename themselves may wipe out the environment that /proc shows, and their tag with it. A session's
    number is not given away while anybody is in it; where another process has it now, the session was another one.
    """
    if find_process(leader.pid) not in (None, leader):
        return []
    found = []
    for pid in _pids():
        status = _status(pid)
        is_member = status is not None and status.session == leader.pid and status.started >= leader.started
        if is_member and status is not None and not status.has_ended and pid != os.getpid():
            found.append(Process(pid, status.started))
    return found


def end_all(processes: Iterable[Process], grace_s: float) -> list[Process]:
    """Ask all to end, then kill what is left after `grace_s`; returns what could not even be killed."""
    remaining = list(processes)
    for process in remaining:
        process.signal(signal.SIGTERM)
    remaining = _wait_for_all(remaining, grace_s)
    for process in remaining:
        process.signal(signal.SIGKILL)
    return _wait_for_all(remaining, 5.0)


def reap_children() -> list[tuple[int, int]]:
    """Collect children that have ended, without waiting; (pid, wait status) of each."""
    ended = []
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            ended.append((pid, status))
    return ended


def _wait_for_all(processes: list[Process], timeout_s: float) -> list[Process]:
    deadline = time.monotonic() + timeout_s
    return [process for process in processes if not process.wait(max(0.0, deadline - time.monotonic()))]


def _pids() -> list[int]:
    return [int(entry) for entry in os.listdir(PROC) if entry.isdecimal()]


def _status(pid: int) -> _Status | None:
    try:
        text = (PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The name in parentheses may itself hold blanks and parentheses.
    fields = text[text.rindex(")") + 2 :].split()
    return _Status(
        parent=int(fields[1]),
        session=int(fields[3]),
        state=fields[0],
        started=int(fields[19]),
        num_threads=int(fields[17]),
    )
