"""Routes of conversations: everybody's own chats, kept in the database."""

from __future__ import annotations

import asyncio
from typing import Annotated

from pydantic import Field

from services.conversations import Conversations
from services.routing import Answer, Call, Route, json_answer, list_answer
from services.validation import RequestBody

Title = Annotated[str, Field(min_length=1, max_length=200)]
_MAX_MIB = 1.0


class NewConversation(RequestBody):
    title: Title | None = None
    model: str | None = None
    collections: list[str] | None = None


class ConversationChanges(RequestBody):
    title: Title | None = None
    model: str | None = None
    collections: list[str] | None = None


class ConversationRoutes:
    def __init__(self, conversations: Conversations) -> None:
        self._conversations = conversations

    def routes(self) -> list[Route]:
        return [
            Route("GET", "/v1/conversations", self.list),
            Route("POST", "/v1/conversations", self.create),
            Route("GET", "/v1/conversations/{id}", self.get),
            Route("PATCH", "/v1/conversations/{id}", self.update),
            Route("DELETE", "/v1/conversations/{id}", self.delete),
            Route("DELETE", "/v1/conversations/{id}/messages/{message_id}", self.delete_from),
        ]

    async def list(self, call: Call) -> Answer:
        return list_answer(await asyncio.to_thread(self._conversations.list, call.actor))

    async def create(self, call: Call) -> Answer:
        new = await call.parse(NewConversation, _MAX_MIB)
        made = await asyncio.to_thread(
            self._conversations.create, call.actor, new.title, new.model, new.collections or ()
        )
        return json_answer(made, 201)

    async def get(self, call: Call) -> Answer:
        return json_answer(await asyncio.to_thread(self._conversations.get, call.actor, call.parameters["id"]))

    async def update(self, call: Call) -> Answer:
        changes = (await call.parse(ConversationChanges, _MAX_MIB)).model_dump(exclude_none=True)
        changed = await asyncio.to_thread(self._conversations.update, call.actor, call.parameters["id"], changes)
        return json_answer(changed)

    async def delete(self, call: Call) -> Answer:
        await asyncio.to_thread(self._conversations.delete, call.actor, call.parameters["id"])
        return json_answer({"id": call.parameters["id"], "deleted": True})

    async def delete_from(self, call: Call) -> Answer:
        number = await asyncio.to_thread(
            self._conversations.delete_from, call.actor, call.parameters["id"], call.parameters["message_id"]
        )
        return json_answer({"id": call.parameters["message_id"], "deleted": True, "num_messages": number})
