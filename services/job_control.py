"""Pause, resume and cancel jobs, one or all of a collection or batch. Decided in the database; calls block.

A change takes the journal's turn, so that it comes wholly before or wholly after the moment in which a job makes its
document active. Who runs the job is told afterwards and stops it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from sqlalchemy import select

from services.database import Database, Job, utc_now
from services.errors import conflict, invalid
from services.journal import Journal
from services.knowledge import ACTIVE_JOB_STATES, Knowledge

JobAction = Literal["pause", "resume", "cancel"]


@dataclass(frozen=True, slots=True)
class Changed:
    """Which jobs an action changed, and the uploads that nobody waits for any more."""

    job_ids: tuple[str, ...]
    blob_paths: tuple[str, ...] = ()


class JobControl:
    def __init__(self, database: Database, journal: Journal, knowledge: Knowledge) -> None:
        self._database = database
        self._journal = journal
        self._knowledge = knowledge

    def change(self, job_id: str, action: str, actor: str) -> Changed:
        """404 for a job that the actor may not see, 409 for one that has ended."""
        self._knowledge.job(job_id, actor)
        with self._journal.turn, self._database.write() as session:
            job = session.get_one(Job, job_id)
            if job.state not in ACTIVE_JOB_STATES:
                raise conflict(f"The job {job_id} has ended ({job.state}); nothing was changed.", code="job_ended")
            if action == "cancel" and job.kind == "repair":
                raise conflict(
                    f"The job {job_id} writes lost passages of a document again; without it the document could not be "
                    "found. Delete the document instead, or pause the job.",
                    code="repair_needed",
                )
            return _apply([job], checked_action(action))

    def change_all(self, collection: str, batch: str | None, action: str, actor: str) -> Changed:
        """All unfinished jobs of a collection, or those of one batch in it; repairs are not cancelled."""
        concerned = [
            Job.collection_id == self._knowledge.managed_collection(collection, actor).id,
            Job.state.in_(ACTIVE_JOB_STATES),
        ]
        if batch is not None:
            concerned.append(Job.batch == batch)
        if checked_action(action) == "cancel":
            concerned.append(Job.kind != "repair")
        with self._journal.turn, self._database.write() as session:
            return _apply(list(session.scalars(select(Job).where(*concerned))), checked_action(action))


def checked_action(action: str) -> JobAction:
    for known in get_args(JobAction):
        if action == known:
            return known  # type: ignore[no-any-return]
    raise invalid(f"A job cannot be told to {action!r}: use pause, resume or cancel.", code="unknown_action")


def _apply(jobs: list[Job], action: JobAction) -> Changed:
    for job in jobs:
        if action == "cancel":
            job.state, job.ended_at = "cancelled", utc_now()
        else:
            job.is_paused = action == "pause"
    blobs = tuple(job.blob_path for job in jobs if job.blob_path is not None) if action == "cancel" else ()
    return Changed(tuple(job.id for job in jobs), blobs)
