"""Brings database, vector store and uploads to agreement after a stop of any kind, before anything is served.

The database is the truth: decided changes are carried out, passages that it does not know are removed, what it knows
and the store lacks is written again from the stored text, and interrupted jobs start anew. Calls block.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import select

from rag.access import PointLabels, label_points
from rag.vector_store import VectorStore, VersionState
from services.blobs import Blobs
from services.database import Collection, Database, Document, DocumentReader, Job, Version, new_id
from services.journal import OUR_INDEX, Journal
from services.knowledge import ACTIVE_JOB_STATES
from services.knowledge_transfer import sweep_unfinished


@dataclass(frozen=True, slots=True)
class ReconcileReport:
    """What was found and done. After it, every active version has as many visible passages as the database says,
    or a repair job that waits."""

    num_replayed: int
    num_requeued_jobs: int
    num_removed_indexes: int
    num_removed_versions: int
    num_repairs: int
    num_relabelled: int
    num_removed_uploads: int
    num_versions: int
    num_passages: int

    @property
    def agreed(self) -> bool:
        """Whether nothing had to be put right in the store."""
        return not (self.num_removed_indexes or self.num_removed_versions or self.num_repairs or self.num_relabelled)


@dataclass(frozen=True, slots=True)
class _Expected:
    index_id: str
    collection_id: str
    owner_id: str
    document_id: str
    num_chunks: int
    labels: PointLabels


def reconcile(
    database: Database, store: VectorStore, journal: Journal, blobs: Blobs, *, owns_all: bool = True
) -> ReconcileReport:
    """`owns_all`: no other windfarm keeps its indexes in this vector store, so unknown ones are leftovers."""
    num_replayed = journal.replay()
    sweep_unfinished(database, store)
    num_requeued = _requeue_interrupted_jobs(database)
    num_removed_indexes = _remove_unknown_indexes(database, store) if owns_all else 0
    expected = _expected_versions(database)
    found = store.list_versions()
    num_removed_versions = _remove_unknown_versions(store, _known_indexes(database), expected, found)
    num_relabelled = _relabel(store, expected, found)
    num_repairs = _repair(database, store, expected, found)
    blobs.originals.remove_all_but(_known_versions(database))
    return ReconcileReport(
        num_replayed=num_replayed,
        num_requeued_jobs=num_requeued,
        num_removed_indexes=num_removed_indexes,
        num_removed_versions=num_removed_versions,
        num_repairs=num_repairs,
        num_relabelled=num_relabelled,
        num_removed_uploads=blobs.remove_all_but(_awaited_uploads(database)),
        num_versions=len(expected),
        num_passages=sum(each.num_chunks for each in expected.values()),
    )


def _requeue_interrupted_jobs(database: Database) -> int:
    with database.write() as session:
        interrupted = session.scalars(select(Job).where(Job.state.in_(ACTIVE_JOB_STATES), Job.state != "queued")).all()
        for job in interrupted:
            job.state, job.progress = "queued", 0.0
        return len(interrupted)


def _remove_unknown_indexes(database: Database, store: VectorStore) -> int:
    """Indexes of deleted collections and of embeddings that did not come to their end."""
    known = _known_indexes(database)
    strays = [name for name in store.list_collections() if name.startswith(OUR_INDEX) and name not in known]
    for name in strays:
        store.delete_collection(name)
    return len(strays)


def _known_indexes(database: Database) -> set[str]:
    with database.read() as session:
        return set(session.scalars(select(Collection.index_id)))


def _expected_versions(database: Database) -> dict[str, _Expected]:
    rows = (
        select(Version.id, Version.num_chunks, Document, Collection)
        .join(Document, Document.active_version_id == Version.id)
        .join(Collection, Collection.id == Document.collection_id)
        .where(Document.deleted_at.is_(None), Collection.deleted_at.is_(None))
    )
    with database.read() as session:
        readers: dict[str, set[str]] = {}
        for row in session.scalars(select(DocumentReader)):
            readers.setdefault(row.document_id, set()).add(row.reader_id)
        return {
            version_id: _Expected(
                index_id=collection.index_id,
                collection_id=collection.id,
                owner_id=document.owner_id,
                document_id=document.id,
                num_chunks=num_chunks,
                labels=label_points(
                    collection.tenant,
                    frozenset(readers.get(document.id, ())) if document.has_own_readers else None,
                ),
            )
            for version_id, num_chunks, document, collection in session.execute(rows)
        }


def _remove_unknown_versions(
    store: VectorStore, indexes: set[str], expected: dict[str, _Expected], found: dict[str, VersionState]
) -> int:
    strays = [
        (state.collection_id, version_id)
        for version_id, state in found.items()
        if state.collection_id in indexes and version_id not in expected
    ]
    for index_id, version_id in strays:
        store.delete_version(index_id, version_id)
    return len(strays)


def _known_versions(database: Database) -> set[str]:
    with database.read() as session:
        return set(session.scalars(select(Version.id)))


def _relabel(store: VectorStore, expected: dict[str, _Expected], found: dict[str, VersionState]) -> int:
    """Points that say something else of their readers than the database, or nothing: those of an earlier version."""
    wrong = [
        want
        for version_id, want in expected.items()
        if (state := found.get(version_id)) is not None and state.is_active and state.labels != want.labels
    ]
    for want in wrong:
        store.label_document(want.index_id, want.document_id, want.labels)
    return len(wrong)


def _repair(
    database: Database, store: VectorStore, expected: dict[str, _Expected], found: dict[str, VersionState]
) -> int:
    """Show what is hidden and should not be; queue a repair where passages are missing."""
    broken: list[_Expected] = []
    for version_id, want in expected.items():
        state = found.get(version_id)
        if (state.num_points if state else 0) != want.num_chunks:
            broken.append(want)
        elif state is not None and not state.is_active:
            store.activate_version(want.index_id, version_id, labels=want.labels)
    with database.write() as session:
        waiting = select(Job.document_id).where(Job.kind == "repair", Job.state.in_(ACTIVE_JOB_STATES))
        queued = set(session.scalars(waiting))
        session.add_all(
            Job(
                id=new_id("job"),
                kind="repair",
                filename="",
                collection_id=want.collection_id,
                owner_id=want.owner_id,
                document_id=want.document_id,
            )
            for want in broken
            if want.document_id not in queued
        )
    return len(broken)


def _awaited_uploads(database: Database) -> set[str]:
    waiting = select(Job.blob_path).where(Job.state.in_(ACTIVE_JOB_STATES), Job.blob_path.is_not(None))
    with database.read() as session:
        return {path for path in session.scalars(waiting) if path is not None}
