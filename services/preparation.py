"""Files on their way to the ingestion: fetched, hashed and parsed before their turn, so that the embedding model never
waits for them."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rag.errors import ParseError
from rag.types import ParsedDocument
from services.database import Job
from services.job_rows import JobRows
from services.parser_pool import ParserPool
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


class Preparation:
    def __init__(self, rows: JobRows, parsers: ParserPool, open_client: Callable[[], GuardedClient]) -> None:
        self._rows = rows
        self._parsers = parsers
        self._open_client = open_client
        self._tasks: dict[str, asyncio.Task[Prepared]] = {}

    @property
    def num_ahead(self) -> int:
        """How many jobs are prepared at the same time."""
        return 1 + self._parsers.num_parsers

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
            task.add_done_callback(_look_at_its_error)

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
            return Prepared(sha256, num_bytes, await self._parsers.parse(path, name))
        except ParseError as error:
            return Prepared(sha256, num_bytes, error)

    async def _fetch(self, job: Job, path: Path) -> str:
        """Fetch a job's URL. Returns the name by which the parser knows its type."""
        assert job.origin is not None
        async with self._open_client() as client:
            fetched, name = await fetch_page(client, job.origin, path)
        job.num_bytes = fetched.num_bytes
        return name


def _look_at_its_error(task: asyncio.Task[Prepared]) -> None:
    """Nobody waits for it any more: without this, asyncio would log that its error was not looked at."""
    with contextlib.suppress(asyncio.CancelledError):
        task.exception()


def _hash(path: Path) -> tuple[str, int]:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest(), file.tell()
