"""Files and questions that nobody means well: they are taken or refused with a reason, and the next one works."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.config import IngestionConfig
from tests.services.harness import error_of, running_endpoint
from tests.services.ingesting import OWNER, running

LARGE_PASSAGES = IngestionConfig(chunk_tokens=512, chunk_overlap_tokens=0)


async def test_ten_megabytes_on_a_single_line_become_a_document(tmp_path: Path) -> None:
    """Long words, so that there are few tokens: what is tested is the one line."""
    line = " ".join(f"{'x' * 500}{number}" for number in range(20_000)) + " needle"
    assert len(line) > 10_000_000
    async with running(tmp_path, config=LARGE_PASSAGES) as windfarm:
        windfarm.create()
        job = await windfarm.ingest("handbook", "line.txt", line)
        assert job["state"] == "done" and job["num_chunks"] >= 39, job["error"]
        assert windfarm.found("handbook", "needle")
        windfarm.check_agreement()


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        ("../../etc/passwd.txt", "passwd.txt"),
        ("C:\\Windows\\system.txt", "system.txt"),
        ("nul\x00byte.txt", "nulbyte.txt"),
        ("evil\u202etxt.exe.txt", "eviltxt.exe.txt"),
        ("line\r\nbreak.txt", "line break.txt"),
    ],
)
async def test_names_are_labels_and_hide_nothing(tmp_path: Path, name: str, stored: str) -> None:
    async with running(tmp_path) as windfarm:
        windfarm.create()
        job = await windfarm.ingest("handbook", name, "Some text.")
        assert (job["state"], job["filename"]) == ("done", stored)
        assert [each["name"] for each in windfarm.knowledge.list_documents("handbook", OWNER)] == [stored]
        assert {path.name for path in tmp_path.iterdir()} <= {
            *("windfarm.db", "windfarm.db-wal", "windfarm.db-shm", "windfarm.db.lock"),
            *("qdrant", "blobs", "originals"),
        }


async def test_a_question_of_a_hundred_thousand_characters_is_refused_by_its_length(tmp_path: Path) -> None:
    async with running_endpoint(tmp_path) as running_:
        answer = await running_.http.post("/v1/collections/x/search", json={"query": "wind " * 20_000})
        assert (answer.status_code, error_of(answer)["param"]) == (400, "query")
        assert "20000" in error_of(answer)["message"] and len(answer.content) < 2000
        assert running_.store.asked == []
