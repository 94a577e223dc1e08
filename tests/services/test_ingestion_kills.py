"""Kills at random moments of an ingest of many files leave what an undisturbed run leaves: database and store agree in
every document, passage and vector. `make test-kills` does it with 20 kills and 200 files; `make test` in short."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from sqlalchemy import select

from services.database import Document, Job, JournalEntry, Version
from tests.seen import seen
from tests.services.ingest_many_files import uploads
from tests.services.ingesting import OWNER, Running, running

ROOT = Path(__file__).parents[2]
NUM_KILLS = int(os.environ.get("WINDFARM_TEST_KILLS", "3"))
NUM_FILES = int(os.environ.get("WINDFARM_TEST_KILL_FILES", "30"))
SEED = int(os.environ.get("WINDFARM_TEST_SEED", "20"))
NUM_PROBES = 4


@dataclass
class Client:
    """Runs the ingesting program and remembers what it acknowledged."""

    home: Path
    acknowledged: list[str] = field(default_factory=list)
    num_done: int = 0

    def run_until(self, num_done: int | None, after_s: float = 0.0) -> bool:
        """Kill the program `after_s` after it told of so many finished jobs. True where it came to its end before."""
        told = self.home / "acknowledged"
        told.write_text("\n".join(self.acknowledged))
        program = [sys.executable, "-m", "tests.services.ingest_many_files", str(self.home), str(NUM_FILES), str(told)]
        process = subprocess.Popen(program, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            has_ended = self._read(process.stdout, num_done)
            time.sleep(after_s)  # The moment of the kill is what is tested.
            if num_done is not None:
                process.send_signal(signal.SIGKILL)
            return self._read(process.stdout, None) or has_ended
        finally:
            process.kill()
            process.wait()

    def _read(self, lines: IO[str], until_done: int | None) -> bool:
        for line in lines:
            what, _, number = line.strip().partition(" ")
            if what == "finished":
                return True
            if what == "done":
                self.num_done = int(number)
                if until_done is not None and self.num_done >= until_done:
                    return False
            elif number.isdecimal():
                self.acknowledged.append(line.strip())
        return False


async def test_after_kills_everything_is_as_after_an_undisturbed_run(tmp_path: Path) -> None:
    chance = random.Random(SEED)
    quiet, killed = Client(tmp_path / "quiet"), Client(tmp_path / "killed")
    for client in (quiet, killed):
        client.home.mkdir()
    assert quiet.run_until(None)
    num_jobs = len(uploads(NUM_FILES))
    for number in range(NUM_KILLS):
        # One in each part of the way, at any moment in it: also while files are sent.
        moment = int((number + chance.random()) / NUM_KILLS * num_jobs * 0.9)
        assert not killed.run_until(moment, after_s=chance.uniform(0, 0.05)), "it was killed in the middle"
    assert killed.run_until(None)
    assert await state_of(killed.home) == await state_of(quiet.home)


async def state_of(home: Path) -> dict[str, Any]:
    """Everything that is kept, but for random ids and times."""
    async with running(home) as windfarm:
        windfarm.check_agreement()
        assert windfarm.report.agreed, windfarm.report
        assert not list((home / "blobs").iterdir())
        with windfarm.database.read() as session:
            documents = {document.id: document for document in session.scalars(select(Document))}
            versions = session.scalars(select(Version)).all()
            jobs = session.scalars(select(Job)).all()
            assert not session.scalars(select(JournalEntry)).all()
        assert {job.state for job in jobs} == {"done"}
        assert len(versions) == len(documents)
        return {
            "documents": sorted(_row(documents[version.document_id], version) for version in versions),
            "passages": _passages(windfarm),
        }


def _row(document: Document, version: Version) -> tuple[Any, ...]:
    assert document.active_version_id == version.id and document.deleted_at is None
    text = hashlib.sha256(version.text_zlib).hexdigest()
    about = (version.num_bytes, version.mime_type, version.title or "", version.language or "", version.state)
    return (document.name, version.content_sha256, text, version.num_chunks, version.num_characters, *about)


def _passages(windfarm: Running) -> list[tuple[Any, ...]]:
    """Every passage with its cosines to some vectors: were a vector another, they would differ."""
    index_id = windfarm.knowledge.collection("handbook", OWNER).index_id
    num_passages = windfarm.store.count(index_id)
    chance = np.random.default_rng(SEED)
    everything = seen(windfarm.store, index_id)
    cosines: dict[str, list[float]] = {}
    chunks = {}
    for _ in range(NUM_PROBES):
        probe = chance.normal(size=windfarm.embedder.dimension).astype(np.float32)
        probe /= np.linalg.norm(probe)
        found = everything.search([index_id], vector=probe, text=None, limit=num_passages)
        assert len(found) == num_passages > NUM_FILES
        for hit in found:
            chunks[hit.chunk.chunk_id] = hit.chunk
            assert hit.dense is not None
            cosines.setdefault(hit.chunk.chunk_id, []).append(round(hit.dense, 4))
    return sorted(
        (each.document_name, each.index, each.text, each.start, each.end, each.headings, tuple(cosines[chunk_id]))
        for chunk_id, each in chunks.items()
    )
