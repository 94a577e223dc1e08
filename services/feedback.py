"""Feedback on answers: thumbs with a reason, kept with question, passages and answer, reviewed before it is used.

Everybody gives and sees their own; owners of the installation see and review all. What an answer rested on is shown
only to those who may read it, and goes with its document. Calls block.
"""

from __future__ import annotations

from collections.abc import Collection as AnyCollection
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from sqlalchemy import Select, delete, func, select
from sqlalchemy.orm import Session

from services.accounts import Actor
from services.database import (
    Conversation,
    Database,
    Feedback,
    FeedbackPassage,
    Message,
    MessageSource,
    utc_now,
)
from services.errors import ApiError, conflict, forbidden, invalid, not_found
from services.message_sources import in_batches, readable_documents

Rating = Literal["up", "down"]
State = Literal["new", "accepted", "rejected"]
Json = dict[str, Any]


class FeedbackBook:
    def __init__(self, database: Database) -> None:
        self._database = database

    def give(self, actor: Actor, conversation_id: str, message_id: str, rating: Rating, reason: str) -> Json:
        """Rate an answer of one's own conversation. Given again, it takes the former's place and is new."""
        with self._database.write() as session:
            answer, question = _answer_and_question(session, actor, conversation_id, message_id)
            conversation = session.get_one(Conversation, conversation_id)
            session.execute(delete(Feedback).where(Feedback.message_id == message_id))
            row = Feedback(
                user_id=actor.user_id,
                message_id=message_id,
                rating=rating,
                reason=reason,
                question=question.content,
                answer=answer.content,
                model=answer.model,
                collections=list(conversation.collections),
            )
            session.add(row)
            session.flush()
            sources = session.scalars(select(MessageSource.document_id).where(MessageSource.message_id == message_id))
            passages = list(_passages(row.id, answer, sources.all()))
            session.add_all(passages)
            session.flush()
            return _as_seen_by(session, actor, [row])[0]

    def withdraw(self, actor: Actor, feedback_id: str) -> None:
        with self._database.write() as session:
            row = session.get(Feedback, feedback_id)
            if row is None or row.user_id != actor.user_id:
                raise _unknown(feedback_id)
            session.delete(row)

    def entries(
        self, actor: Actor, *, everybody: bool, state: State | None = None, after: str | None = None, limit: int = 100
    ) -> list[Json]:
        """The newest first, from behind the entry `after`. `everybody` is for owners."""
        if everybody:
            _require_owner(actor)
        wanted: Select[Feedback] = select(Feedback).order_by(Feedback.created_at.desc(), Feedback.id.desc())
        if not everybody:
            wanted = wanted.where(Feedback.user_id == actor.user_id)
        if state is not None:
            wanted = wanted.where(Feedback.state == state)
        with self._database.read() as session:
            if after is not None:
                last = session.get(Feedback, after)
                if last is None or (not everybody and last.user_id != actor.user_id):
                    raise _unknown(after)
                is_older = Feedback.created_at < last.created_at
                is_same = (Feedback.created_at == last.created_at) & (Feedback.id < last.id)
                wanted = wanted.where(is_older | is_same)
            return _as_seen_by(session, actor, session.scalars(wanted.limit(limit)).all())

    def review(self, actor: Actor, feedback_id: str, decision: State, relevant: Sequence[str] | None) -> Json:
        """Accept as a test question, or reject. `relevant`: ids of the documents that hold the answer; by default those
        that a praised answer cites."""
        _require_owner(actor)
        with self._database.write() as session:
            row = session.get(Feedback, feedback_id)
            if row is None:
                raise _unknown(feedback_id)
            passages = _passages_of(session, [row.id]).get(row.id, [])
            if decision == "accepted":
                row.relevant = _relevant(row, passages, relevant)
                readable = readable_documents(session, row.relevant, actor.user_id)
                if unknown := [document_id for document_id in row.relevant if document_id not in readable]:
                    raise not_found(f"There is no document {unknown[0]!r}.", code="unknown_document", param="relevant")
            else:
                row.relevant = []
            row.state, row.reviewer_id, row.reviewed_at = decision, actor.user_id, utc_now()
            session.flush()
            return _as_seen_by(session, actor, [row])[0]


def forget_documents(session: Session, document_ids: AnyCollection[str]) -> int:
    """Part of a deletion's transaction: passages of these documents go, and the answers that rested on them. Returns
    how many answers there were."""
    num_forgotten = 0
    for some in in_batches(document_ids):
        rested = select(FeedbackPassage.feedback_id).where(FeedbackPassage.document_id.in_(some))
        for row in session.scalars(select(Feedback).where(Feedback.id.in_(rested))).all():
            row.answer = ""
            row.relevant = [document_id for document_id in row.relevant if document_id not in document_ids]
            num_forgotten += 1
        session.execute(delete(FeedbackPassage).where(FeedbackPassage.document_id.in_(some)))
    return num_forgotten


def passages_left(session: Session, document_ids: AnyCollection[str]) -> int:
    """Passages of these documents that feedback still holds, for the look after a deletion."""
    return sum(
        session.scalar(select(func.count()).where(FeedbackPassage.document_id.in_(some))) or 0
        for some in in_batches(document_ids)
    )


def _as_seen_by(session: Session, actor: Actor, rows: Sequence[Feedback]) -> list[Json]:
    """Of an answer that rests on anything which the actor may not read right now, neither text nor passages."""
    passages = _passages_of(session, [row.id for row in rows])
    named = {passage.document_id for each in passages.values() for passage in each}
    readable = readable_documents(session, named, actor.user_id) if named else set()
    entries = []
    for row in rows:
        entry = feedback_json(row, passages.get(row.id, []))
        is_readable = all(passage["document_id"] in readable for passage in entry["passages"])
        entries.append(entry if is_readable else _hidden(entry))
    return entries


def feedback_json(row: Feedback, passages: Sequence[FeedbackPassage]) -> Json:
    return {
        "id": row.id,
        "object": "feedback",
        "user_id": row.user_id,
        "message_id": row.message_id,
        "rating": row.rating,
        "reason": row.reason,
        "question": row.question,
        "answer": row.answer,
        "model": row.model,
        "collections": row.collections,
        "passages": [_passage_json(passage) for passage in passages],
        "is_hidden": False,
        "state": row.state,
        "relevant": row.relevant,
        "created_at": int(row.created_at.timestamp()),
        "reviewed_at": int(row.reviewed_at.timestamp()) if row.reviewed_at else None,
    }


def _hidden(entry: Json) -> Json:
    return entry | {"answer": "", "passages": [], "relevant": [], "is_hidden": True}


def _passage_json(passage: FeedbackPassage) -> Json:
    return {
        "document_id": passage.document_id,
        "version_id": passage.version_id,
        "document": passage.document,
        "collection": passage.collection,
        "page": passage.page,
        "start": passage.start,
        "end": passage.end,
        "text": passage.text,
        "is_cited": passage.is_cited,
    }


def _answer_and_question(
    session: Session, actor: Actor, conversation_id: str, message_id: str
) -> tuple[Message, Message]:
    conversation = session.get(Conversation, conversation_id)
    answer = session.get(Message, message_id)
    is_own = conversation is not None and conversation.user_id == actor.user_id
    if answer is None or not is_own or answer.conversation_id != conversation_id:
        raise not_found(
            f"There is no message {message_id} in a conversation {conversation_id} of yours.",
            code="message_not_found",
            param="message",
        )
    asked = (
        select(Message)
        .where(Message.conversation_id == conversation_id, Message.position < answer.position, Message.role == "user")
        .order_by(Message.position.desc())
        .limit(1)
    )
    question = session.scalars(asked).first()
    if answer.role != "assistant" or question is None:
        raise invalid("Feedback is given to an answer; this message is none.", param="message", code="not_an_answer")
    return answer, question


def _passages(feedback_id: str, answer: Message, sources: Sequence[str]) -> Iterator[FeedbackPassage]:
    """What the answer cites, then what it was given besides; documents that it could use otherwise (`sources`: a tool
    showed them, or an earlier answer) without a place in them."""
    cited = [entry for entry in answer.citations if isinstance(entry, dict)]
    found = [
        passage for step in answer.steps if step.get("event") == "retrieval" for passage in step.get("passages", ())
    ]
    places = {(entry["document_id"], entry["start"], entry["end"]) for entry in cited}
    others = [entry for entry in found if (entry["document_id"], entry["start"], entry["end"]) not in places]
    named = {entry["document_id"] for entry in (*cited, *found)}
    unplaced = [
        {"document_id": document_id, "version_id": "", "document": "", "start": 0, "end": 0}
        for document_id in sources
        if document_id not in named
    ]
    for position, entry in enumerate([*cited, *others, *unplaced]):
        yield FeedbackPassage(
            feedback_id=feedback_id,
            position=position,
            document_id=entry["document_id"],
            version_id=entry["version_id"],
            document=entry["document"],
            collection=entry.get("collection"),
            page=entry.get("page"),
            start=entry["start"],
            end=entry["end"],
            text=entry.get("text"),
            is_cited=position < len(cited),
        )


def _passages_of(session: Session, feedback_ids: Sequence[str]) -> dict[str, list[FeedbackPassage]]:
    rows = session.scalars(
        select(FeedbackPassage)
        .where(FeedbackPassage.feedback_id.in_(feedback_ids))
        .order_by(FeedbackPassage.feedback_id, FeedbackPassage.position)
    )
    by_feedback: dict[str, list[FeedbackPassage]] = {}
    for row in rows:
        by_feedback.setdefault(row.feedback_id, []).append(row)
    return by_feedback


def _relevant(row: Feedback, passages: Sequence[FeedbackPassage], relevant: Sequence[str] | None) -> list[str]:
    if relevant:
        return list(dict.fromkeys(relevant))
    cited = list(dict.fromkeys(passage.document_id for passage in passages if passage.is_cited))
    if row.rating == "up" and cited:
        return cited
    raise conflict(
        "Which document holds the answer? Only a praised answer with citations says so by itself. Name documents with "
        "`relevant` (windfarm feedback accept ID --relevant DOCUMENT_ID), or reject it.",
        code="relevant_missing",
        param="relevant",
    )


def _require_owner(actor: Actor) -> None:
    if actor.role != "owner":
        raise forbidden("Only an owner of this windfarm sees and reviews everybody's feedback.")


def _unknown(feedback_id: str) -> ApiError:
    return not_found(f"There is no feedback {feedback_id} of yours.", code="feedback_not_found")
