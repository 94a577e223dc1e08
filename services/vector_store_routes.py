"""OpenAI's vector stores API: `/v1/vector_stores`, their files, batches of files, and search."""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from rag.reranking import LEG
from rag.types import Passage
from services.accounts import Actor
from services.attribute_filters import compile_attribute_filter
from services.chat_types import MAX_QUERY_CHARACTERS
from services.errors import invalid
from services.event_stream import until_client_leaves
from services.knowledge_calls import RemoteSearcher
from services.model_queues import SEARCHES, ModelQueues
from services.pages import page_of
from services.routing import Answer, Call, Route, json_answer
from services.token_estimate import estimate_search
from services.validation import FieldError, RequestBody
from services.vector_stores import VectorStores, new_batch_id

_MAX_MIB = 1.0
_NO_EXPIRY = "Vector stores stay until they are deleted. Leave it out."
_STATES = ("in_progress", "completed", "failed", "cancelled")

Key = Annotated[str, Field(max_length=64)]
Text = Annotated[str, Field(max_length=512)]
Metadata = Annotated[dict[Key, Text], Field(max_length=16)]
Attributes = Annotated[dict[Key, Text | float | bool], Field(max_length=16)]
FileId = Annotated[str, Field(min_length=1, max_length=255)]


class ChunkingStrategy(RequestBody):
    type: Literal["auto", "static"]
    static: Any = None

    @model_validator(mode="after")
    def _check(self) -> ChunkingStrategy:
        if self.type == "static" or self.static is not None:
            raise FieldError(
                "'chunking_strategy' can only be auto: passages are cut alike in all collections, as "
                "store.ingestion.chunk_tokens in ray_config.yaml says.",
                param="chunking_strategy",
                code="unsupported_parameter",
            )
        return self


class NewVectorStore(RequestBody):
    name: Annotated[str, Field(max_length=1024)] | None = None
    description: Annotated[str, Field(max_length=2000)] = ""
    metadata: Metadata | None = None
    file_ids: Annotated[list[FileId], Field(max_length=500)] = Field(default_factory=list)
    chunking_strategy: ChunkingStrategy | None = None
    expires_after: None = None

    REFUSED: ClassVar[dict[str, str]] = {"expires_after": _NO_EXPIRY}


class VectorStoreChanges(RequestBody):
    name: Annotated[str, Field(max_length=1024)] | None = None
    metadata: Metadata | None = None
    expires_after: None = None

    REFUSED: ClassVar[dict[str, str]] = {"expires_after": _NO_EXPIRY}


class NewStoreFile(RequestBody):
    file_id: FileId
    attributes: Attributes | None = None
    chunking_strategy: ChunkingStrategy | None = None


class StoreFileChanges(RequestBody):
    attributes: Attributes | None


class NewFileBatch(RequestBody):
    file_ids: Annotated[list[FileId], Field(max_length=500)] | None = None
    files: Annotated[list[NewStoreFile], Field(max_length=500)] | None = None
    attributes: Attributes | None = None
    chunking_strategy: ChunkingStrategy | None = None

    @model_validator(mode="after")
    def _check(self) -> NewFileBatch:
        if bool(self.file_ids) == bool(self.files):
            raise FieldError("Give either 'file_ids' or 'files', and at least one.", param="file_ids")
        return self

    def entries(self) -> list[NewStoreFile]:
        """With `files`, each has its own attributes; those of the batch do not count, as at OpenAI."""
        if self.files:
            return self.files
        return [NewStoreFile(file_id=file_id, attributes=self.attributes) for file_id in self.file_ids or ()]


class RankingOptions(RequestBody):
    ranker: Literal["none", "auto", "default-2024-11-15"] = "auto"
    score_threshold: Annotated[float, Field(ge=0, le=1)] = 0.0

    @model_validator(mode="after")
    def _check(self) -> RankingOptions:
        if self.ranker == "default-2024-11-15":
            raise FieldError("This ranker is OpenAI's own. Use 'auto'.", param="ranking_options.ranker")
        return self


Query = Annotated[str, Field(min_length=1, max_length=MAX_QUERY_CHARACTERS)]


class SearchBody(RequestBody):
    query: Query | Annotated[list[Query], Field(min_length=1, max_length=16)]
    max_num_results: Annotated[int, Field(ge=1, le=50)] = 10
    filters: dict[str, Any] | None = None
    ranking_options: RankingOptions = RankingOptions()
    rewrite_query: Literal[False] = False

    @property
    def queries(self) -> list[str]:
        return [self.query] if isinstance(self.query, str) else self.query


class VectorStoreRoutes:
    def __init__(self, vector_stores: VectorStores, searcher: RemoteSearcher, queues: ModelQueues) -> None:
        self._vector_stores = vector_stores
        self._searcher = searcher
        self._queues = queues

    def routes(self) -> list[Route]:
        one, files = "/v1/vector_stores/{id}", "/v1/vector_stores/{id}/files"
        batch = "/v1/vector_stores/{id}/file_batches"
        return [
            Route("GET", "/v1/vector_stores", self.list_stores),
            Route("POST", "/v1/vector_stores", self.create),
            Route("GET", one, self.get),
            Route("POST", one, self.update),
            Route("DELETE", one, self.delete),
            Route("POST", f"{one}/search", self.search),
            Route("GET", files, self.list_files),
            Route("POST", files, self.add_file),
            Route("GET", f"{files}/{{file_id}}", self.get_file),
            Route("POST", f"{files}/{{file_id}}", self.update_file),
            Route("DELETE", f"{files}/{{file_id}}", self.remove_file),
            Route("GET", f"{files}/{{file_id}}/content", self.file_content),
            Route("POST", batch, self.add_batch),
            Route("GET", f"{batch}/{{batch_id}}", self.get_batch),
            Route("GET", f"{batch}/{{batch_id}}/files", self.list_batch),
        ]

    async def create(self, call: Call) -> Answer:
        new = await call.parse(NewVectorStore, _MAX_MIB)
        return json_answer(
            await self._vector_stores.create(call.actor, new.name, new.description, new.metadata or {}, new.file_ids)
        )

    async def list_stores(self, call: Call) -> Answer:
        return json_answer(page_of(call, await self._vector_stores.list_stores(call.actor), default=20, most=100))

    async def get(self, call: Call) -> Answer:
        return json_answer(await self._vector_stores.get(call.actor, call.parameters["id"]))

    async def update(self, call: Call) -> Answer:
        new = await call.parse(VectorStoreChanges, _MAX_MIB)
        given = new.model_dump(exclude_unset=True)
        changes = {"attributes" if name == "metadata" else name: value for name, value in given.items()}
        if changes.get("attributes", {}) is None:
            changes["attributes"] = {}
        return json_answer(await self._vector_stores.update(call.actor, call.parameters["id"], changes))

    async def delete(self, call: Call) -> Answer:
        return json_answer(await self._vector_stores.delete(call.actor, call.parameters["id"]))

    async def add_file(self, call: Call) -> Answer:
        new = await call.parse(NewStoreFile, _MAX_MIB)
        return json_answer(
            await self._vector_stores.add_file(call.actor, call.parameters["id"], new.file_id, new.attributes or {})
        )

    async def list_files(self, call: Call) -> Answer:
        return self._page(call, await self._vector_stores.files(call.actor, call.parameters["id"]))

    async def get_file(self, call: Call) -> Answer:
        return json_answer(
            await self._vector_stores.file(call.actor, call.parameters["id"], call.parameters["file_id"])
        )

    async def update_file(self, call: Call) -> Answer:
        attributes = (await call.parse(StoreFileChanges, _MAX_MIB)).attributes or {}
        store_id, file_id = call.parameters["id"], call.parameters["file_id"]
        return json_answer(await self._vector_stores.update_file(call.actor, store_id, file_id, attributes))

    async def remove_file(self, call: Call) -> Answer:
        store_id, file_id = call.parameters["id"], call.parameters["file_id"]
        return json_answer(await self._vector_stores.remove_file(call.actor, store_id, file_id))

    async def file_content(self, call: Call) -> Answer:
        store_id, file_id = call.parameters["id"], call.parameters["file_id"]
        text = await self._vector_stores.file_text(call.actor, store_id, file_id)
        return json_answer(
            {
                "object": "vector_store.file_content.page",
                "data": [{"type": "text", "text": text}],
                "has_more": False,
                "next_page": None,
            }
        )

    async def add_batch(self, call: Call) -> Answer:
        new = await call.parse(NewFileBatch, _MAX_MIB)
        store_id, batch_id = call.parameters["id"], new_batch_id()
        for entry in new.entries():
            await self._vector_stores.add_file(call.actor, store_id, entry.file_id, entry.attributes or {}, batch_id)
        return json_answer(await self._vector_stores.batch(call.actor, store_id, batch_id))

    async def get_batch(self, call: Call) -> Answer:
        return json_answer(
            await self._vector_stores.batch(call.actor, call.parameters["id"], call.parameters["batch_id"])
        )

    async def list_batch(self, call: Call) -> Answer:
        store_id, batch_id = call.parameters["id"], call.parameters["batch_id"]
        await self._vector_stores.batch(call.actor, store_id, batch_id)
        return self._page(call, await self._vector_stores.files(call.actor, store_id, batch_id))

    async def search(self, call: Call) -> Answer:
        wanted = await call.parse(SearchBody, _MAX_MIB)
        store_id, actor = call.parameters["id"], call.actor
        await self._vector_stores.require(actor, store_id)
        documents: list[str] | None = None
        if wanted.filters is not None:
            matches = compile_attribute_filter(wanted.filters)
            documents = await self._vector_stores.matching_documents(actor, store_id, matches)
        passages: list[Passage] = []
        if documents != []:
            searched = self._in_turn(actor, store_id, wanted, documents)
            passages = await until_client_leaves(call.receive, searched)
        files = await self._vector_stores.searchable(actor, store_id)
        found = [_result(passage, files.get(passage.chunk.document_id)) for passage in passages]
        kept = [result for result in found if result["score"] >= wanted.ranking_options.score_threshold]
        return json_answer(
            {
                "object": "vector_store.search_results.page",
                "search_query": wanted.queries,
                "data": kept,
                "has_more": False,
                "next_page": None,
            }
        )

    async def _in_turn(
        self, actor: Actor, store_id: str, wanted: SearchBody, documents: list[str] | None
    ) -> list[Passage]:
        async with self._queues.place(SEARCHES, actor.key_id, "default", estimate_search(wanted.queries)):
            return await self._passages(actor, store_id, wanted, documents)

    async def _passages(
        self, actor: Actor, store_id: str, wanted: SearchBody, documents: list[str] | None
    ) -> list[Passage]:
        """The best of all queries; a passage that several find counts with the best that was said of it."""
        best: dict[str, Passage] = {}
        for query in wanted.queries:
            found = await self._searcher.search(
                [store_id],
                query,
                top_k=wanted.max_num_results,
                actor=actor.user_id,
                documents=documents,
                is_reranked=wanted.ranking_options.ranker != "none",
            )
            for passage in found.passages:
                before = best.get(passage.chunk.chunk_id)
                if before is None or _rank(passage) > _rank(before):
                    best[passage.chunk.chunk_id] = passage
        return sorted(best.values(), key=_rank, reverse=True)[: wanted.max_num_results]

    def _page(self, call: Call, files: list[dict[str, Any]]) -> Answer:
        state = call.query.get("filter")
        if state not in (None, *_STATES):
            raise invalid(f"'filter' is '{state}', but one of {', '.join(_STATES)} is expected.", param="filter")
        shown = [file for file in files if state in (None, file["status"])]
        return json_answer(page_of(call, shown, default=20, most=100, known=("filter",)))


def _rank(passage: Passage) -> tuple[float, float]:
    """Higher is better; what a reranker has read comes before what it has not."""
    return passage.leg_scores.get(LEG, -math.inf), passage.score


def _result(passage: Passage, file: dict[str, Any] | None) -> dict[str, Any]:
    """Documents that came another way than as a file go by their own id."""
    chunk = passage.chunk
    return {
        "file_id": file["id"] if file else chunk.document_id,
        "filename": file["filename"] if file else chunk.document_name,
        "score": round(min(1.0, max(0.0, float(passage.score))), 6),
        "attributes": file["attributes"] if file else {},
        "content": [{"type": "text", "text": chunk.text}],
        "windfarm": {
            "document_id": chunk.document_id,
            "version_id": chunk.version_id,
            "page": chunk.page,
            "start": chunk.start,
            "end": chunk.end,
        },
    }
