"""A PostgreSQL server of a trial's own, which can be killed and started again on the same data."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

# It refuses to run as root.
_AS_USER = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"]


class Postgres:
    """Listens on a socket in a temporary folder alone. Blocks."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="windfarm-pg-"))
        self._folder.chmod(0o777)
        self._user = _AS_USER if os.geteuid() == 0 else []
        self._data = self._folder / "data"
        self._server: subprocess.Popen[str] | None = None
        command = [*self._user, "initdb", "--no-sync", "-A", "trust", "-U", "windfarm", "-D", str(self._data)]
        subprocess.run(command, check=True, capture_output=True, cwd=self._folder)

    @property
    def url(self) -> str:
        return f"postgresql://windfarm@/postgres?host={self._folder}"

    def start(self) -> None:
        """Returns when it accepts connections."""
        options = ["-D", str(self._data), "-k", str(self._folder), "-c", "listen_addresses=", "-F"]
        self._server = subprocess.Popen(
            [*self._user, "postgres", *options], cwd=self._folder, stderr=subprocess.PIPE, text=True
        )
        assert self._server.stderr is not None
        if not any("ready to accept connections" in line for line in self._server.stderr):
            raise RuntimeError("PostgreSQL did not start")

    def crash(self) -> None:
        """All of its processes end at once, without a checkpoint."""
        assert self._server is not None
        self._server.send_signal(signal.SIGQUIT)
        self._server.wait(20)
        assert self._server.stderr is not None
        self._server.stderr.close()
        self._server = None

    def close(self) -> None:
        if self._server is not None:
            self.crash()
        shutil.rmtree(self._folder, ignore_errors=True)
