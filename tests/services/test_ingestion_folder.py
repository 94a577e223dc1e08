"""The whole collection of real files goes through one ingestion: each ends as its manifest says, none stops another."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.services.ingesting import OWNER, running

DOCUMENTS = Path(__file__).parents[1] / "data" / "documents"
MANIFEST = [json.loads(line) for line in (DOCUMENTS / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]
STATES = {"text": {"done"}, "empty": {"failed"}, "reject": {"failed"}, "text-or-empty": {"done"}}


@pytest.mark.integration
async def test_every_file_of_a_folder_ends_as_its_manifest_says(tmp_path: Path) -> None:
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
                seen.setdefault(job["state"], []).append(job["progress"])
            if job["state"] not in STATES[entry["expect"]] or (job["state"] == "failed") != bool(job["error"]):
                wrong.append((entry["file"], entry["expect"], job["state"], job["error"]))
        assert wrong == []
        # How many states are seen depends on the machine; none may be seen that is not one of a job on its way.
        assert seen
        assert set(seen) <= {"queued", "parsing", "embedding"}
        assert [value for values in seen.values() for value in values if not 0 <= value <= 1] == []
        documents = windfarm.knowledge.list_documents("handbook", OWNER)
        expected = {entry["file"] for entry in MANIFEST if "done" in STATES[entry["expect"]]}
        assert {document["name"] for document in documents} == expected
        windfarm.check_agreement()
