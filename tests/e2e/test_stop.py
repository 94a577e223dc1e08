"""However it ends, nothing of ours is left running, the port is free, and no document is lost.

The last of the end-to-end tests: one windfarm after the other runs on the product's own data folder, each is ended in
another way, and each finds the documents of those before it. Meanwhile a second windfarm, started by hand, goes on.
"""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from services.accounts import Accounts
from services.config import StoreConfig
from services.control import RunState, read_state
from services.environment import read_environment
from services.knowledge import Knowledge
from services.processes import Process, descendants, end_with_parent, find_process, tagged
from services.store_opening import open_store
from tests.e2e.by_hand import ByHand, serve_by_hand
from tests.e2e.test_closed import ESTABLISHED, LISTEN, sockets_of
from tests.product import ROOT, WINDFARM, Product, free_port, link_models, logs, windfarm

pytestmark = [pytest.mark.e2e, pytest.mark.ends_product]

# A busy machine; the tests wait for events, this is only where they give up.
GONE_S = 60
ONE_RELAY = "num_replicas: 1             # processes that share the port"


@dataclass
class Life:
    """One run of a windfarm. `starter` is the `windfarm up` that a person would have in a terminal, if there is one."""

    state: RunState
    home: Path
    key: str
    starter: "subprocess.Popen[str] | None" = None

    def processes(self) -> list[Process]:
        """By tag and by descent: the parser process gets none of our environment, so it has no tag."""
        return list({*tagged(self.state.instance), *descendants(self.state.guardian_pid)})

    def find(self, name: str) -> Process:
        """The one process of ours with this name."""
        (found,) = [p for p in self.processes() if Path(f"/proc/{p.pid}/comm").read_text().strip() == name]
        return found

    def serving(self) -> list[str]:
        """What the processes are called that hold a connection to the public port, while a client waits there."""
        port = self.state.port
        with httpx.Client(base_url=self.state.api, trust_env=False) as client:
            client.get("/v1/models", headers={"Authorization": f"Bearer {self.key}"}).raise_for_status()
            ends = {s.pid for s in sockets_of(self.processes()) if (s.local[1], s.state) == (port, ESTABLISHED)}
            return [Path(f"/proc/{pid}/comm").read_text().strip() for pid in ends]

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


def detached(product: Product) -> Life:
    state = read_state(product.home / "run")
    assert state is not None
    return Life(state, product.home, product.key)


@contextmanager
def foreground(home: Path, key: str, config: Path = ROOT / "ray_config.yaml") -> Iterator[Life]:
    command = [str(WINDFARM), "up", "--json", "--home", str(home), "--port", str(free_port()), "--config", str(config)]
    errors = home.with_name("up.err")
    with errors.open("w") as file:
        starter = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
            preexec_fn=partial(end_with_parent, os.getpid()),
        )
    try:
        assert starter.stdout is not None
        line = starter.stdout.readline()
        assert line, errors.read_text() + logs(home)
        assert json.loads(line)["key"] == key
        state = read_state(home / "run")
        assert state is not None
        yield Life(state, home, key, starter)
    finally:
        starter.kill()
        starter.wait()
        if read_state(home / "run") is not None:
            windfarm(home, ["down"], check=False)


def press_ctrl_c(life: Life) -> None:
    assert life.starter is not None
    life.starter.send_signal(signal.SIGINT)


def down(life: Life) -> None:
    windfarm(life.home, ["down"])


def kill_the_starter(life: Life) -> None:
    assert life.starter is not None
    life.starter.kill()


def kill_rays_head(life: Life) -> None:
    life.find("gcs_server").signal(signal.SIGKILL)


def kill_the_guardian(life: Life) -> None:
    """The worst case: nobody is left to clean up, so `down` has to find everything by its tag."""
    assert life.starter is not None
    life.state.guardian.signal(signal.SIGKILL)
    life.starter.wait(GONE_S)
    windfarm(life.home, ["down"], check=False)


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ByHand]:
    with serve_by_hand(tmp_path_factory.mktemp("by-hand") / "home") as running:
        running.wait_until_ready()
        yield running


def test_plain_serve_run_in_the_printed_environment_answers_beside_the_product(
    by_hand: ByHand, product: Product
) -> None:
    answer = httpx.post(
        f"{by_hand.address}/v1/chat/completions",
        headers={"Authorization": f"Bearer {by_hand.key}"},
        json={"model": "tiny", "messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 8},
        timeout=120,
    )
    assert answer.json()["choices"][0]["message"]["content"]
    assert httpx.get(f"{product.address}/ready", timeout=10).status_code == 200


def test_a_model_that_needs_too_much_memory_is_pending_with_the_reason(product: Product, tmp_path: Path) -> None:
    """Here, because Serve takes half a minute to give up a replica that never started: the product ends with it."""
    edited = tmp_path / "edited.yaml"
    text = (ROOT / "ray_config.yaml").read_text(encoding="utf-8")
    huge = (
        "  - {name: llm-huge, route_prefix: null, import_path: 'services.app:build_model', "
        "args: {id: huge, source: tiny, memory_gib: 9000}}\n"
    )
    edited.write_text(text.replace("applications:\n", f"applications:\n{huge}", 1), encoding="utf-8")
    answer = product.run("apply", "--config", str(edited), "--timeout", "2", check=False)
    assert answer.returncode == 1
    deadline = time.monotonic() + 60
    pending: list[dict[str, Any]] = []
    while not pending and time.monotonic() < deadline:
        pending = json.loads(product.run("status", "--json").stdout)["pending"]
    assert [(item["application"], item["deployment"]) for item in pending] == [("llm-huge", "ModelServer")]
    assert "needs 9000.0 GiB memory" in pending[0]["reason"]
    shown = " ".join(product.run("status").stdout.split())  # lines are cut where the terminal ends
    assert "pending: llm-huge/ModelServer (1): needs 9000.0 GiB memory" in shown


@pytest.mark.timeout(600)
def test_two_windfarms_run_side_by_side_and_ctrl_c_ends_only_its_own(
    product: Product, by_hand: ByHand, tmp_path: Path
) -> None:
    home = tmp_path / "second" / "home"
    link_models(home)
    key = windfarm(home, ["key"]).stdout.strip()
    first = detached(product)
    with foreground(home, key) as second:
        assert {first.state.port, first.state.instance}.isdisjoint({second.state.port, second.state.instance})
        assert {process.pid for process in first.processes()}.isdisjoint({p.pid for p in second.processes()})
        first.upload("first.txt", "A document of the first windfarm.")
        end_life(second, press_ctrl_c, [], by_hand)
    assert httpx.get(f"{product.address}/ready", timeout=60).status_code == 200
    assert first.documents() == ["first.txt"]
    assert documents_of(home) == ["press_ctrl_c.txt"]


@pytest.mark.timeout(600)
def test_nothing_survives_no_document_is_lost_and_another_windfarm_goes_on(
    product: Product, by_hand: ByHand, tmp_path: Path
) -> None:
    uploaded = detached(product).documents()
    end_life(detached(product), down, uploaded, by_hand)
    balanced = tmp_path / "balanced.yaml"
    text = (ROOT / "ray_config.yaml").read_text(encoding="utf-8")
    text = text.replace("balancer: kernel ", "balancer: haproxy ")
    balanced.write_text(text.replace(ONE_RELAY, ONE_RELAY.replace("1", "2")), encoding="utf-8")
    # HAProxy takes the port over and knows nothing of a guardian: the hardest ends are tried with it.
    ways: list[tuple[Callable[[Life], None], Path]] = [
        (kill_the_starter, ROOT / "ray_config.yaml"),
        (kill_rays_head, balanced),
        (kill_the_guardian, balanced),
    ]
    for end, config in ways:
        with foreground(product.home, product.key, config) as life:
            assert life.documents() == sorted(uploaded)
            assert {name == "haproxy" for name in life.serving()} == {config == balanced}
            if end is kill_rays_head:
                assert_two_relays_share_and_let_in_exactly_the_limit(life)
            end_life(life, end, uploaded, by_hand)
    assert documents_of(product.home) == sorted(uploaded)


def assert_two_relays_share_and_let_in_exactly_the_limit(life: Life) -> None:
    """Here, because HAProxy stands before relays in no other product."""
    made = windfarm(life.home, ["key", "--new", "limited", "--requests-per-minute", "7", "--json"])
    limited = {"Authorization": f"Bearer {json.loads(made.stdout)['key']}"}
    body = {"model": "tiny", "prompt": "One", "max_tokens": 1}

    def ask(_: int) -> int:
        url = f"{life.state.api}/v1/completions"
        return httpx.post(url, json=body, headers=limited, timeout=GONE_S, trust_env=False).status_code

    # HAProxy looks after each relay that it knows.
    wait_until(lambda: len(counts := requests_of_relays(life, "/health")) == 2 and all(counts))
    with ThreadPoolExecutor(20) as threads:
        answers = list(threads.map(ask, range(20)))
    assert (answers.count(200), answers.count(429)) == (7, 13)
    wait_until(lambda: sum(requests_of_relays(life, "/v1/completions")) == 20)  # counted when they have ended
    assert all(requests_of_relays(life, "/v1/completions"))


def requests_of_relays(life: Life, route: str) -> list[float]:
    """How many each relay has answered, from its own port."""
    relays = [process for process in life.processes() if "ServeReplica:platform:Gateway" in describe(process.pid)]
    ports = [socket.local[1] for socket in sockets_of(relays) if socket.state == LISTEN]
    headers = {"Authorization": f"Bearer {life.key}"}
    told = []
    for port in ports:
        with contextlib.suppress(httpx.RemoteProtocolError):  # Ray's own port, which speaks something else
            told.append(httpx.get(f"http://127.0.0.1:{port}/metrics", headers=headers, trust_env=False).text)
    counts = rf'^windfarm_requests_total{{.*route="{route}".*}} ([\d.]+)$'
    return [sum(map(float, re.findall(counts, text, re.MULTILINE))) for text in told]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + GONE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def documents_of(home: Path) -> list[str]:
    """The documents of a windfarm that does not run; its database and its vector store have to agree."""
    environment = read_environment({"WINDFARM_HOME": str(home), "WINDFARM_INTERNAL_SECRET": "none"})
    parts = open_store(StoreConfig(), environment)
    try:
        assert parts.report.agreed, parts.report
        owner = Accounts(parts.database).owner_id()
        assert owner is not None
        return sorted(document["name"] for document in Knowledge(parts.database).list_documents("kept", owner))
    finally:
        parts.vectors.close()
        parts.database.close()


def end_life(life: Life, end: Callable[[Life], None], uploaded: list[str], other: ByHand) -> None:
    """Upload one more document, end this life, and look at what is left of it."""
    name = f"{end.__name__}.txt"
    life.upload(name, f"Kept although the end was: {end.__name__}.")
    uploaded.append(name)
    ours = life.processes()
    assert len(ours) >= 8
    names = {process.pid: describe(process.pid) for process in ours}
    assert any("rag.parser_process" in name for name in names.values())
    end(life)
    left = [f"{names[process.pid]} {state_of(process.pid)}" for process in ours if not process.wait(GONE_S)]
    assert left == [], end.__name__
    assert life.processes() == [], end.__name__
    assert_port_is_free(life.state.port)
    assert other.is_ready(), end.__name__


def test_ctrl_c_ends_all_that_serve_run_has_started(by_hand: ByHand) -> None:
    ours = by_hand.processes()
    assert len(ours) >= 8
    names = {process.pid: describe(process.pid) for process in ours}
    by_hand.press_ctrl_c()
    assert [names[process.pid] for process in ours if not process.wait(GONE_S)] == []
    assert by_hand.processes() == []
    assert_port_is_free(by_hand.port)


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
