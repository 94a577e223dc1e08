"""What the answers of conversations rest on: which may still be shown, and which lose their text with a document.

An answer counts as resting on every document whose text its prompt held, cited or not: nobody can tell from its words
alone what a model took from where. Calls block.
"""

from __future__ import annotations

from collections.abc import Collection as AnyCollection
from collections.abc import Iterator
from functools import cache
from typing import Any

from sqlalchemy import BindParameter, Select, bindparam, delete, select, update
from sqlalchemy.orm import Session

from services.database import Collection, Document, Message, MessageSource
from services.rights import Scope, is_readable, reader_of, scope_of, values_of

_BATCH = 5000
WITHDRAWN = (
    "The text of this answer was taken away: it rests on documents that are not there any more, or that you may not "
    "read."
)


def withheld_messages(session: Session, conversation_id: str, actor: str) -> set[str]:
    """The messages of a conversation that rest on anything which its reader may not read right now."""
    rows = session.execute(
        select(MessageSource.message_id, MessageSource.document_id)
        .join(Message, Message.id == MessageSource.message_id)
        .where(Message.conversation_id == conversation_id)
    ).all()
    if not rows:
        return set()
    readable = readable_documents(session, {document_id for _, document_id in rows}, actor)
    return {message_id for message_id, document_id in rows if document_id not in readable}


def readable_documents(session: Session, document_ids: AnyCollection[str], actor: str) -> set[str]:
    """Those that are there and that the actor may read right now."""
    reader = reader_of(session, actor)
    found = _documents_among(scope_of(reader))
    return set(session.scalars(found, values_of(reader, document_ids=list(document_ids))))


@cache
def _documents_among(scope: Scope) -> Select[str]:
    wanted: BindParameter[Any] = bindparam("document_ids", expanding=True)
    rows = select(Document.id).join(Collection, Collection.id == Document.collection_id)
    return rows.where(is_readable(scope), Document.id.in_(wanted))


def living_documents(session: Session, document_ids: AnyCollection[str]) -> set[str]:
    """Those that were not deleted."""
    rows = (
        select(Document.id)
        .join(Collection, Collection.id == Document.collection_id)
        .where(Document.id.in_(document_ids), Document.deleted_at.is_(None), Collection.deleted_at.is_(None))
    )
    return set(session.scalars(rows))


def withdraw_answers(session: Session, document_ids: AnyCollection[str]) -> int:
    """Take the text of all answers away that rest on documents which are being deleted. Returns how many there were."""
    message_ids: set[str] = set()
    for some in in_batches(document_ids):
        message_ids.update(session.scalars(select(MessageSource.message_id).where(MessageSource.document_id.in_(some))))
    for some in in_batches(message_ids):
        session.execute(
            update(Message)
            .where(Message.id.in_(some))
            .values(content=WITHDRAWN, citations=[], steps=[])
            .execution_options(synchronize_session=False)
        )
        # Nothing is left in them to protect; later answers of the same conversation are free again.
        session.execute(delete(MessageSource).where(MessageSource.message_id.in_(some)))
    return len(message_ids)


def in_batches(ids: AnyCollection[str]) -> Iterator[list[str]]:
    """A statement takes some ten thousand values at most."""
    ordered = sorted(ids)
    for start in range(0, len(ordered), _BATCH):
        yield ordered[start : start + _BATCH]
