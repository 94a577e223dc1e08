"""The rights of a person as the database has them right now: who they are, and which rows they may read.

Every question asks the database anew, so that a change of groups or readers holds for whatever begins after it. The
conditions here say in SQL what `rag.access` says of single collections; a test holds them against each other. Whoever
may not read something gets the answer for what does not exist. Calls block.
"""

from __future__ import annotations

from collections.abc import Collection as AnyCollection
from dataclasses import dataclass
from functools import cache
from typing import Any

from sqlalchemy import BindParameter, ColumnElement, and_, bindparam, exists, or_, select, true
from sqlalchemy.orm import Session

from rag.access import CollectionGrant, PointLabels, Reader, label_points
from services.database import Collection, CollectionReader, Document, DocumentReader, GroupMember, User
from services.errors import ApiError

OWNER, ADMINISTRATOR, OPERATOR, MEMBER = "owner", "administrator", "operator", "member"
ROLES = (OWNER, ADMINISTRATOR, OPERATOR, MEMBER)
"""The owner looks after the installation, an administrator after a tenant: both read everything there. An operator may
look at the cluster and reads as a member does."""


_WHO = (
    select(User.id, User.role, User.tenant, GroupMember.group_id)
    .outerjoin(GroupMember, GroupMember.user_id == User.id)
    .where(User.id == bindparam("actor"))
)
_READERS_OF = select(CollectionReader.collection_id, CollectionReader.reader_id).where(
    CollectionReader.collection_id.in_(bindparam("collection_ids", expanding=True))
)


def reader_of(session: Session, actor: str | None) -> Reader:
    """The person behind a user id. 401 where there is none any more: their key may be known for a moment longer."""
    rows = session.execute(_WHO, {"actor": actor}).all() if actor else []
    if not rows:
        raise ApiError(401, "authentication_error", "unknown_user", "The user of this key does not exist any more.")
    user_id, role, tenant, _ = rows[0]
    return Reader(
        user_id=user_id,
        group_ids=frozenset(group_id for *_, group_id in rows if group_id is not None),
        is_administrator=role in (OWNER, ADMINISTRATOR),
        tenant=None if role == OWNER else tenant,
    )


def grants_of(session: Session, collections: AnyCollection[Collection]) -> list[CollectionGrant]:
    """What the filter of a search must know of each, in their order."""
    readers: dict[str, set[str]] = {collection.id: set() for collection in collections}
    for collection_id, reader_id in session.execute(_READERS_OF, {"collection_ids": list(readers)}):
        readers[collection_id].add(reader_id)
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


@dataclass(frozen=True, slots=True)
class Scope:
    """What of a reader decides about the form of a question; everything else is a value in it (`values_of`). Questions
    of the same form are built once: building them would cost more than a search."""

    all_tenants: bool
    manages_all: bool


def scope_of(reader: Reader) -> Scope:
    return Scope(reader.tenant is None, reader.is_administrator)


def values_of(reader: Reader, **others: Any) -> dict[str, Any]:
    """Goes along with every statement that holds one of the conditions below."""
    return {"reader": reader.user_id, "reader_names": sorted(reader.names), "reader_tenant": reader.tenant, **others}


@cache
def is_visible(scope: Scope) -> ColumnElement[bool]:
    """Of `Collection`: living, and some of it may be read."""
    of_documents = select(Document.id).where(
        Document.collection_id == Collection.id,
        Document.deleted_at.is_(None),
        Document.active_version_id.is_not(None),
        Document.has_own_readers,
        _is_listed(),
    )
    return and_(
        Collection.deleted_at.is_(None),
        _is_of_tenant(scope),
        or_(_is_managed(scope), _is_inherited(), exists(of_documents.correlate(Collection))),
    )


@cache
def is_readable(scope: Scope) -> ColumnElement[bool]:
    """Of `Document` joined with its `Collection`: both are living, and the document may be read."""
    return and_(
        Document.deleted_at.is_(None),
        Collection.deleted_at.is_(None),
        _is_of_tenant(scope),
        or_(
            _is_managed(scope),
            and_(Document.has_own_readers, _is_listed()),
            and_(~Document.has_own_readers, _is_inherited()),
        ),
    )


_NAMES: BindParameter[Any] = bindparam("reader_names", expanding=True)


def _is_of_tenant(scope: Scope) -> ColumnElement[bool]:
    return true() if scope.all_tenants else Collection.tenant == bindparam("reader_tenant")


def _is_managed(scope: Scope) -> ColumnElement[bool]:
    return true() if scope.manages_all else Collection.owner_id == bindparam("reader")


def _is_inherited() -> ColumnElement[bool]:
    rows = select(CollectionReader.reader_id).where(
        CollectionReader.collection_id == Collection.id, CollectionReader.reader_id.in_(_NAMES)
    )
    return exists(rows.correlate(Collection))


def _is_listed() -> ColumnElement[bool]:
    rows = select(DocumentReader.reader_id).where(
        DocumentReader.document_id == Document.id, DocumentReader.reader_id.in_(_NAMES)
    )
    return exists(rows.correlate(Document))
