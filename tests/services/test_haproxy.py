"""Several relays behind HAProxy: they share the load, come and go, and clients notice nothing."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from cluster.engine import GenerationChunk
from services.discovery import RELAY_APP, ReplicaEndpoint, encode_beat
from services.haproxy import Haproxy
from services.haproxy_config import haproxy_config
from services.limits import Limits
from services.listener import bind_socket
from services.preflight import demands
from services.ray_config import parse_ray_config
from tests.services.harness import (
    BookCalls,
    Running,
    ScriptedEngine,
    chat_body,
    error_of,
    events_of,
    running_endpoint,
    wait_until,
    words,
)

ROOT = Path(__file__).resolve().parents[2]


def test_each_relay_is_a_server_and_the_sockets_number_stands_in_the_file() -> None:
    text = haproxy_config(7, [("b", "http://127.0.0.1:5002"), ("a", "http://[::1]:5001")])
    assert "bind fd@7" in text
    servers = [line.split()[1:3] for line in text.splitlines() if line.strip().startswith("server ")]
    assert servers == [["a", "[::1]:5001"], ["b", "127.0.0.1:5002"]]


def test_a_balancer_is_one_more_process_and_only_where_it_is_asked_for(tmp_path: Path) -> None:
    text = (ROOT / "ray_config.yaml").read_text(encoding="utf-8")
    wanted = {
        balancer: [each.deployment for each in demands(parse_ray_config(changed, ROOT / "ray_config.yaml"), tmp_path)]
        for balancer in ("kernel", "haproxy")
        if (changed := text.replace("balancer: kernel ", f"balancer: {balancer} "))
    }
    assert [name for name in wanted["haproxy"] if name not in wanted["kernel"]] == ["Balancer"]


class Front:
    """HAProxy before relays that share database and limiter."""

    def __init__(self, haproxy: Haproxy, url: str, relays: list[Running], client: httpx.AsyncClient) -> None:
        self.haproxy = haproxy
        self.url = url
        self.relays = relays
        self.http = client

    def servers(self) -> list[tuple[str, str]]:
        return [(f"relay{number}", relay.url) for number, relay in enumerate(self.relays)]

    async def chat(self, **fields: object) -> httpx.Response:
        return await self.http.post("/v1/chat/completions", json=chat_body(**fields))


@asynccontextmanager
async def front(folder: Path, *engines: ScriptedEngine) -> AsyncIterator[Front]:
    """A relay for each engine, which is the only one that it sees."""
    limiter = BookCalls()
    async with AsyncExitStack() as stack:
        relays = [
            await stack.enter_async_context(running_endpoint(folder, engine, limiter=limiter)) for engine in engines
        ]
        sock = bind_socket("127.0.0.1", 0)
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        haproxy = Haproxy(sock, [(f"relay{number}", relay.url) for number, relay in enumerate(relays)], folder)
        stack.callback(haproxy.stop)
        headers = {"authorization": f"Bearer {relays[0].key}"} if relays else {}
        client = httpx.AsyncClient(base_url=url, headers=headers, timeout=60, trust_env=False)
        await stack.enter_async_context(client)
        yield Front(haproxy, url, relays, client)


async def until_served(client: httpx.AsyncClient) -> None:
    async def is_served() -> bool:
        try:
            return (await client.get("/health")).status_code == 200
        except httpx.TransportError:
            return False

    await wait_until(is_served)


@pytest.mark.integration
@pytest.mark.requires("haproxy")
async def test_relays_share_the_streams_and_their_bytes_come_as_they_are(tmp_path: Path) -> None:
    go_on = asyncio.Event()
    engines = [ScriptedEngine(GenerationChunk((9,), "Hel"), go_on, *words("lo")) for _ in range(3)]
    async with front(tmp_path, *engines) as before:
        await until_served(before.http)
        asked = [asyncio.create_task(before.chat(stream=True)) for _ in range(12)]
        await wait_until(lambda: sum(len(engine.requests) for engine in engines) == 12)
        assert [len(engine.requests) for engine in engines] == [4, 4, 4]
        go_on.set()
        for answer in await asyncio.gather(*asked):
            *_, last_text, _, done = events_of(answer.text)
            assert (last_text["choices"][0]["delta"]["content"], done) == ("lo", "[DONE]")


@pytest.mark.integration
@pytest.mark.requires("haproxy")
async def test_limits_are_exact_behind_it(tmp_path: Path) -> None:
    async with front(tmp_path, *(ScriptedEngine(*words("x")) for _ in range(2))) as before:
        await until_served(before.http)
        owner = before.relays[0].accounts.owner_id()
        assert owner is not None
        key = before.relays[0].accounts.create_key(owner, "limited", Limits(requests_per_minute=13))
        headers = {"authorization": f"Bearer {key}"}
        url = "/v1/chat/completions"
        answers = await asyncio.gather(*(before.http.post(url, json=chat_body(), headers=headers) for _ in range(40)))
    statuses = [answer.status_code for answer in answers]
    assert (statuses.count(200), statuses.count(429)) == (13, 27)


@pytest.mark.integration
@pytest.mark.requires("haproxy")
async def test_a_relay_that_is_gone_fails_no_request_and_one_that_leaves_the_list_ends_its_streams(
    tmp_path: Path,
) -> None:
    go_on = asyncio.Event()
    engines = [ScriptedEngine(GenerationChunk((9,), "Hel"), go_on, *words("lo")), ScriptedEngine(*words("x"))]
    async with front(tmp_path, *engines) as before:
        await until_served(before.http)
        waiting = [asyncio.create_task(before.chat(stream=True)) for _ in range(2)]
        await wait_until(lambda: engines[0].requests)
        gone = bind_socket("127.0.0.1", 0)  # nobody listens there
        nobody = ("relay2", f"http://127.0.0.1:{gone.getsockname()[1]}")
        assert before.haproxy.share_among([before.servers()[1], nobody])
        assert not before.haproxy.share_among([before.servers()[1], nobody])
        num_before = len(engines[0].requests)
        await wait_until(lambda: len(psutil.Process(before.haproxy.pid).children()) == 2)
        async with httpx.AsyncClient(base_url=before.url, headers=before.http.headers, trust_env=False) as fresh:
            for _ in range(20):
                answer = await fresh.post("/v1/chat/completions", json=chat_body())
                assert answer.status_code == 200, answer.text
        assert len(engines[0].requests) == num_before
        go_on.set()
        assert all(events_of(answer.text)[-1] == "[DONE]" for answer in await asyncio.gather(*waiting))
        gone.close()


@pytest.mark.integration
@pytest.mark.requires("haproxy")
async def test_a_client_that_leaves_cancels_its_generation_through_it(tmp_path: Path) -> None:
    engine = ScriptedEngine(GenerationChunk((1,), "Hel"), asyncio.Event())
    async with front(tmp_path, engine) as before:
        await until_served(before.http)
        async with before.http.stream("POST", "/v1/chat/completions", json=chat_body(stream=True)) as answer:
            await read_until(answer, "Hel")
        await asyncio.wait_for(engine.was_closed.wait(), 10)


async def read_until(answer: httpx.Response, text: str) -> None:
    async for line in answer.aiter_lines():
        if text in line:
            return
    raise AssertionError(f"{text} did not come")


@pytest.mark.integration
@pytest.mark.requires("haproxy")
async def test_without_a_relay_clients_hear_to_try_again(tmp_path: Path) -> None:
    async with front(tmp_path) as before:
        refused = await before.chat()
        assert (refused.status_code, error_of(refused)["code"]) == (503, "no_relay")
        assert refused.headers["retry-after"] == "1"


@pytest.mark.integration
@pytest.mark.requires("haproxy")
def test_a_killed_parent_leaves_no_balancer_behind(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from services.haproxy import Haproxy;"
        "from services.listener import bind_socket; sock = bind_socket('127.0.0.1', 0);"
        "print(Haproxy(sock, [], Path(sys.argv[1])).pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        master = psutil.Process(int(parent.stdout.readline()))
        family = [master, *master.children()]
        os.kill(parent.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive


async def test_relays_share_the_slots_of_a_model(tmp_path: Path) -> None:
    go_on = asyncio.Event()
    engine = ScriptedEngine(go_on, *words("x"))  # four slots: two for each relay, and one request that waits there
    async with running_endpoint(tmp_path, engine) as running:
        for number in range(2):
            relay = ReplicaEndpoint(f"relay{number}", RELAY_APP, running.url, os.getpid())
            running.beats.put(relay.key, encode_beat(relay))
        await running.directory.refresh()
        asked = [asyncio.create_task(running.chat()) for _ in range(7)]

        async def four_wait() -> bool:
            return 'windfarm_waiting{model="tiny"} 4.0' in (await running.http.get("/metrics")).text

        await wait_until(lambda: len(engine.requests) >= 3)
        await wait_until(four_wait)
        assert len(engine.requests) == 3
        go_on.set()
        assert [answer.status_code for answer in await asyncio.gather(*asked)] == [200] * 7
