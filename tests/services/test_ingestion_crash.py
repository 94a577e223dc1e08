"""A kill at any moment leaves no half and no double document, and loses no acknowledged upload."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from services.knowledge import ACTIVE_JOB_STATES
from tests.services.ingest_until_killed import DELETED_NAME, NAMES, content
from tests.services.ingesting import OWNER, Running, running

ROOT = Path(__file__).parents[2]
NUM_KILLS = 4
SEED = 20


async def test_after_kills_the_knowledge_is_as_if_nothing_had_happened(tmp_path: Path) -> None:
    chance = random.Random(SEED)
    acknowledged: dict[str, int] = {}
    for _ in range(NUM_KILLS):
        _ingest_and_kill(tmp_path, acknowledged, chance)
        async with running(tmp_path) as windfarm:
            await _until_idle(windfarm)
            _check(windfarm, acknowledged)


def _ingest_and_kill(home: Path, acknowledged: dict[str, int], chance: random.Random) -> None:
    first = max(acknowledged.values(), default=0) + 1
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.services.ingest_until_killed", str(home), str(first)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    time.sleep(chance.uniform(0.0, 1.2))  # The moment of the kill is what is tested.
    process.send_signal(signal.SIGKILL)
    for line in process.stdout:
        name, _, number = line.strip().partition(" ")
        if number.isdecimal():
            acknowledged[name] = int(number)
    process.wait()


async def _until_idle(windfarm: Running) -> None:
    for job in await windfarm.service.jobs("handbook", OWNER):
        if job["state"] in ACTIVE_JOB_STATES:
            ended = await windfarm.service.wait_for_job(job["id"], OWNER, timeout_s=60)
            assert ended["state"] == "done", ended


def _check(windfarm: Running, acknowledged: dict[str, int]) -> None:
    documents = {document["name"]: document for document in windfarm.knowledge.list_documents("handbook", OWNER)}
    assert set(acknowledged) <= set(documents) <= {*NAMES, DELETED_NAME}
    for name, document in documents.items():
        text = windfarm.knowledge.document(document["id"], OWNER)["text"].encode()
        # The kill may fall between keeping an upload and telling so: then the next version is there.
        number = acknowledged.get(name, 0)
        assert name == DELETED_NAME or text in (content(name, number), content(name, number + 1))
        hits = [hit for hit in windfarm.found("handbook", name) if name in hit]
        assert hits, "an active document is found"
    assert not list((windfarm.home / "blobs").iterdir())
    windfarm.check_agreement()
