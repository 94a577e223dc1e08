"""A complete ingestion on a folder of its own, with the real vector store, database and parser, and an embedder that
needs no model: words are hashed into vectors, so equal texts have equal vectors and common words bring texts near."""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rag.parsing import ParseLimits
from rag.read_write_lock import ReadWriteLock
from rag.types import Vectors
from rag.vector_store import VectorStore, open_vector_store
from services.blobs import Blobs
from services.config import IngestionConfig
from services.database import Database, User
from services.ingestion import IngestionService
from services.journal import Journal
from services.knowledge import Knowledge
from services.parser_pool import ParserPool
from services.reconciler import ReconcileReport, reconcile
from services.schema import upgrade
from tests.seen import seen

OWNER = "user_owner"
CONFIG = IngestionConfig(chunk_tokens=64, chunk_overlap_tokens=8, parse_timeout_s=30)


class HashEmbedder:
    def __init__(self, model_name: str = "hash", dimension: int = 32) -> None:
        self.model_name = model_name
        self.dimension = dimension
        self.num_texts = 0
        self.gate = asyncio.Event()
        self.gate.set()

    async def embed_queries(self, texts: Sequence[str]) -> Vectors:
        return self.vectors(texts)

    def vectors(self, texts: Sequence[str]) -> Vectors:
        return np.stack([self._vector(text) for text in texts])

    async def embed_passages(self, texts: Sequence[str]) -> Vectors:
        await self.gate.wait()
        self.num_texts += len(texts)
        return await self.embed_queries(texts)

    async def call(self, method: str, /, *args: Any, **kwargs: Any) -> Any:
        """The cross-encoder beside it likes best what comes last."""
        assert method == "rerank"
        return list(range(len(args[1])))

    def _vector(self, text: str) -> Any:
        vector = np.full(self.dimension, 1e-3, dtype=np.float32)
        for word in re.findall(r"\w+", text.lower()):
            vector[int(hashlib.sha256(word.encode()).hexdigest(), 16) % self.dimension] += 1
        return vector / np.linalg.norm(vector)


def word_spans(text: str) -> list[tuple[int, int]]:
    return [found.span() for found in re.finditer(r"\w+|[^\w\s]", text)]


@dataclass
class Running:
    """One windfarm's knowledge, as far as it needs no Ray."""

    home: Path
    database: Database
    store: VectorStore
    journal: Journal
    knowledge: Knowledge
    service: IngestionService
    embedder: HashEmbedder
    blobs: Blobs
    report: ReconcileReport

    async def ingest(self, collection: str, name: str, content: str | bytes) -> dict[str, Any]:
        data = content.encode() if isinstance(content, str) else content
        job = await self.service.submit(collection, name, data, OWNER)
        return await self.service.wait_for_job(job["id"], OWNER, timeout_s=60)

    def create(self, name: str = "handbook") -> str:
        made = self.knowledge.create_collection(
            name, "", OWNER, embedding_model=self.embedder.model_name, dimension=self.embedder.dimension
        )
        return str(made["name"])

    def found(self, collection: str, text: str) -> list[str]:
        """Texts that a search by words finds."""
        index_id = self.knowledge.collection(collection, OWNER).index_id
        return [
            hit.chunk.text for hit in seen(self.store, index_id).search([index_id], vector=None, text=text, limit=20)
        ]

    def check_agreement(self) -> None:
        """A second look must find nothing to do."""
        report = reconcile(self.database, self.store, self.journal, self.blobs)
        assert report.agreed and report.num_replayed == 0, report
        states = self.store.list_versions()
        assert all(state.is_active for state in states.values())
        assert sum(state.num_points for state in states.values()) == report.num_passages


@asynccontextmanager
async def running(
    home: Path,
    *,
    embedder: HashEmbedder | None = None,
    config: IngestionConfig = CONFIG,
    url: str | None = None,
    num_replicas: int = 1,
) -> AsyncIterator[Running]:
    """`url`: of the database; a file in `home` where it is None. `num_replicas`: of the embedding model, as far as the
    ingestion is told."""
    url = url or f"sqlite:///{home / 'windfarm.db'}"
    upgrade(url)
    database = Database(url)
    _ensure_owner(database)
    store = open_vector_store(home / "qdrant", lock_timeout_s=10)
    blobs = Blobs(home / "blobs", home)
    journal = Journal(database, store, ReadWriteLock(), blobs.originals)
    report = reconcile(database, store, journal, blobs)
    limits = ParseLimits(timeout_s=config.parse_timeout_s, memory_bytes=config.parse_memory_mib << 20)
    parsers = ParserPool(limits, config.parallel_parsers)
    embedder = embedder or HashEmbedder()
    service = IngestionService(
        database=database,
        store=store,
        journal=journal,
        embedder=embedder,
        token_spans=word_spans,
        parsers=parsers,
        blobs=blobs,
        config=config,
        num_replicas=lambda: num_replicas,
    )
    await service.start()
    try:
        yield Running(home, database, store, journal, Knowledge(database), service, embedder, blobs, report)
    finally:
        await service.stop()
        parsers.close()
        with journal.turn:
            store.close()
        database.close()


def _ensure_owner(database: Database) -> None:
    with database.write() as session:
        if session.get(User, OWNER) is None:
            session.add(User(id=OWNER, name="owner", role="owner"))
