"""Jobs are paused, resumed and cancelled at any moment, say how far they are, and wait for what is away."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from rag.errors import EmbedderUnavailable, StoreUnavailable
from services.database import Database, Job, User
from services.errors import ApiError
from services.ingest_progress import LiveJobs, RateMeter
from services.job_list import JobList
from services.knowledge import Knowledge
from services.schema import upgrade
from tests.services.harness import wait_until
from tests.services.ingesting import OWNER, HashEmbedder, Running, running

TEXT = "# Holidays\n\n" + "\n\n".join(f"Rule {n} gives {n} free days to everybody." for n in range(60))


async def submit(windfarm: Running, name: str, text: str = TEXT, **about: str) -> str:
    job = await windfarm.service.submit("handbook", name, text.encode(), OWNER, **about)
    return str(job["id"])


async def ended(windfarm: Running, job_id: str) -> dict[str, Any]:
    return await windfarm.service.wait_for_job(job_id, OWNER, timeout_s=30)


async def until_state(windfarm: Running, job_id: str, state: str) -> None:
    async def is_there() -> bool:
        return (await windfarm.service.job(job_id, OWNER))["state"] == state

    await wait_until(is_there)


async def test_a_job_that_embeds_is_paused_others_go_on_and_it_is_resumed(tmp_path: Path) -> None:
    embedder = HashEmbedder()
    embedder.gate.clear()
    async with running(tmp_path, embedder=embedder) as windfarm:
        windfarm.create()
        first = await submit(windfarm, "first.md")
        await until_state(windfarm, first, "embedding")
        paused = await windfarm.service.change_job(first, "pause", OWNER)
        assert paused["paused"]
        embedder.gate.set()
        other = await ended(windfarm, await submit(windfarm, "other.md"))
        assert other["state"] == "done"
        waiting = await windfarm.service.wait_for_job(first, OWNER, timeout_s=30)
        assert (waiting["state"], waiting["paused"], waiting["progress"]) == ("queued", True, 0.0)
        assert [each["name"] for each in windfarm.knowledge.list_documents("handbook", OWNER)] == ["other.md"]
        assert len(windfarm.store.list_versions()) == 1, "nothing of a paused job lies about"
        await windfarm.service.change_job(first, "resume", OWNER)
        assert (await ended(windfarm, first))["state"] == "done"
        windfarm.check_agreement()


async def test_a_pause_survives_a_restart(tmp_path: Path) -> None:
    embedder = HashEmbedder()
    embedder.gate.clear()
    async with running(tmp_path, embedder=embedder) as windfarm:
        windfarm.create()
        job_id = await submit(windfarm, "first.md")
        await windfarm.service.change_job(job_id, "pause", OWNER)
    async with running(tmp_path) as windfarm:
        assert (await windfarm.ingest("handbook", "other.md", TEXT))["state"] == "done"
        assert (await windfarm.service.job(job_id, OWNER))["state"] == "queued"
        await windfarm.service.change_job(job_id, "resume", OWNER)
        assert (await ended(windfarm, job_id))["state"] == "done"


@pytest.mark.parametrize("state", ["queued", "parsing", "embedding"])
async def test_a_cancelled_job_leaves_nothing_in_whatever_state_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    embedder = HashEmbedder()
    embedder.gate.clear()
    async with running(tmp_path, embedder=embedder) as windfarm:
        windfarm.create()
        before = [await submit(windfarm, "before.md")] if state == "queued" else []
        if state == "parsing":
            monkeypatch.setattr("services.parser_pool.ParserPool.parse", _parse_for_ever)
        job_id = await submit(windfarm, "rules.md")
        await until_state(windfarm, job_id, state)
        cancelled = await windfarm.service.change_job(job_id, "cancel", OWNER)
        assert cancelled["state"] == "cancelled" and cancelled["ended_at"]
        monkeypatch.undo()
        embedder.gate.set()
        assert (await windfarm.ingest("handbook", "after.md", TEXT))["state"] == "done"
        names = {each["name"] for each in windfarm.knowledge.list_documents("handbook", OWNER)}
        assert names == {"after.md"} | ({"before.md"} if before else set())
        assert (await windfarm.service.job(job_id, OWNER))["state"] == "cancelled"
        with pytest.raises(ApiError, match="has ended") as refused:
            await windfarm.service.change_job(job_id, "resume", OWNER)
        assert (refused.value.status, refused.value.code) == (409, "job_ended")
        assert not list((tmp_path / "blobs").iterdir())
        windfarm.check_agreement()


async def _parse_for_ever(*_: object) -> None:
    await asyncio.Event().wait()


async def test_a_cancelled_reembedding_leaves_the_old_vectors_in_use(tmp_path: Path) -> None:
    embedder = HashEmbedder()
    async with running(tmp_path, embedder=embedder) as windfarm:
        windfarm.create()
        await windfarm.ingest("handbook", "rules.md", TEXT)
        index_id = windfarm.knowledge.collection("handbook", OWNER).index_id
        embedder.gate.clear()
        job = await windfarm.service.reembed("handbook", OWNER)
        await until_state(windfarm, job["id"], "embedding")
        await windfarm.service.change_job(job["id"], "cancel", OWNER)
        embedder.gate.set()
        await windfarm.ingest("handbook", "more.md", "More.")
        assert windfarm.store.list_collections() == [index_id]
        assert windfarm.found("handbook", "rule")
        windfarm.check_agreement()


async def test_jobs_of_a_batch_are_changed_and_counted_together(tmp_path: Path) -> None:
    embedder = HashEmbedder()
    embedder.gate.clear()
    async with running(tmp_path, embedder=embedder) as windfarm:
        windfarm.create()
        mine = [await submit(windfarm, f"{n}.md", batch="run_1") for n in range(3)]
        other = await submit(windfarm, "other.md")
        assert await windfarm.service.change_jobs("handbook", "run_1", "pause", OWNER) == 3
        found = await windfarm.service.find_jobs(OWNER, batch="run_1")
        assert {job["id"] for job in found["data"]} == set(mine)
        assert found["summary"]["num_paused"] == 3 and found["summary"]["progress"] == 0.0
        embedder.gate.set()
        assert (await ended(windfarm, other))["state"] == "done"
        assert await windfarm.service.change_jobs("handbook", "run_1", "resume", OWNER) == 3
        for job_id in mine:
            assert (await ended(windfarm, job_id))["state"] == "done"
        found = await windfarm.service.find_jobs(OWNER, batch="run_1", states=["done"], limit=2)
        assert len(found["data"]) == 2 and found["summary"]["states"]["done"] == 3
        assert found["summary"]["progress"] == 1.0 and found["summary"]["seconds_left"] is None
        assert found["summary"]["num_bytes"] == 3 * len(TEXT)
        tokens = {job["num_tokens"] for job in found["data"]}
        assert found["summary"]["num_tokens"] == 3 * tokens.pop() > 0 and not tokens
        assert await windfarm.service.change_jobs("handbook", None, "cancel", OWNER) == 0
        with pytest.raises(ApiError, match="no state of a job"):
            await windfarm.service.find_jobs(OWNER, states=["dnoe"])
        with pytest.raises(ApiError, match="pause, resume or cancel"):
            await windfarm.service.change_jobs("handbook", None, "explode", OWNER)


async def test_others_jobs_are_neither_listed_nor_changed(tmp_path: Path) -> None:
    from services.database import User

    async with running(tmp_path) as windfarm:
        with windfarm.database.write() as session:
            session.add(User(id="user_member", name="member", role="member"))
        windfarm.create()
        job = await windfarm.ingest("handbook", "rules.md", TEXT)
        assert (await windfarm.service.find_jobs("user_member"))["data"] == []
        for attempt in (
            windfarm.service.change_job(job["id"], "cancel", "user_member"),
            windfarm.service.change_jobs("handbook", None, "cancel", "user_member"),
            windfarm.service.find_jobs("user_member", collection="handbook"),
        ):
            with pytest.raises(ApiError) as refused:
                await attempt
            assert refused.value.status == 404


async def test_a_repair_is_not_cancelled(tmp_path: Path) -> None:
    async with running(tmp_path) as windfarm:
        windfarm.create()
        done = await windfarm.ingest("handbook", "rules.md", TEXT)
        index_id = windfarm.knowledge.collection("handbook", OWNER).index_id
        windfarm.store.delete_version(index_id, done["version_id"])
    embedder = HashEmbedder()
    embedder.gate.clear()
    async with running(tmp_path, embedder=embedder) as windfarm:
        (repair,) = [job for job in await windfarm.service.jobs("handbook", OWNER) if job["kind"] == "repair"]
        with pytest.raises(ApiError, match="could not be found") as refused:
            await windfarm.service.change_job(repair["id"], "cancel", OWNER)
        assert refused.value.code == "repair_needed"
        embedder.gate.set()
        assert (await ended(windfarm, repair["id"]))["state"] == "done"


async def test_the_embedding_model_goes_away_in_the_middle_and_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.passage_writer._RETRY_S", 0.01)
    embedder = HashEmbedder()
    is_away = asyncio.Event()
    embed, num_calls = embedder.embed_passages, 0

    async def embed_or_fail(texts: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        if num_calls > 1 and is_away.is_set():
            raise EmbedderUnavailable("It restarts.")
        return await embed(texts)

    embedder.embed_passages = embed_or_fail  # type: ignore[method-assign]
    is_away.set()
    async with running(tmp_path, embedder=embedder) as windfarm:
        windfarm.create()
        job_id = await submit(windfarm, "rules.md", TEXT * 20)
        await wait_until(lambda: _waits(windfarm, job_id, "embedding model does not answer"))
        num_done = embedder.num_texts
        assert num_done == 32, "one batch was embedded before"
        is_away.clear()
        job = await ended(windfarm, job_id)
        assert job["state"] == "done" and job["waiting_for"] is None
        assert embedder.num_texts == job["num_chunks"], "nothing was embedded twice"
        windfarm.check_agreement()


async def _waits(windfarm: Running, job_id: str, for_what: str) -> bool:
    job = await windfarm.service.job(job_id, OWNER)
    return for_what in (job["waiting_for"] or "")


@pytest.mark.parametrize(
    ("step", "then"),
    [
        *(("upsert", "come back"), ("upsert", "cancel"), ("upsert", "pause")),
        *(("activate_version", "come back"), ("activate_version", "cancel"), ("delete_version", "come back")),
    ],
)
async def test_the_vector_store_goes_away_and_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, then: str
) -> None:
    """`activate_version` and `delete_version` fail when the change is decided already: it is carried out later."""
    monkeypatch.setattr("services.ingest_worker._FIRST_RETRY_S", 0.01)
    async with running(tmp_path) as windfarm:
        windfarm.create()
        await windfarm.ingest("handbook", "rules.md", "Old rules hold.")

        def fail(*_: object, **__: object) -> None:
            raise StoreUnavailable("The Qdrant server does not answer.")

        monkeypatch.setattr(windfarm.store, step, fail)
        job_id = await submit(windfarm, "rules.md", "New rules hold.")
        await wait_until(lambda: _has_met_it(windfarm, job_id))
        if then != "come back":
            await _try(windfarm.service.change_job(job_id, then, OWNER))
        monkeypatch.undo()
        if then == "pause":
            await _try(windfarm.service.change_job(job_id, "resume", OWNER))
        job = await ended(windfarm, job_id)
        assert (await windfarm.ingest("handbook", "after.md", "Bananas."))["state"] == "done"
        job = await windfarm.service.job(job_id, OWNER)
        is_new = job["state"] == "done"
        assert is_new or (then == "cancel" and job["state"] == "cancelled"), job
        assert windfarm.found("handbook", "rules hold") == ["New rules hold." if is_new else "Old rules hold."]
        windfarm.check_agreement()


async def _has_met_it(windfarm: Running, job_id: str) -> bool:
    job = await windfarm.service.job(job_id, OWNER)
    return bool(job["waiting_for"]) or job["state"] == "done"


async def _try(attempt: Any) -> None:
    try:
        await attempt
    except ApiError as error:
        assert error.code == "job_ended"


async def test_the_same_content_under_another_name_is_said(tmp_path: Path) -> None:
    async with running(tmp_path) as windfarm:
        windfarm.create()
        first = await windfarm.ingest("handbook", "a.md", TEXT)
        second = await windfarm.ingest("handbook", "b.md", TEXT)
        assert (first["duplicate_of"], second["duplicate_of"]) == (None, "a.md")
        await windfarm.service.delete_document("handbook", first["document_id"], OWNER)
        assert windfarm.found("handbook", "rule 33"), "each name stands for itself"


def clock(*times: float) -> Callable[[], float]:
    remaining = iter(times)
    return lambda: next(remaining)


def test_the_speed_is_that_of_the_last_minute_of_work() -> None:
    meter = RateMeter(window_s=60, clock=clock(0, 10, 20, 80, 90, 100, 110, 110.1))
    meter.begin()
    meter.add(tokens=100, files=1, num_bytes=1000)  # at 10
    rates = meter.rates()  # at 20
    assert rates is not None and (rates.tokens, rates.files, rates.bytes) == (5, 0.05, 50)
    meter.add(tokens=600, files=6)  # at 80
    rates = meter.rates()  # at 90: the first event is older than a minute
    assert rates is not None and (rates.tokens, rates.files) == (10, 0.1)
    meter.rest()
    assert meter.rates() is None  # at 100
    meter.begin()  # at 110
    assert meter.rates() is None, "too little is known"


def test_the_time_left_is_that_of_all_jobs_before_the_last_one_that_was_asked_for(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'windfarm.db'}"
    upgrade(url)
    database = Database(url)
    with database.write() as session:
        session.add(User(id=OWNER, name="owner", role="owner"))
    knowledge = Knowledge(database)
    ids = {
        name: knowledge.create_collection(name, "", OWNER, embedding_model="hash", dimension=4)["id"]
        for name in ("first", "second")
    }
    with database.write() as session:
        for number, (collection, state, num_bytes, is_paused) in enumerate(
            [
                ("first", "embedding", 1000, False),
                ("second", "queued", 3000, False),
                ("second", "queued", 9000, True),
                ("first", "queued", 5000, False),
            ]
        ):
            at = datetime(2026, 11, 22, 12, number, tzinfo=UTC)
            about: dict[str, Any] = {"id": f"job_{number}", "kind": "ingest", "filename": "a.md", "owner_id": OWNER}
            session.add(
                Job(
                    **about,
                    collection_id=ids[collection],
                    state=state,
                    num_bytes=num_bytes,
                    is_paused=is_paused,
                    created_at=at,
                )
            )
    live = LiveJobs()
    live.meter = RateMeter(clock=clock(0, 4, 10, 10))
    live.begin("job_0")
    live.advance("job_0", 0.5)
    live.meter.add(tokens=400, files=1, num_bytes=2000)
    jobs = JobList(database, knowledge, live)
    second, both = (jobs.find(OWNER, collection=name)["summary"] for name in ("second", None))
    assert second["seconds_left"] == (500 + 3000) / 200, "what is paused is not waited for"
    assert both["seconds_left"] == (500 + 3000 + 5000) / 200
    assert (both["tokens_per_s"], both["files_per_s"]) == (40.0, 0.1)
    assert both["progress"] == pytest.approx(500 / 18004)
    database.close()


def test_a_job_that_never_ran_has_no_times() -> None:
    assert Job(id="job_1", filename="x").started_at is None
