"""What the ingestion worker reads and writes in the database about its jobs and their documents.

Calls block unless they are coroutines. Whatever is gone meanwhile raises `Cancelled`.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from sqlalchemy import select
from sqlalchemy.exc import OperationalError

from services.database import Collection, Database, Document, Job, Version, utc_now
from services.ingest_progress import LiveJobs
from services.ingestion_errors import Cancelled, Paused
from services.knowledge import ACTIVE_JOB_STATES

_log = logging.getLogger(__name__)

_RETRY_S = 2.0


class JobRows:
    def __init__(self, database: Database, live: LiveJobs) -> None:
        self._database = database
        self._live = live

    def next_jobs(self, limit: int) -> list[Job]:
        """The job whose turn it is and those after it, without the paused ones."""
        waiting = (
            select(Job)
            .where(Job.state.in_(ACTIVE_JOB_STATES), Job.is_paused.is_(False))
            .order_by(Job.created_at, Job.id)
        )
        with self._database.read() as session:
            return list(session.scalars(waiting.limit(limit)))

    def living_collection(self, collection_id: str) -> Collection:
        with self._database.read() as session:
            collection = session.get(Collection, collection_id)
        if collection is None or collection.deleted_at is not None:
            raise Cancelled
        return collection

    def living_document(self, collection_id: str, name: str) -> Document | None:
        wanted = select(Document).where(
            Document.collection_id == collection_id, Document.name == name, Document.deleted_at.is_(None)
        )
        with self._database.read() as session:
            return session.scalars(wanted).one_or_none()

    def active_version(self, document: Document | None) -> Version | None:
        if document is None or document.active_version_id is None:
            return None
        with self._database.read() as session:
            return session.get(Version, document.active_version_id)

    def same_content(self, collection_id: str, content_sha256: str, name: str) -> str | None:
        """Name of another document of the collection whose active version has the same bytes."""
        twins = (
            select(Document.name)
            .join(Version, Version.id == Document.active_version_id)
            .where(
                Document.collection_id == collection_id,
                Document.deleted_at.is_(None),
                Document.name != name,
                Version.content_sha256 == content_sha256,
            )
            .order_by(Document.name)
            .limit(1)
        )
        with self._database.read() as session:
            return session.scalars(twins).first()

    def active_documents(self, collection_id: str) -> list[tuple[Document, Version]]:
        rows = (
            select(Document, Version)
            .join(Version, Version.id == Document.active_version_id)
            .where(Document.collection_id == collection_id, Document.deleted_at.is_(None))
            .order_by(Document.name)
        )
        with self._database.read() as session:
            return [(document, version) for document, version in session.execute(rows)]

    def document_of_job(self, job: Job) -> tuple[Document, Version]:
        with self._database.read() as session:
            document = session.get(Document, job.document_id) if job.document_id else None
            version = session.get(Version, document.active_version_id) if document else None
        if document is None or version is None:
            raise Cancelled
        return document, version

    def note_origin(self, document_id: str, job: Job) -> None:
        """Content that was there already may have come by another way: a synchronisation takes its document over."""
        if job.source is None and job.origin is None:
            return
        with self._database.write() as session:
            document = session.get(Document, document_id)
            if document is not None:
                document.source, document.origin = job.source, job.origin

    async def end_unchanged(self, job: Job, active: Version) -> None:
        await self.set_state(
            job,
            "done",
            unchanged=True,
            progress=1.0,
            document_id=active.document_id,
            version_id=active.id,
            num_chunks=active.num_chunks,
        )

    async def put_back(self, job: Job) -> bool:
        """Back into the queue, from the beginning. False where the job has ended meanwhile."""
        try:
            await self.set_state(job, "queued", progress=0.0, started_at=None)
        except Cancelled:
            return False
        return True

    async def set_state(self, job: Job, state: str, **values: Any) -> None:
        """Write a job's state; waits where the database cannot be written (a full disk), because nothing else helps.
        Raises `Cancelled` or `Paused` where a job that shall go on was cancelled or paused."""
        while True:
            try:
                is_wanted = await asyncio.to_thread(self._write_state, job.id, state, values)
                if not is_wanted and state in ACTIVE_JOB_STATES:
                    raise Cancelled
                return
            except OperationalError as error:
                _log.error("The state of job %s cannot be written, trying again: %s", job.id, error.orig)
                self._live.waits(job.id, f"The database cannot be written ({error.orig}). Free some space on its disk.")
                await asyncio.sleep(_RETRY_S)

    def _write_state(self, job_id: str, state: str, values: dict[str, Any]) -> bool:
        with self._database.write() as session:
            row = session.get(Job, job_id)
            if row is None or row.state not in ACTIVE_JOB_STATES:
                return False
            if row.is_paused and state in ("parsing", "embedding"):
                raise Paused
            if state not in ACTIVE_JOB_STATES:
                values = {"ended_at": utc_now(), **values}
            for name, value in {"state": state, **values}.items():
                setattr(row, name, value)
            return True
