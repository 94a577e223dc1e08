"""Everything behind the store's handle, without Ray: collections, documents, jobs, search, on one data folder.

Opening migrates the database, waits for the vector store's folder (a predecessor may still hold it), refuses an empty
folder where the database knows passages, and brings both to agreement. `actor` is a user id everywhere.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from sqlalchemy import select

from rag.chunking import TokenSpans
from rag.errors import EmbedderUnavailable, EmbeddingMismatch, StoreMissing
from rag.fusion import FusionMethod
from rag.page_rendering import PageRenderer
from rag.parsing import ParseLimits
from rag.ranking import RetrievalSettings
from rag.read_write_lock import ReadWriteLock
from rag.types import Embedder
from rag.vector_store import ScoredChunk, VectorStore, open_vector_store
from services.blobs import Blobs
from services.chat_types import SearchResult
from services.config import Environment, IngestionConfig, StoreConfig
from services.database import Collection, Database, Document, Version, utc_now
from services.document_view import DocumentViews, Span
from services.errors import ApiError, conflict, invalid, unavailable
from services.ingestion import IngestionService
from services.journal import Journal
from services.knowledge import Knowledge, unknown_document
from services.parser_pool import ParserPool
from services.passage_writer import chunk_size_problem
from services.receipts import Deletions
from services.reconciler import ReconcileReport, reconcile
from services.retrieval import SearchableCollections
from services.schema import upgrade
from services.self_questions import MAX_QUESTIONS as SELF_MADE
from services.self_questions import as_far_questions, make_questions
from services.sharing import ReaderChange, Sharing
from services.tuning import Source, TuningQuestion, tune, tuned_fusion, tuning_json

_log = logging.getLogger(__name__)

REBUILD_FILE = "REBUILD"
_LOCK_TIMEOUT_S = 60.0
_EMBEDDER_WAIT_S = 60.0
_MAX_COLLECTIONS_PER_SEARCH = 32


class ConnectedEmbedder(Embedder, Protocol):
    """An embedder that has to be reached first and knows its model's tokens."""

    async def connect(self) -> None: ...

    @property
    def max_tokens(self) -> int: ...

    @property
    def token_spans(self) -> TokenSpans: ...


@dataclass(frozen=True, slots=True)
class StoreParts:
    """What belongs to one opened data folder."""

    config: StoreConfig
    database: Database
    vectors: VectorStore
    visible: ReadWriteLock
    journal: Journal
    blobs: Blobs
    report: ReconcileReport


def open_store(config: StoreConfig, environment: Environment) -> StoreParts:
    """Blocks. Raises `StartRefused`, `StoreLocked` or `StoreMissing` with the next step."""
    upgrade(environment.database_url)
    database = Database(environment.database_url)
    folder = environment.home / "qdrant"
    config = _with_server(config, environment)
    url = config.qdrant.url
    if url is None:
        _refuse_lost_folder(database, folder)
    vectors = open_vector_store(
        folder, url=url, nodes=config.qdrant.nodes, api_key=_api_key(config), lock_timeout_s=_LOCK_TIMEOUT_S
    )
    visible = ReadWriteLock()
    blobs = Blobs(environment.home / "blobs", environment.home)
    journal = Journal(database, vectors, visible, blobs.originals)
    report = reconcile(database, vectors, journal, blobs, owns_all=url is None)
    Deletions(database, vectors, journal, blobs).finish_interrupted()
    _log.info("Database and vector store agree: %s", asdict(report))
    return StoreParts(config, database, vectors, visible, journal, blobs, report)


class StoreService:
    def __init__(self, parts: StoreParts, embedder: ConnectedEmbedder) -> None:
        self._parts = parts
        self._knowledge = Knowledge(parts.database)
        self._sharing = Sharing(parts.database, parts.journal)
        self._deletions = Deletions(parts.database, parts.vectors, parts.journal, parts.blobs)
        self._embedder = embedder
        ingestion = parts.config.ingestion
        self._parsers = ParserPool(_limits(ingestion), ingestion.parallel_parsers)
        self._ingestion = IngestionService(
            database=parts.database,
            store=parts.vectors,
            journal=parts.journal,
            embedder=embedder,
            token_spans=lambda text: embedder.token_spans(text),
            parsers=self._parsers,
            blobs=parts.blobs,
            config=ingestion,
        )
        self._views = DocumentViews(self._knowledge, parts.blobs.originals, PageRenderer(_limits(ingestion)))
        self._starting: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Serve what needs no model at once; jobs and searches begin when the embedding model answers."""
        self._starting = asyncio.create_task(self._connect())

    async def close(self) -> None:
        """Stop working, give the folder back. Jobs that run start anew at the next start."""
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.wait([self._starting])
        await self._ingestion.stop()
        self._parsers.close()
        self._views.close()
        await asyncio.to_thread(self._close_parts)

    def check_health(self) -> None:
        """Raise where this replica cannot work any more."""
        if self._starting is not None and self._starting.done() and not self._starting.cancelled():
            self._starting.result()
        self._ingestion.check_health()
        self._parts.vectors.list_collections()

    # Collections and documents

    async def create_collection(self, name: str, description: str, actor: str) -> dict[str, Any]:
        await self._know_present_model()
        return await asyncio.to_thread(
            self._knowledge.create_collection,
            name,
            description,
            actor,
            embedding_model=self._embedder.model_name,
            dimension=self._embedder.dimension,
        )

    async def list_collections(self, actor: str) -> list[dict[str, Any]]:
        return await asyncio.to_thread(self._knowledge.list_collections, actor)

    async def collection(self, name: str, actor: str) -> dict[str, Any]:
        return await asyncio.to_thread(self._knowledge.describe_collection, name, actor)

    async def delete_collection(self, name: str, actor: str) -> dict[str, Any]:
        return await self._ingestion.delete_collection(name, actor)

    async def submit_document(
        self, collection: str, filename: str, content: Path | bytes, actor: str, **about: str | None
    ) -> dict[str, Any]:
        """The job of a file. A path inside the data folder is taken over, any other copied. `about`: batch, source and
        origin of the file."""
        await self._embedder_is_there()
        return await self._ingestion.submit(collection, filename, content, actor, **about)

    async def submit_url(self, collection: str, url: str, actor: str, **about: str | None) -> dict[str, Any]:
        """The job that fetches a URL. `about`: batch and source."""
        await self._embedder_is_there()
        return await self._ingestion.submit_url(collection, url, actor, **about)

    async def list_documents(self, collection: str, actor: str) -> list[dict[str, Any]]:
        return await asyncio.to_thread(self._knowledge.list_documents, collection, actor)

    async def document(self, document_id: str, actor: str) -> dict[str, Any]:
        return await asyncio.to_thread(self._knowledge.document, document_id, actor)

    async def require_manager(self, collection: str, actor: str) -> None:
        """Raise where the actor may not change a collection."""
        await asyncio.to_thread(self._knowledge.managed_collection, collection, actor)

    async def view_document(
        self, collection: str, document_id: str, span: Span, actor: str, width: int | None
    ) -> dict[str, Any]:
        """See `DocumentViews.view`."""
        view = await self._views.view(document_id, span, actor, width)
        if collection not in (view["collection"], view["collection_id"]):
            raise unknown_document(document_id)
        return view

    async def page_image(
        self, collection: str, document_id: str, page: int, span: Span, actor: str, width: int
    ) -> bytes:
        """PNG; see `DocumentViews.page`."""
        document = await self.document(document_id, actor)
        if collection not in (document["collection"], document["collection_id"]):
            raise unknown_document(document_id)
        return await self._views.page(document_id, page, span, actor, width)

    async def delete_document(self, collection: str, document_id: str, actor: str) -> dict[str, Any]:
        return await self._ingestion.delete_document(collection, document_id, actor)

    async def receipts(self, actor: str) -> list[dict[str, Any]]:
        return await asyncio.to_thread(self._deletions.receipts, actor)

    async def receipt(self, receipt_id: str, actor: str) -> dict[str, Any]:
        return await asyncio.to_thread(self._deletions.receipt, receipt_id, actor)

    async def readers(self, collection: str, document_id: str | None, actor: str) -> dict[str, Any]:
        return await asyncio.to_thread(self._sharing.readers, collection, document_id, actor)

    async def share(self, collection: str, document_id: str | None, change: ReaderChange, actor: str) -> dict[str, Any]:
        return await asyncio.to_thread(self._sharing.share, collection, document_id, change, actor)

    async def reembed(self, collection: str, actor: str) -> dict[str, Any]:
        await self._know_present_model()
        return await self._ingestion.reembed(collection, actor)

    async def job(self, job_id: str, actor: str) -> dict[str, Any]:
        return await self._ingestion.job(job_id, actor)

    async def jobs(self, collection: str, actor: str) -> list[dict[str, Any]]:
        return await self._ingestion.jobs(collection, actor)

    async def find_jobs(self, actor: str, **chosen: Any) -> dict[str, Any]:
        return await self._ingestion.find_jobs(actor, **chosen)

    async def change_job(self, job_id: str, action: str, actor: str) -> dict[str, Any]:
        return await self._ingestion.change_job(job_id, action, actor)

    async def change_jobs(self, collection: str, batch: str | None, action: str, actor: str) -> int:
        return await self._ingestion.change_jobs(collection, batch, action, actor)

    async def wait_for_job(self, job_id: str, actor: str, timeout_s: float = 100.0) -> dict[str, Any]:
        return await self._ingestion.wait_for_job(job_id, actor, timeout_s)

    # Search

    async def search(
        self,
        collections: Sequence[str],
        query: str,
        top_k: int,
        actor: str,
        candidates: int = 50,
        fusion: FusionMethod = "minmax",
        dense_weight: float = 0.5,
        documents: Sequence[str] | None = None,
    ) -> SearchResult:
        """The best passages for a question, with the names of the collections whose ids they carry. `documents`: only
        passages of these."""
        from rag.retriever import retrieve

        names = list(dict.fromkeys(collections))
        if not 1 <= len(names) <= _MAX_COLLECTIONS_PER_SEARCH:
            raise invalid(f"Name 1 to {_MAX_COLLECTIONS_PER_SEARCH} collections.", param="collections")
        await self._embedder_is_there()
        own_fusion = await asyncio.to_thread(self._check_readable, names, actor)
        readable = self._readable(actor, documents)
        fusion, dense_weight = own_fusion or (fusion, dense_weight)
        settings = RetrievalSettings(top_k, candidates, fusion, dense_weight)
        try:
            passages = await retrieve(query, names, embedder=self._embedder, store=readable, settings=settings)
        except EmbedderUnavailable as error:
            raise _no_embedder() from error
        except EmbeddingMismatch as error:
            # The model changed since the last question; now that it is known, each collection says what it needs.
            await asyncio.to_thread(self._check_readable, names, actor)
            raise unavailable(str(error), code="embedding_changed") from error
        return SearchResult(passages, readable.names_by_index, readable.thresholds)

    async def tune(
        self,
        name: str,
        questions: Sequence[tuple[str, Sequence[str]]] | None,
        actor: str,
        candidates: int = 50,
        fusion: FusionMethod = "minmax",
        dense_weight: float = 0.5,
        top_k: int = 3,
    ) -> dict[str, Any]:
        """Fit threshold and fusion to (question, ids of documents that answer it), or to questions made from the
        collection where there are none, and keep what was found. The other settings are those in force without it."""
        await self._know_present_model()
        collection = await asyncio.to_thread(self._knowledge.managed_collection, name, actor)
        self._ingestion.require_embedding(collection)
        settings = RetrievalSettings(top_k, candidates, fusion, dense_weight)
        source: Source = "collection" if questions is None else "questions"
        asked = await asyncio.to_thread(self._questions_for, name, questions, actor)
        readable = self._readable(actor)

        async def find(question: str) -> Sequence[ScoredChunk]:
            vector = (await self._embedder.embed_queries([question]))[0]
            return await asyncio.to_thread(readable.search, [name], vector=vector, text=question, limit=candidates)

        try:
            tuned = await tune(asked, find, settings, source=source)
        except ValueError as error:
            raise invalid(f"{name} cannot be tuned: {error}", code="too_few_questions", param="questions") from error
        except (EmbedderUnavailable, EmbeddingMismatch) as error:
            raise _no_embedder() from error
        found = tuning_json(
            tuned, settings, source=source, embedding_model=collection.embedding_model, made_at=utc_now()
        )
        return await asyncio.to_thread(self._knowledge.keep_tuning, name, found, actor)

    async def forget_tuning(self, name: str, actor: str) -> dict[str, Any]:
        """Back to the settings of the configuration."""
        return await asyncio.to_thread(self._knowledge.keep_tuning, name, None, actor)

    def _questions_for(
        self, name: str, given: Sequence[tuple[str, Sequence[str]]] | None, actor: str
    ) -> list[TuningQuestion]:
        """Given ones, or made ones: of this collection, and far ones of the others that the actor may read."""
        if given is not None:
            known = {identity for identity, _ in self._knowledge.readable_texts(name, actor)}
            for text, documents in given:
                if unknown := set(documents) - known:
                    raise invalid(
                        f"{name} has no document {min(unknown)!r}, which the question {text[:60]!r} names.",
                        param="questions",
                        code="unknown_document",
                    )
            return [TuningQuestion(text, frozenset(documents)) for text, documents in given]
        own = make_questions(self._knowledge.readable_texts(name, actor))
        others = [
            each["id"] for each in self._knowledge.list_collections(actor) if name not in (each["name"], each["id"])
        ]
        far = [
            question for other in others for question in make_questions(self._knowledge.readable_texts(other, actor))
        ]
        return own + as_far_questions(far[:: max(1, len(far) // SELF_MADE)][:SELF_MADE])

    def _readable(self, actor: str, documents: Sequence[str] | None = None) -> SearchableCollections:
        return SearchableCollections(
            self._knowledge,
            self._parts.vectors,
            self._parts.visible,
            actor,
            self._ingestion.require_embedding,
            documents,
        )

    async def check_quotes(self, quotes: Sequence[tuple[str, int, int, str]], actor: str) -> list[bool]:
        """Whether each (version, start, end, quote) stands so in a stored document that the actor may read."""
        return await asyncio.to_thread(self._knowledge.check_quotes, quotes, actor)

    def _check_readable(self, names: Sequence[str], actor: str) -> tuple[FusionMethod, float] | None:
        """Before any work: unknown collections and other embedding models. Returns the fusion that all of these
        collections were tuned to, if it is the same for all."""
        _, collections, _ = self._knowledge.searchable(names, actor)
        for collection in collections:
            self._ingestion.require_embedding(collection)
        chosen = {tuned_fusion(collection.tuning, collection.embedding_model) for collection in collections}
        return chosen.pop() if len(chosen) == 1 else None

    async def describe(self) -> dict[str, Any]:
        return {
            "vector_store": "server" if self._parts.config.qdrant.url else "embedded",
            "embedding_ready": self._starting is not None and self._starting.done(),
            "reconciled": asdict(self._parts.report),
        }

    async def _connect(self) -> None:
        while True:
            try:
                await self._embedder.connect()
                break
            except EmbedderUnavailable as error:
                _log.info("Waiting for the embedding model: %s", error)
                await asyncio.sleep(1.0)
        _check_chunk_size(self._parts.config.ingestion, self._embedder)
        await self._ingestion.start()
        # LangChain takes most of a second to load. Not at the top: Serve loads this module twice, and all processes of
        # windfarm start at the same time.
        await asyncio.to_thread(importlib.import_module, "rag.retriever")

    async def _embedder_is_there(self) -> None:
        assert self._starting is not None, "started"
        try:
            await asyncio.wait_for(asyncio.shield(self._starting), _EMBEDDER_WAIT_S)
        except TimeoutError as error:
            raise _no_embedder() from error

    async def _know_present_model(self) -> None:
        """What a collection remembers must be the model that runs now: it may have been changed since."""
        await self._embedder_is_there()
        try:
            async with asyncio.timeout(_EMBEDDER_WAIT_S):
                await self._embedder.connect()
        except (EmbedderUnavailable, TimeoutError) as error:
            raise _no_embedder() from error

    def _close_parts(self) -> None:
        with self._parts.journal.turn:
            self._parts.vectors.close()
        self._parts.database.close()


def _no_embedder() -> ApiError:
    return unavailable(
        "The embedding model is not ready. Try again; `windfarm status` says what it waits for.",
        code="embedding_unavailable",
        retry_after_s=5,
    )


def _limits(config: IngestionConfig) -> ParseLimits:
    return ParseLimits(
        max_file_bytes=int(config.max_file_mib * (1 << 20)),
        timeout_s=config.parse_timeout_s,
        memory_bytes=config.parse_memory_mib << 20,
    )


def _check_chunk_size(config: IngestionConfig, embedder: ConnectedEmbedder) -> None:
    if problem := chunk_size_problem(config, embedder.model_name, embedder.max_tokens):
        raise conflict(problem, code="chunk_tokens_too_large")


def _refuse_lost_folder(database: Database, folder: Path) -> None:
    """A vanished vector store must not look like an empty knowledge base."""
    with_passages = (
        select(Collection.name)
        .join(Document, Document.collection_id == Collection.id)
        .join(Version, Version.id == Document.active_version_id)
        .where(Collection.deleted_at.is_(None), Document.deleted_at.is_(None), Version.num_chunks > 0)
        .limit(1)
    )
    with database.read() as session:
        name = session.scalars(with_passages).first()
    rebuild = folder / REBUILD_FILE
    if name is None or (folder.is_dir() and any(entry.is_dir() for entry in folder.iterdir())):
        rebuild.unlink(missing_ok=True)
        return
    if rebuild.exists():
        return
    raise StoreMissing(
        f"The vector store in {folder} is gone, but the database knows documents (such as those of the collection "
        f"{name!r}). Restore that folder from a backup. To make all vectors anew from the stored texts instead, create "
        f"an empty file {rebuild} and start again."
    )


def _with_server(config: StoreConfig, environment: Environment) -> StoreConfig:
    """The environment's Qdrant server wins over the file's."""
    if environment.qdrant_url is None:
        return config
    qdrant = config.qdrant.model_copy(update={"url": environment.qdrant_url})
    return config.model_copy(update={"qdrant": qdrant})


def _api_key(config: StoreConfig) -> str | None:
    name = config.qdrant.api_key_env
    if name is None:
        return None
    key = os.environ.get(name)
    if not key:
        raise invalid(f"qdrant.api_key_env names the variable {name}, which is not set. Set it before `windfarm up`.")
    return key
