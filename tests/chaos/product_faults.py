"""Faults of the running product's processes, each killed with SIGKILL: Ray Serve or `windfarm up` brings them back.

One product serves all trials of a campaign; the head's trials come last, because each ends it.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.chaos.faults import Fault, Heard, Outcome, hear, until
from tests.chaos.streams import difference, read_events
from tests.product import Product, windfarm

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Tell a long story."}], "temperature": 0}
# Nobody ends an answer early: the ids that would are forbidden.
ENDLESS = {"logit_bias": {"0": -100, "2": -100}}
LONG = {"stream": True, "max_tokens": 250, "stream_options": {"include_usage": True}, **ENDLESS}
ONE_TOKEN = {"model": "tiny", "prompt": "One", "max_tokens": 1}
LIMIT_S = 90.0


def faults(product: Product) -> list[Fault]:
    return [
        Fault("replica process of the product killed", 25, partial(kill_the_model, product)),
        Fault("embedding process of the product killed", 30, partial(kill_the_embedding, product)),
        Fault("store owner", 30, partial(kill_the_store, product)),
        Fault("relay", 30, partial(kill_the_relay, product)),
        Fault("limiter of keys", 10, partial(kill_the_limiter, product)),
        Fault("head", 90, partial(kill_the_head, product), num_trials=3),
    ]


def process_of(home: Path, title: str) -> int:
    """The process with this title of the windfarm on this data folder: others may run on the machine. Of several the
    newest: one that was replaced may still finish its streams."""
    marker = f"WINDFARM_HOME={home}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if title.encode() in (entry / "cmdline").read_bytes() and marker in (entry / "environ").read_bytes():
                found.append((psutil.Process(int(entry.name)).create_time(), int(entry.name)))
        except (OSError, psutil.NoSuchProcess):
            continue
    assert found, f"no process {title} runs"
    return max(found)[1]


@dataclass
class Client:
    product: Product
    http: httpx.AsyncClient

    async def chat(self, **fields: Any) -> Heard:
        return await hear(self.http, CHAT | {"stream": True} | fields)

    async def embed(self) -> httpx.Response:
        return await self.http.post("/v1/embeddings", json={"model": "embed", "input": "Which badge?"})

    async def search(self) -> httpx.Response:
        return await self.http.post("/v1/collections/chaos/search", json={"query": "badge", "top_k": 1})


def client_of(product: Product) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=product.address, headers=product.headers, timeout=LIMIT_S, trust_env=False)


async def until_served(ask: Callable[[], Awaitable[httpx.Response]]) -> tuple[float, list[int]]:
    """Seconds until the answer is 200, and what came before; 0: no connection."""
    started, before = time.monotonic(), []
    while True:
        try:
            status = (await ask()).status_code
        except httpx.TransportError:
            status = 0
        if status == 200:
            return time.monotonic() - started, before
        before.append(status)
        assert time.monotonic() - started < LIMIT_S, f"not served within {LIMIT_S} s: {before[-10:]}"
        await asyncio.sleep(0.1)


async def kill_the_model(product: Product, _folder: Path) -> Outcome:
    """The only replica of a model: its streams wait for the next one and go on there. Computed anew, the best of two
    tokens that are nearly as good may be the other one; what the client had before the kill stands."""
    async with client_of(product) as http:
        client = Client(product, http)
        whole = await client.chat(**LONG)
        heard, victim = Heard(), process_of(product.home, "ServeReplica:llm-tiny")
        asked = asyncio.create_task(hear(http, CHAT | LONG, heard))
        await until(lambda: heard.body.count("data: ") >= 5 or asked.done())
        os.kill(victim, signal.SIGKILL)
        had_ended, had = asked.done(), heard.body[: heard.body.rindex("\n\n") + 2]
        await asked
    if had_ended:
        return Outcome(0.0, "-", f"the answer ended before its process was killed: {heard.body[-300:]!r}")
    if not whole.is_complete or not heard.is_complete:
        return Outcome(heard.longest_silence_s, "-", f"the answer ends with {heard.body[-300:]!r}")
    said, undisturbed, before = read_events(heard.body), read_events(whole.body), read_events(had)
    if not undisturbed.text.startswith(before.text) or said.usage != undisturbed.usage:
        return Outcome(heard.longest_silence_s, "another answer", difference(said, undisturbed))
    return Outcome(heard.longest_silence_s, "the whole answer, after a pause")


async def kill_the_embedding(product: Product, _folder: Path) -> Outcome:
    async with client_of(product) as http:
        client = Client(product, http)
        assert (await client.embed()).status_code == 200
        os.kill(process_of(product.home, "ServeReplica:embed"), signal.SIGKILL)
        chat = await client.chat(max_tokens=5)
        seconds, before = await until_served(client.embed)
    return _judged(seconds, before, chat)


async def kill_the_store(product: Product, _folder: Path) -> Outcome:
    async with client_of(product) as http:
        client = Client(product, http)
        await _make_collection(http)
        os.kill(process_of(product.home, "ServeReplica:store"), signal.SIGKILL)
        chat = await client.chat(max_tokens=5)
        seconds, before = await until_served(client.search)
        found = await client.search()
    outcome = _judged(seconds, before, chat)
    if "yellow badge" not in found.text:
        return Outcome(seconds, outcome.seen, f"a document is lost: {found.text[:200]}")
    return outcome


async def kill_the_relay(product: Product, _folder: Path) -> Outcome:
    """Its connections end with it: a client sees a cut stream, never one that looks complete. New ones wait."""
    async with client_of(product) as http:
        client, heard = Client(product, http), Heard()
        victim = process_of(product.home, "ServeReplica:platform:Gateway")
        asked = asyncio.create_task(hear(http, CHAT | ENDLESS | {"stream": True, "max_tokens": 1500}, heard))
        await until(lambda: heard.body.count("data: ") >= 5 or asked.done())
        os.kill(victim, signal.SIGKILL)
        await asked
        seconds, before = await until_served(client.embed)
        chat = await client.chat(max_tokens=5)
    problem = None
    if heard.is_complete or not heard.was_cut:
        problem = f"the stream was not cut: {heard.body[-200:]!r}"
    elif not chat.is_complete or before:
        problem = f"afterwards: {before}, {chat.status} {chat.body[-200:]}"
    return Outcome(seconds, "the connection ends; new ones wait", problem)


async def kill_the_limiter(product: Product, _folder: Path) -> Outcome:
    """A key with limits hears 503 until it is there again; one without never asks it."""
    new = await asyncio.to_thread(product.run, "key", "--new", "limited", "--requests-per-minute", "9999", "--json")
    headers = {"authorization": f"Bearer {json.loads(new.stdout)['key']}"}
    async with client_of(product) as http:
        client = Client(product, http)

        async def ask() -> httpx.Response:
            return await http.post("/v1/completions", json=ONE_TOKEN, headers=headers)

        assert (await ask()).status_code == 200
        os.kill(process_of(product.home, "ray::Limiter"), signal.SIGKILL)
        killed_at = time.monotonic()
        refused = await ask()
        chat = await client.chat(max_tokens=5)
        _, before = await until_served(ask)
        seconds = time.monotonic() - killed_at
    outcome = _judged(seconds, before, chat)
    if refused.status_code != 503 or "retry-after" not in refused.headers:
        return Outcome(seconds, outcome.seen, f"the limited key heard {refused.status_code} {refused.text[:200]}")
    return outcome


async def kill_the_head(product: Product, _folder: Path) -> Outcome:
    """All ends with it; `windfarm up` starts again with everything that was kept. The time from kill to a token."""
    async with client_of(product) as http:
        await _make_collection(http)
        started = time.monotonic()
        os.kill(process_of_head(product), signal.SIGKILL)
        arguments = ["up", "--detach", "--json", "--port", str(product.port)]
        await until_gone(http)
        up = await asyncio.to_thread(windfarm, product.home, arguments, check=False)
        if up.returncode:
            return Outcome(time.monotonic() - started, "-", up.stderr[-500:])
        chat = await Client(product, http).chat(max_tokens=1)
        seconds = time.monotonic() - started
        found = await Client(product, http).search()
    if not chat.is_complete or "yellow badge" not in found.text:
        return Outcome(seconds, "-", f"afterwards: {chat.status} {chat.body[-200:]} {found.text[:200]}")
    return Outcome(seconds, "no connection until `windfarm up` has run")


def process_of_head(product: Product) -> int:
    from services.control import read_state
    from services.processes import descendants, tagged

    state = read_state(product.home / "run")
    assert state is not None
    ours = {*tagged(state.instance), *descendants(state.guardian_pid)}
    return next(p.pid for p in ours if Path(f"/proc/{p.pid}/comm").read_text().strip() == "gcs_server")


async def until_gone(http: httpx.AsyncClient) -> None:
    """Until nobody listens any more."""
    async with asyncio.timeout(LIMIT_S):
        while True:
            try:
                await http.get("/health")
            except httpx.TransportError:
                return
            await asyncio.sleep(0.1)


async def _make_collection(http: httpx.AsyncClient) -> None:
    made = await http.post("/v1/collections", json={"name": "chaos"})
    if made.status_code == 409:
        return
    file = {"file": ("badges.md", b"Each visitor gets a yellow badge at the gate.")}
    (await http.post("/v1/collections/chaos/documents?wait=true", files=file)).raise_for_status()


def _judged(seconds: float, before: list[int], chat: Heard) -> Outcome:
    problem = None
    if set(before) - {503}:
        problem = f"other answers than 503 before it came back: {sorted(set(before))}"
    elif not chat.is_complete:
        problem = f"a chat that needs none of it did not go on: {chat.status} {chat.body[-200:]}"
    return Outcome(seconds, "503 with Retry-After until it is back; chats go on", problem)
