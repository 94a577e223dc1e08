"""Files on their way to the ingestion: fetched, hashed, parsed and cut before their turn, and their first passages
embedded, so that the embedding model never waits for them."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rag.errors import ParseError
from rag.types import ParsedDocument, TextChunk
from services.database import Job
from services.embedding_ahead import BATCHES_PER_REPLICA, EmbeddingAhead
from services.job_rows import JobRows
from services.parser_pool import ParserPool
from services.passage_writer import PassageWriter
from services.web.client import GuardedClient
from services.web.errors import FetchError
from services.web.pages import fetch_page


@dataclass(frozen=True, slots=True)
class Prepared:
    """What is known of a file before its turn: the hash of its content, and its text or why there is none."""

    content_sha256: str
    num_bytes: int
    outcome: ParsedDocument | ParseError | FetchError | None
    """None: the content is that of the active version, so there was nothing to parse."""
    chunks: Sequence[TextChunk] = ()
    ahead: list[EmbeddingAhead] = field(default_factory=list)
    """The passages' vectors, until they are taken: there is one way through them."""

    def take_ahead(self, embed_ahead: Callable[[Sequence[TextChunk]], EmbeddingAhead]) -> EmbeddingAhead:
        """What was begun; begun anew where a job goes this way once more."""
        return self.ahead.pop() if self.ahead else embed_ahead(self.chunks)

    def close(self) -> None:
        while self.ahead:
            self.ahead.pop().close()


class Preparation:
    """`num_replicas`: of the embedding model, each of which shall have something to do."""

    def __init__(
        self,
        rows: JobRows,
        parsers: ParserPool,
        writer: PassageWriter,
        open_client: Callable[[], GuardedClient],
        num_replicas: Callable[[], int],
    ) -> None:
        self._rows = rows
        self._parsers = parsers
        self._writer = writer
        self._open_client = open_client
        self._num_replicas = num_replicas
        self._tasks: dict[str, asyncio.Task[Prepared]] = {}

    @property
    def num_ahead(self) -> int:
        """How many jobs are prepared at the same time."""
        return 1 + max(self._parsers.num_parsers, BATCHES_PER_REPLICA * self._num_replicas())

    def begin(self, jobs: Sequence[Job]) -> None:
        """Prepare these jobs; drop what was prepared for jobs that were paused or cancelled before their turn."""
        wanted = {job.id for job in jobs}
        for job_id in self._tasks.keys() - wanted:
            self.forget(job_id)
        for job in jobs:
            if job.kind in ("ingest", "url") and job.id not in self._tasks:
                self._tasks[job.id] = asyncio.create_task(self.prepare(job))

    async def of(self, job: Job) -> Prepared:
        """What `begin` has begun for a job."""
        return await asyncio.shield(self._tasks[job.id])

    def forget(self, job_id: str) -> None:
        if (task := self._tasks.pop(job_id, None)) is not None:
            task.cancel()
            task.add_done_callback(_drop)

    async def stop(self) -> None:
        tasks = list(self._tasks.values())
        for job_id in list(self._tasks):
            self.forget(job_id)
        if tasks:
            await asyncio.wait(tasks)

    async def prepare(self, job: Job) -> Prepared:
        assert job.blob_path is not None
        path, name = Path(job.blob_path), job.parse_as or job.filename
        if job.kind == "url":
            try:
                name = await self._fetch(job, path)
            except FetchError as error:
                return Prepared("", 0, error)
        sha256, num_bytes = await asyncio.to_thread(_hash, path)
        document = await asyncio.to_thread(self._rows.living_document, job.collection_id, job.filename)
        active = await asyncio.to_thread(self._rows.active_version, document)
        if active is not None and active.content_sha256 == sha256:
            return Prepared(sha256, num_bytes, None)
        try:
            parsed = await self._parsers.parse(path, name)
        except ParseError as error:
            return Prepared(sha256, num_bytes, error)
        chunks = await self._writer.cut(parsed)
        return Prepared(sha256, num_bytes, parsed, chunks, [self._writer.embed_ahead(chunks)])

    async def _fetch(self, job: Job, path: Path) -> str:
        """Fetch a job's URL. Returns the name by which the parser knows its type."""
        assert job.origin is not None
        async with self._open_client() as client:
            fetched, name = await fetch_page(client, job.origin, path)
        job.num_bytes = fetched.num_bytes
        return name


def _drop(task: asyncio.Task[Prepared]) -> None:
    """Nobody waits for it any more: without a look at its error, asyncio would log that there was none."""
    with contextlib.suppress(asyncio.CancelledError):
        if task.exception() is None:
            task.result().close()


def _hash(path: Path) -> tuple[str, int]:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest(), file.tell()
