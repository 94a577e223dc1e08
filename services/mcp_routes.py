"""`/mcp`: search and read for other assistants, under the rights of the key that they send.

The host is checked as for every route; a browser's `Origin` has to be the endpoint's own, so that no web page can make
its visitor's browser call this.
"""

from __future__ import annotations

import json
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import Field, ValidationError

from services.accounts import Actor
from services.calls import Calls
from services.chat_types import MAX_QUERY_CHARACTERS
from services.errors import ApiError, forbidden, invalid
from services.event_stream import until_client_leaves
from services.knowledge_calls import RemoteSearcher
from services.mcp_protocol import INVALID_REQUEST, VERSIONS, McpServer, Tool
from services.model_queues import SEARCHES, ModelQueues
from services.routing import Answer, Call, Route, json_answer
from services.token_estimate import estimate_search
from services.validation import RequestBody, describe

_MAX_MIB = 1.0
_MAX_COLLECTIONS = 32
_INSTRUCTIONS = (
    "Search the documents of this windfarm with `search`, then `read` the documents around the passages that matter. "
    "Passages name document, page and characters; cite them. You see what your key may read."
)


class SearchArguments(RequestBody):
    query: Annotated[
        str, Field(min_length=1, max_length=MAX_QUERY_CHARACTERS, description="What to look for, in any language.")
    ]
    collections: Annotated[
        list[str], Field(max_length=_MAX_COLLECTIONS, description="Names of collections; left out: all.")
    ] = Field(default_factory=list)
    limit: Annotated[int, Field(ge=1, le=50, description="Number of passages.")] = 8


class ReadArguments(RequestBody):
    document_id: Annotated[str, Field(max_length=255, description="Id of a document, as `search` gives it.")]
    start: Annotated[int, Field(ge=0, description="First character to read.")] = 0
    length: Annotated[int, Field(ge=1, le=100_000, description="Number of characters.")] = 20_000


class NoArguments(RequestBody):
    pass


class McpRoutes:
    def __init__(self, store: Calls, searcher: RemoteSearcher, queues: ModelQueues, version: str) -> None:
        self._store = store
        self._searcher = searcher
        self._queues = queues
        self._server = McpServer("windfarm", version, _INSTRUCTIONS, self._tools())

    def routes(self) -> list[Route]:
        return [Route("POST", "/mcp", self.message)]

    async def message(self, call: Call) -> Answer:
        _check_origin(call)
        version = call.headers.get("mcp-protocol-version")
        if version is not None and version not in VERSIONS:
            # 400 with a JSON-RPC error: newer clients then fall back to the handshake.
            error = {"code": INVALID_REQUEST, "message": f"Served are the protocol versions {', '.join(VERSIONS)}."}
            return json_answer({"jsonrpc": "2.0", "id": None, "error": error}, 400)
        if not call.headers.get("content-type", "").lower().startswith("application/json"):
            raise ApiError(415, "invalid_request_error", "unsupported_media_type", "Send application/json.")
        body = await call.body(_MAX_MIB)
        answer = await until_client_leaves(call.receive, self._server.answer(body, call.actor))
        return Answer(status=202) if answer is None else json_answer(answer)

    def _tools(self) -> list[Tool]:
        return [
            Tool(
                "search",
                "Search documents",
                "Find passages in the documents by meaning and by words. Returns passages, best first.",
                _schema(SearchArguments),
                lambda arguments: _checked(SearchArguments, arguments),
                self._search,
            ),
            Tool(
                "read",
                "Read a document",
                "Read the text of a document, or a part of it by character positions.",
                _schema(ReadArguments),
                lambda arguments: _checked(ReadArguments, arguments),
                self._read,
            ),
            Tool(
                "list_collections",
                "List collections",
                "List the collections of documents that can be searched.",
                _schema(NoArguments),
                lambda arguments: _checked(NoArguments, arguments),
                self._list,
            ),
        ]

    async def _search(self, arguments: SearchArguments, actor: Actor) -> dict[str, Any]:
        names = arguments.collections or await self._all_collections(actor.user_id)
        if not names:
            return {"passages": []}
        async with self._queues.place(SEARCHES, actor.key_id, "default", estimate_search([arguments.query])):
            found = await self._searcher.search(names, arguments.query, top_k=arguments.limit, actor=actor.user_id)
        return {
            "passages": [
                {
                    "document_id": passage.chunk.document_id,
                    "document": passage.chunk.document_name,
                    "collection": found.collection_names.get(passage.chunk.collection_id),
                    "title": passage.chunk.title,
                    "headings": list(passage.chunk.headings),
                    "page": passage.chunk.page,
                    "start": passage.chunk.start,
                    "end": passage.chunk.end,
                    "text": passage.chunk.text,
                    "score": round(float(passage.score), 6),
                }
                for passage in found.passages
            ]
        }

    async def _all_collections(self, user_id: str) -> list[str]:
        collections = await self._store.call("list_collections", user_id)
        if len(collections) > _MAX_COLLECTIONS:
            raise invalid(
                f"There are {len(collections)} collections; name up to {_MAX_COLLECTIONS} of them in `collections` "
                "(`list_collections` lists them).",
                param="collections",
            )
        return [collection["id"] for collection in collections]

    async def _read(self, arguments: ReadArguments, actor: Actor) -> dict[str, Any]:
        document = await self._store.call("document", arguments.document_id, actor.user_id)
        text = document["text"]
        end = min(len(text), arguments.start + arguments.length)
        pages = [page for page in document["pages"] if page["start"] < end and page["end"] > arguments.start]
        return {
            "document_id": document["id"],
            "document": document["name"],
            "collection": document["collection"],
            "title": document["title"],
            "language": document["language"],
            "start": min(arguments.start, len(text)),
            "end": max(end, min(arguments.start, len(text))),
            "num_characters": len(text),
            "pages": pages,
            "text": text[arguments.start : end],
        }

    async def _list(self, arguments: NoArguments, actor: Actor) -> dict[str, Any]:
        collections = await self._store.call("list_collections", actor.user_id)
        kept = ("name", "description", "num_documents")
        return {"collections": [{name: collection[name] for name in kept} for collection in collections]}


def _schema(arguments: type[RequestBody]) -> dict[str, Any]:
    schema = arguments.model_json_schema()
    return {"type": "object", "properties": {}} | {name: value for name, value in schema.items() if name != "title"}


def _checked(kind: type[RequestBody], arguments: dict[str, Any]) -> RequestBody:
    try:
        return kind.model_validate_json(json.dumps(arguments))
    except ValidationError as error:
        raise describe(kind, error) from None


def _check_origin(call: Call) -> None:
    origin = call.headers.get("origin")
    if origin is None:
        return
    if urlsplit(origin).netloc.lower() != call.headers.get("host", "").lower():
        raise forbidden(f"A page of {origin[:100]} may not call this.", code="foreign_origin")
