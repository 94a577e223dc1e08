"""The routes and commands of jobs address the store as they should and refuse what they do not know."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from services.cli.jobs import duration, summary_line
from tests.services.harness import error_of, running_endpoint

SUMMARY = {
    "states": {"queued": 3, "embedding": 1, "done": 2, "failed": 0},
    "num_paused": 1,
    "progress": 0.42,
    "tokens_per_s": 1234.5,
    "files_per_s": 2.5,
    "seconds_left": 75,
}
JOB = {"id": "job_1", "state": "queued", "paused": True, "collection": "towers", "filename": "a.md", "error": None}


async def test_jobs_are_found_and_changed_through_the_api(tmp_path: Path) -> None:
    async with running_endpoint(tmp_path) as running:
        asked: list[Any] = []
        running.store.answers = {
            "find_jobs": lambda actor, **chosen: asked.append(chosen) or {"data": [JOB], "summary": SUMMARY},
            "change_job": lambda job_id, action, actor: JOB | {"id": job_id, "asked": action},
            "change_jobs": lambda name, batch, action, actor: 7,
            "jobs": lambda name, actor: [JOB],
        }
        found = await running.http.get("/v1/jobs", params={"batch": "b", "state": "queued,failed", "limit": 5})
        assert found.json() == {"data": [JOB], "summary": SUMMARY}
        assert asked == [{"collection": None, "batch": "b", "states": ["queued", "failed"], "limit": 5}]
        changed = await running.http.post("/v1/jobs/job_9/pause")
        assert (changed.json()["id"], changed.json()["asked"]) == ("job_9", "pause")
        all_of_it = await running.http.post("/v1/collections/towers/jobs/cancel", params={"batch": "b"})
        assert (all_of_it.json()["num_jobs"], all_of_it.json()["action"]) == (7, "cancel")
        assert (await running.http.get("/v1/collections/towers/jobs")).json()["data"] == [JOB]


@pytest.mark.parametrize(
    ("query", "param"), [("limit=1001", "limit"), ("limit=x", "limit"), ("limit=-1", "limit"), ("stat=done", "stat")]
)
async def test_wrong_questions_for_jobs_are_refused(tmp_path: Path, query: str, param: str) -> None:
    async with running_endpoint(tmp_path) as running:
        answer = await running.http.get(f"/v1/jobs?{query}")
        assert (answer.status_code, error_of(answer)["param"]) == (400, param)
        assert (await running.http.post("/v1/jobs/job_1/explode")).status_code == 404
        assert (await running.http.get("/v1/jobs/job_1/pause")).status_code == 405


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "services.cli", *arguments], capture_output=True, text=True, check=False
    )


async def test_the_command_lists_shows_and_changes_jobs(tmp_path: Path) -> None:
    async with running_endpoint(tmp_path) as running:
        at = ("--api", running.url, "--key", running.key)
        running.store.answers = {
            "find_jobs": lambda actor, **chosen: {"data": [JOB], "summary": SUMMARY},
            "job": lambda job_id, actor: JOB | {"error": {"code": "damaged", "message": "Save it again."}},
            "change_job": lambda job_id, action, actor: JOB,
            "change_jobs": lambda name, batch, action, actor: 7,
        }

        async def said(*arguments: str) -> str:
            answer = await asyncio.to_thread(run, "jobs", *arguments, *at)
            assert answer.returncode == 0, answer.stderr
            return answer.stdout

        listed = await said("list")
        assert "paused" in listed and "towers: a.md" in listed and "1:15 left" in listed
        assert json.loads(await said("list", "--json"))["summary"] == SUMMARY
        assert "Save it again." in await said("show", "job_1")
        assert json.loads(await said("pause", "job_1", "job_2", "--json")) == {"action": "pause", "num_jobs": 2}
        assert await said("cancel", "--collection", "towers") == "7 jobs: cancel\n"
        refused = await asyncio.to_thread(run, "jobs", "resume", *at)
        assert refused.returncode == 2 and "--collection" in refused.stderr


def test_the_summary_fits_into_one_line() -> None:
    assert summary_line(SUMMARY) == (
        "3 queued, 1 embedding, 2 done, 1 paused, 42% done, 1234 tokens/s, 2.5 files/s, 1:15 left"
    )
    assert [duration(seconds) for seconds in (7, 750, 10_800)] == ["0:07", "12:30", "3:00:00"]
