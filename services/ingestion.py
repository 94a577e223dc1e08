"""Files into collections: every upload becomes a job, and one worker takes the jobs in order.

A job goes: keep the file, parse, cut into passages, embed, write them hidden into the vector store, then make them the
document's active version in one journaled step. The same content again changes nothing. Here is what callers may ask;
embedder, store and parsers are handed in. Knows nothing of Ray.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rag.chunking import TokenSpans
from rag.errors import EmbeddingMismatch
from rag.filenames import clean_filename
from rag.types import Embedder
from rag.vector_store import VectorStore
from services.blobs import Blobs
from services.config import IngestionConfig
from services.database import Collection, Database, Job, new_id
from services.ingest_progress import LiveJobs
from services.ingest_worker import IngestWorker
from services.ingestion_errors import as_api_errors
from services.job_control import Changed, JobControl
from services.job_list import JobList, with_live
from services.job_rows import JobRows
from services.journal import Journal
from services.knowledge import ACTIVE_JOB_STATES, Knowledge, job_json
from services.parser_pool import ParserPool
from services.passage_writer import PassageWriter
from services.preparation import Preparation
from services.receipts import Deletions
from services.reembedding import Reembedding
from services.threads import to_its_end
from services.web.pages import open_client
from services.web.urls import checked_url, document_name


class IngestionService:
    def __init__(
        self,
        *,
        database: Database,
        store: VectorStore,
        journal: Journal,
        embedder: Embedder,
        token_spans: TokenSpans,
        parsers: ParserPool,
        blobs: Blobs,
        config: IngestionConfig,
    ) -> None:
        self._database = database
        self._store = store
        self._journal = journal
        self._embedder = embedder
        self._blobs = blobs
        self._config = config
        self._knowledge = Knowledge(database)
        self._deletions = Deletions(database, store, journal, blobs)
        self._live = LiveJobs()
        self._rows = JobRows(database, self._live)
        self._list = JobList(database, self._knowledge, self._live)
        self._control = JobControl(database, journal, self._knowledge)
        writer = PassageWriter(database, store, journal, embedder, token_spans, config, self._live, blobs.require_space)
        self._worker = IngestWorker(
            store=store,
            journal=journal,
            blobs=blobs,
            rows=self._rows,
            live=self._live,
            writer=writer,
            preparation=Preparation(self._rows, parsers, lambda: open_client(config.web, config.max_file_mib)),
            reembedding=Reembedding(database, store, journal, embedder, self._rows, writer),
            check_embedding=self.check_embedding,
        )

    # What callers use

    async def start(self) -> None:
        """Begin to work on the jobs that wait; reconcile before."""
        await self._worker.start()

    async def stop(self) -> None:
        """Stop in the middle of a job; it starts anew at the next start."""
        await self._worker.stop()

    def check_health(self) -> None:
        """Raise where the worker has ended by itself."""
        self._worker.check_health()

    async def submit(
        self,
        collection: str,
        filename: str,
        content: Path | bytes,
        actor: str,
        *,
        batch: str | None = None,
        source: str | None = None,
        origin: str | None = None,
        parse_as: str | None = None,
    ) -> dict[str, Any]:
        """Keep a file and queue its job. Returns the job's JSON. For the optional fields see `Job`."""
        job = Job(id=new_id("job"), filename=filename, batch=batch, source=source, origin=origin, parse_as=parse_as)
        made = await asyncio.to_thread(self._submit, collection, job, content, actor)
        self._worker.wake()
        return made

    async def submit_url(self, collection: str, url: str, actor: str, **about: str | None) -> dict[str, Any]:
        """Queue a job that fetches a URL. Returns the job's JSON."""
        made = await asyncio.to_thread(self._submit_url, collection, url, actor, about)
        self._worker.wake()
        return made

    async def reembed(self, collection: str, actor: str) -> dict[str, Any]:
        """Queue a job that embeds all of a collection anew with the present model, from the stored text."""
        job = await asyncio.to_thread(self._submit_reembedding, collection, actor)
        self._worker.wake()
        return job

    async def job(self, job_id: str, actor: str) -> dict[str, Any]:
        live = self._list.live()
        return with_live(await asyncio.to_thread(self._knowledge.job, job_id, actor), live)

    async def jobs(self, collection: str, actor: str) -> list[dict[str, Any]]:
        live = self._list.live()
        found = await asyncio.to_thread(self._knowledge.list_jobs, collection, actor)
        return [with_live(job, live) for job in found]

    async def find_jobs(self, actor: str, **chosen: Any) -> dict[str, Any]:
        """See `JobList.find`."""
        return await asyncio.to_thread(self._list.find, actor, **chosen)

    async def change_job(self, job_id: str, action: str, actor: str) -> dict[str, Any]:
        """Pause, resume or cancel a job. Returns its JSON."""
        await self._change(self._control.change, job_id, action, actor)
        return await self.job(job_id, actor)

    async def change_jobs(self, collection: str, batch: str | None, action: str, actor: str) -> int:
        """The same for all unfinished jobs of a collection or of a batch in it. Returns how many there were."""
        return await self._change(self._control.change_all, collection, batch, action, actor)

    async def wait_for_job(self, job_id: str, actor: str, timeout_s: float) -> dict[str, Any]:
        """The job when it has ended or is paused, or as it is after `timeout_s`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s), self._worker.changed:
                while (job := await self.job(job_id, actor))["state"] in ACTIVE_JOB_STATES and not job["paused"]:
                    await self._worker.changed.wait()
                return job
        return await self.job(job_id, actor)

    async def delete_document(self, collection: str, document_id: str, actor: str) -> dict[str, Any]:
        """Remove a document with all that was made of it. Returns a receipt."""
        receipt = await asyncio.to_thread(self._deletions.delete_document, collection, document_id, actor)
        self._worker.wake(needs_tidying=True)
        return receipt

    async def delete_collection(self, name: str, actor: str) -> dict[str, Any]:
        return await asyncio.to_thread(self._deletions.delete_collection, name, actor)

    def require_embedding(self, collection: Collection) -> None:
        """`check_embedding` for callers over the handle: a 409 that says what to do."""
        with as_api_errors():
            self.check_embedding(collection)

    def check_embedding(self, collection: Collection) -> None:
        """Raise `EmbeddingMismatch` where a collection's vectors are of another model than the one that runs."""
        have = (collection.embedding_model, collection.embedding_dimension)
        runs = (self._embedder.model_name, self._embedder.dimension)
        if have != runs:
            raise EmbeddingMismatch(
                f"The collection {collection.name!r} was embedded with {have[0]} (dimension {have[1]}), but {runs[0]} "
                f"(dimension {runs[1]}) runs. Run `windfarm reembed {collection.name}`, or start the former model."
            )

    # Submitting

    def _submit(self, collection_name: str, job: Job, content: Path | bytes, actor: str) -> dict[str, Any]:
        collection = self._knowledge.managed_collection(collection_name, actor)
        self.require_embedding(collection)
        with as_api_errors():
            job.filename = clean_filename(job.filename)
            job.parse_as = clean_filename(job.parse_as) if job.parse_as else None
        blob = self._blobs.keep(job.id, content, int(self._config.max_file_mib * (1 << 20)))
        try:
            job.blob_path, job.num_bytes = str(blob), blob.stat().st_size
            return self._insert_job(job, collection, actor)
        except BaseException:
            self._blobs.remove(str(blob))
            raise

    def _submit_url(self, name: str, url: str, actor: str, about: dict[str, str | None]) -> dict[str, Any]:
        collection = self._knowledge.managed_collection(name, actor)
        self.require_embedding(collection)
        with as_api_errors():
            checked = checked_url(url)
            filename = document_name(checked)
        job = Job(id=new_id("job"), kind="url", filename=filename, **(about | {"origin": str(checked)}))
        job.blob_path = str(self._blobs.place_for(job.id))
        return self._insert_job(job, collection, actor)

    def _submit_reembedding(self, collection_name: str, actor: str) -> dict[str, Any]:
        collection = self._knowledge.managed_collection(collection_name, actor)
        num_bytes = sum(version.num_bytes for _, version in self._rows.active_documents(collection.id))
        job = Job(id=new_id("job"), kind="reembed", filename="", num_bytes=num_bytes)
        return self._insert_job(job, collection, actor)

    def _insert_job(self, job: Job, collection: Collection, actor: str) -> dict[str, Any]:
        job.collection_id, job.owner_id = collection.id, actor
        with as_api_errors(), self._database.write() as session:
            session.add(job)
            session.flush()
            return with_live(job_json(job, collection.name), self._list.live())

    async def _change(self, decide: Callable[..., Changed], *what: Any) -> int:
        changed = await to_its_end(decide, *what)
        await self._worker.interrupt(changed.job_ids)
        for blob_path in changed.blob_paths:
            await asyncio.to_thread(self._blobs.remove, blob_path)
        return len(changed.job_ids)
