"""Files into collections: every upload becomes a job, and one worker takes the jobs in order.

A job goes: keep the file, parse, cut into passages, embed, write them hidden into the vector store, then make them the
document's active version in one journaled step. The same content again changes nothing. A failing file ends its own
job with a reason and no other. Knows nothing of Ray; embedder, store and parsers are handed in.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import logging
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.exc import OperationalError

from rag.chunking import TokenSpans, chunk_document
from rag.errors import EmbedderUnavailable, EmbeddingMismatch, ParseError, StoreError
from rag.filenames import clean_filename
from rag.types import Embedder, ParsedDocument, StoredChunk, TextChunk, Vectors
from rag.vector_store import VectorStore, point_id
from services.blobs import Blobs
from services.config import IngestionConfig
from services.database import Collection, Database, Document, Job, Version, new_id
from services.errors import ApiError, conflict, invalid
from services.journal import Journal, Removal, Replacement
from services.knowledge import ACTIVE_JOB_STATES, Knowledge, job_json, stored_document, unknown_document
from services.parser_pool import ParserPool

_log = logging.getLogger(__name__)

_EMBED_BATCH = 32
_SHARE_OF_PARSING = 0.1
_RETRY_S = 2.0
_EMBEDDER_PATIENCE_S = 300.0
"""How long a job waits for an embedding replica that restarts."""


class _Cancelled(Exception):
    """The job's collection or document was deleted while it ran."""


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
        self._token_spans = token_spans
        self._parsers = parsers
        self._blobs = blobs
        self._config = config
        self._knowledge = Knowledge(database)
        self._progress: dict[str, float] = {}
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
        receipt = await asyncio.to_thread(self._delete_document, collection, document_id, actor)
        self._needs_tidying = True
        self._has_work.set()
        return receipt

    async def delete_collection(self, name: str, actor: str) -> dict[str, Any]:
        return await asyncio.to_thread(self._delete_collection, name, actor)

    def require_embedding(self, collection: Collection) -> None:
        """`check_embedding` for callers over the handle: a 409 that says what to do."""
        with _as_api_errors():
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

    # Submitting and deleting

    def _submit(self, collection_name: str, filename: str, source: Path | bytes, actor: str) -> dict[str, Any]:
        collection = self._knowledge.collection(collection_name, actor)
        self.require_embedding(collection)
        with _as_api_errors():
            name = clean_filename(filename)
        job_id = new_id("job")
        blob = self._blobs.keep(job_id, source, int(self._config.max_file_mib * (1 << 20)))
        try:
            return self._insert_job(Job(id=job_id, filename=name, blob_path=str(blob)), collection, actor)
        except BaseException:
            self._blobs.remove(str(blob))
            raise

    def _submit_reembedding(self, collection_name: str, actor: str) -> dict[str, Any]:
        collection = self._knowledge.collection(collection_name, actor)
        return self._insert_job(Job(id=new_id("job"), kind="reembed", filename=""), collection, actor)

    def _insert_job(self, job: Job, collection: Collection, actor: str) -> dict[str, Any]:
        job.collection_id, job.owner_id = collection.id, actor
        with _as_api_errors(), self._database.write() as session:
            session.add(job)
            session.flush()
            return job_json(job, collection.name)

    def _delete_document(self, collection_name: str, document_id: str, actor: str) -> dict[str, Any]:
        collection = self._knowledge.collection(collection_name, actor)
        with self._database.read() as session:
            document = session.get(Document, document_id)
        if document is None or document.collection_id != collection.id or document.deleted_at is not None:
            raise unknown_document(document_id)
        removed = self._journal.delete_document(document, collection.index_id)
        return self._receipt(removed, id=document.id, object="document.deleted", name=document.name)

    def _delete_collection(self, name: str, actor: str) -> dict[str, Any]:
        collection = self._knowledge.collection(name, actor)
        removed = self._journal.delete_collection(collection)
        return self._receipt(removed, id=collection.id, object="collection.deleted", name=collection.name)

    def _receipt(self, removed: Removal, **of_what: str) -> dict[str, Any]:
        for blob_path in removed.blob_paths:
            self._blobs.remove(blob_path)
        return of_what | {
            "deleted": True,
            "num_documents": removed.num_documents,
            "num_versions": removed.num_versions,
            "num_passages": removed.num_passages,
        }

    def _with_progress(self, job: dict[str, Any]) -> dict[str, Any]:
        live = self._progress.get(job["id"])
        return job if live is None or job["state"] not in ACTIVE_JOB_STATES else job | {"progress": live}

    # The worker

    async def _work(self) -> None:
        while True:
            self._has_work.clear()
            jobs = await asyncio.to_thread(self._next_jobs)
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

    def _next_jobs(self) -> list[Job]:
        """The job whose turn it is and those whose files may be parsed meanwhile."""
        waiting = select(Job).where(Job.state.in_(ACTIVE_JOB_STATES)).order_by(Job.created_at, Job.id)
        with self._database.read() as session:
            return list(session.scalars(waiting.limit(1 + self._parsers.num_parsers)))

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
        self._progress[job.id] = 0.0
        self._needs_tidying = True
        try:
            await self._step(job)
        except _Cancelled:
            await self._set_state(job, "cancelled")
        except Exception as error:  # noqa: BLE001  # the border that keeps one file from stopping the others
            code, message = _reason(error)
            if code == "internal_error":
                _log.exception("Job %s failed", job.id)
            await self._set_state(job, "failed", error_code=code, error_message=message)
        self._progress.pop(job.id, None)
        if (preparing := self._prepared.pop(job.id, None)) is not None and not preparing.done():
            preparing.cancel()
        await asyncio.to_thread(self._blobs.remove, job.blob_path)
        async with self._changed:
            self._changed.notify_all()

    async def _step(self, job: Job) -> None:
        collection = await asyncio.to_thread(self._living_collection, job.collection_id)
        if job.kind == "reembed":
            await self._reembed(job, collection)
            return
        self.check_embedding(collection)
        if job.kind == "repair":
            await self._repair(job, collection)
        else:
            await self._ingest(job, collection)

    async def _ingest(self, job: Job, collection: Collection) -> None:
        await self._set_state(job, "parsing")
        prepared = await self._prepared[job.id]
        document = await asyncio.to_thread(self._living_document, collection.id, job.filename)
        active = await asyncio.to_thread(self._active_version, document)
        if active is not None and active.content_sha256 == prepared.content_sha256:
            await self._end_unchanged(job, active)
            return
        if prepared.outcome is None:
            # The version that made it look unchanged is gone by now.
            prepared = await self._prepare(job)
        if not isinstance(parsed := prepared.outcome, ParsedDocument):
            raise parsed if parsed is not None else _Cancelled
        version = _new_version(document.id if document else new_id("doc"), prepared, parsed)
        await self._set_state(job, "embedding", warnings=list(parsed.warnings))
        try:
            version.num_chunks = await self._store_passages(
                job, collection.index_id, version, parsed, job.filename, (_SHARE_OF_PARSING, 1.0)
            )
            change = Replacement(job.id, collection.id, collection.index_id, version, job.filename, job.owner_id)
            if not await asyncio.to_thread(self._journal.activate, change):
                raise _Cancelled
        except BaseException:
            await asyncio.shield(asyncio.to_thread(self._discard_if_staged, collection.index_id, version.id))
            raise

    async def _prepare(self, job: Job) -> _Prepared:
        assert job.blob_path is not None
        path = Path(job.blob_path)
        sha256, num_bytes = await asyncio.to_thread(_hash, path)
        document = await asyncio.to_thread(self._living_document, job.collection_id, job.filename)
        active = await asyncio.to_thread(self._active_version, document)
        if active is not None and active.content_sha256 == sha256:
            return _Prepared(sha256, num_bytes, None)
        try:
            return _Prepared(sha256, num_bytes, await self._parsers.parse(path, job.filename))
        except ParseError as error:
            return _Prepared(sha256, num_bytes, error)

    async def _store_passages(
        self,
        job: Job,
        index_id: str,
        version: Version,
        parsed: ParsedDocument,
        document_name: str,
        progress: tuple[float, float],
    ) -> int:
        """Cut, embed and write a version's passages, hidden. Returns how many there are."""
        chunks = await asyncio.to_thread(
            chunk_document,
            parsed,
            self._token_spans,
            self._config.chunk_tokens,
            min(self._config.chunk_overlap_tokens, self._config.chunk_tokens // 2),
        )
        first, last = progress
        num_stored = 0
        for start in range(0, len(chunks), _EMBED_BATCH):
            batch = chunks[start : start + _EMBED_BATCH]
            vectors = await self._embed([embedded_text(chunk) for chunk in batch])
            stored = [_stored_chunk(chunk, index_id, version, document_name) for chunk in batch]
            await asyncio.to_thread(self._write_hidden, job, index_id, stored, vectors)
            num_stored += len(batch)
            self._progress[job.id] = min(last, first + (last - first) * num_stored / len(chunks))
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
                    raise _Cancelled
            self._store.upsert(index_id, chunks, vectors, active=False)

    def _discard_if_staged(self, index_id: str, version_id: str) -> None:
        """Remove passages of a job that did not come to its end. A version that was decided on is the journal's."""
        with self._journal.turn:
            with self._database.read() as session:
                if session.get(Version, version_id) is not None:
                    return
            self._store.delete_version(index_id, version_id)

    # Embedding again

    async def _reembed(self, job: Job, collection: Collection) -> None:
        """Fill a new index with all documents, then let the collection use it, in one step."""
        await self._set_state(job, "embedding")
        index_id = new_id("col")
        documents = await asyncio.to_thread(self._active_documents, collection.id)
        num_chunks: dict[str, int] = {}
        try:
            for position, (document, version) in enumerate(documents):
                progress = (position / len(documents), (position + 1) / len(documents))
                parsed = await asyncio.to_thread(stored_document, version)
                num_chunks[version.id] = await self._store_passages(
                    job, index_id, version, parsed, document.name, progress
                )
            await asyncio.to_thread(self._switch, job, collection.id, index_id, num_chunks)
        except BaseException:
            await asyncio.shield(asyncio.to_thread(self._discard_index, index_id))
            raise

    def _switch(self, job: Job, collection_id: str, index_id: str, num_chunks: dict[str, int]) -> None:
        with self._journal.turn:
            active = {version.id for _, version in self._active_documents(collection_id)}
            for version_id in num_chunks:
                if version_id in active:
                    self._store.activate_version(index_id, version_id)
                else:
                    # Deleted while it was embedded.
                    self._store.delete_version(index_id, version_id)
            with self._database.write() as session:
                collection = session.get(Collection, collection_id)
                if collection is None or collection.deleted_at is not None:
                    raise _Cancelled
                self._journal.switch_index(session, collection, index_id)
                collection.embedding_model = self._embedder.model_name
                collection.embedding_dimension = self._embedder.dimension
                for version_id in active:
                    session.get_one(Version, version_id).num_chunks = num_chunks[version_id]
                row = session.get_one(Job, job.id)
                row.state, row.progress = "done", 1.0
                row.num_chunks = sum(num_chunks[version_id] for version_id in active)
            self._journal.replay()

    def _discard_index(self, index_id: str) -> None:
        with self._journal.turn:
            with self._database.read() as session:
                if session.scalars(select(Collection).where(Collection.index_id == index_id)).first() is not None:
                    return
            self._store.delete_collection(index_id)

    async def _repair(self, job: Job, collection: Collection) -> None:
        """Write the passages of one document's active version again, from its stored text."""
        await self._set_state(job, "embedding")
        document, version = await asyncio.to_thread(self._document_of_job, job)
        parsed = await asyncio.to_thread(stored_document, version)
        await asyncio.to_thread(self._store.delete_version, collection.index_id, version.id)
        num_chunks = await self._store_passages(job, collection.index_id, version, parsed, document.name, (0.0, 1.0))
        await asyncio.to_thread(self._end_repair, job, collection.index_id, version.id, num_chunks)

    def _end_repair(self, job: Job, index_id: str, version_id: str, num_chunks: int) -> None:
        with self._journal.turn, self._database.write() as session:
            version = session.get(Version, version_id)
            if version is None or version.state != "active":
                self._store.delete_version(index_id, version_id)
                raise _Cancelled
            self._store.activate_version(index_id, version_id)
            version.num_chunks = num_chunks
            row = session.get_one(Job, job.id)
            row.state, row.progress, row.num_chunks = "done", 1.0, num_chunks

    # Database

    def _living_collection(self, collection_id: str) -> Collection:
        with self._database.read() as session:
            collection = session.get(Collection, collection_id)
        if collection is None or collection.deleted_at is not None:
            raise _Cancelled
        return collection

    def _living_document(self, collection_id: str, name: str) -> Document | None:
        wanted = select(Document).where(
            Document.collection_id == collection_id, Document.name == name, Document.deleted_at.is_(None)
        )
        with self._database.read() as session:
            return session.scalars(wanted).one_or_none()

    def _active_version(self, document: Document | None) -> Version | None:
        if document is None or document.active_version_id is None:
            return None
        with self._database.read() as session:
            return session.get(Version, document.active_version_id)

    def _active_documents(self, collection_id: str) -> list[tuple[Document, Version]]:
        rows = (
            select(Document, Version)
            .join(Version, Version.id == Document.active_version_id)
            .where(Document.collection_id == collection_id, Document.deleted_at.is_(None))
            .order_by(Document.name)
        )
        with self._database.read() as session:
            return [(document, version) for document, version in session.execute(rows)]

    def _document_of_job(self, job: Job) -> tuple[Document, Version]:
        with self._database.read() as session:
            document = session.get(Document, job.document_id) if job.document_id else None
            version = session.get(Version, document.active_version_id) if document else None
        if document is None or version is None:
            raise _Cancelled
        return document, version

    async def _end_unchanged(self, job: Job, active: Version) -> None:
        await self._set_state(
            job,
            "done",
            unchanged=True,
            progress=1.0,
            document_id=active.document_id,
            version_id=active.id,
            num_chunks=active.num_chunks,
        )

    async def _set_state(self, job: Job, state: str, **values: Any) -> None:
        """Write a job's state; waits where the database cannot be written (a full disk), because nothing else helps.
        Raises `_Cancelled` where a job that shall go on was cancelled."""
        while True:
            try:
                is_wanted = await asyncio.to_thread(self._write_state, job.id, state, values)
                if not is_wanted and state in ACTIVE_JOB_STATES:
                    raise _Cancelled
                return
            except OperationalError as error:
                _log.error("The state of job %s cannot be written, trying again: %s", job.id, error.orig)
                await asyncio.sleep(_RETRY_S)

    def _write_state(self, job_id: str, state: str, values: dict[str, Any]) -> bool:
        with self._database.write() as session:
            row = session.get(Job, job_id)
            if row is None or row.state not in ACTIVE_JOB_STATES:
                return False
            for name, value in {"state": state, **values}.items():
                setattr(row, name, value)
            return True


def embedded_text(chunk: TextChunk) -> str:
    """What the embedding model sees of a passage: the headings above it say what it is about."""
    missing = [heading for heading in chunk.headings if heading not in chunk.text]
    return "\n".join((" > ".join(missing), chunk.text)) if missing else chunk.text


def _stored_chunk(chunk: TextChunk, index_id: str, version: Version, document_name: str) -> StoredChunk:
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


def _reason(error: Exception) -> tuple[str, str]:
    """Stable code and message of what ended a job."""
    cause = error.orig if isinstance(error, OperationalError) else error
    text = str(cause)
    if isinstance(error, ParseError):
        return error.code, text
    if (
        (isinstance(cause, OSError) and cause.errno == errno.ENOSPC)
        or "disk is full" in text
        or "No space left" in text
    ):
        return "disk_full", "The disk is full; the file was not stored. Free some space and upload it again."
    if isinstance(error, EmbeddingMismatch):
        return "embedding_mismatch", text
    if isinstance(error, EmbedderUnavailable | TimeoutError):
        return "embedding_unavailable", f"The embedding model did not answer: {text}. Upload the file again later."
    if isinstance(error, FileNotFoundError):
        return "upload_lost", "The uploaded file is gone from the data folder. Upload it again."
    if isinstance(error, StoreError):
        return "store_error", text
    return "internal_error", f"Something went wrong inside windfarm ({type(error).__name__}); the log says more."


@contextlib.contextmanager
def _as_api_errors() -> Iterator[None]:
    """What a caller hears of problems that show before there is a job."""
    try:
        yield
    except ParseError as error:
        raise invalid(str(error), param="file", code=error.code) from error
    except EmbeddingMismatch as error:
        raise conflict(str(error), code="embedding_mismatch", param="collection") from error
    except OperationalError as error:
        if "disk is full" in str(error.orig):
            message = "The disk of the database is full; nothing was stored. Free some space and try again."
            raise ApiError(507, "insufficient_storage", "disk_full", message) from error
        raise
