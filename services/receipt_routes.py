"""Routes of the receipts of deletions: what was removed, and what a look for it found."""

from __future__ import annotations

from services.calls import Calls
from services.routing import Answer, Call, Route, json_answer, list_answer


class ReceiptRoutes:
    def __init__(self, store: Calls) -> None:
        self._store = store

    def routes(self) -> list[Route]:
        return [
            Route("GET", "/v1/receipts", self.list),
            Route("GET", "/v1/receipts/{id}", self.get),
        ]

    async def list(self, call: Call) -> Answer:
        return list_answer(await self._store.call("receipts", call.actor.user_id))

    async def get(self, call: Call) -> Answer:
        return json_answer(await self._store.call("receipt", call.parameters["id"], call.actor.user_id))
