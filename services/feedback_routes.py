"""Routes of feedback: give, list and withdraw one's own; review, for owners."""

from __future__ import annotations

import asyncio
from typing import Annotated, Literal

from pydantic import Field

from services.errors import invalid
from services.feedback import FeedbackBook, State
from services.routing import Answer, Call, Route, flag, json_answer
from services.validation import RequestBody

_MAX_MIB = 1.0
_MAX_LISTED = 1000
_STATES: tuple[State, ...] = ("new", "accepted", "rejected")


class NewFeedback(RequestBody):
    conversation: Annotated[str, Field(max_length=255)]
    message: Annotated[str, Field(max_length=255)]
    rating: Literal["up", "down"]
    reason: Annotated[str, Field(max_length=2000)] = ""


class Review(RequestBody):
    decision: Literal["accepted", "rejected"]
    relevant: Annotated[list[str], Field(max_length=100)] | None = None


class FeedbackRoutes:
    def __init__(self, book: FeedbackBook) -> None:
        self._book = book

    def routes(self) -> list[Route]:
        return [
            Route("GET", "/v1/feedback", self.list_feedback),
            Route("POST", "/v1/feedback", self.give),
            Route("DELETE", "/v1/feedback/{id}", self.withdraw),
            Route("POST", "/v1/feedback/{id}/review", self.review),
        ]

    async def give(self, call: Call) -> Answer:
        new = await call.parse(NewFeedback, _MAX_MIB)
        made = await asyncio.to_thread(
            self._book.give, call.actor, new.conversation, new.message, new.rating, new.reason
        )
        return json_answer(made, 201)

    async def list_feedback(self, call: Call) -> Answer:
        """`?state=`, `?all=true` (owners: everybody's), `?limit=&after=`: pages, the newest first."""
        named, limit = call.query.get("state"), call.query.get("limit", "100")
        state = next((each for each in _STATES if each == named), None)
        if named is not None and state is None:
            raise invalid(f"'state' is '{named[:40]}', but one of {', '.join(_STATES)} is expected.", param="state")
        if not (limit.isascii() and limit.isdecimal() and 1 <= int(limit[:9]) <= _MAX_LISTED):
            raise invalid(
                f"'limit' is '{limit[:20]}', but a number from 1 to {_MAX_LISTED} is expected.", param="limit"
            )
        num_wanted = int(limit)
        entries = await asyncio.to_thread(
            self._book.entries,
            call.actor,
            everybody=flag(call, "all"),
            state=state,
            after=call.query.get("after"),
            limit=num_wanted + 1,
        )
        shown = entries[:num_wanted]
        return json_answer({"object": "list", "data": shown, "has_more": len(entries) > num_wanted})

    async def withdraw(self, call: Call) -> Answer:
        await asyncio.to_thread(self._book.withdraw, call.actor, call.parameters["id"])
        return json_answer({"id": call.parameters["id"], "object": "feedback.deleted", "deleted": True})

    async def review(self, call: Call) -> Answer:
        review = await call.parse(Review, _MAX_MIB)
        reviewed = await asyncio.to_thread(
            self._book.review, call.actor, call.parameters["id"], review.decision, review.relevant
        )
        return json_answer(reviewed)
