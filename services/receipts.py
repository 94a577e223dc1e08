"""Deletions that prove themselves: what was removed, and that a look for it afterwards finds nothing.

The receipt is written in the transaction that decides the deletion, so none is ever without one; the look follows when
everything is carried out, after a crash at the next start. Receipts hold ids, names and counts, never text. Calls
block.
"""

from __future__ import annotations

from collections.abc import Collection as AnyCollection
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from sqlalchemy import func, or_, select
from sqlalchemy.orm import Session

from rag.access import CollectionGrant, Reader, search_as
from rag.vector_store import VectorStore
from services.blobs import Blobs
from services.database import (
    Collection,
    Database,
    DeletionReceipt,
    Document,
    DocumentReader,
    Job,
    MessageSource,
    Version,
    utc_now,
)
from services.errors import ApiError, not_found
from services.feedback import passages_left
from services.journal import Journal
from services.knowledge import Knowledge, find_document, stored_document, unknown_document
from services.message_sources import in_batches
from services.rights import reader_of

_MAX_LISTED = 1000
_MAX_IDS_SHOWN = 100
_NUM_PROBES = 8
_PROBE_LENGTH = 400
_LOOK = Reader("self-check", is_administrator=True, tenant=None)
"""Sees everything: what it does not find, nobody can."""


@dataclass(frozen=True, slots=True)
class Probe:
    """A search that found something of what is deleted. Kept in memory until it has been made again, never stored."""

    tenant: str
    vector: npt.NDArray[np.float32] | None
    words: str


class Deletions:
    def __init__(self, database: Database, store: VectorStore, journal: Journal, blobs: Blobs) -> None:
        self._database = database
        self._store = store
        self._journal = journal
        self._blobs = blobs
        self._knowledge = Knowledge(database)

    def delete_document(self, collection_name: str, document_id: str, actor: str) -> dict[str, Any]:
        """Remove a document with all that was made of it. Returns the receipt."""
        collection = self._knowledge.managed_collection(collection_name, actor)
        with self._database.read() as session:
            document, _ = find_document(session, reader_of(session, actor), document_id)
        if document.collection_id != collection.id:
            raise unknown_document(document_id)
        probes = self._probes(collection, [document.id])
        return self._finish(self._journal.delete_document(document, collection, actor), probes)

    def delete_collection(self, name: str, actor: str) -> dict[str, Any]:
        collection = self._knowledge.managed_collection(name, actor)
        with self._database.read() as session:
            some = session.scalars(
                select(Document.id).where(Document.collection_id == collection.id).limit(_NUM_PROBES)
            )
            document_ids = list(some)
        probes = self._probes(collection, document_ids)
        return self._finish(self._journal.delete_collection(collection, actor), probes)

    def finish_interrupted(self) -> int:
        """After a start that carried out what a crash left: look after those deletions too. Returns how many."""
        with self._database.read() as session:
            waiting = select(DeletionReceipt.id).where(DeletionReceipt.checked_at.is_(None))
            receipt_ids = session.scalars(waiting).all()
        for receipt_id in receipt_ids:
            self._finish(receipt_id, ())
        return len(receipt_ids)

    def receipts(self, actor: str) -> list[dict[str, Any]]:
        """The newest first: those of one's own collections and deletions, for administrators all of their tenant."""
        with self._database.read() as session:
            rows = select(DeletionReceipt).where(_is_shown(reader_of(session, actor)))
            newest = rows.order_by(DeletionReceipt.created_at.desc(), DeletionReceipt.id).limit(_MAX_LISTED)
            return [receipt_json(row) for row in session.scalars(newest)]

    def receipt(self, receipt_id: str, actor: str) -> dict[str, Any]:
        with self._database.read() as session:
            wanted = select(DeletionReceipt).where(
                DeletionReceipt.id == receipt_id, _is_shown(reader_of(session, actor))
            )
            row = session.scalars(wanted).one_or_none()
        if row is None:
            raise not_found(f"There is no receipt {receipt_id!r}.", code="unknown_receipt")
        return receipt_json(row)

    def _probes(self, collection: Collection, document_ids: Sequence[str]) -> list[Probe]:
        """Searches that find some of what is about to go, to be made again afterwards."""
        probes = []
        with self._database.read() as session:
            rows = select(Version).join(Document, Document.active_version_id == Version.id)
            versions = session.scalars(rows.where(Document.id.in_(document_ids))).all()
            beginnings = {each.document_id: stored_document(each).text[:_PROBE_LENGTH] for each in versions}
        for document_id, text in beginnings.items():
            stored = self._store.measure(collection.index_id, document_id=document_id)
            vectors = stored.sample if stored.num_points else (None,)
            probes += [Probe(collection.tenant, vector, text) for vector in vectors]
        return probes[:_NUM_PROBES]

    def _finish(self, receipt_id: str, probes: Sequence[Probe]) -> dict[str, Any]:
        with self._database.read() as session:
            receipt = session.get_one(DeletionReceipt, receipt_id)
        for path in receipt.removed["upload_paths"]:
            self._blobs.remove(path)
        found = self._look(receipt, probes)
        with self._database.write() as session:
            row = session.get_one(DeletionReceipt, receipt_id)
            row.self_check, row.checked_at = found, utc_now()
        answer = receipt_json(row)
        if not answer["self_check"]["is_clean"]:
            raise ApiError(
                500,
                "server_error",
                "deletion_incomplete",
                f"What was deleted is still there in part; the receipt {receipt_id} says where. Nobody can read it any "
                "more. Restart windfarm: it puts database and vector store in order at each start.",
            )
        return answer

    def _look(self, receipt: DeletionReceipt, probes: Sequence[Probe]) -> dict[str, Any]:
        document_ids = set(receipt.removed["document_ids"])
        wanted = {receipt.removed["index_id"], *self._journal.unfinished_indexes()}
        index_ids = sorted(wanted & set(self._store.list_collections()))
        num_points = sum(
            self._store.count(index_id, document_id=document_id)
            for index_id in index_ids
            for document_id in document_ids
        )
        with self._database.read() as session:
            num_rows, num_answers = _rows_left(session, receipt), _answers_left(session, document_ids)
            num_feedback = passages_left(session, document_ids)
        hits = [document_id for probe in probes for document_id in self._search(index_ids, probe)]
        return {
            "points": num_points,
            "rows": num_rows,
            "answers": num_answers,
            "feedback": num_feedback,
            "originals": sum(self._blobs.originals.path(each) is not None for each in receipt.removed["version_ids"]),
            "uploads": sum(Path(path).exists() for path in receipt.removed["upload_paths"]),
            "num_searches": len(probes),
            "search_hits": sum(document_id in document_ids for document_id in hits),
        }

    def _search(self, index_ids: Sequence[str], probe: Probe) -> list[str]:
        """Documents that are found now with the vector and the words of a removed passage."""
        grants = [CollectionGrant(index_id, _LOOK.user_id, tenant=probe.tenant) for index_id in index_ids]
        found = search_as(_LOOK, self._store, grants, vector=probe.vector, text=probe.words, limit=20)
        return [hit.chunk.document_id for hit in found]


def receipt_json(row: DeletionReceipt) -> dict[str, Any]:
    removed = {key: value for key, value in row.removed.items() if key not in ("index_id", "upload_paths")}
    for ids in ("document_ids", "version_ids", "files_kept"):
        removed[ids] = removed.get(ids, [])[:_MAX_IDS_SHOWN]
    check = row.self_check
    found = None if check is None else {**check, "is_clean": not any(check.get(name) for name in _MUST_BE_NONE)}
    return {
        "id": row.subject_id,
        "object": f"{row.kind}.deleted",
        "name": row.subject_name,
        "deleted": True,
        "receipt_id": row.id,
        "num_documents": len(row.removed["document_ids"]),
        "num_versions": len(row.removed["version_ids"]),
        "num_passages": row.removed["points"],
        "removed": removed,
        "self_check": found,
        "created_at": int(row.created_at.timestamp()),
    }


_MUST_BE_NONE = ("points", "rows", "answers", "feedback", "originals", "uploads", "search_hits")


def _is_shown(reader: Reader) -> Any:
    if reader.is_administrator:
        return True if reader.tenant is None else DeletionReceipt.tenant == reader.tenant
    return or_(DeletionReceipt.owner_id == reader.user_id, DeletionReceipt.actor_id == reader.user_id)


def _rows_left(session: Session, receipt: DeletionReceipt) -> int:
    subject = receipt.subject_id
    of_collection = (Collection.id == subject, Document.collection_id == subject, Job.collection_id == subject)
    of_document = (
        Document.id == subject,
        Version.document_id == subject,
        DocumentReader.document_id == subject,
        Job.document_id == subject,
    )
    conditions = of_collection if receipt.kind == "collection" else of_document
    return sum(session.scalar(select(func.count()).where(condition)) or 0 for condition in conditions)


def _answers_left(session: Session, document_ids: AnyCollection[str]) -> int:
    return sum(
        session.scalar(select(func.count()).where(MessageSource.document_id.in_(some))) or 0
        for some in in_batches(document_ids)
    )
