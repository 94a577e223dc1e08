"""A hub gets the token that the environment names, although implicit tokens are off, and none where none is named."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

FETCH = """
import sys
from pathlib import Path
from cluster.errors import ClusterError
from cluster.home import open_home
from cluster.weights.prepare import prepare
try:
    prepare('hf:owner/name', 'hf', open_home(Path(sys.argv[1])))
except ClusterError as error:
    print(error)
"""


class Hub(ThreadingHTTPServer):
    """Refuses everybody and remembers what they showed."""

    def __init__(self) -> None:
        self.shown: list[str | None] = []
        super().__init__(("127.0.0.1", 0), _Refuse)


class _Refuse(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        self.server.shown.append(self.headers.get("Authorization"))
        self.send_response(401)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("token", ["hf_secret", ""])
def test_the_named_token_is_shown_to_the_hub(hub: Hub, tmp_path: Path, token: str) -> None:
    # Tests before this one load engines, which work offline, and a machine may reach the world through a proxy only.
    inherited = {name: value for name, value in os.environ.items() if not name.lower().endswith(("_offline", "_proxy"))}
    environment = {
        **inherited,
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
        "HF_TOKEN": token,
    }
    answer = subprocess.run(
        [sys.executable, "-c", FETCH, str(tmp_path)], capture_output=True, text=True, env=environment, check=True
    )
    assert "set HF_TOKEN" in answer.stdout
    assert set(hub.shown) == {f"Bearer {token}" if token else None}
