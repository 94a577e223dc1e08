"""Who may read a collection, or a document of it that has readers of its own: shown and changed by who manages it.

A change is decided in the database and holds from that moment for every search that begins; where it concerns a
document, the journal lets the vector store follow. Calls block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from rag.access import EVERYBODY, Reader
from services.database import Collection, CollectionReader, Database, Document, DocumentReader, Group, User
from services.journal import Journal
from services.knowledge import find_collection, find_document, require_manager, unknown_document
from services.people import find_group, find_user
from services.rights import own_readers, reader_of


@dataclass(frozen=True, slots=True)
class ReaderNames:
    """Readers as people name them: names or ids of users and groups."""

    users: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    everybody: bool = False


@dataclass(frozen=True, slots=True)
class ReaderChange:
    """`only`: these and no others; without it `add` and `remove` change what there is. `inherit`: a document gives up
    readers of its own. What a document is first given or denied starts from the readers of its collection."""

    only: ReaderNames | None = None
    add: ReaderNames = ReaderNames()
    remove: ReaderNames = ReaderNames()
    inherit: bool = False


class Sharing:
    def __init__(self, database: Database, journal: Journal) -> None:
        self._database = database
        self._journal = journal

    def readers(self, collection_name: str, document_id: str | None, actor: str) -> dict[str, Any]:
        """Of the collection, or of one document in it."""
        with self._database.read() as session:
            _, collection, document = _managed(session, collection_name, document_id, actor)
            return _readers_json(session, collection, document)

    def share(self, collection_name: str, document_id: str | None, change: ReaderChange, actor: str) -> dict[str, Any]:
        """The readers after the change. 404 for a user or group that the collection's tenant does not have."""
        with self._journal.turn:
            with self._journal.deciding(), self._database.write() as session:
                _, collection, document = _managed(session, collection_name, document_id, actor)
                if document is None:
                    _replace(
                        session, collection, _changed(session, collection, _of_collection(session, collection), change)
                    )
                else:
                    _change_document(session, collection, document, change)
                    self._journal.label_document(session, document, collection.index_id)
                session.flush()
                answer = _readers_json(session, collection, document)
            self._journal.replay()
            return answer


def _managed(
    session: Session, collection_name: str, document_id: str | None, actor: str
) -> tuple[Reader, Collection, Document | None]:
    reader = reader_of(session, actor)
    collection = find_collection(session, reader, collection_name)
    document = None
    if document_id is not None:
        document, _ = find_document(session, reader, document_id)
        if document.collection_id != collection.id:
            raise unknown_document(document_id)
    require_manager(reader, collection)
    return reader, collection, document


def _change_document(session: Session, collection: Collection, document: Document, change: ReaderChange) -> None:
    before = own_readers(session, document)
    session.execute(delete(DocumentReader).where(DocumentReader.document_id == document.id))
    document.has_own_readers = not change.inherit
    if change.inherit:
        return
    after = _changed(session, collection, _of_collection(session, collection) if before is None else before, change)
    session.add_all(DocumentReader(document_id=document.id, reader_id=reader_id) for reader_id in sorted(after))


def _replace(session: Session, collection: Collection, readers: frozenset[str]) -> None:
    session.execute(delete(CollectionReader).where(CollectionReader.collection_id == collection.id))
    session.add_all(CollectionReader(collection_id=collection.id, reader_id=each) for each in sorted(readers))


def _of_collection(session: Session, collection: Collection) -> frozenset[str]:
    rows = select(CollectionReader.reader_id).where(CollectionReader.collection_id == collection.id)
    return frozenset(session.scalars(rows))


def _changed(session: Session, collection: Collection, before: frozenset[str], change: ReaderChange) -> frozenset[str]:
    start = before if change.only is None else _ids(session, collection, change.only)
    return (start | _ids(session, collection, change.add)) - _ids(session, collection, change.remove)


def _ids(session: Session, collection: Collection, names: ReaderNames) -> frozenset[str]:
    users = (find_user(session, collection.tenant, name).id for name in names.users)
    groups = (find_group(session, collection.tenant, name).id for name in names.groups)
    return frozenset({*users, *groups, *({EVERYBODY} if names.everybody else ())})


def _readers_json(session: Session, collection: Collection, document: Document | None) -> dict[str, Any]:
    own = own_readers(session, document) if document is not None else None
    readers = _of_collection(session, collection) if own is None else own
    named = {
        kind: [
            {"id": row_id, "name": name}
            for row_id, name in session.execute(
                select(table.id, table.name).where(table.id.in_(readers)).order_by(table.name)
            )
        ]
        for kind, table in (("users", User), ("groups", Group))
    }
    of_document = {"document_id": document.id, "inherited": own is None} if document is not None else {}
    return {
        "object": "readers",
        "collection": collection.name,
        **of_document,
        "everybody": EVERYBODY in readers,
        **named,
    }
