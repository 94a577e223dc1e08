"""Files into collections: every upload becomes a job, and one worker takes the jobs in order.

A job goes: keep the file, parse, cut into passages, embed, write them hidden into the vector store, then make them the
document's active version in one journaled step. The same content again changes nothing. A failing file ends its own
job with a reason and no other. Knows nothing of Ray; embedder, store and parsers are handed in.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rag.chunking import TokenSpans
from rag.errors import EmbeddingMismatch, ParseError, StoreError
from rag.filenames import clean_filename
from rag.types import Embedder, ParsedDocument
from rag.vector_store import VectorStore
from services.blobs import Blobs
from services.config import IngestionConfig
from services.database import Collection, Database, Job, Version, new_id
from services.ingestion_errors import Cancelled, as_api_errors, reason_of
from services.job_rows import JobRows
from services.journal import Journal, Replacement
from services.knowledge import ACTIVE_JOB_STATES, Knowledge, job_json
from services.parser_pool import ParserPool
from services.passage_writer import PassageWriter
from services.receipts import Deletions
from services.reembedding import Reembedding

_log = logging.getLogger(__name__)

_SHARE_OF_PARSING = 0.1


@dataclass(frozen=True, slots=True)
class _Prepared:
    """What is known of a file before its turn: the hash of its content, and its text or why there is none."""

    content_sha256: str
    num_bytes: int
    outcome: ParsedDocument | ParseError | None
    """None: the content is that of the active version, so there was nothing to parse."""


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
        self._parsers = parsers
        self._blobs = blobs
        self._config = config
        self._knowledge = Knowledge(database)
        self._deletions = Deletions(database, store, journal, blobs)
        self._rows = JobRows(database)
        self._writer = PassageWriter(database, store, journal, embedder, token_spans, config)
        self._reembedding = Reembedding(database, store, journal, embedder, self._rows, self._writer)
        self._prepared: dict[str, asyncio.Task[_Prepared]] = {}
        self._has_work = asyncio.Event()
        self._needs_tidying = False
        self._changed = asyncio.Condition()
        self._worker: asyncio.Task[None] | None = None

    # What callers use

    async def start(self) -> None:
        """Begin to work on the jobs that wait; reconcile before."""
        self._has_work.set()
        self._worker = asyncio.create_task(self._work())

    async def stop(self) -> None:
        """Stop in the middle of a job; it starts anew at the next start."""
        tasks = [task for task in (self._worker, *self._prepared.values()) if task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        self._prepared.clear()
        self._worker = None

    def check_health(self) -> None:
        """Raise where the worker has ended by itself."""
        if self._worker is not None and self._worker.done():
            raise RuntimeError("The ingestion worker has ended.") from self._worker.exception()

    async def submit(self, collection: str, filename: str, source: Path | bytes, actor: str) -> dict[str, Any]:
        """Keep a file and queue its job. Returns the job's JSON."""
        job = await asyncio.to_thread(self._submit, collection, filename, source, actor)
        self._has_work.set()
        return job

    async def reembed(self, collection: str, actor: str) -> dict[str, Any]:
        """Queue a job that embeds all of a collection anew with the present model, from the stored text."""
        job = await asyncio.to_thread(self._submit_reembedding, collection, actor)
        self._has_work.set()
        return job

    async def job(self, job_id: str, actor: str) -> dict[str, Any]:
        return self._with_progress(await asyncio.to_thread(self._knowledge.job, job_id, actor))

    async def jobs(self, collection: str, actor: str) -> list[dict[str, Any]]:
        found = await asyncio.to_thread(self._knowledge.list_jobs, collection, actor)
        return [self._with_progress(job) for job in found]

    async def wait_for_job(self, job_id: str, actor: str, timeout_s: float) -> dict[str, Any]:
        """The job when it has ended, or as it is after `timeout_s`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s), self._changed:
                while (job := await self.job(job_id, actor))["state"] in ACTIVE_JOB_STATES:
                    await self._changed.wait()
                return job
        return await self.job(job_id, actor)

    async def delete_document(self, collection: str, document_id: str, actor: str) -> dict[str, Any]:
        """Remove a document with all that was made of it. Returns a receipt."""
        receipt = await asyncio.to_thread(self._deletions.delete_document, collection, document_id, actor)
        self._needs_tidying = True
        self._has_work.set()
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

    def _submit(self, collection_name: str, filename: str, source: Path | bytes, actor: str) -> dict[str, Any]:
        collection = self._knowledge.managed_collection(collection_name, actor)
        self.require_embedding(collection)
        with as_api_errors():
            name = clean_filename(filename)
        job_id = new_id("job")
        blob = self._blobs.keep(job_id, source, int(self._config.max_file_mib * (1 << 20)))
        try:
            return self._insert_job(Job(id=job_id, filename=name, blob_path=str(blob)), collection, actor)
        except BaseException:
            self._blobs.remove(str(blob))
            raise

    def _submit_reembedding(self, collection_name: str, actor: str) -> dict[str, Any]:
        collection = self._knowledge.managed_collection(collection_name, actor)
        return self._insert_job(Job(id=new_id("job"), kind="reembed", filename=""), collection, actor)

    def _insert_job(self, job: Job, collection: Collection, actor: str) -> dict[str, Any]:
        job.collection_id, job.owner_id = collection.id, actor
        with as_api_errors(), self._database.write() as session:
            session.add(job)
            session.flush()
            return job_json(job, collection.name)

    def _with_progress(self, job: dict[str, Any]) -> dict[str, Any]:
        live = self._writer.progress.get(job["id"])
        return job if live is None or job["state"] not in ACTIVE_JOB_STATES else job | {"progress": live}

    # The worker

    async def _work(self) -> None:
        while True:
            self._has_work.clear()
            jobs = await asyncio.to_thread(self._rows.next_jobs, 1 + self._parsers.num_parsers)
            if not jobs:
                await self._tidy()
                await self._has_work.wait()
                continue
            self._forget_prepared(keep={job.id for job in jobs})
            self._prepare_ahead(jobs)
            await self._run(jobs[0])

    async def _tidy(self) -> None:
        """Use the pause: merge what was written, drop what was deleted from the files of the vector store."""
        if self._needs_tidying and not self._has_work.is_set():
            self._needs_tidying = False
            try:
                await asyncio.to_thread(self._store.optimize)
            except StoreError as error:
                # Everything is stored already; the next pause tries again.
                _log.warning("The vector store could not be tidied: %s", error)

    def _prepare_ahead(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            if job.kind == "ingest" and job.id not in self._prepared:
                self._prepared[job.id] = asyncio.create_task(self._prepare(job))

    def _forget_prepared(self, keep: set[str]) -> None:
        """Drop what was prepared for jobs that were cancelled before their turn."""
        for job_id in self._prepared.keys() - keep:
            self._prepared.pop(job_id).cancel()

    async def _run(self, job: Job) -> None:
        """Work on one job. Whatever goes wrong in it ends this job alone."""
        self._writer.progress[job.id] = 0.0
        self._needs_tidying = True
        try:
            await self._step(job)
        except Cancelled:
            await self._rows.set_state(job, "cancelled")
        except Exception as error:  # noqa: BLE001  # the border that keeps one file from stopping the others
            code, message = reason_of(error)
            if code == "internal_error":
                _log.exception("Job %s failed", job.id)
            await self._rows.set_state(job, "failed", error_code=code, error_message=message)
        self._writer.progress.pop(job.id, None)
        if (preparing := self._prepared.pop(job.id, None)) is not None and not preparing.done():
            preparing.cancel()
        await asyncio.to_thread(self._blobs.remove, job.blob_path)
        async with self._changed:
            self._changed.notify_all()

    async def _step(self, job: Job) -> None:
        collection = await asyncio.to_thread(self._rows.living_collection, job.collection_id)
        if job.kind == "reembed":
            await self._reembedding.reembed(job, collection)
            return
        self.check_embedding(collection)
        if job.kind == "repair":
            await self._reembedding.repair(job, collection)
        else:
            await self._ingest(job, collection)

    async def _ingest(self, job: Job, collection: Collection) -> None:
        await self._rows.set_state(job, "parsing")
        prepared = await self._prepared[job.id]
        document = await asyncio.to_thread(self._rows.living_document, collection.id, job.filename)
        active = await asyncio.to_thread(self._rows.active_version, document)
        if active is not None and active.content_sha256 == prepared.content_sha256:
            await self._rows.end_unchanged(job, active)
            return
        if prepared.outcome is None:
            # The version that made it look unchanged is gone by now.
            prepared = await self._prepare(job)
        if not isinstance(parsed := prepared.outcome, ParsedDocument):
            raise parsed if parsed is not None else Cancelled
        version = _new_version(document.id if document else new_id("doc"), prepared, parsed)
        await self._rows.set_state(job, "embedding", warnings=list(parsed.warnings))
        try:
            version.num_chunks = await self._writer.store_passages(
                job, collection.index_id, version, parsed, job.filename, (_SHARE_OF_PARSING, 1.0)
            )
            change = Replacement(job.id, collection.id, collection.index_id, version, job.filename, job.owner_id)
            assert job.blob_path is not None
            await asyncio.to_thread(self._blobs.originals.keep, version.id, Path(job.blob_path))
            if not await asyncio.to_thread(self._journal.activate, change):
                raise Cancelled
        except BaseException:
            await asyncio.shield(asyncio.to_thread(self._discard, collection.index_id, version.id))
            raise

    def _discard(self, index_id: str, version_id: str) -> None:
        if self._writer.discard_if_staged(index_id, version_id):
            self._blobs.originals.remove([version_id])

    async def _prepare(self, job: Job) -> _Prepared:
        assert job.blob_path is not None
        path = Path(job.blob_path)
        sha256, num_bytes = await asyncio.to_thread(_hash, path)
        document = await asyncio.to_thread(self._rows.living_document, job.collection_id, job.filename)
        active = await asyncio.to_thread(self._rows.active_version, document)
        if active is not None and active.content_sha256 == sha256:
            return _Prepared(sha256, num_bytes, None)
        try:
            return _Prepared(sha256, num_bytes, await self._parsers.parse(path, job.filename))
        except ParseError as error:
            return _Prepared(sha256, num_bytes, error)


def _new_version(document_id: str, prepared: _Prepared, parsed: ParsedDocument) -> Version:
    return Version(
        id=new_id("ver"),
        document_id=document_id,
        content_sha256=prepared.content_sha256,
        num_bytes=prepared.num_bytes,
        mime_type=parsed.mime_type,
        title=parsed.title,
        language=parsed.language,
        num_characters=len(parsed.text),
        state="staged",
        text_zlib=zlib.compress(parsed.text.encode(), 6),
        pages=[[page.number, page.start, page.end] for page in parsed.pages],
    )


def _hash(path: Path) -> tuple[str, int]:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest(), file.tell()
