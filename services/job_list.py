"""Jobs as people see them: listed over all collections, with what is done, how fast it goes and how long it takes.

A job counts by the bytes of its file, because a page of text and a book are both one file. Calls block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import ColumnElement, Select, func, select
from sqlalchemy.orm import Session

from services.database import Database, Job
from services.errors import invalid
from services.ingest_progress import LiveJobs, LiveState
from services.knowledge import ACTIVE_JOB_STATES, Knowledge, job_json

JOB_STATES = (*ACTIVE_JOB_STATES, "done", "failed", "cancelled")
MAX_LISTED = 1000


class JobList:
    def __init__(self, database: Database, knowledge: Knowledge, live: LiveJobs) -> None:
        self._database = database
        self._knowledge = knowledge
        self._live = live

    def find(
        self,
        actor: str,
        *,
        collection: str | None = None,
        batch: str | None = None,
        states: Sequence[str] = (),
        limit: int = 100,
    ) -> dict[str, Any]:
        """The newest jobs first, of the collections that the actor may change. `summary` counts all that were asked
        for, also beyond `limit` and whatever their state."""
        _check_states(states)
        names = self._names(actor, collection)
        chosen = [Job.collection_id.in_(names), *([Job.batch == batch] if batch is not None else [])]
        listed = chosen + ([Job.state.in_(states)] if states else [])
        newest = select(Job).where(*listed).order_by(Job.created_at.desc(), Job.id.desc())
        live = self.live()
        with self._database.read() as session:
            jobs = list(session.scalars(newest.limit(min(limit, MAX_LISTED)))) if limit else []
            summary = self._summary(session, chosen, live)
        data = [with_live(job_json(job, names[job.collection_id]), live) for job in jobs]
        return {"object": "list", "data": data, "summary": summary}

    def live(self) -> LiveState:
        """What only the running worker knows, to be taken before the database is asked."""
        return self._live.state()

    def _names(self, actor: str, collection: str | None) -> dict[str, str]:
        """Names of the concerned collections by their ids: those that the actor may change, because jobs name files and
        their faults."""
        if collection is not None:
            found = self._knowledge.managed_collection(collection, actor)
            return {found.id: found.name}
        visible = self._knowledge.list_collections(actor)
        return {entry["id"]: entry["name"] for entry in visible if entry["can_change"]}

    def _summary(self, session: Session, chosen: list[ColumnElement[bool]], live: LiveState) -> dict[str, Any]:
        rows = session.execute(_grouped(chosen)).all()
        states = dict.fromkeys(JOB_STATES, 0)
        for state, _, num_jobs, _, _ in rows:
            states[state] += num_jobs
        active = [row for row in rows if row[0] in ACTIVE_JOB_STATES]
        # One byte more for each, so that empty files count too.
        total = sum(row.num_bytes + row.num_jobs for row in rows)
        unfinished = sum(row.num_bytes + row.num_jobs for row in active)
        under_way = _under_way(session, chosen, live)
        rates = self._live.meter.rates()
        return {
            "num_jobs": sum(states.values()),
            "states": states,
            "num_paused": sum(row.num_jobs for row in active if row.is_paused),
            "num_bytes": sum(row.num_bytes for row in rows),
            "num_tokens": sum(row.num_tokens for row in rows),
            "progress": 1.0 if not total else (total - unfinished + under_way) / total,
            "tokens_per_s": None if rates is None else round(rates.tokens, 1),
            "files_per_s": None if rates is None else round(rates.files, 3),
            "seconds_left": _seconds_left(session, chosen, live, rates.bytes if rates else 0.0),
        }


def with_live(job: dict[str, Any], live: LiveState) -> dict[str, Any]:
    """A job's JSON with what only the running worker knows."""
    is_active = job["state"] in ACTIVE_JOB_STATES
    progress = live.progress.get(job["id"]) if is_active else None
    waiting_for = live.waiting_for.get(job["id"]) if is_active else None
    return job | {"waiting_for": waiting_for} | ({} if progress is None else {"progress": progress})


def _under_way(session: Session, chosen: list[ColumnElement[bool]], live: LiveState) -> float:
    """Bytes that are done of the jobs that run."""
    running = select(Job.id, Job.num_bytes).where(*chosen, Job.state.in_(ACTIVE_JOB_STATES), Job.state != "queued")
    return sum(live.progress.get(job_id, 0.0) * num_bytes for job_id, num_bytes in session.execute(running))


def _seconds_left(
    session: Session, chosen: list[ColumnElement[bool]], live: LiveState, bytes_per_s: float
) -> float | None:
    """Until the last of the chosen jobs has ended, those of others that come before it included."""
    waiting = [Job.state.in_(ACTIVE_JOB_STATES), Job.is_paused.is_(False)]
    last = session.scalar(select(func.max(Job.created_at)).where(*chosen, *waiting))
    if last is None or bytes_per_s <= 0:
        return None
    ahead = [*waiting, Job.created_at <= last]
    num_bytes = int(session.scalar(select(func.coalesce(func.sum(Job.num_bytes), 0)).where(*ahead)) or 0)
    left = num_bytes - _under_way(session, ahead, live)
    return round(left / bytes_per_s, 1) if num_bytes else None


def _grouped(chosen: list[ColumnElement[bool]]) -> Select[str, bool, int, int, int]:
    return (
        select(
            Job.state.label("state"),
            Job.is_paused.label("is_paused"),
            func.count().label("num_jobs"),
            func.coalesce(func.sum(Job.num_bytes), 0).label("num_bytes"),
            func.coalesce(func.sum(Job.num_tokens), 0).label("num_tokens"),
        )
        .where(*chosen)
        .group_by(Job.state, Job.is_paused)
    )


def _check_states(states: Sequence[str]) -> None:
    for state in states:
        if state not in JOB_STATES:
            raise invalid(f"{state!r} is no state of a job: {', '.join(JOB_STATES)}.", param="state")
