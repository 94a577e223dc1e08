"""However it ends, nothing of ours is left running, the port is free, and no document is lost."""

import json
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from services.control import RunState, read_state
from services.processes import Process, descendants, find_process, tagged
from tests.product import ROOT, WINDFARM, Product, free_port, link_models, logs, windfarm

pytestmark = pytest.mark.e2e

# A start on a busy machine; the tests wait for events, this is only where they give up.
START_S = 180
GONE_S = 40


@dataclass
class Foreground:
    """`windfarm up` attached to this test, as a person has it in a terminal."""

    starter: "subprocess.Popen[str]"
    state: RunState
    home: Path
    key: str

    def processes(self) -> list[Process]:
        """By tag and by descent: the parser process gets none of our environment, so it has no tag."""
        return list({*tagged(self.state.instance), *descendants(self.state.guardian_pid)})

    def find(self, name: str) -> Process:
        """The one process of ours with this name."""
        (found,) = [p for p in self.processes() if Path(f"/proc/{p.pid}/comm").read_text().strip() == name]
        return found

    def upload(self, name: str, text: str) -> None:
        headers = {"Authorization": f"Bearer {self.key}"}
        httpx.post(f"{self.state.api}/v1/collections", json={"name": "kept"}, headers=headers, timeout=60)
        httpx.post(
            f"{self.state.api}/v1/collections/kept/documents?wait=true",
            files={"file": (name, text.encode())},
            headers=headers,
            timeout=120,
        ).raise_for_status()

    def documents(self) -> list[str]:
        answer = windfarm(self.home, ["documents", "kept", "--json"])
        return sorted(item["name"] for item in json.loads(answer.stdout)["documents"])


@contextmanager
def foreground(home: Path) -> Iterator[Foreground]:
    link_models(home)
    command = [str(WINDFARM), "up", "--json", "--home", str(home), "--port", str(free_port())]
    with (home.parent / "up.err").open("w") as errors:
        starter = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True)
    try:
        assert starter.stdout is not None
        line = starter.stdout.readline()
        assert line, (home.parent / "up.err").read_text() + logs(home)
        state = read_state(home / "run")
        assert state is not None
        yield Foreground(starter, state, home, json.loads(line)["key"])
    finally:
        starter.kill()
        starter.wait()
        windfarm(home, ["down"], check=False)


def press_ctrl_c(running: Foreground) -> None:
    running.starter.send_signal(signal.SIGINT)


def down(running: Foreground) -> None:
    windfarm(running.home, ["down"])


def kill_the_starter(running: Foreground) -> None:
    running.starter.kill()


def kill_rays_head(running: Foreground) -> None:
    running.find("gcs_server").signal(signal.SIGKILL)


def kill_the_guardian(running: Foreground) -> None:
    """The worst case: nobody is left to clean up, so `down` has to find everything by its tag."""
    running.state.guardian.signal(signal.SIGKILL)
    running.starter.wait(GONE_S)
    windfarm(running.home, ["down"], check=False)


@pytest.mark.timeout(600)
def test_nothing_survives_no_document_is_lost_and_another_windfarm_goes_on(tmp_path: Path, product: Product) -> None:
    home = tmp_path / "home"
    home.mkdir()
    uploaded = []
    ways: list[Callable[[Foreground], None]] = [
        press_ctrl_c,
        down,
        kill_the_starter,
        kill_rays_head,
        kill_the_guardian,
    ]
    for end in ways:
        with foreground(home) as running:
            if uploaded:
                assert running.documents() == sorted(uploaded)
            name = f"{end.__name__}.txt"
            running.upload(name, f"Kept although the end was: {end.__name__}.")
            uploaded.append(name)
            ours = running.processes()
            assert len(ours) >= 8
            names = {process.pid: describe(process.pid) for process in ours}
            assert any("rag.parser_process" in name for name in names.values())
            end(running)
            left = [f"{names[process.pid]} {state_of(process.pid)}" for process in ours if not process.wait(GONE_S)]
            assert left == [], end.__name__
            assert running.processes() == [], end.__name__
            assert_port_is_free(running.state.port)
            assert httpx.get(f"{product.address}/ready", timeout=10).status_code == 200, end.__name__


def test_somebody_elses_process_is_left_alone(tmp_path: Path) -> None:
    """The same program under another tag, and a child of the shell that starts windfarm."""
    other = subprocess.Popen(["sleep", "60"], env={**os.environ, "WINDFARM_INSTANCE": "another"})
    try:
        windfarm(tmp_path / "home", ["down"], check=False)
        assert other.poll() is None
        found = find_process(other.pid)
        assert found is not None
        assert found.is_alive
    finally:
        other.kill()
        other.wait()


def describe(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip()[:80]


def state_of(pid: int) -> list[str]:
    """State of the process and of each of its threads, for the message of a failure."""
    try:
        files = [Path(f"/proc/{pid}/stat"), *Path(f"/proc/{pid}/task").glob("*/stat")]
        return [" ".join(file.read_text().rpartition(")")[2].split()[:2]) for file in files]
    except OSError:
        return ["gone meanwhile"]


def assert_port_is_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))
