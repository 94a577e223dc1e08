"""Routes that show and change who may read a collection or one of its documents."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from services.calls import Calls
from services.errors import invalid
from services.routing import Answer, Call, Route, json_answer
from services.sharing import ReaderChange, ReaderNames
from services.validation import RequestBody

_MAX_MIB = 1.0
Names = Annotated[list[Annotated[str, Field(min_length=1, max_length=100)]], Field(max_length=1000)]


class Readers(RequestBody):
    """Names or ids."""

    users: Names = []
    groups: Names = []
    everybody: bool = False

    def names(self) -> ReaderNames:
        return ReaderNames(tuple(self.users), tuple(self.groups), self.everybody)


class OnlyReaders(Readers):
    inherit: bool = False
    """Of a document: those of its collection, and none of its own."""


class MoreOrFewerReaders(RequestBody):
    add: Readers = Readers()
    remove: Readers = Readers()


class SharingRoutes:
    """PUT says who may read, and nobody else; PATCH adds and removes."""

    def __init__(self, store: Calls) -> None:
        self._store = store

    def routes(self) -> list[Route]:
        of_collection = "/v1/collections/{name}/readers"
        of_document = "/v1/collections/{name}/documents/{id}/readers"
        return [
            route
            for template in (of_collection, of_document)
            for route in (
                Route("GET", template, self.get),
                Route("PUT", template, self.replace),
                Route("PATCH", template, self.change),
            )
        ]

    async def get(self, call: Call) -> Answer:
        name, document_id = call.parameters["name"], call.parameters.get("id")
        return json_answer(await self._store.call("readers", name, document_id, call.actor.user_id))

    async def replace(self, call: Call) -> Answer:
        wanted = await call.parse(OnlyReaders, _MAX_MIB)
        if not wanted.inherit:
            return await self._share(call, ReaderChange(only=wanted.names()))
        if wanted.names() != ReaderNames():
            raise invalid("A document that inherits has no readers of its own: leave them out.", param="inherit")
        if "id" not in call.parameters:
            raise invalid("A collection has nothing to inherit from; this is for its documents.", param="inherit")
        return await self._share(call, ReaderChange(inherit=True))

    async def change(self, call: Call) -> Answer:
        wanted = await call.parse(MoreOrFewerReaders, _MAX_MIB)
        return await self._share(call, ReaderChange(add=wanted.add.names(), remove=wanted.remove.names()))

    async def _share(self, call: Call, change: ReaderChange) -> Answer:
        name, document_id = call.parameters["name"], call.parameters.get("id")
        return json_answer(await self._store.call("share", name, document_id, change, call.actor.user_id))
