"""The watcher of connections sees what it has to see: a test that finds nothing must be able to find something."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from services.process_environment import STARTUP

WATCHED = Path(__file__).with_name("watched")


@pytest.mark.parametrize(
    ("program", "noted"),
    [
        ("s = socket.socket(); s.settimeout(0.01); s.connect(('192.0.2.1', 443))", "('192.0.2.1', 443)"),
        ("socket.getaddrinfo('telemetry.invalid', 443)", "telemetry.invalid"),
        ("socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('192.0.2.1', 53))", "('192.0.2.1', 53)"),
        ("import urllib.request; urllib.request.urlopen('http://telemetry.invalid/', timeout=1)", "telemetry.invalid"),
        ("socket.create_connection(('127.0.0.1', 1))", None),
        ("socket.getaddrinfo('localhost', 80)", None),
        ("socket.socket(type=socket.SOCK_DGRAM).connect(('192.0.2.1', 53))", None),
    ],
)
def test_a_try_is_noted_although_it_fails(tmp_path: Path, program: str, noted: str | None) -> None:
    file = tmp_path / "connections"
    environment = {**os.environ, "PYTHONPATH": str(WATCHED), "WATCH_CONNECTIONS": str(file)}
    command = [sys.executable, "-c", f"import socket\ntry:\n    {program}\nexcept OSError:\n    pass"]
    subprocess.run(command, env=environment, check=True)
    watching, *tries = file.read_text().splitlines()
    assert watching.startswith("watching ")
    assert len(tries) == (1 if noted else 0), tries
    assert noted is None or noted in tries[0]


def test_the_hook_of_the_product_runs_behind_the_watcher(tmp_path: Path) -> None:
    path = os.pathsep.join([str(WATCHED), str(STARTUP)])
    environment = {**os.environ, "PYTHONPATH": path, "WATCH_CONNECTIONS": str(tmp_path / "connections")}
    command = [sys.executable, "-c", "import sys; print(*(type(finder).__name__ for finder in sys.meta_path))"]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "_NoPandasForServe" in answer.stdout.split(), answer.stdout + answer.stderr
