"""Conversations that survive a reload: one user's chats with their messages, citations and tool steps.

Every call names the actor and touches only that user's rows; somebody else's conversation does not exist for them.
An answer is kept with the documents whose text it could use, its own and those of the answers before it. It is shown
while its reader may read all of them; when one is deleted, its text is deleted too. Everything here blocks; async code
uses a thread.
"""

from __future__ import annotations

from collections.abc import Collection as AnyCollection
from collections.abc import Sequence
from typing import Any, Literal

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from services.accounts import Actor
from services.database import Conversation, Database, Message, MessageSource, utc_now
from services.errors import ApiError, not_found
from services.message_sources import WITHDRAWN, living_documents, readable_documents, withheld_messages

MessageState = Literal["complete", "stopped", "failed"]
_TITLE_LENGTH = 60
_DEFAULT_TITLE = "New conversation"


class Conversations:
    def __init__(self, database: Database) -> None:
        self._database = database

    def create(
        self, actor: Actor, title: str | None = None, model: str | None = None, collections: Sequence[str] = ()
    ) -> dict[str, Any]:
        with self._database.write() as session:
            row = Conversation(
                user_id=actor.user_id, title=title or _DEFAULT_TITLE, model=model, collections=list(collections)
            )
            session.add(row)
            session.flush()
            return _conversation_json(row)

    def list(self, actor: Actor, limit: int = 100) -> list[dict[str, Any]]:
        """The newest first."""
        with self._database.read() as session:
            rows = session.scalars(
                select(Conversation)
                .where(Conversation.user_id == actor.user_id)
                .order_by(Conversation.updated_at.desc(), Conversation.id)
                .limit(limit)
            ).all()
        return [_conversation_json(row) for row in rows]

    def get(self, actor: Actor, conversation_id: str) -> dict[str, Any]:
        """The conversation with all its messages."""
        with self._database.read() as session:
            row = _own(session, actor, conversation_id)
            messages = session.scalars(
                select(Message).where(Message.conversation_id == row.id).order_by(Message.position)
            ).all()
            withheld = withheld_messages(session, row.id, actor.user_id)
        shown = [_message_json(message, is_withheld=message.id in withheld) for message in messages]
        return _conversation_json(row) | {"messages": shown}

    def update(self, actor: Actor, conversation_id: str, changes: dict[str, Any]) -> dict[str, Any]:
        """`changes` may hold `title`, `model` and `collections`, already validated."""
        with self._database.write() as session:
            row = _own(session, actor, conversation_id)
            for name, value in changes.items():
                setattr(row, name, value)
            row.updated_at = utc_now()
            return _conversation_json(row)

    def delete(self, actor: Actor, conversation_id: str) -> None:
        with self._database.write() as session:
            session.delete(_own(session, actor, conversation_id))

    def delete_from(self, actor: Actor, conversation_id: str, message_id: str) -> int:
        """Delete that message and all after it, so that it can be asked again. Returns how many went."""
        with self._database.write() as session:
            row = _own(session, actor, conversation_id)
            message = session.get(Message, message_id)
            if message is None or message.conversation_id != row.id:
                raise not_found(f"Conversation {row.id} has no message {message_id}.", code="message_not_found")
            doomed = (Message.conversation_id == row.id) & (Message.position >= message.position)
            count = session.scalar(select(func.count()).select_from(Message).where(doomed)) or 0
            session.execute(delete(Message).where(doomed))
            row.updated_at = utc_now()
            return count

    def add_message(
        self,
        actor: Actor,
        conversation_id: str,
        role: str,
        content: str,
        *,
        citations: Sequence[dict[str, Any]] = (),
        steps: Sequence[dict[str, Any]] = (),
        state: MessageState = "complete",
        model: str | None = None,
        document_ids: AnyCollection[str] = (),
    ) -> str:
        """Append a message; the first of a user names an untitled conversation. `document_ids`: what an answer could
        use; where one of them was deleted meanwhile, its text is not kept. Returns the message's id."""
        with self._database.write() as session:
            row = _own(session, actor, conversation_id, lock=True)
            last = session.scalar(select(func.max(Message.position)).where(Message.conversation_id == row.id))
            sources = set(document_ids)
            if role == "assistant":
                sources |= _sources_so_far(session, row, actor)
            if sources - living_documents(session, sources):
                content, citations, steps, sources = WITHDRAWN, (), (), set()
            message = Message(
                conversation_id=row.id,
                position=0 if last is None else last + 1,
                role=role,
                content=content,
                citations=list(citations),
                steps=list(steps),
                state=state,
                model=model,
            )
            session.add(message)
            session.flush()
            session.add_all(MessageSource(message_id=message.id, document_id=each) for each in sorted(sources))
            if role == "user" and row.title == _DEFAULT_TITLE:
                row.title = title_of(content)
            row.updated_at = utc_now()
            session.flush()
            return message.id

    def may_read(self, actor: Actor, document_ids: AnyCollection[str]) -> bool:
        """Whether all these documents are there and the actor may read them right now."""
        with self._database.read() as session:
            return readable_documents(session, document_ids, actor.user_id) >= set(document_ids)


def title_of(question: str) -> str:
    """The first words of a question, whole words where they fit."""
    line = " ".join(question.split())
    if len(line) <= _TITLE_LENGTH:
        return line or _DEFAULT_TITLE
    return line[:_TITLE_LENGTH].rsplit(" ", 1)[0] + "…"


def _sources_so_far(session: Session, row: Conversation, actor: Actor) -> set[str]:
    """What the earlier answers of a conversation rest on, which a new one may repeat; without those answers that the
    reader is not shown any more."""
    withheld = withheld_messages(session, row.id, actor.user_id)
    rows = select(MessageSource).join(Message, Message.id == MessageSource.message_id)
    found = session.scalars(rows.where(Message.conversation_id == row.id))
    return {source.document_id for source in found if source.message_id not in withheld}


def _own(session: Session, actor: Actor, conversation_id: str, *, lock: bool = False) -> Conversation:
    row = session.get(Conversation, conversation_id, with_for_update=lock)
    if row is None or row.user_id != actor.user_id:
        raise _unknown(conversation_id)
    return row


def _unknown(conversation_id: str) -> ApiError:
    return not_found(
        f"There is no conversation {conversation_id}. GET /v1/conversations lists yours.",
        code="conversation_not_found",
        param="conversation",
    )


def _conversation_json(row: Conversation) -> dict[str, Any]:
    return {
        "id": row.id,
        "object": "conversation",
        "title": row.title,
        "model": row.model,
        "collections": row.collections,
        "created_at": row.created_at.isoformat(),
        "updated_at": row.updated_at.isoformat(),
    }


def _message_json(row: Message, *, is_withheld: bool = False) -> dict[str, Any]:
    return {
        "id": row.id,
        "role": row.role,
        "content": WITHDRAWN if is_withheld else row.content,
        "citations": [] if is_withheld else row.citations,
        "steps": [] if is_withheld else row.steps,
        "state": row.state,
        "model": row.model,
        "created_at": row.created_at.isoformat(),
    }
