"""Changes that touch both database and vector store, each decided in one database transaction and then carried out.

The deciding transaction writes a journal entry; carrying out may be repeated and ends with a second transaction that
removes the entry. A crash in between leaves an entry, which is carried out at the next start: so the database is the
truth, and the store follows it. Calls block and take turns.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, delete, select
from sqlalchemy.orm import Session

from rag.read_write_lock import ReadWriteLock
from rag.vector_store import VectorStore
from services.database import (
    Collection,
    Database,
    DeletionReceipt,
    Document,
    Job,
    JournalEntry,
    VectorStoreFile,
    Version,
    utc_now,
)
from services.feedback import forget_documents
from services.knowledge import ACTIVE_JOB_STATES, unknown_collection, unknown_document
from services.message_sources import in_batches, withdraw_answers
from services.originals import Originals
from services.rights import labels_of

Payload = dict[str, Any]
OUR_INDEX = "col_"
"""How the names of indexes begin that belong to collections."""


@dataclass(frozen=True, slots=True)
class Replacement:
    """A staged version that shall become its document's active one, and the job that brought it."""

    job_id: str
    collection_id: str
    index_id: str
    version: Version
    document_name: str
    owner_id: str
    source: str | None = None
    origin: str | None = None


class Journal:
    """Carries out changes one after the other. `turn` is held while the store or the deciding rows change; `visible` is
    held alone while both change what searches see."""

    def __init__(
        self, database: Database, store: VectorStore, visible: ReadWriteLock, originals: Originals | None = None
    ) -> None:
        self._database = database
        self._store = store
        self._visible = visible
        self._originals = originals
        self.turn = threading.RLock()
        self._operations: dict[str, Callable[[Payload], None]] = {
            "activate": self._finish_activation,
            "retire": self._finish_retirement,
            "label_document": self._finish_labelling,
            "delete_document": self._finish_document_deletion,
            "delete_collection": self._finish_collection_deletion,
            "drop_index": self._finish_index_drop,
            "discard_version": self._finish_discard,
        }

    @contextmanager
    def deciding(self) -> Iterator[None]:
        """For a change that takes something away: no search that began before it is still looking when it has ended."""
        with self.turn, self._visible.exclusive():
            yield

    def replay(self) -> int:
        """Carry out everything that was decided and not finished. Returns how many entries there were."""
        num_entries = 0
        with self.turn:
            while (entry := self._first_entry()) is not None:
                self._carry_out(entry)
                num_entries += 1
        return num_entries

    def activate(self, change: Replacement) -> bool:
        """Make a staged version the active one and remove what it replaces. False where its collection or job was
        deleted or cancelled meanwhile: nothing has changed then."""
        with self.turn:
            self.replay()  # What the store could not carry out before may decide which version this one replaces.
            with self._database.write() as session:
                if not _is_wanted(session, change):
                    return False
                document = session.get(Document, change.version.document_id)
                if document is None:
                    document = Document(
                        id=change.version.document_id,
                        collection_id=change.collection_id,
                        name=change.document_name,
                        owner_id=change.owner_id,
                    )
                    session.add(document)
                    session.flush()
                document.source, document.origin = change.source, change.origin
                session.add(change.version)
                payload = {
                    "index_id": change.index_id,
                    "document_id": document.id,
                    "version_id": change.version.id,
                    "replaces": document.active_version_id,
                    "job_id": change.job_id,
                }
                session.add(JournalEntry(operation="activate", payload=payload))
            self.replay()
            return True

    def delete_document(self, document: Document, collection: Collection, actor: str) -> str:
        """Remove a document with all that was made of it. Returns the id of the receipt that says what went."""
        with self.turn:
            self.replay()
            stored = self._store.measure(collection.index_id, document_id=document.id)
            with self._visible.exclusive(), self._database.write() as session:
                row = session.get(Document, document.id)
                if row is None or row.deleted_at is not None:
                    raise unknown_document(document.id)
                row.deleted_at = utc_now()
                row.active_version_id = None
                removed = _take_away(session, collection, [document.id], filename=document.name)
                removed |= {
                    "points": stored.num_points,
                    "words": stored.num_words,
                    "word_entries": stored.num_word_entries,
                }
                receipt = _receipt(session, "document", document.id, document.name, collection, actor, removed)
                payload = {"index_id": collection.index_id, "document_id": document.id}
                session.add(JournalEntry(operation="delete_document", payload=payload))
            self.replay()
            return receipt.id

    def delete_collection(self, collection: Collection, actor: str) -> str:
        """The same for a collection. Its index goes as a whole, so its words are not counted."""
        with self.turn:
            self.replay()
            num_points = self._store.count(collection.index_id)
            with self._visible.exclusive(), self._database.write() as session:
                row = session.get(Collection, collection.id)
                if row is None or row.deleted_at is not None:
                    raise unknown_collection(collection.name)
                row.deleted_at = utc_now()
                documents = session.scalars(select(Document.id).where(Document.collection_id == row.id)).all()
                removed = _take_away(session, row, documents) | {"points": num_points, "indexes": 1}
                receipt = _receipt(session, "collection", row.id, row.name, row, actor, removed)
                payload = {"index_id": row.index_id, "collection_id": row.id, "document_ids": list(documents)}
                session.add(JournalEntry(operation="delete_collection", payload=payload))
            self.replay()
            return receipt.id

    def unfinished_indexes(self) -> list[str]:
        """Indexes that are being filled by a new embedding of a collection: what is deleted may lie there as well."""
        with self._database.read() as session:
            known = set(session.scalars(select(Collection.index_id)))
        return [name for name in self._store.list_collections() if name.startswith(OUR_INDEX) and name not in known]

    def label_document(self, session: Session, document: Document, index_id: str) -> None:
        """Let the store follow a change of a document's readers; part of the caller's transaction. `replay` does it."""
        payload = {"index_id": index_id, "document_id": document.id}
        session.add(JournalEntry(operation="label_document", payload=payload))

    def note_discard(self, operation: str, index_id: str, version_id: str | None = None) -> None:
        """What is to be removed when the store is back: a version that nobody decided on (`discard_version`), or an
        index that no collection uses (`drop_index`)."""
        payload = {"index_id": index_id, "version_id": version_id}
        with self._database.write() as session:
            session.add(JournalEntry(operation=operation, payload=payload))

    def switch_index(self, session: Session, collection: Collection, index_id: str) -> None:
        """Let a collection use another, complete index; part of the caller's transaction. `replay` drops the old."""
        session.add(JournalEntry(operation="drop_index", payload={"index_id": collection.index_id}))
        collection.index_id = index_id

    def _first_entry(self) -> JournalEntry | None:
        with self._database.read() as session:
            return session.scalars(select(JournalEntry).order_by(JournalEntry.id).limit(1)).first()

    def _carry_out(self, entry: JournalEntry) -> None:
        self._operations[entry.operation](entry.payload | {"entry_id": entry.id})

    def _finish_activation(self, payload: Payload) -> None:
        index_id, version_id, replaces = payload["index_id"], payload["version_id"], payload["replaces"]
        with self._database.read() as session:
            version = session.get(Version, version_id)
            num_expected = version.num_chunks if version is not None else None
        if num_expected is None or self._store.count(index_id, version_id=version_id) != num_expected:
            self._undo_activation(payload)
            return
        with self._visible.exclusive(), self._database.write() as session:
            document = session.get_one(Document, payload["document_id"])
            self._store.activate_version(index_id, version_id, labels=labels_of(session, document), replaces=replaces)
            document.active_version_id = version_id
            session.get_one(Version, version_id).state = "active"
            _end_job(session, payload["job_id"], document.id, version_id, num_expected)
            if replaces is not None:
                session.get_one(Version, replaces).state = "retired"
                retirement = {"index_id": index_id, "version_id": replaces}
                session.add(JournalEntry(operation="retire", payload=retirement))
            _close(session, payload)

    def _undo_activation(self, payload: Payload) -> None:
        """The staged passages are not all there (a crash of the machine can lose them): start this job anew."""
        self._store.delete_version(payload["index_id"], payload["version_id"])
        self._remove_originals(Version.id == payload["version_id"])
        with self._database.write() as session:
            session.execute(delete(Version).where(Version.id == payload["version_id"]))
            session.execute(
                delete(Document).where(Document.id == payload["document_id"], Document.active_version_id.is_(None))
            )
            job = session.get(Job, payload["job_id"])
            if job is not None:
                job.state = "queued"
            _close(session, payload)

    def _finish_retirement(self, payload: Payload) -> None:
        self._store.delete_version(payload["index_id"], payload["version_id"])
        self._remove_originals(Version.id == payload["version_id"])
        with self._database.write() as session:
            session.execute(delete(Version).where(Version.id == payload["version_id"]))
            _close(session, payload)

    def _finish_labelling(self, payload: Payload) -> None:
        with self._database.read() as session:
            document = session.get(Document, payload["document_id"])
            labels = labels_of(session, document) if document is not None else None
        if labels is not None:
            self._store.label_document(payload["index_id"], payload["document_id"], labels)
        with self._database.write() as session:
            _close(session, payload)

    def _finish_document_deletion(self, payload: Payload) -> None:
        for index_id in (payload["index_id"], *self.unfinished_indexes()):
            self._store.delete_document(index_id, payload["document_id"])
        self._remove_originals(Version.document_id == payload["document_id"])
        with self._database.write() as session:
            session.execute(delete(Version).where(Version.document_id == payload["document_id"]))
            session.execute(delete(Document).where(Document.id == payload["document_id"]))
            _close(session, payload)

    def _finish_collection_deletion(self, payload: Payload) -> None:
        self._store.delete_collection(payload["index_id"])
        documents = select(Document.id).where(Document.collection_id == payload["collection_id"])
        self._remove_originals(Version.document_id.in_(documents))
        for index_id in self.unfinished_indexes():
            for document_id in payload.get("document_ids", ()):
                self._store.delete_document(index_id, document_id)
        with self._database.write() as session:
            session.execute(delete(Collection).where(Collection.id == payload["collection_id"]))
            _close(session, payload)

    def _remove_originals(self, of_versions: ColumnElement[bool]) -> None:
        """Before the rows go: afterwards nobody would know the files' names."""
        if self._originals is not None:
            with self._database.read() as session:
                self._originals.remove(session.scalars(select(Version.id).where(of_versions)).all())

    def _finish_discard(self, payload: Payload) -> None:
        self._store.delete_version(payload["index_id"], payload["version_id"])
        with self._database.write() as session:
            _close(session, payload)

    def _finish_index_drop(self, payload: Payload) -> None:
        self._store.delete_collection(payload["index_id"])
        with self._database.write() as session:
            _close(session, payload)


def _is_wanted(session: Session, change: Replacement) -> bool:
    collection = session.get(Collection, change.collection_id)
    job = session.get(Job, change.job_id)
    if collection is None or collection.deleted_at is not None or collection.index_id != change.index_id:
        return False
    return job is not None and job.state in ACTIVE_JOB_STATES


def _take_away(
    session: Session, collection: Collection, document_ids: Sequence[str], filename: str | None = None
) -> dict[str, Any]:
    """What a deletion takes out of the database at once, and the counts of it for the receipt."""
    versions = [
        version_id
        for some in in_batches(document_ids)
        for version_id in session.scalars(select(Version.id).where(Version.document_id.in_(some)))
    ]
    num_jobs, upload_paths = _forget_jobs(session, collection.id, filename)
    return {
        "index_id": collection.index_id,
        "document_ids": list(document_ids),
        "version_ids": versions,
        "jobs": num_jobs,
        "answers": withdraw_answers(session, document_ids),
        "feedback": forget_documents(session, document_ids),
        "uploads": len(upload_paths),
        "upload_paths": list(upload_paths),
        "files_kept": _files_behind(session, collection.id, filename),
    }


def _files_behind(session: Session, collection_id: str, filename: str | None) -> list[str]:
    """Uploads of people's own accounts that documents were made of. They stay: who uploaded them deletes them."""
    made = select(VectorStoreFile.file_id).where(VectorStoreFile.collection_id == collection_id)
    if filename is not None:
        made = made.where(VectorStoreFile.document_name == filename)
    return list(session.scalars(made.order_by(VectorStoreFile.file_id)))


def _receipt(
    session: Session,
    kind: str,
    subject_id: str,
    subject_name: str,
    collection: Collection,
    actor: str,
    removed: dict[str, Any],
) -> DeletionReceipt:
    receipt = DeletionReceipt(
        kind=kind,
        subject_id=subject_id,
        subject_name=subject_name,
        tenant=collection.tenant,
        owner_id=collection.owner_id,
        actor_id=actor,
        removed=removed,
    )
    session.add(receipt)
    session.flush()
    return receipt


def _forget_jobs(session: Session, collection_id: str, filename: str | None = None) -> tuple[int, tuple[str, ...]]:
    """End the unfinished jobs of a file or a whole collection, so that what is deleted does not come back; remove the
    ended ones. Returns how many there were of both, and the uploads of the unfinished."""
    concerned = [Job.collection_id == collection_id]
    if filename is not None:
        concerned.append(Job.filename == filename)
    ended = session.scalars(select(Job).where(*concerned, Job.state.not_in(ACTIVE_JOB_STATES))).all()
    for job in ended:
        session.delete(job)
    unfinished = session.scalars(select(Job).where(*concerned)).all()
    for job in unfinished:
        # The worker may be at it, and still has to find the row; nothing in it may lead back to the document.
        job.state, job.document_id, job.version_id, job.ended_at = "cancelled", None, None, utc_now()
    uploads = tuple(job.blob_path for job in unfinished if job.blob_path is not None)
    return len(ended) + len(unfinished), uploads


def _end_job(session: Session, job_id: str, document_id: str, version_id: str, num_chunks: int) -> None:
    job = session.get(Job, job_id)
    if job is not None:
        job.state, job.progress, job.ended_at = "done", 1.0, utc_now()
        job.document_id, job.version_id, job.num_chunks = document_id, version_id, num_chunks


def _close(session: Session, payload: Payload) -> None:
    session.execute(delete(JournalEntry).where(JournalEntry.id == payload["entry_id"]))
