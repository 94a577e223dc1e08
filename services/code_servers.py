"""Fork servers for code that came after the start: one for each version that an application runs, and none for others.

A server is a child of the conductor in a Python of its own, which imports that code alone. Workers of a version whose
server is gone, or not there yet, are started afresh, which takes them two seconds longer.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from services.ray_worker import CODE_VARIABLE, SOCKET_VARIABLE, socket_of

_log = logging.getLogger("windfarm.conductor")

LISTENS_WITHIN_S = 10.0
CHECK_EVERY_S = 0.05


class CodeServers:
    """`want` may be called from any thread; `tend` and `close` only from the one that lasts: the kernel ends a server
    with the thread that started it."""

    def __init__(self) -> None:
        self._path = os.environ[SOCKET_VARIABLE]
        self._wanted: dict[str, dict[str, str]] = {}
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def want(self, applications: Iterable[Mapping[str, Any]]) -> None:
        """Have servers for the code of these entries of a Serve config; returns when they listen, or soon after."""
        variables = [(app.get("runtime_env") or {}).get("env_vars") or {} for app in applications]
        self._wanted = {each[CODE_VARIABLE]: each for each in variables if CODE_VARIABLE in each}
        deadline = time.monotonic() + LISTENS_WITHIN_S
        while any(map(self._is_coming, self._wanted)) and time.monotonic() < deadline:
            time.sleep(CHECK_EVERY_S)

    def _is_coming(self, version: str) -> bool:
        process = self._running.get(version)
        return process is None or (process.poll() is None and not Path(socket_of(self._path, version)).exists())

    def tend(self) -> None:
        """Start those that are wanted and end the others. One that ended by itself is not started again."""
        wanted = self._wanted
        for version in self._running.keys() - wanted.keys():
            self._end(version)
        for version in wanted.keys() - self._running.keys():
            self._running[version] = self._start(version, wanted[version])

    def close(self) -> None:
        """End all of them."""
        for version in list(self._running):
            self._end(version)

    def _start(self, version: str, variables: Mapping[str, str]) -> subprocess.Popen[bytes]:
        _log.info("Workers of code %s are forks of a server of their own", version)
        path = socket_of(self._path, version)
        Path(path).unlink(missing_ok=True)  # of a conductor that was killed
        command = [sys.executable, "-m", "services.fork_server", path, str(os.getpid())]
        return subprocess.Popen(command, env={**os.environ, **variables}, stdin=subprocess.DEVNULL)

    def _end(self, version: str) -> None:
        process = self._running.pop(version)
        process.kill()  # it holds nothing, and its workers go on
        process.wait()
        Path(socket_of(self._path, version)).unlink(missing_ok=True)
