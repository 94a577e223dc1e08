"""Passages made anew from stored text: of a collection for another embedding model, of one version for a repair."""

from __future__ import annotations

import asyncio

from sqlalchemy import select

from rag.errors import StoreUnavailable
from rag.types import Embedder
from rag.vector_store import VectorStore
from services.database import Collection, Database, Document, Job, Version, new_id, utc_now
from services.ingestion_errors import Cancelled
from services.job_rows import JobRows
from services.journal import Journal
from services.knowledge import ACTIVE_JOB_STATES, stored_document
from services.passage_writer import PassageWriter
from services.rights import labels_of
from services.threads import to_its_end


class Reembedding:
    """Carries out the jobs of these two kinds; the ingestion worker says when."""

    def __init__(
        self,
        database: Database,
        store: VectorStore,
        journal: Journal,
        embedder: Embedder,
        rows: JobRows,
        writer: PassageWriter,
    ) -> None:
        self._database = database
        self._store = store
        self._journal = journal
        self._embedder = embedder
        self._rows = rows
        self._writer = writer

    async def reembed(self, job: Job, collection: Collection) -> None:
        """Fill a new index with all documents, then let the collection use it, in one step."""
        await self._rows.set_state(job, "embedding")
        index_id = new_id("col")
        documents = await asyncio.to_thread(self._rows.active_documents, collection.id)
        num_chunks: dict[str, int] = {}
        try:
            for position, (document, version) in enumerate(documents):
                progress = (position / len(documents), (position + 1) / len(documents))
                parsed = await asyncio.to_thread(stored_document, version)
                num_chunks[version.id] = await self._writer.store_passages(
                    job, index_id, version, parsed, document.name, progress
                )
            await to_its_end(self._switch, job, collection.id, index_id, num_chunks)
        except BaseException:
            await asyncio.shield(asyncio.to_thread(self._discard_index, index_id))
            raise

    def _switch(self, job: Job, collection_id: str, index_id: str, num_chunks: dict[str, int]) -> None:
        with self._journal.turn:
            self._require_wanted(job)
            active = {version.id: document for document, version in self._rows.active_documents(collection_id)}
            for version_id in num_chunks:
                if version_id in active:
                    self._show(index_id, active[version_id], version_id)
                else:
                    # Deleted while it was embedded.
                    self._store.delete_version(index_id, version_id)
            with self._database.write() as session:
                collection = session.get(Collection, collection_id)
                if collection is None or collection.deleted_at is not None:
                    raise Cancelled
                self._journal.switch_index(session, collection, index_id)
                collection.embedding_model = self._embedder.model_name
                collection.embedding_dimension = self._embedder.dimension
                for version_id in active:
                    session.get_one(Version, version_id).num_chunks = num_chunks[version_id]
                row = session.get_one(Job, job.id)
                row.state, row.progress, row.ended_at = "done", 1.0, utc_now()
                row.num_chunks = sum(num_chunks[version_id] for version_id in active)
            self._journal.replay()

    def _require_wanted(self, job: Job) -> None:
        with self._database.read() as session:
            row = session.get(Job, job.id)
            if row is None or row.state not in ACTIVE_JOB_STATES:
                raise Cancelled

    def _show(self, index_id: str, document: Document, version_id: str) -> None:
        with self._database.read() as session:
            labels = labels_of(session, document)
        self._store.activate_version(index_id, version_id, labels=labels)

    def _discard_index(self, index_id: str) -> None:
        with self._journal.turn:
            with self._database.read() as session:
                if session.scalars(select(Collection).where(Collection.index_id == index_id)).first() is not None:
                    return
            try:
                self._store.delete_collection(index_id)
            except StoreUnavailable:
                self._journal.note_discard("drop_index", index_id)

    async def repair(self, job: Job, collection: Collection) -> None:
        """Write the passages of one document's active version again, from its stored text."""
        await self._rows.set_state(job, "embedding")
        document, version = await asyncio.to_thread(self._rows.document_of_job, job)
        parsed = await asyncio.to_thread(stored_document, version)
        await to_its_end(self._store.delete_version, collection.index_id, version.id)
        num_chunks = await self._writer.store_passages(
            job, collection.index_id, version, parsed, document.name, (0.0, 1.0)
        )
        await to_its_end(self._end_repair, job, collection.index_id, version.id, num_chunks)

    def _end_repair(self, job: Job, index_id: str, version_id: str, num_chunks: int) -> None:
        with self._journal.turn, self._database.write() as session:
            version = session.get(Version, version_id)
            if version is None or version.state != "active":
                self._store.delete_version(index_id, version_id)
                raise Cancelled
            labels = labels_of(session, session.get_one(Document, version.document_id))
            self._store.activate_version(index_id, version_id, labels=labels)
            version.num_chunks = num_chunks
            row = session.get_one(Job, job.id)
            row.state, row.progress, row.num_chunks, row.ended_at = "done", 1.0, num_chunks, utc_now()
