"""The whole collection of real files goes through one ingestion: each ends as its manifest says, none stops another."""

import json
from pathlib import Path
from typing import Any

import pytest

from services.ingest_progress import LiveJobs
from tests.services.ingesting import OWNER, running

DOCUMENTS = Path(__file__).parents[1] / "data" / "documents"
MANIFEST = [json.loads(line) for line in (DOCUMENTS / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]
STATES = {"text": {"done"}, "empty": {"failed"}, "reject": {"failed"}, "text-or-empty": {"done"}}


def code_of(entry: dict[str, Any]) -> str:
    """The code with which a file of the manifest that is not taken must fail."""
    return "encrypted" if "encrypted" in entry["note"] else "empty_file"


@pytest.mark.integration
async def test_every_file_of_a_folder_ends_as_its_manifest_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[str, list[float]] = {}
    advance = LiveJobs.advance

    def listen(live: LiveJobs, job_id: str, progress: float) -> None:
        told.setdefault(job_id, []).append(progress)
        advance(live, job_id, progress)

    monkeypatch.setattr(LiveJobs, "advance", listen)
    seen: dict[str, list[float]] = {}
    async with running(tmp_path) as windfarm:
        windfarm.create()
        jobs: list[tuple[dict[str, Any], str]] = []
        for entry in MANIFEST:
            job = await windfarm.service.submit(
                "handbook", entry["file"], (DOCUMENTS / entry["file"]).read_bytes(), OWNER
            )
            jobs.append((entry, job["id"]))
        wrong = []
        for entry, job_id in jobs:
            while (job := await windfarm.service.wait_for_job(job_id, OWNER, timeout_s=0.02))["state"] not in (
                "done",
                "failed",
            ):
                seen.setdefault(job_id, []).append(job["progress"])
            failure = job["error"]["code"] if job["error"] else None
            if job["state"] not in STATES[entry["expect"]] or failure not in (None, code_of(entry)):
                wrong.append((entry["file"], entry["expect"], job["state"], job["error"]))
            if job["state"] == "done":
                assert job["progress"] == 1
        assert wrong == []
        # What clients see never falls, and what the worker tells is more than a beginning and an end.
        assert [values for values in seen.values() if values != sorted(values)] == []
        assert [values for values in told.values() if values != sorted(values) or not 0 <= values[-1] <= 1] == []
        assert sum(0 < value < 1 for values in told.values() for value in values) > 10
        documents = windfarm.knowledge.list_documents("handbook", OWNER)
        expected = {entry["file"] for entry in MANIFEST if "done" in STATES[entry["expect"]]}
        assert {document["name"] for document in documents} == expected
        windfarm.check_agreement()
