"""The worker of the ingestion: takes the jobs in order and carries them out, one at a time.

A job that fails ends alone, with its reason. One that is paused goes back into the queue; one that needs something that
is away (vector store, embedding model) waits for it and says so. Knows nothing of Ray.
"""

from __future__ import annotations

import asyncio
import logging
import time
import zlib
from collections.abc import Callable
from collections.abc import Collection as AnyCollection
from pathlib import Path

from rag.errors import EmbedderUnavailable, StoreError, StoreUnavailable
from rag.types import ParsedDocument
from rag.vector_store import VectorStore
from services.blobs import Blobs
from services.database import Collection, Job, Version, new_id, utc_now
from services.ingest_progress import LiveJobs
from services.ingestion_errors import Cancelled, Paused, reason_of
from services.job_rows import JobRows
from services.journal import Journal, Replacement
from services.passage_writer import PassageWriter
from services.preparation import Preparation, Prepared
from services.reembedding import Reembedding
from services.threads import to_its_end

_log = logging.getLogger(__name__)

_SHARE_OF_PARSING = 0.1
_FIRST_RETRY_S, _LONGEST_RETRY_S = 1.0, 30.0
_TIDY_EVERY_S = 60.0
"""While one job follows another."""


class IngestWorker:
    """`check_embedding` raises where a collection's vectors are of another model than the one that runs."""

    def __init__(
        self,
        *,
        store: VectorStore,
        journal: Journal,
        blobs: Blobs,
        rows: JobRows,
        live: LiveJobs,
        writer: PassageWriter,
        preparation: Preparation,
        reembedding: Reembedding,
        check_embedding: Callable[[Collection], None],
    ) -> None:
        self._store = store
        self._journal = journal
        self._blobs = blobs
        self._rows = rows
        self._live = live
        self._writer = writer
        self._preparation = preparation
        self._reembedding = reembedding
        self._check_embedding = check_embedding
        self._running: tuple[str, asyncio.Task[None]] | None = None
        self._has_work = asyncio.Event()
        self._needs_tidying = True
        self._tidied_at = 0.0
        self._tidying: asyncio.Task[None] | None = None
        self._worker: asyncio.Task[None] | None = None
        self.changed = asyncio.Condition()
        """Notified whenever a job has ended or was put back."""

    async def start(self) -> None:
        self._has_work.set()
        self._worker = asyncio.create_task(self._work())

    async def stop(self) -> None:
        """Stop in the middle of a job; it starts anew at the next start."""
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.wait([self._worker])
        if self._tidying is not None:
            # Its thread ends by itself, or when the vector store is closed.
            self._tidying.cancel()
        await self._preparation.stop()
        self._worker = None

    def check_health(self) -> None:
        """Raise where the worker has ended by itself."""
        if self._worker is not None and self._worker.done():
            raise RuntimeError("The ingestion worker has ended.") from self._worker.exception()

    def wake(self, *, needs_tidying: bool = False) -> None:
        """There are new jobs, or the vector store was changed by others than jobs."""
        self._needs_tidying |= needs_tidying
        self._has_work.set()

    async def interrupt(self, job_ids: AnyCollection[str]) -> None:
        """The jobs were paused, resumed or cancelled in the database: stop the one that runs, look anew."""
        if self._running is not None and self._running[0] in job_ids:
            self._running[1].cancel()
        self._has_work.set()
        await self._tell()

    async def _tell(self) -> None:
        async with self.changed:
            self.changed.notify_all()

    async def _work(self) -> None:
        while True:
            self._has_work.clear()
            jobs = await asyncio.to_thread(self._rows.next_jobs, self._preparation.num_ahead)
            self._preparation.begin(jobs)
            if jobs:
                self._begin_tidying(_TIDY_EVERY_S)
                await self._run_and_prepare(jobs[0])
                continue
            self._live.meter.rest()
            self._begin_tidying(0.0)
            await self._has_work.wait()

    def _begin_tidying(self, pause_s: float) -> None:
        """Beside the jobs: a large collection takes long, and searches are slow in what is not merged."""
        is_due = self._needs_tidying and time.monotonic() - self._tidied_at >= pause_s
        if is_due and (self._tidying is None or self._tidying.done()):
            self._needs_tidying = False
            self._tidying = asyncio.create_task(self._tidy())

    async def _tidy(self) -> None:
        """Merge what was written, drop what was deleted from the files of the vector store."""
        try:
            self._blobs.require_space()
            await asyncio.to_thread(self._store.optimize)
        except (StoreError, OSError) as error:
            # Everything is stored already; the next time tries again.
            _log.warning("The vector store could not be tidied: %s", error)
        finally:
            self._tidied_at = time.monotonic()
            # What came meanwhile, and was not tidied because this was running.
            self._has_work.set()

    async def _run_and_prepare(self, job: Job) -> None:
        """Work on one job; those that arrive meanwhile are prepared already."""
        run = asyncio.create_task(self._run(job))
        try:
            while not run.done():
                arrival = asyncio.create_task(self._has_work.wait())
                try:
                    await asyncio.wait([run, arrival], return_when=asyncio.FIRST_COMPLETED)
                finally:
                    arrival.cancel()
                if not run.done():
                    self._has_work.clear()
                    self._preparation.begin(await asyncio.to_thread(self._rows.next_jobs, self._preparation.num_ahead))
            await run
        except BaseException:
            run.cancel()
            await asyncio.wait([run])
            raise

    async def _run(self, job: Job) -> None:
        """Work on one job. Whatever goes wrong in it ends this job alone."""
        self._live.begin(job.id)
        self._needs_tidying = True
        step = asyncio.create_task(self._persist(job))
        self._running = (job.id, step)
        has_ended = True
        try:
            await step
        except asyncio.CancelledError:
            if _is_stopping():
                raise
            # Somebody paused or cancelled it; a cancelled one stands so in the database already.
            has_ended = not await self._rows.put_back(job)
        except Paused:
            has_ended = not await self._rows.put_back(job)
        except Cancelled:
            await self._rows.set_state(job, "cancelled")
        except Exception as error:  # noqa: BLE001  # the border that keeps one file from stopping the others
            code, message = reason_of(error)
            if code == "internal_error":
                _log.exception("Job %s failed", job.id)
            if code == "disk_full":
                # The state needs some space too.
                await asyncio.to_thread(self._blobs.remove, job.blob_path)
            await self._rows.set_state(job, "failed", error_code=code, error_message=message)
        finally:
            self._running = None
            self._live.end(job.id)
            self._preparation.forget(job.id)
        if has_ended:
            self._live.meter.add(files=1)
            await asyncio.to_thread(self._blobs.remove, job.blob_path)
        await self._tell()

    async def _persist(self, job: Job) -> None:
        """Carry a job out. Where something that it needs is away, it waits and begins anew: no file is to blame."""
        retry_s = _FIRST_RETRY_S
        while True:
            try:
                await to_its_end(self._journal.replay)
                await self._step(job)
                return
            except (StoreUnavailable, EmbedderUnavailable) as error:
                _log.warning("Job %s waits: %s", job.id, error)
                self._live.waits(job.id, str(error))
                await asyncio.sleep(retry_s)
                retry_s = min(2 * retry_s, _LONGEST_RETRY_S)

    async def _step(self, job: Job) -> None:
        collection = await asyncio.to_thread(self._rows.living_collection, job.collection_id)
        if job.kind == "reembed":
            await self._reembedding.reembed(job, collection)
            return
        self._check_embedding(collection)
        if job.kind == "repair":
            await self._reembedding.repair(job, collection)
        else:
            await self._ingest(job, collection)

    async def _ingest(self, job: Job, collection: Collection) -> None:
        await self._rows.set_state(job, "parsing", started_at=utc_now(), progress=0.0)
        prepared = await self._preparation.of(job)
        document = await asyncio.to_thread(self._rows.living_document, collection.id, job.filename)
        active = await asyncio.to_thread(self._rows.active_version, document)
        if active is not None and active.content_sha256 == prepared.content_sha256:
            await self._rows.end_unchanged(job, active)
            await asyncio.to_thread(self._rows.note_origin, active.document_id, job)
            return
        if prepared.outcome is None:
            # The version that made it look unchanged is gone by now.
            prepared = await self._preparation.prepare(job)
        if not isinstance(parsed := prepared.outcome, ParsedDocument):
            raise parsed if parsed is not None else Cancelled
        version = _new_version(document.id if document else new_id("doc"), prepared, parsed)
        chunks = prepared.chunks
        twin = await asyncio.to_thread(self._rows.same_content, collection.id, prepared.content_sha256, job.filename)
        version.num_chunks = len(chunks)
        await self._rows.set_state(
            job,
            "embedding",
            warnings=list(parsed.warnings),
            duplicate_of=twin,
            num_bytes=prepared.num_bytes,
            num_tokens=sum(chunk.num_tokens for chunk in chunks),
        )
        change = Replacement(
            job.id, collection.id, collection.index_id, version, job.filename, job.owner_id, job.source, job.origin
        )
        try:
            ahead = prepared.take_ahead(self._writer.embed_ahead)
            await self._writer.store_chunks(
                job, collection.index_id, version, chunks, job.filename, (_SHARE_OF_PARSING, 1.0), ahead
            )
            assert job.blob_path is not None
            await to_its_end(self._blobs.originals.keep, version.id, Path(job.blob_path))
            if not await to_its_end(self._journal.activate, change):
                raise Cancelled
        except BaseException:
            await asyncio.shield(asyncio.to_thread(self._discard, collection.index_id, version.id))
            raise

    def _discard(self, index_id: str, version_id: str) -> None:
        if self._writer.discard_if_staged(index_id, version_id):
            self._blobs.originals.remove([version_id])


def _is_stopping() -> bool:
    """Whether the worker itself is cancelled, and not only the job that it waits for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _new_version(document_id: str, prepared: Prepared, parsed: ParsedDocument) -> Version:
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
