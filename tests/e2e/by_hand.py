"""A windfarm without `windfarm up`: plain `serve run` in the environment that `windfarm env` prints."""

import json
import os
import secrets
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx

from services.processes import INSTANCE_VARIABLE, Process, descendants, end_all, end_with_parent, tagged
from tests.product import ROOT, WINDFARM, free_port, link_models, windfarm

READY_S = 240


@dataclass
class ByHand:
    """`tag` is set by the test alone, to find every process that `serve run` has started."""

    server: "subprocess.Popen[bytes]"
    address: str
    key: str
    port: int
    tag: str
    output: Path

    def processes(self) -> list[Process]:
        return list({*tagged(self.tag), *descendants(self.server.pid)})

    def is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.address}/ready", timeout=10).status_code == 200
        except httpx.TransportError:
            return False

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + READY_S
        while not self.is_ready():
            assert self.server.poll() is None and time.monotonic() < deadline, self.output.read_text()[-3000:]
            time.sleep(0.1)

    def press_ctrl_c(self) -> None:
        self.server.send_signal(signal.SIGINT)
        self.server.wait(60)


@contextmanager
def serve_by_hand(home: Path) -> Iterator[ByHand]:
    """Starts `serve run ray_config.yaml` on a new data folder; whatever happens, nothing of it is left in the end."""
    link_models(home)
    key = windfarm(home, ["key"]).stdout.strip()
    printed = json.loads(windfarm(home, ["env", "--json"]).stdout)
    port, tag = free_port(), secrets.token_hex(8)
    environment = {**os.environ, **printed, "WINDFARM_PORT": str(port), INSTANCE_VARIABLE: tag}
    output = home.with_name("serve-run.log")
    with output.open("wb") as log:
        server = subprocess.Popen(
            [WINDFARM.with_name("serve"), "run", "ray_config.yaml"],
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            preexec_fn=partial(end_with_parent, os.getpid()),
        )
    running = ByHand(server, f"http://127.0.0.1:{port}", key, port, tag, output)
    try:
        yield running
    finally:
        end_all(running.processes(), 1.0)
        server.kill()
        server.wait()
