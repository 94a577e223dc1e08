"""Everything behind the store's handle, without Ray: collections, documents, jobs, search, on one data folder.

`actor` is a user id everywhere.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from rag.chunking import TokenSpans
from rag.errors import EmbedderUnavailable, EmbeddingMismatch
from rag.fusion import FusionMethod
from rag.page_rendering import PageRenderer
from rag.parsing import ParseLimits
from rag.ranking import RetrievalSettings
from rag.types import Embedder
from rag.vector_store import ScoredChunk
from services.backup import Backups
from services.calls import Calls
from services.chat_types import SearchResult
from services.config import IngestionConfig, RetrievalConfig
from services.database import utc_now
from services.document_view import DocumentViews, Span
from services.errors import ApiError, conflict, invalid, unavailable
from services.ingestion import IngestionService
from services.knowledge import Knowledge, unknown_document
from services.knowledge_transfer import KnowledgeTransfer, RunningModel
from services.parser_pool import ParserPool
from services.passage_writer import chunk_size_problem
from services.receipts import Deletions
from services.retrieval import BegunEmbedding, SearchableCollections
from services.self_questions import MAX_QUESTIONS as SELF_MADE
from services.self_questions import as_far_questions, make_questions
from services.sharing import ReaderChange, Sharing
from services.store_opening import StoreParts
from services.transfers import Transfers
from services.tuning import Source, TuningQuestion, tune, tuned_fusion, tuning_json

_log = logging.getLogger(__name__)

_EMBEDDER_WAIT_S = 60.0
_MAX_COLLECTIONS_PER_SEARCH = 32


class ConnectedEmbedder(Embedder, Calls, Protocol):
    """An embedder that has to be reached first and knows its model's tokens. The rest of its deployment is called."""

    async def connect(self) -> None: ...

    @property
    def max_tokens(self) -> int: ...

    @property
    def token_spans(self) -> TokenSpans: ...


class StoreService:
    def __init__(
        self, parts: StoreParts, embedder: ConnectedEmbedder, *, num_replicas: Callable[[], int] = lambda: 1
    ) -> None:
        """`num_replicas`: of the embedding model right now; it must not block."""
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
            num_replicas=num_replicas,
        )
        self._views = DocumentViews(self._knowledge, parts.blobs.originals, PageRenderer(_limits(ingestion)))
        self._transfer = KnowledgeTransfer(parts.database, parts.vectors, parts.journal, parts.blobs)
        self._backups = Backups(
            parts.database,
            parts.vectors,
            parts.journal,
            parts.blobs,
            parts.visible,
            parts.home,
            owns_all=parts.config.qdrant.url is None,
        )
        self._transfers = Transfers()
        self._starting: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Serve what needs no model at once; jobs and searches begin when the embedding model answers."""
        self._starting = asyncio.create_task(self._connect())

    async def close(self) -> None:
        """Stop working, give the folder back. Jobs that run start anew at the next start."""
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.wait([self._starting])
        await self._transfers.close()
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

    # Transfers of whole knowledge bases

    async def begin_export(self, collections: Sequence[str], actor: str, target: Path) -> str:
        """Starts `KnowledgeTransfer.export`; the same for the next three. Wait with `wait_for_transfer`."""
        return self._transfers.begin(actor, asyncio.to_thread(self._transfer.export, collections, actor, target))

    async def begin_import(self, actor: str, source: Path) -> str:
        await self._know_present_model()
        model = RunningModel(self._embedder.model_name, self._embedder.dimension)
        return self._transfers.begin(actor, self._import(source, actor, model))

    async def _import(self, source: Path, actor: str, model: RunningModel) -> dict[str, Any]:
        imported = await asyncio.to_thread(self._transfer.import_, source, actor, model)
        self._ingestion.tidy()
        return imported

    async def begin_backup(self, actor: str, target: Path) -> str:
        return self._transfers.begin(actor, asyncio.to_thread(self._backups.write, actor, target))

    async def begin_restore(self, actor: str, source: Path) -> str:
        await self._embedder_is_there()
        return self._transfers.begin(actor, self._restore(actor, source))

    async def _restore(self, actor: str, source: Path) -> dict[str, Any]:
        """Jobs stop in the middle and begin anew afterwards: those of the backup, or the present ones if it fails."""
        await self._ingestion.stop()
        try:
            return await asyncio.to_thread(self._backups.restore, actor, source)
        finally:
            await self._ingestion.start()

    async def wait_for_transfer(self, transfer_id: str, actor: str, timeout_s: float) -> dict[str, Any] | None:
        return await self._transfers.wait(transfer_id, actor, timeout_s)

    async def require_importer(self, actor: str) -> None:
        """Raise where the actor may neither import nor restore, before a long upload."""
        await asyncio.to_thread(self._transfer.require_importer, actor)

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
        # Begun now: the question is embedded while the database is asked.
        embedding = BegunEmbedding(self._embedder, query)
        try:
            own_fusion = await asyncio.to_thread(self._check_readable, names, actor)
            readable = self._readable(actor, documents)
            fusion, dense_weight = own_fusion or (fusion, dense_weight)
            settings = RetrievalSettings(top_k, candidates, fusion, dense_weight)
            passages = await retrieve(query, names, embedder=embedding, store=readable, settings=settings)
        except EmbedderUnavailable as error:
            raise _no_embedder() from error
        except EmbeddingMismatch as error:
            # The model changed since the last question; now that it is known, each collection says what it needs.
            await asyncio.to_thread(self._check_readable, names, actor)
            raise unavailable(str(error), code="embedding_changed") from error
        finally:
            embedding.close()
        return SearchResult(passages, readable.names_by_index, readable.thresholds)

    async def tune(
        self,
        name: str,
        questions: Sequence[tuple[str, Sequence[str]]] | None,
        actor: str,
        *,
        retrieval: RetrievalConfig,
    ) -> dict[str, Any]:
        """Fit threshold and fusion to (question, ids of documents that answer it), or to questions made from the
        collection where there are none, and keep what was found. `retrieval`: what is in force without it."""
        # Not at the top: it brings an HTTP client along, and a start imports as little as possible.
        from services.reranker import serving_reranking

        await self._know_present_model()
        collection = await asyncio.to_thread(self._knowledge.managed_collection, name, actor)
        self._ingestion.require_embedding(collection)
        limit = retrieval.candidates
        settings = RetrievalSettings(retrieval.top_k, limit, retrieval.fusion, retrieval.dense_weight)
        source: Source = "collection" if questions is None else "questions"
        asked = await asyncio.to_thread(self._questions_for, name, questions, actor)
        readable = self._readable(actor)

        async def find(question: str) -> Sequence[ScoredChunk]:
            vector = (await self._embedder.embed_queries([question]))[0]
            return await asyncio.to_thread(readable.search, [name], vector=vector, text=question, limit=limit)

        try:
            async with serving_reranking(retrieval, self._embedder) as reranking:
                prior = retrieval.evidence_threshold
                tuned = await tune(asked, find, settings, source=source, reranking=reranking, prior=prior)
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
        cpu_s=config.parse_cpu_s,
        ocr_languages=config.ocr_languages,
    )


def _check_chunk_size(config: IngestionConfig, embedder: ConnectedEmbedder) -> None:
    if problem := chunk_size_problem(config, embedder.model_name, embedder.max_tokens):
        raise conflict(problem, code="chunk_tokens_too_large")
