"""Ray's workers as forks of one process that has imported Ray Serve already.

Ray starts a new Python for every worker, which imports Ray twice and Serve once: two and a half seconds of a processor
for each of the dozen workers of a start, and as much again for every replica that is added or replaced. Here the raylet
starts a small script instead (`services/ray_worker.py`), which asks this server for a fork and ends; the fork
runs Ray's own worker program and tells the raylet its process id itself. Unchanged memory stays shared.

The server has one thread and opens nothing, so that a fork finds no lock held and no connection that is not its own.
Nor does it let Ray draw a random id: Ray's generators would be seeded from then on, every fork would draw the same ids
of objects and tasks, and Ray ends a process that finds two of one id. Each fork's first id is compared with all before.
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
    parent = os.getpid()
    _import_ray_as_a_worker(parent)
    listener = _listen(path)
    pid = os.fork()
    if pid:
        listener.close()
        return pid
    try:
        _be_a_server(parent, listener, modules)
    except BaseException:  # noqa: BLE001 -- a fork never returns into the code of its parent
        traceback.print_exc()
    os._exit(1)


def main(arguments: Sequence[str] | None = None) -> None:
    """A server for code that came after the start, in a Python of its own: the conductor holds the old modules."""
    path, parent = sys.argv[1:] if arguments is None else arguments
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    _import_ray_as_a_worker(int(parent))
    _be_a_server(int(parent), _listen(path), PRELOADED)


def _listen(path: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    listener.bind(path)
    os.chmod(path, 0o600)
    listener.listen(64)
    return listener


def _be_a_server(parent: int, listener: socket.socket, modules: Sequence[str]) -> None:
    end_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C is for the starter
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel collects ended workers
    serve(listener, modules)


def _import_ray_as_a_worker(parent: int) -> None:
    """Import Ray with the variables that tell a worker its job and its raylet: Ray reads them once, at its import.

    A worker ends when the process that it takes for its raylet is gone. That will be `parent`, which ends as soon as
    its raylet does, and not a server, whose workers may outlive it where their code is replaced.
    """
    if "ray" in sys.modules:
        raise RuntimeError("Ray was imported too early for a fork server.")
    os.environ |= {JOB_VARIABLE: ONLY_JOB, RAYLET_VARIABLE: str(parent)}
    importlib.import_module("ray")
    _name_actor_classes_without_ray()
    del os.environ[JOB_VARIABLE], os.environ[RAYLET_VARIABLE]


def _name_actor_classes_without_ray() -> None:
    """`ray.remote` draws an id for each class; some of the preloaded modules declare one."""
    actor: Any = importlib.import_module("ray.actor")
    original = actor.ActorClassID

    class KernelActorClassID:
        @staticmethod
        def from_random() -> Any:
            return original(os.urandom(original.size()))

    actor.ActorClassID = KernelActorClassID


def serve(listener: socket.socket, modules: Sequence[str]) -> None:
    """Import one module after the other; in between, and for ever after, fork for whoever asks."""
    waiting = deque(modules)
    first_ids: set[bytes] = set()
    while True:
        asked, _, _ = select.select([listener], [], [], 0 if waiting else None)
        if not asked:
            _import(waiting.popleft())
            continue
        connection, _ = listener.accept()
        with connection:
            try:
                _answer(connection, listener, first_ids)
            except (OSError, ValueError, EOFError) as error:
                _log.warning("No worker was started: %s", error)


def _import(name: str) -> None:
    try:
        importlib.import_module(name)
    except ImportError as error:  # a worker that needs it says so where it can be seen
        _log.warning("%s could not be imported beforehand: %s", name, error)
    gc.collect()
    gc.freeze()  # the collector of a fork leaves shared memory alone


def _answer(connection: socket.socket, listener: socket.socket, first_ids: set[bytes]) -> None:
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
        ours, theirs = socket.socketpair()
        pid = os.fork()
        if pid == 0:
            for other in (listener, connection, ours):
                other.close()
            _show_first_id(theirs)
            _become_worker(request, descriptors)
        theirs.close()
        with ours:
            _check_first_id(ours, first_ids)
        connection.sendall(f"{pid}\n".encode())
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _show_first_id(server: socket.socket) -> None:
    """In the fork: go on only where the server has not seen this id before."""
    import ray

    with contextlib.suppress(OSError), server:  # the server has stopped to wait
        server.sendall(ray.ObjectID.from_random().binary())
        if server.recv(1):
            return
    os._exit(1)


def _check_first_id(fork: socket.socket, first_ids: set[bytes]) -> None:
    """Let the fork go on; raises `ValueError` where it draws the ids of another one, and it ends."""
    import ray

    fork.settimeout(CLIENT_TIMEOUT_S)
    first_id = read_exactly(fork, ray.ObjectID.size())
    if first_id in first_ids:
        raise ValueError("Ray's generators were seeded before the fork: two workers would give out the same ids")
    first_ids.add(first_id)
    fork.sendall(b"y")


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


if __name__ == "__main__":
    main()
