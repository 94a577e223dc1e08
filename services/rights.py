"""The rights of a person as the database has them right now: who they are, and which rows they may read.

Every question asks the database anew, so that a change of groups or readers holds for whatever begins after it. The
conditions here say in SQL what `rag.access` says of single collections; a test holds them against each other. Whoever
may not read something gets the answer for what does not exist. Calls block.
"""

from __future__ import annotations

from collections.abc import Collection as AnyCollection

from sqlalchemy import ColumnElement, and_, exists, or_, select, true
from sqlalchemy.orm import Session

from rag.access import CollectionGrant, PointLabels, Reader, label_points
from services.database import Collection, CollectionReader, Document, DocumentReader, GroupMember, User
from services.errors import ApiError

OWNER, ADMINISTRATOR, OPERATOR, MEMBER = "owner", "administrator", "operator", "member"
ROLES = (OWNER, ADMINISTRATOR, OPERATOR, MEMBER)
"""The owner looks after the installation, an administrator after a tenant: both read everything there. An operator may
look at the cluster and reads as a member does."""


def reader_of(session: Session, actor: str | None) -> Reader:
    """The person behind a user id. 401 where there is none any more: their key may be known for a moment longer."""
    user = session.get(User, actor) if actor else None
    if user is None:
        raise ApiError(401, "authentication_error", "unknown_user", "The user of this key does not exist any more.")
    groups = session.scalars(select(GroupMember.group_id).where(GroupMember.user_id == user.id))
    return Reader(
        user_id=user.id,
        group_ids=frozenset(groups),
        is_administrator=user.role in (OWNER, ADMINISTRATOR),
        tenant=None if user.role == OWNER else user.tenant,
    )


def grants_of(session: Session, collections: AnyCollection[Collection]) -> list[CollectionGrant]:
    """What the filter of a search must know of each, in their order."""
    readers: dict[str, set[str]] = {collection.id: set() for collection in collections}
    rows = select(CollectionReader).where(CollectionReader.collection_id.in_(readers))
    for row in session.scalars(rows):
        readers[row.collection_id].add(row.reader_id)
    return [
        CollectionGrant(each.index_id, each.owner_id, frozenset(readers[each.id]), each.tenant) for each in collections
    ]


def own_readers(session: Session, document: Document) -> frozenset[str] | None:
    """None where they are those of the collection."""
    if not document.has_own_readers:
        return None
    rows = select(DocumentReader.reader_id).where(DocumentReader.document_id == document.id)
    return frozenset(session.scalars(rows))


def labels_of(session: Session, document: Document) -> PointLabels:
    """What the points of a document must say."""
    collection = session.get_one(Collection, document.collection_id)
    return label_points(collection.tenant, own_readers(session, document))


def manages(reader: Reader, collection: Collection) -> bool:
    """Whether somebody may change a collection, and read all of it."""
    return CollectionGrant(collection.index_id, collection.owner_id, tenant=collection.tenant).is_managed_by(reader)


def is_visible(reader: Reader) -> ColumnElement[bool]:
    """Of `Collection`: living, and some of it may be read."""
    of_documents = select(Document.id).where(
        Document.collection_id == Collection.id,
        Document.deleted_at.is_(None),
        Document.active_version_id.is_not(None),
        Document.has_own_readers,
        _is_listed(reader),
    )
    return and_(
        Collection.deleted_at.is_(None),
        _is_of_tenant(reader),
        or_(_is_managed(reader), _is_inherited(reader), exists(of_documents.correlate(Collection))),
    )


def is_readable(reader: Reader) -> ColumnElement[bool]:
    """Of `Document` joined with its `Collection`: both are living, and the document may be read."""
    return and_(
        Document.deleted_at.is_(None),
        Collection.deleted_at.is_(None),
        _is_of_tenant(reader),
        or_(
            _is_managed(reader),
            and_(Document.has_own_readers, _is_listed(reader)),
            and_(~Document.has_own_readers, _is_inherited(reader)),
        ),
    )


def _is_of_tenant(reader: Reader) -> ColumnElement[bool]:
    return true() if reader.tenant is None else Collection.tenant == reader.tenant


def _is_managed(reader: Reader) -> ColumnElement[bool]:
    return true() if reader.is_administrator else Collection.owner_id == reader.user_id


def _is_inherited(reader: Reader) -> ColumnElement[bool]:
    rows = select(CollectionReader.reader_id).where(
        CollectionReader.collection_id == Collection.id, CollectionReader.reader_id.in_(reader.names)
    )
    return exists(rows.correlate(Collection))


def _is_listed(reader: Reader) -> ColumnElement[bool]:
    rows = select(DocumentReader.reader_id).where(
        DocumentReader.document_id == Document.id, DocumentReader.reader_id.in_(reader.names)
    )
    return exists(rows.correlate(Document))
