"""From a document's text to hidden passages in the vector store: cut, embed in batches, write.

Hidden passages are found by nobody until a change of the database makes their version active.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence

from rag.chunking import TokenSpans, chunk_document
from rag.errors import EmbedderUnavailable, StoreUnavailable
from rag.types import Embedder, ParsedDocument, StoredChunk, TextChunk, Vectors
from rag.vector_store import VectorStore, point_id
from services.config import IngestionConfig
from services.database import Collection, Database, Job, Version
from services.embedding_ahead import EmbeddingAhead
from services.ingest_progress import LiveJobs
from services.ingestion_errors import Cancelled
from services.journal import Journal
from services.knowledge import ACTIVE_JOB_STATES
from services.threads import to_its_end

_log = logging.getLogger(__name__)

_EMBED_BATCH = 32
_RETRY_S = 2.0
_OF_KEPT_VERSIONS = ("reembed", "repair")
"""Kinds of jobs that work on versions which the database has; those of the others get their row when they are whole."""


class PassageWriter:
    """`live` is told how far jobs are and what they wait for; `require_space` raises where the disk is nearly full;
    `num_replicas` tells how many embedding replicas there are right now."""

    def __init__(
        self,
        database: Database,
        store: VectorStore,
        journal: Journal,
        embedder: Embedder,
        token_spans: TokenSpans,
        config: IngestionConfig,
        live: LiveJobs,
        require_space: Callable[[], None],
        num_replicas: Callable[[], int],
    ) -> None:
        self._database = database
        self._store = store
        self._journal = journal
        self._embedder = embedder
        self._token_spans = token_spans
        self._config = config
        self._live = live
        self._require_space = require_space
        self._num_replicas = num_replicas

    async def cut(self, parsed: ParsedDocument) -> list[TextChunk]:
        return await asyncio.to_thread(cut_into_chunks, parsed, self._token_spans, self._config)

    async def store_passages(
        self,
        job: Job,
        index_id: str,
        version: Version,
        parsed: ParsedDocument,
        document_name: str,
        progress: tuple[float, float],
    ) -> int:
        """Cut, embed and write a version's passages, hidden. Returns how many there are."""
        chunks = await self.cut(parsed)
        await self.store_chunks(job, index_id, version, chunks, document_name, progress, self.embed_ahead(chunks))
        return len(chunks)

    def embed_ahead(self, chunks: Sequence[TextChunk]) -> EmbeddingAhead:
        """The vectors of passages, batch by batch; the first ones are under way."""
        texts = ([embedded_text(chunk) for chunk in batch] for batch in _batches(chunks))
        ahead = EmbeddingAhead(self._embedder.embed_passages, texts, self._num_replicas)
        ahead.begin()
        return ahead

    async def store_chunks(
        self,
        job: Job,
        index_id: str,
        version: Version,
        chunks: Sequence[TextChunk],
        document_name: str,
        progress: tuple[float, float],
        ahead: EmbeddingAhead,
    ) -> None:
        """Write passages that were cut before, hidden, as `ahead` embeds them. Waits for an embedding model that is
        away."""
        first, last = progress
        num_stored = 0
        try:
            for batch in _batches(chunks):
                vectors = await self._vectors(job, ahead)
                stored = [stored_chunk(chunk, index_id, version, document_name) for chunk in batch]
                await to_its_end(self._write_hidden, job, index_id, stored, vectors)
                num_stored += len(batch)
                self._live.advance(job.id, min(last, first + (last - first) * num_stored / len(chunks)))
                share = (last - first) * len(batch) / len(chunks)
                self._live.meter.add(tokens=sum(chunk.num_tokens for chunk in batch), num_bytes=share * job.num_bytes)
        finally:
            ahead.close()

    async def _vectors(self, job: Job, ahead: EmbeddingAhead) -> Vectors:
        """Of the next batch. An embedding model that is away comes back or somebody cancels the job: what was computed
        so far is kept, and the job says what it waits for."""
        while True:
            try:
                return await ahead.next()
            except EmbedderUnavailable as error:
                _log.warning("Waiting for the embedding model: %s", error)
                self._live.waits(
                    job.id, f"The embedding model does not answer: {error} It goes on when the model is back."
                )
                await asyncio.sleep(_RETRY_S)

    def _write_hidden(self, job: Job, index_id: str, chunks: list[StoredChunk], vectors: Vectors) -> None:
        self._require_space()
        # The turn keeps a deletion from slipping between the question and the writing.
        with self._journal.turn:
            with self._database.read() as session:
                row = session.get(Job, job.id)
                collection = session.get(Collection, job.collection_id)
                if (
                    row is None
                    or row.state not in ACTIVE_JOB_STATES
                    or collection is None
                    or collection.deleted_at is not None
                ):
                    raise Cancelled
                if job.kind in _OF_KEPT_VERSIONS and session.get(Version, chunks[0].version_id) is None:
                    return  # deleted while it was embedded anew
            self._store.upsert(index_id, chunks, vectors, active=False)

    def discard_if_staged(self, index_id: str, version_id: str) -> bool:
        """Remove passages of a job that did not come to its end. False for a version that was decided on: it is the
        journal's."""
        with self._journal.turn:
            with self._database.read() as session:
                if session.get(Version, version_id) is not None:
                    return False
            try:
                self._store.delete_version(index_id, version_id)
            except StoreUnavailable as error:
                _log.warning("Passages that nobody needs are removed when the store is back: %s", error)
                self._journal.note_discard("discard_version", index_id, version_id)
            return True


def _batches(chunks: Sequence[TextChunk]) -> Iterator[Sequence[TextChunk]]:
    for start in range(0, len(chunks), _EMBED_BATCH):
        yield chunks[start : start + _EMBED_BATCH]


def cut_into_chunks(parsed: ParsedDocument, token_spans: TokenSpans, config: IngestionConfig) -> list[TextChunk]:
    """Passages as the configuration wants them; the overlap is at most half of a passage."""
    overlap = min(config.chunk_overlap_tokens, config.chunk_tokens // 2)
    return chunk_document(parsed, token_spans, config.chunk_tokens, overlap)


def chunk_size_problem(config: IngestionConfig, model_name: str, max_tokens: int) -> str | None:
    """Why passages of this size cannot be embedded: prefix, special tokens and headings are embedded with them."""
    most = max_tokens - 16
    if config.chunk_tokens <= most:
        return None
    return (
        f"ingestion.chunk_tokens is {config.chunk_tokens}, but the embedding model {model_name} reads at most "
        f"{max_tokens} tokens with its prefix. Set it to {most} or less."
    )


def embedded_text(chunk: TextChunk) -> str:
    """What the embedding model sees of a passage: the headings above it say what it is about, and the header of a table
    what its cells are."""
    missing = [heading for heading in chunk.headings if heading not in chunk.text]
    above = [" > ".join(missing)] if missing else []
    return "\n".join((*above, *([chunk.table_header] if chunk.table_header else ()), chunk.text))


def stored_chunk(chunk: TextChunk, index_id: str, version: Version, document_name: str) -> StoredChunk:
    """What the vector store keeps of a passage of a document version."""
    return StoredChunk(
        chunk_id=point_id(version.id, chunk.index),
        collection_id=index_id,
        document_id=version.document_id,
        version_id=version.id,
        document_name=document_name,
        text=chunk.text,
        start=chunk.start,
        end=chunk.end,
        index=chunk.index,
        page=chunk.page,
        title=version.title,
        headings=chunk.headings,
        language=version.language,
        table_header=chunk.table_header,
    )
