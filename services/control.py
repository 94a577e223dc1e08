"""How commands reach a running windfarm: one JSON line each way over a Unix socket that only its user may open.

The socket lies in Ray's temporary folder, whose path is short (Unix sockets allow 107 bytes); `RunState` says where.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import socketserver
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cluster.home import write_atomically
from services.environment import url_of
from services.processes import Process, find_process
from services.setup_errors import NotRunning, StartFailed

STATE_FILE = "windfarm.json"
# A Unix socket's path may have 107 bytes; Ray appends up to 66 to its folder's.
MAX_RAY_FOLDER = 40
MAX_LINE = 16 * 2**20


@dataclass(frozen=True, slots=True)
class RunState:
    """What is known of the windfarm that runs on a data folder; written by `up`, removed by `down`."""

    instance: str
    guardian_pid: int
    guardian_started: int
    control: str
    host: str
    port: int
    config: str
    ray_folder: str
    may_use_hub: bool = False
    """Whether its processes were started with the way to model hubs open."""
    code: str = ""
    """Version of the code that it was started with."""
    python_path: str = ""
    """From where its processes import."""
    locks: str = ""
    packages: list[str] = field(default_factory=list)
    """What was pinned, and what was installed, when it was started."""

    @property
    def api(self) -> str:
        return url_of(self.host, self.port)

    @property
    def guardian(self) -> Process:
        return Process(self.guardian_pid, self.guardian_started)


def ray_folder_of(home: Path) -> Path:
    """Where Ray keeps sockets, logs and sessions: in the data folder, or below /tmp where that path is too long."""
    folder = home / "run" / "ray"
    if len(os.fsencode(folder)) <= MAX_RAY_FOLDER:
        return folder
    name = hashlib.sha256(os.fsencode(home)).hexdigest()[:10]
    return Path(tempfile.gettempdir()) / f"wf-{os.getuid()}-{name}"


def write_state(run: Path, state: RunState) -> None:
    write_atomically(run / STATE_FILE, json.dumps(asdict(state), indent=1).encode())


def read_state(run: Path) -> RunState | None:
    """The state left in the folder, whether or not that windfarm still runs."""
    try:
        return RunState(**json.loads((run / STATE_FILE).read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, TypeError) as error:
        raise StartFailed(
            f"{run / STATE_FILE} cannot be read ({error}); it was written by another version or damaged. "
            "End that windfarm's processes, then delete the file."
        ) from error


def remove_state(run: Path) -> None:
    (run / STATE_FILE).unlink(missing_ok=True)


def running_state(run: Path) -> RunState:
    """The state of a windfarm that runs; raises `NotRunning`."""
    state = read_state(run)
    if state is None or find_process(state.guardian_pid) != state.guardian or not state.guardian.is_alive:
        raise NotRunning(f"No windfarm runs on {run.parent}. Start it with `windfarm up`, or name its --home.")
    return state


def ask(control: str, request: Mapping[str, Any], timeout_s: float = 30.0) -> dict[str, Any]:
    """Send one command; raises `NotRunning` when nobody listens and `StartFailed` when the command failed."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(timeout_s)
            connection.connect(control)
            with connection.makefile("rwb") as stream:
                stream.write(json.dumps(request).encode() + b"\n")
                stream.flush()
                line = stream.readline(MAX_LINE)
    except (FileNotFoundError, ConnectionError) as error:
        raise NotRunning(f"windfarm does not answer ({error}). `windfarm logs` may say why.") from error
    except TimeoutError as error:
        raise StartFailed(f"windfarm did not answer within {timeout_s:.0f} s. `windfarm logs` may say why.") from error
    if not line:
        raise NotRunning("windfarm ended while it was asked. `windfarm logs` may say why.")
    answer: dict[str, Any] = json.loads(line)
    if "error" in answer:
        raise StartFailed(answer["error"])
    return answer


class ControlServer:
    """Answers commands in threads until it is closed. `handle` gets the request and returns the answer."""

    def __init__(self, path: str, handle: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                line = self.rfile.readline(MAX_LINE)
                if line:
                    self.wfile.write(json.dumps(_answer(handle, line)).encode() + b"\n")

        class Server(socketserver.ThreadingUnixStreamServer):
            daemon_threads = True
            block_on_close = False

        Path(path).unlink(missing_ok=True)
        before = os.umask(0o177)
        try:
            self._server = Server(path, Handler)
        finally:
            os.umask(before)
        threading.Thread(target=self._server.serve_forever, name="control", daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def _answer(handle: Callable[[dict[str, Any]], dict[str, Any]], line: bytes) -> dict[str, Any]:
    try:
        return handle(json.loads(line))
    except Exception as error:  # noqa: BLE001  # whatever goes wrong is the asker's to see; the server goes on
        return {"error": f"{type(error).__name__}: {error}"}
