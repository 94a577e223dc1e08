"""Ray's workers as forks of one process that has imported Ray Serve already.

Ray starts a new Python for every worker, which imports Ray twice and Serve once: two and a half seconds of a processor
for each of the dozen workers of a start, and as much again for every replica that is added or replaced. Here the raylet
starts a small script instead (`services/ray_worker.py`), which asks this server for a fork and ends; the fork
runs Ray's own worker program and tells the raylet its process id itself. Unchanged memory stays shared.

The server has one thread and opens nothing, so that a fork finds no lock held and no connection that is not its own.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import logging
import os
import resource
import runpy
import select
import signal
import socket
import sys
import traceback
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from services.processes import end_with_parent
from services.ray_worker import MAX_MESSAGE, read_exactly

PRELOADED = (
    "ray._private.workers.default_worker",
    "ray.serve._private.controller",
    "ray.serve._private.replica",
    "services.app",
    "services.store",
    "services.embedding",
    "services.model_server",
    "services.gateway",
    "services.page",
)
"""What workers import, in the order of a start. Nothing of it loads a model library: those must know their threads."""

CLIENT_TIMEOUT_S = 5.0
JOB_VARIABLE = "RAY_JOB_ID"
ONLY_JOB = "01000000"
"""Ray's number of the first driver, and the conductor is the only one."""
RAYLET_VARIABLE = "RAY_RAYLET_PID"

_log = logging.getLogger("windfarm.fork_server")


def start_fork_server(path: str, modules: Sequence[str] = PRELOADED) -> int:
    """Fork this process into a server on the Unix socket `path`; returns its process id when it listens.

    To be called while this process has no other Python thread and has not imported Ray: from here on it has. The
    server ends with this process.
    """
    _import_ray_as_a_worker()
    listener = socket.socket(socket.AF_UNIX)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    listener.bind(path)
    os.chmod(path, 0o600)
    listener.listen(64)
    pid = os.fork()
    if pid:
        listener.close()
        return pid
    try:
        end_with_parent()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C is for the starter
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel collects ended workers
        serve(listener, modules)
    except BaseException:  # noqa: BLE001 -- a fork never returns into the code of its parent
        traceback.print_exc()
    os._exit(1)


def _import_ray_as_a_worker() -> None:
    """Import Ray with the variables that tell a worker its job and its raylet: Ray reads them once, at its import.

    A worker ends when the process that it takes for its raylet is gone. That will be this one, which ends as soon as
    its raylet does.
    """
    if "ray" in sys.modules:
        raise RuntimeError("Ray was imported too early for a fork server.")
    os.environ |= {JOB_VARIABLE: ONLY_JOB, RAYLET_VARIABLE: str(os.getpid())}
    importlib.import_module("ray")
    del os.environ[JOB_VARIABLE], os.environ[RAYLET_VARIABLE]


def serve(listener: socket.socket, modules: Sequence[str]) -> None:
    """Import one module after the other; in between, and for ever after, fork for whoever asks."""
    waiting = deque(modules)
    while True:
        asked, _, _ = select.select([listener], [], [], 0 if waiting else None)
        if not asked:
            _import(waiting.popleft())
            continue
        connection, _ = listener.accept()
        with connection:
            try:
                _answer(connection, listener)
            except (OSError, ValueError, EOFError) as error:
                _log.warning("No worker was started: %s", error)


def _import(name: str) -> None:
    try:
        importlib.import_module(name)
    except ImportError as error:  # a worker that needs it says so where it can be seen
        _log.warning("%s could not be imported beforehand: %s", name, error)
    gc.collect()
    gc.freeze()  # the collector of a fork leaves shared memory alone


def _answer(connection: socket.socket, listener: socket.socket) -> None:
    connection.settimeout(CLIENT_TIMEOUT_S)
    head, descriptors, _, _ = socket.recv_fds(connection, 4, 2)
    try:
        head += read_exactly(connection, 4 - len(head))
        length = int.from_bytes(head, "big")
        if length > MAX_MESSAGE or len(descriptors) != 2:
            raise ValueError("not a request for a worker")
        request = json.loads(read_exactly(connection, length))
        if (job := request["environment"].get(JOB_VARIABLE, ONLY_JOB)) != ONLY_JOB:
            raise ValueError(f"job {job} is not ours")
        if select.select([connection], [], [], 0)[0]:
            # It has waited too long and started the worker by itself; there must not be two of them.
            raise EOFError("who asked has gone")
        pid = os.fork()
        if pid == 0:
            listener.close()
            connection.close()
            _become_worker(request, descriptors)
        connection.sendall(f"{pid}\n".encode())
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _become_worker(request: dict[str, Any], descriptors: Sequence[int]) -> None:
    """Take over what the asking process was given by the raylet, and run Ray's worker program. Does not return."""
    code = 1
    try:
        for number in (signal.SIGTERM, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for target, descriptor in zip((1, 2), descriptors, strict=True):
            os.dup2(descriptor, target)
            os.close(descriptor)
        os.environ.clear()
        os.environ.update(request["environment"])
        os.chdir(request["folder"])
        for name, limits in request["limits"].items():
            resource.setrlimit(getattr(resource, name), tuple(limits))
        program, *arguments = request["command"]
        sys.argv = [program, *arguments]
        # Python was started with -m, which put the current folder first; for a program it is that of the program.
        sys.path[0] = str(Path(program).parent)
        runpy.run_path(program, run_name="__main__")
        code = 0
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else 0 if ending.code is None else 1
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
