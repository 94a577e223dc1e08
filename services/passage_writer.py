"""From a document's text to hidden passages in the vector store: cut, embed in batches, write.

Hidden passages are found by nobody until a change of the database makes their version active.
"""

from __future__ import annotations

import asyncio
import logging

from rag.chunking import TokenSpans, chunk_document
from rag.errors import EmbedderUnavailable
from rag.types import Embedder, ParsedDocument, StoredChunk, TextChunk, Vectors
from rag.vector_store import VectorStore, point_id
from services.config import IngestionConfig
from services.database import Collection, Database, Job, Version
from services.ingestion_errors import Cancelled
from services.journal import Journal

_log = logging.getLogger(__name__)

_EMBED_BATCH = 32
_RETRY_S = 2.0
_EMBEDDER_PATIENCE_S = 300.0
"""How long a job waits for an embedding replica that restarts."""


class PassageWriter:
    """`progress` holds the part of each running job that is done, from 0 to 1."""

    def __init__(
        self,
        database: Database,
        store: VectorStore,
        journal: Journal,
        embedder: Embedder,
        token_spans: TokenSpans,
        config: IngestionConfig,
    ) -> None:
        self._database = database
        self._store = store
        self._journal = journal
        self._embedder = embedder
        self._token_spans = token_spans
        self._config = config
        self.progress: dict[str, float] = {}

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
        chunks = await asyncio.to_thread(cut_into_chunks, parsed, self._token_spans, self._config)
        first, last = progress
        num_stored = 0
        for start in range(0, len(chunks), _EMBED_BATCH):
            batch = chunks[start : start + _EMBED_BATCH]
            vectors = await self._embed([embedded_text(chunk) for chunk in batch])
            stored = [stored_chunk(chunk, index_id, version, document_name) for chunk in batch]
            await asyncio.to_thread(self._write_hidden, job, index_id, stored, vectors)
            num_stored += len(batch)
            self.progress[job.id] = min(last, first + (last - first) * num_stored / len(chunks))
        return len(chunks)

    async def _embed(self, texts: list[str]) -> Vectors:
        """Vectors of passages; waits for an embedding replica that restarts."""
        async with asyncio.timeout(_EMBEDDER_PATIENCE_S):
            while True:
                try:
                    return await self._embedder.embed_passages(texts)
                except EmbedderUnavailable as error:
                    _log.warning("Waiting for the embedding model: %s", error)
                    await asyncio.sleep(_RETRY_S)

    def _write_hidden(self, job: Job, index_id: str, chunks: list[StoredChunk], vectors: Vectors) -> None:
        # The turn keeps a deletion from slipping between the question and the writing.
        with self._journal.turn:
            with self._database.read() as session:
                row = session.get(Job, job.id)
                collection = session.get(Collection, job.collection_id)
                if row is None or row.state == "cancelled" or collection is None or collection.deleted_at is not None:
                    raise Cancelled
                if job.kind != "ingest" and session.get(Version, chunks[0].version_id) is None:
                    return  # deleted while it was embedded anew
            self._store.upsert(index_id, chunks, vectors, active=False)

    def discard_if_staged(self, index_id: str, version_id: str) -> bool:
        """Remove passages of a job that did not come to its end. False for a version that was decided on: it is the
        journal's."""
        with self._journal.turn:
            with self._database.read() as session:
                if session.get(Version, version_id) is not None:
                    return False
            self._store.delete_version(index_id, version_id)
            return True


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
    """What the embedding model sees of a passage: the headings above it say what it is about."""
    missing = [heading for heading in chunk.headings if heading not in chunk.text]
    return "\n".join((" > ".join(missing), chunk.text)) if missing else chunk.text


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
    )
