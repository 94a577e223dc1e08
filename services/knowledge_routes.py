"""Routes of the knowledge base: collections, documents, search. The store does the work; here it is addressed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from rag.types import Passage
from services.calls import Calls
from services.chat_types import MAX_QUERY_CHARACTERS, SearchResult
from services.errors import invalid, not_found
from services.event_stream import until_client_leaves
from services.knowledge import ACTIVE_JOB_STATES
from services.knowledge_calls import RemoteSearcher
from services.model_queues import SEARCHES, TUNINGS, ModelQueues
from services.routing import Answer, Call, Route, flag, json_answer, list_answer
from services.token_estimate import estimate_search
from services.tuning import MAX_QUESTIONS
from services.uploads import receive_upload
from services.validation import RequestBody

_MAX_MIB = 1.0
_ABOUT = {"batch": 200, "source": 1000, "origin": 4000, "parse_as": 1000}
"""Most characters of each."""


class NewCollection(RequestBody):
    name: Annotated[str, Field(min_length=1, max_length=120)]
    description: Annotated[str, Field(max_length=2000)] = ""


class NewUrl(RequestBody):
    url: Annotated[str, Field(min_length=1, max_length=4000)]
    batch: Annotated[str, Field(max_length=200)] | None = None
    source: Annotated[str, Field(max_length=1000)] | None = None


class SearchBody(RequestBody):
    query: Annotated[str, Field(min_length=1, max_length=MAX_QUERY_CHARACTERS)]
    top_k: Annotated[int, Field(ge=1, le=100)] | None = None


class TuningQuestion(RequestBody):
    text: Annotated[str, Field(min_length=1, max_length=2000)]
    documents: Annotated[list[str], Field(max_length=1000)] = []
    """Ids of the documents that answer it; none: nothing in the collection does."""


class TuningBody(RequestBody):
    questions: Annotated[list[TuningQuestion], Field(min_length=1, max_length=MAX_QUESTIONS)] | None = None
    """None: made from the collection itself."""


class KnowledgeRoutes:
    """`uploads` is a folder on the store's own disk, where a file waits until the store takes it over."""

    def __init__(
        self, store: Calls, searcher: RemoteSearcher, queues: ModelQueues, uploads: Path, max_file_mib: float
    ) -> None:
        self._store = store
        self._searcher = searcher
        self._queues = queues
        self._uploads = uploads
        self._max_file_mib = max_file_mib

    def routes(self) -> list[Route]:
        collection = "/v1/collections/{name}"
        return [
            Route("GET", "/v1/collections", self.list_collections),
            Route("POST", "/v1/collections", self.create_collection),
            Route("GET", collection, self.get_collection),
            Route("DELETE", collection, self.delete_collection),
            Route("GET", f"{collection}/documents", self.list_documents),
            Route("POST", f"{collection}/documents", self.upload),
            Route("POST", f"{collection}/urls", self.add_url),
            Route("GET", f"{collection}/documents/{{id}}", self.get_document),
            Route("DELETE", f"{collection}/documents/{{id}}", self.delete_document),
            Route("POST", f"{collection}/search", self.search),
            Route("POST", f"{collection}/reembed", self.reembed),
            Route("POST", f"{collection}/tune", self.tune),
            Route("DELETE", f"{collection}/tune", self.forget_tuning),
        ]

    async def list_collections(self, call: Call) -> Answer:
        return list_answer(await self._store.call("list_collections", call.actor.user_id))

    async def create_collection(self, call: Call) -> Answer:
        new = await call.parse(NewCollection, _MAX_MIB)
        made = await self._store.call("create_collection", new.name, new.description, call.actor.user_id)
        return json_answer(made, 201)

    async def get_collection(self, call: Call) -> Answer:
        return json_answer(await self._store.call("collection", call.parameters["name"], call.actor.user_id))

    async def delete_collection(self, call: Call) -> Answer:
        return json_answer(await self._store.call("delete_collection", call.parameters["name"], call.actor.user_id))

    async def list_documents(self, call: Call) -> Answer:
        return list_answer(await self._store.call("list_documents", call.parameters["name"], call.actor.user_id))

    async def upload(self, call: Call) -> Answer:
        """202 with a job that runs; with `?wait=true` the job when it has ended or is paused. `?batch=`, `?source=` and
        `?origin=` are kept with it; `?parse_as=page.html` says the type of a file whose name does not."""
        wait = flag(call, "wait")
        about = _about(call)
        content_type = call.headers.get("content-type", "")
        async with receive_upload(call.receive, content_type, self._uploads, self._max_file_mib) as upload:
            job = await self._store.call(
                "submit_document", call.parameters["name"], upload.filename, upload.path, call.actor.user_id, **about
            )
        if not wait:
            return json_answer({"job": job}, 202)
        ended = until_client_leaves(call.receive, self._until_ended(job, call.actor.user_id))
        return json_answer({"job": await ended})

    async def add_url(self, call: Call) -> Answer:
        """202 with a job that fetches the URL; the store's guarded client decides what may be fetched."""
        new = await call.parse(NewUrl, _MAX_MIB)
        about = {"batch": new.batch, "source": new.source}
        job = await self._store.call("submit_url", call.parameters["name"], new.url, call.actor.user_id, **about)
        return json_answer({"job": job}, 202)

    async def get_document(self, call: Call) -> Answer:
        document = await self._store.call("document", call.parameters["id"], call.actor.user_id)
        if call.parameters["name"] not in (document["collection"], document["collection_id"]):
            raise not_found(
                f"The document {document['id']} lies in another collection: '{document['collection']}'.",
                code="unknown_document",
            )
        return json_answer(document)

    async def delete_document(self, call: Call) -> Answer:
        name, document_id = call.parameters["name"], call.parameters["id"]
        return json_answer(await self._store.call("delete_document", name, document_id, call.actor.user_id))

    async def search(self, call: Call) -> Answer:
        wanted = await call.parse(SearchBody, _MAX_MIB)
        name = call.parameters["name"]
        found = await until_client_leaves(call.receive, self._search_in_turn(call, wanted))
        return json_answer({"object": "list", "passages": [_passage(passage, name) for passage in found.passages]})

    async def _search_in_turn(self, call: Call, wanted: SearchBody) -> SearchResult:
        name, actor = call.parameters["name"], call.actor
        async with self._queues.place(SEARCHES, actor.key_id, "default", estimate_search([wanted.query])):
            return await self._searcher.search([name], wanted.query, top_k=wanted.top_k, actor=actor.user_id)

    async def reembed(self, call: Call) -> Answer:
        job = await self._store.call("reembed", call.parameters["name"], call.actor.user_id)
        return json_answer({"job": job}, 202)

    async def tune(self, call: Call) -> Answer:
        wanted = await call.parse(TuningBody, _MAX_MIB)
        return json_answer(await until_client_leaves(call.receive, self._tune_in_turn(call, wanted)))

    async def _tune_in_turn(self, call: Call, wanted: TuningBody) -> Any:
        questions = None if wanted.questions is None else [(each.text, each.documents) for each in wanted.questions]
        num_tokens = estimate_search(text for text, _ in questions or ())
        async with self._queues.place(TUNINGS, call.actor.key_id, "default", num_tokens):
            return await self._searcher.tune(call.parameters["name"], questions, call.actor.user_id)

    async def forget_tuning(self, call: Call) -> Answer:
        return json_answer(await self._store.call("forget_tuning", call.parameters["name"], call.actor.user_id))

    async def _until_ended(self, job: dict[str, Any], actor: str) -> dict[str, Any]:
        """One call waits for less than calls may take; long jobs need several."""
        while job["state"] in ACTIVE_JOB_STATES and not job.get("paused"):
            job = await self._store.call("wait_for_job", job["id"], actor)
        return job


def _about(call: Call) -> dict[str, str]:
    """What a client says of a file beside its content."""
    about = {name: call.query[name] for name in _ABOUT if call.query.get(name)}
    for name, value in about.items():
        if len(value) > _ABOUT[name] or "\x00" in value:
            raise invalid(f"'{name}' is longer than {_ABOUT[name]} characters or holds a NUL.", param=name)
    return about


def _passage(passage: Passage, collection: str) -> dict[str, Any]:
    chunk = passage.chunk
    return {
        "collection": collection,
        "document_id": chunk.document_id,
        "version_id": chunk.version_id,
        "document": chunk.document_name,
        "title": chunk.title,
        "headings": list(chunk.headings),
        "table_header": chunk.table_header,
        "page": chunk.page,
        "start": chunk.start,
        "end": chunk.end,
        "text": chunk.text,
        "score": passage.score,
        "scores": passage.leg_scores,
    }
