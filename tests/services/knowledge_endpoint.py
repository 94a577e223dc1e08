"""The public endpoint on the real store in this process: real HTTP, database, vector engine, parser; vectors are hashed
words, so that no model is needed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from cluster.engine import Engine
from services.accounts import Accounts
from services.chat import make_story
from services.config import IngestionConfig, PlatformConfig, StoreConfig
from services.database import Database
from services.knowledge_calls import RemoteSearcher
from services.store_opening import open_store
from services.store_service import StoreService
from tests.services.harness import Running, plain_story, running_endpoint
from tests.services.test_store_service import RemoteHashEmbedder, environment

CONFIG = StoreConfig(ingestion=IngestionConfig(chunk_tokens=64, chunk_overlap_tokens=8))


class InProcessCalls:
    """The store's handle without a process between."""

    def __init__(self) -> None:
        self.service: StoreService | None = None

    async def call(self, method: str, /, *args: Any, **kwargs: Any) -> Any:
        return await getattr(self.service, method)(*args, **kwargs)


@dataclass
class KnowledgeEndpoint:
    home: Path
    url: str
    key: str
    owner_id: str
    http: httpx.AsyncClient
    database: Database
    service: StoreService
    running: Running

    async def ingest(self, collection: str, name: str, content: str | bytes) -> str:
        """The id of the document."""
        data = content.encode() if isinstance(content, str) else content
        job = await self.service.submit_document(collection, name, data, self.owner_id)
        job = await self.service.wait_for_job(job["id"], self.owner_id)
        assert job["state"] == "done", job
        return str(job["document_id"])

    async def member_key(self, name: str) -> str:
        """The key of a new user who owns nothing."""
        accounts = Accounts(self.database)
        return await asyncio.to_thread(lambda: accounts.create_key(accounts.create_user(name), name))


@asynccontextmanager
async def knowledge_endpoint(
    home: Path,
    *engines: Engine,
    config: PlatformConfig | None = None,
    database_url: str | None = None,
) -> AsyncIterator[KnowledgeEndpoint]:
    """`engines` answer from documents. `database_url`: a file in `home` where it is None."""
    calls = InProcessCalls()
    around = environment(home, database_url)
    settings = config or PlatformConfig()
    told = make_story(settings, RemoteSearcher(calls, settings.retrieval), None) if engines else plain_story
    async with running_endpoint(
        home, *engines, story=told, config=config, store=calls, database_url=around.database_url
    ) as running:
        parts = await asyncio.to_thread(open_store, CONFIG, around)
        calls.service = service = StoreService(parts, RemoteHashEmbedder())
        await service.start()
        owner = running.accounts.owner_id()
        assert owner is not None
        try:
            yield KnowledgeEndpoint(
                home, running.url, running.key, owner, running.http, running.database, service, running
            )
        finally:
            await service.close()
