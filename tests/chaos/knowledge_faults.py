"""Faults below the knowledge base, through the public endpoint with the real store in this process: the database locked
or damaged, the embedding model and the Qdrant server away. Chats that need none of it go on."""

from __future__ import annotations

import asyncio
import sqlite3
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
from qdrant_client import QdrantClient
from qdrant_client.http.exceptions import ResponseHandlingException

from rag.errors import EmbedderUnavailable
from rag.vector_store_server import ServerVectorStore
from services import database as database_module
from tests.chaos.faults import Fault, Outcome, hear, seconds_of
from tests.chaos.hash_engine import HashEngine
from tests.chaos.postgres import Postgres
from tests.services.harness import error_of, running_endpoint
from tests.services.knowledge_endpoint import KnowledgeEndpoint, knowledge_endpoint

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "stream": True, "max_tokens": 20}
BUSY_S = database_module._BUSY_TIMEOUT_MS / 1000
TEXT = "Each visitor gets a yellow badge at the gate."


def faults(quick: bool) -> list[Fault]:
    busy_s = 0.3 if quick else BUSY_S
    return [
        Fault("database gone", 5, lose_the_database, needs="postgres"),
        # One after the other: writers wait in the few threads of this process, as a relay's do in its own.
        Fault("database locked", 2 * busy_s + 5, partial(lock_the_database, busy_s=busy_s)),
        Fault("database damaged", 5, damage_the_database),
        Fault("embedding service away", 5, partial(take_away, what="embedding")),
        Fault("Qdrant server unreachable", 5, partial(take_away, what="qdrant")),
    ]


@asynccontextmanager
async def with_a_document(folder: Path) -> AsyncIterator[KnowledgeEndpoint]:
    async with knowledge_endpoint(folder) as windfarm:
        await windfarm.running.add_model(HashEngine())
        (await windfarm.http.post("/v1/collections", json={"name": "rules"})).raise_for_status()
        await windfarm.ingest("rules", "badges.md", TEXT)
        yield windfarm


async def search(windfarm: KnowledgeEndpoint) -> httpx.Response:
    body = {"query": "Which badge do visitors get?", "top_k": 1}
    return await windfarm.http.post("/v1/collections/rules/search", json=body)


async def keep(windfarm: KnowledgeEndpoint) -> httpx.Response:
    """A request that has to write."""
    return await windfarm.http.post("/v1/conversations", json={"title": "kept"})


async def lock_the_database(folder: Path, *, busy_s: float) -> Outcome:
    """Somebody else holds the write lock for longer than anybody waits. Ten writers wait at once."""
    with mock.patch.object(database_module, "_BUSY_TIMEOUT_MS", int(busy_s * 1000)):
        async with with_a_document(folder) as windfarm:
            other = sqlite3.connect(folder / "windfarm.db", isolation_level=None, check_same_thread=False)
            other.execute("BEGIN IMMEDIATE")
            try:
                writers = [asyncio.create_task(seconds_of(keep(windfarm))) for _ in range(10)]
                chat = await hear(windfarm.http, CHAT)
                found = await search(windfarm)
                refused = await asyncio.gather(*writers)
            finally:
                other.execute("ROLLBACK")
                other.close()
            after = await keep(windfarm)
    problem = None
    if not chat.is_complete or found.status_code != 200:
        problem = f"reading did not go on: chat {chat.status}, search {found.status_code}"
    elif why := _why_not_refused([answer for _, answer in refused], "database_unavailable"):
        problem = why
    elif after.status_code != 201:
        problem = f"after the lock: {after.status_code} {after.text}"
    return Outcome(max(seconds for seconds, _ in refused), "503 database_unavailable for what writes", problem)


async def lose_the_database(folder: Path) -> Outcome:
    """PostgreSQL crashes and comes back; the time from then until something is written."""
    postgres = await asyncio.to_thread(Postgres)
    try:
        await asyncio.to_thread(postgres.start)
        async with running_endpoint(folder, HashEngine(), database_url=postgres.url) as running:
            body = {"title": "kept"}
            kept = await running.http.post("/v1/conversations", json=body)
            await asyncio.to_thread(postgres.crash)
            refused = [await running.http.post("/v1/conversations", json=body) for _ in range(3)]
            chat = await hear(running.http, CHAT)
            await asyncio.to_thread(postgres.start)
            seconds, after = await seconds_of(running.http.post("/v1/conversations", json=body))
            listed = (await running.http.get("/v1/conversations")).json()["data"]
    finally:
        await asyncio.to_thread(postgres.close)
    problem = _why_not_refused(refused, "database_unavailable")
    if problem is None and not chat.is_complete:
        problem = f"a chat that keeps nothing did not go on: {chat.status} {chat.body[-200:]}"
    if problem is None and sorted(item["id"] for item in listed) != sorted(c.json()["id"] for c in (kept, after)):
        problem = f"afterwards there are {listed}"
    return Outcome(seconds, "503 database_unavailable for what is kept", problem)


async def damage_the_database(folder: Path) -> Outcome:
    """The file has become garbage. What reads it is refused in a sentence; what is in memory is right or refused."""
    async with with_a_document(folder) as windfarm:
        windfarm.database.close()  # connections keep pages; new ones read the file
        windfarm.running.database.close()
        for name in ("windfarm.db", "windfarm.db-wal"):
            file = folder / name
            if file.exists():
                file.write_bytes(b"\xff" * file.stat().st_size)
        started = time.monotonic()
        answers = [await keep(windfarm), await search(windfarm), await windfarm.http.get("/v1/collections")]
        seconds = time.monotonic() - started
    refused = [answer for answer in answers if answer.status_code != 200]
    problem = _why_not_refused(refused, "database_unavailable")
    if problem is None and (answers[0] not in refused or (answers[1] not in refused and TEXT not in answers[1].text)):
        problem = f"something was made up: {[answer.text[:200] for answer in answers]}"
    return Outcome(seconds, "503 database_unavailable", problem)


async def take_away(folder: Path, *, what: str) -> Outcome:
    """The time from the moment when it is back until a search answers again."""
    with _server() if what == "qdrant" else _nothing() as server:
        async with with_a_document(folder) as windfarm:
            with _away(windfarm, server):
                refused = [await search(windfarm) for _ in range(3)]
                chat = await hear(windfarm.http, CHAT)
                upload = asyncio.create_task(windfarm.ingest("rules", "later.md", "Keys are at the desk."))
                await asyncio.sleep(0.1)
                was_waiting = not upload.done()
            back_at = time.monotonic()
            found = await search(windfarm)
            seconds = time.monotonic() - back_at
            await upload
    problem = _why_not_refused(refused, "embedding_unavailable" if what == "embedding" else "store_unavailable")
    if problem is None and not chat.is_complete:
        problem = f"a chat without documents did not go on: {chat.status} {chat.body[-200:]}"
    if problem is None and (found.status_code != 200 or TEXT not in found.text):
        problem = f"afterwards: {found.status_code} {found.text[:200]}"
    if problem is None and not was_waiting:
        problem = "the upload did not wait for it"
    return Outcome(seconds, "503 for searches; uploads wait", problem)


def _why_not_refused(answers: list[httpx.Response], code: str) -> str | None:
    for answer in answers:
        if answer.status_code != 503 or error_of(answer)["code"] != code or "retry-after" not in answer.headers:
            return f"{answer.request.url.path}: {answer.status_code} {answer.text[:200]}, expected 503 {code}"
    return None


class _Server:
    """A Qdrant in memory, reached through a client whose connection can be cut."""

    def __init__(self) -> None:
        self._real = QdrantClient(":memory:")
        self.is_away = False

    def __getattr__(self, name: str) -> Any:
        if self.is_away:
            raise ResponseHandlingException(ConnectionError("connection refused"))
        return getattr(self._real, name)


@contextmanager
def _server() -> Any:
    server = _Server()
    store = ServerVectorStore(server, [])  # type: ignore[arg-type]
    with (
        mock.patch("services.store_opening.open_vector_store", lambda *_, **__: store),
        mock.patch("services.ingest_worker._FIRST_RETRY_S", 0.05),
    ):
        yield server


@contextmanager
def _nothing() -> Any:
    with mock.patch("services.passage_writer._RETRY_S", 0.05):
        yield None


@contextmanager
def _away(windfarm: KnowledgeEndpoint, server: _Server | None) -> Any:
    if server is not None:
        server.is_away = True
        try:
            yield
        finally:
            server.is_away = False
        return

    async def fail(*_: object) -> None:
        raise EmbedderUnavailable("It restarts.")

    embedder: Any = windfarm.service._embedder
    embedder.num_failures = sys.maxsize  # not a patched method: jobs keep the one that they began with
    try:
        with mock.patch.object(embedder, "embed_queries", fail):
            yield
    finally:
        embedder.num_failures = 0
