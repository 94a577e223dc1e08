"""Random (person, question, route) tries at the real endpoint (10,000 with `make test-leaks`), while people join and
leave, rights come and go and documents are deleted: nothing is told of a document that the person may not read. See
`leaking` for what is real.

Two things keep the rights: the filter of the search, and the look into the database at what was found. Each is taken
out in a test of its own, which must then find what the other alone keeps or lets through.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import rag.access
from rag.vector_store import ScoredChunk
from rag.vector_store_edge import EdgeVectorStore
from services.chat import Chat
from services.chat_types import ChatEvent, ChatRequest, ModelClient
from services.config import ChatConfig, Environment, IngestionConfig, PlatformConfig, RetrievalConfig, StoreConfig
from services.knowledge import Knowledge
from services.knowledge_calls import RemoteSearcher
from services.routing import Route
from services.store_service import StoreService, open_store
from tests.services.harness import ScriptedEngine, running_endpoint, words
from tests.services.leaking import (
    LARGE,
    SMALL,
    TOPICS,
    AtOnce,
    Box,
    Company,
    DirectCalls,
    EchoModel,
    Embedder,
    Size,
    marks,
    text_of,
)

NUM_TRIES = int(os.environ.get("WINDFARM_TEST_TRIES", "2500"))
"""`make test-leaks` makes 10,000."""
TRIES_PER_CHANGE = 40
RETRIEVAL = RetrievalConfig(evidence_threshold=-1.0, top_k=3)


class Observed:
    """What came out: of the vector store, and of each route."""

    def __init__(self) -> None:
        self.num_tries: Counter[str] = Counter()
        self.num_shown: Counter[str] = Counter()
        self.leaks: list[str] = []
        self.store_leaks: list[str] = []


@asynccontextmanager
async def company(
    home: Path, monkeypatch: pytest.MonkeyPatch, seed: int, size: Size = SMALL
) -> AsyncIterator[tuple[Company, Observed]]:
    environment = Environment(home=home, database_url=f"sqlite:///{home}/windfarm.db", internal_secret="secret")
    calls: list[DirectCalls] = []

    class LateCalls:
        async def call(self, method: str, /, *args: Any, **kwargs: Any) -> Any:
            return await calls[0].call(method, *args, **kwargs)

    searcher = RemoteSearcher(LateCalls(), RETRIEVAL)
    chat = Chat(searcher, retrieval=RETRIEVAL, chat=ChatConfig())

    def story(request: ChatRequest, _model: ModelClient) -> AsyncIterator[ChatEvent]:
        return chat(request, EchoModel())

    config = PlatformConfig(retrieval=RETRIEVAL)
    engine = ScriptedEngine(*words("x"))
    async with running_endpoint(home, engine, story=story, config=config, store=LateCalls()) as running:
        store_config = StoreConfig(ingestion=IngestionConfig(chunk_tokens=64, chunk_overlap_tokens=8))
        parts = open_store(store_config, environment)
        service = StoreService(parts, Embedder())
        await service.start()
        calls.append(DirectCalls(service))
        asyncio.get_running_loop().set_default_executor(AtOnce())
        observed = Observed()
        firm = Company(running, parts, seed)
        _watch_store(monkeypatch, firm, observed)
        try:
            await firm.found(size)
            yield firm, observed
        finally:
            await service.close()


def _watch_store(monkeypatch: pytest.MonkeyPatch, firm: Company, observed: Observed) -> None:
    """Note what leaves the vector store itself, before the database is asked again."""
    search = EdgeVectorStore.search_filtered

    def watched(self: EdgeVectorStore, *args: Any, **kwargs: Any) -> list[ScoredChunk]:
        found = search(self, *args, **kwargs)
        for number in firm.leaks(firm.asking, " ".join(hit.chunk.text for hit in found)):
            observed.store_leaks.append(f"{firm.asking} found {number}")
        return found

    monkeypatch.setattr(EdgeVectorStore, "search_filtered", watched)


# One try of each kind: what is asked, and what beside the marks must be right.


def _some_box(firm: Company) -> Box:
    return firm.random.choice(list(firm.boxes.values()))


def _question(firm: Company) -> str:
    topic = firm.random.choice(TOPICS)
    papers = list(firm.papers) + list(firm.gone)[-20:]
    return firm.random.choice((topic, f"Which {topic} number?", f"key{firm.random.choice(papers)} {topic}"))


def _is_hidden(firm: Company, name: str, box: Box, status: int, told: str) -> bool:
    """Whether the answer is that for a collection which does not exist: just for those who see none of it."""
    sees = firm.sees(name, box)
    assert (status == 404) == (not sees), (name, box, status, told)
    if not sees:
        assert json.loads(told)["error"]["code"] == "unknown_collection"
    return not sees


def _check_counts(firm: Company, name: str, box: Box, shown: dict[str, Any]) -> None:
    readable = [paper for paper in firm.of(box) if firm.may_read(name, paper.number)]
    assert shown["num_documents"] == shown["num_chunks"] == len(readable)
    assert shown["can_change"] == firm.manages(firm.people[name], box)


async def list_collections(firm: Company, name: str) -> str:
    _, told = await firm.ask(name, "GET", "/v1/collections")
    shown = {each["id"]: each for each in json.loads(told)["data"]}
    assert shown.keys() == {box.id for box in firm.boxes.values() if firm.sees(name, box)}
    for box in firm.boxes.values():
        if box.id in shown:
            _check_counts(firm, name, box, shown[box.id])
    return told


async def show_collection(firm: Company, name: str) -> str:
    box = _some_box(firm)
    status, told = await firm.ask(name, "GET", f"/v1/collections/{firm.random.choice((box.id, box.name))}")
    if not _is_hidden(firm, name, box, status, told):
        _check_counts(firm, name, box, json.loads(told))
    return told


async def list_documents(firm: Company, name: str) -> str:
    box = _some_box(firm)
    status, told = await firm.ask(name, "GET", f"/v1/collections/{box.id}/documents")
    if not _is_hidden(firm, name, box, status, told):
        assert marks(told) == {paper.number for paper in firm.of(box) if firm.may_read(name, paper.number)}
    return told


async def show_document(firm: Company, name: str) -> str:
    paper = firm.random.choice(list(firm.papers.values()))
    status, told = await firm.ask(name, "GET", f"/v1/collections/{firm.boxes[paper.box].id}/documents/{paper.id}")
    assert (status == 200) == firm.may_read(name, paper.number)
    if status != 200:
        assert (status, json.loads(told)["error"]["code"]) == (404, "unknown_document")
    return told


async def search(firm: Company, name: str) -> str:
    box, question = _some_box(firm), _question(firm)
    body = {"query": question, "top_k": firm.random.choice((1, 5, 50))}
    status, told = await firm.ask(name, "POST", f"/v1/collections/{box.id}/search", body)
    if not _is_hidden(firm, name, box, status, told) and body["top_k"] == 50:
        # What may be read is found as well: rights take away nothing else.
        assert marks(told) >= {paper.number for paper in firm.of(box) if firm.may_read(name, paper.number)}
    return told


async def _chat(firm: Company, name: str, **fields: Any) -> str:
    seen = [box.id for box in firm.boxes.values() if firm.sees(name, box)]
    asked = firm.random.sample(seen, min(len(seen), 2)) or [_some_box(firm).id]
    if firm.random.random() < 0.1:
        asked.append(_some_box(firm).id)
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": _question(firm)}],
        "knowledge": {"collections": asked},
    }
    status, told = await firm.ask(name, "POST", "/v1/chat/completions", body | fields)
    boxes = [box for box in firm.boxes.values() if box.id in asked]
    assert (status == 404) == (not all(firm.sees(name, box) for box in boxes)), told
    return told


async def chat(firm: Company, name: str) -> str:
    return await _chat(firm, name)


async def chat_streamed(firm: Company, name: str) -> str:
    return await _chat(firm, name, stream=True)


async def chat_with_search_tool(firm: Company, name: str) -> str:
    return await _chat(firm, name, windfarm_tools=["knowledge_search"], tool_choice="auto")


async def chat_that_is_kept(firm: Company, name: str) -> str:
    person = firm.people[name]
    if not person.conversation or firm.random.random() < 0.2:
        _, made = await firm.ask(name, "POST", "/v1/conversations", {})
        person.conversation = json.loads(made)["id"]
    return await _chat(firm, name, conversation=person.conversation)


async def show_conversation(firm: Company, name: str) -> str:
    """One's own: of what was said, only what may be read now. Another's does not exist."""
    kept = [person for person in firm.people.values() if person.conversation]
    if not kept:
        return ""
    whose = firm.people[name] if firm.people[name].conversation else firm.random.choice(kept)
    if firm.random.random() < 0.2:
        whose = firm.random.choice(kept)
    status, told = await firm.ask(name, "GET", f"/v1/conversations/{whose.conversation}")
    assert (status == 200) == (whose.name == name)
    return told


async def list_conversations(firm: Company, name: str) -> str:
    return (await firm.ask(name, "GET", "/v1/conversations"))[1]


async def list_jobs(firm: Company, name: str) -> str:
    box = _some_box(firm)
    if firm.random.random() < 0.3:
        return (await firm.ask(name, "GET", "/v1/jobs"))[1]
    status, told = await firm.ask(name, "GET", f"/v1/collections/{box.id}/jobs")
    if not _is_hidden(firm, name, box, status, told) and not firm.manages(firm.people[name], box):
        assert json.loads(told)["data"] == []
    return told


async def show_readers(firm: Company, name: str) -> str:
    box = _some_box(firm)
    status, told = await firm.ask(name, "GET", f"/v1/collections/{box.id}/readers")
    if not _is_hidden(firm, name, box, status, told):
        assert status == (200 if firm.manages(firm.people[name], box) else 403)
    return told


async def list_receipts(firm: Company, name: str) -> str:
    """They name what is gone, to those who managed it, and hold no text."""
    _, told = await firm.ask(name, "GET", "/v1/receipts")
    assert "About" not in told
    assert all(firm.manages(firm.people[name], firm.gone[number]) for number in marks(told))
    return ""


async def forbidden_changes(firm: Company, name: str) -> str:
    """Whoever may not see a collection learns nothing by trying to change it."""
    box = _some_box(firm)
    if firm.manages(firm.people[name], box):
        return ""
    paper = firm.random.choice(list(firm.papers.values()))
    attempts = [
        ("DELETE", f"/v1/collections/{box.id}", None),
        ("POST", f"/v1/collections/{box.id}/reembed", None),
        ("DELETE", f"/v1/collections/{box.id}/tune", None),
        ("POST", f"/v1/vector_stores/{box.id}", {"name": "mine"}),
        ("POST", f"/v1/collections/{box.id}/jobs/cancel", None),
        ("PUT", f"/v1/collections/{box.id}/readers", {"everybody": True}),
        ("DELETE", f"/v1/collections/{box.id}/documents/{paper.id}", None),
        ("PUT", f"/v1/collections/{box.id}/documents/{paper.id}/readers", {"inherit": True}),
    ]
    status, told = await firm.ask(name, *firm.random.choice(attempts))
    assert status in ((403, 404) if firm.sees(name, box) else (404,)), told
    return told


async def view_document(firm: Company, name: str) -> str:
    paper = firm.random.choice(list(firm.papers.values()))
    path = f"/v1/collections/{firm.boxes[paper.box].id}/documents/{paper.id}/{firm.random.choice(('view', 'pages/1'))}"
    status, told = await firm.ask(name, "GET", path)
    # These papers have no drawn pages, which is told only to those who may read them.
    code = "" if status == 200 else json.loads(told)["error"]["code"]
    assert (code in ("", "no_such_page", "no_page_image")) == firm.may_read(name, paper.number)
    return told


async def list_vector_stores(firm: Company, name: str) -> str:
    _, told = await firm.ask(name, "GET", "/v1/vector_stores")
    shown = {each["id"]: each for each in json.loads(told)["data"]}
    seen = [box for box in firm.boxes.values() if firm.sees(name, box)]
    assert shown.keys() == {box.id for box in seen}
    for box in seen:
        readable = [paper for paper in firm.of(box) if firm.may_read(name, paper.number)]
        assert shown[box.id]["file_counts"]["total"] == len(readable)
        assert shown[box.id]["usage_bytes"] == sum(len(text_of(each.number, each.topic)) for each in readable)
    return told


async def look_into_vector_store(firm: Company, name: str) -> str:
    box = _some_box(firm)
    method, path, body = firm.random.choice(
        [
            ("GET", "", None),
            ("GET", "/files", None),
            ("POST", "/search", {"query": _question(firm), "max_num_results": 50}),
            ("POST", "/search", {"query": _question(firm), "max_num_results": 5}),
        ]
    )
    status, told = await firm.ask(name, method, f"/v1/vector_stores/{box.id}{path}", body)
    assert (status == 404) == (not firm.sees(name, box)), told
    return told


async def ask_over_mcp(firm: Company, name: str) -> str:
    paper = firm.random.choice(list(firm.papers.values()))
    tool, arguments = firm.random.choice(
        [
            ("search", {"query": _question(firm), "limit": 20}),
            ("search", {"query": _question(firm), "collections": [firm.boxes[paper.box].id]}),
            ("read", {"document_id": paper.id}),
            ("list_collections", {}),
        ]
    )
    call = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": tool, "arguments": arguments}}
    _, told = await firm.ask(name, "POST", "/mcp", call)
    if tool == "read":
        assert (paper.number in marks(told)) == firm.may_read(name, paper.number)
    return told


async def carry_files_away(firm: Company, name: str) -> str:
    """An export is for those who manage the whole collection, a backup for the owner of the installation."""
    person, box = firm.people[name], _some_box(firm)
    if firm.random.random() < 0.3 and person.role != "owner":
        for method, path in (("GET", "/v1/backup"), ("POST", "/v1/restore"), ("POST", "/v1/kb/import")):
            status, told = await firm.ask(name, method, path)
            assert status in (400, 403), told
        return told
    status, told = await firm.ask(name, "GET", f"/v1/kb/export?collections={box.id}")
    if firm.manages(person, box):
        assert status == 200
        return ""
    assert status == (403 if firm.sees(name, box) else 404)
    return told


async def give_or_read_feedback(firm: Company, name: str) -> str:
    person = firm.people[name]
    if person.conversation and firm.random.random() < 0.5:
        _, told = await firm.ask(name, "GET", f"/v1/conversations/{person.conversation}")
        answers = [each["id"] for each in json.loads(told)["messages"] if each["role"] == "assistant"]
        if answers:
            body = {"conversation": person.conversation, "message": firm.random.choice(answers), "rating": "up"}
            status, told = await firm.ask(name, "POST", "/v1/feedback", body)
            assert status < 300, told
            return told
    return (await firm.ask(name, "GET", "/v1/feedback"))[1]


Try = Callable[[Company, str], Awaitable[str]]
TRIES: dict[Try, tuple[int, tuple[str, ...]]] = {
    list_collections: (4, ("GET /v1/collections",)),
    show_collection: (6, ("GET /v1/collections/{name}",)),
    list_documents: (9, ("GET /v1/collections/{name}/documents",)),
    show_document: (16, ("GET /v1/collections/{name}/documents/{id}",)),
    search: (15, ("POST /v1/collections/{name}/search",)),
    chat: (1, ("POST /v1/chat/completions",)),
    chat_streamed: (1, ("POST /v1/chat/completions",)),
    chat_with_search_tool: (1, ("POST /v1/chat/completions",)),
    chat_that_is_kept: (1, ("POST /v1/chat/completions",)),
    show_conversation: (10, ("GET /v1/conversations/{id}",)),
    list_conversations: (2, ("GET /v1/conversations",)),
    list_jobs: (5, ("GET /v1/jobs", "GET /v1/collections/{name}/jobs", "GET /v1/jobs/{id}")),
    show_readers: (
        4,
        ("GET /v1/collections/{name}/readers", "GET /v1/collections/{name}/documents/{id}/readers"),
    ),
    list_receipts: (1, ("GET /v1/receipts", "GET /v1/receipts/{id}")),
    view_document: (
        5,
        ("GET /v1/collections/{name}/documents/{id}/view", "GET /v1/collections/{name}/documents/{id}/pages/{page}"),
    ),
    list_vector_stores: (1, ("GET /v1/vector_stores",)),
    look_into_vector_store: (
        6,
        ("GET /v1/vector_stores/{id}", "GET /v1/vector_stores/{id}/files", "POST /v1/vector_stores/{id}/search"),
    ),
    ask_over_mcp: (5, ("POST /mcp",)),
    carry_files_away: (
        1,
        ("GET /v1/kb/export", "GET /v1/backup", "POST /v1/restore", "POST /v1/kb/import"),
    ),
    give_or_read_feedback: (3, ("GET /v1/feedback", "POST /v1/feedback")),
    forbidden_changes: (3, ("DELETE /v1/collections/{name}",)),
}
"""Kind of try -> how often of a hundred, and the routes that it asks."""

SHOW_TEXT = {
    view_document,
    look_into_vector_store,
    ask_over_mcp,
    give_or_read_feedback,
    show_document,
    list_documents,
    search,
    chat,
    chat_streamed,
    chat_with_search_tool,
    chat_that_is_kept,
    show_conversation,
}

NO_TEXT_OF_DOCUMENTS = {
    "GET /health", "GET /ready", "GET /metrics", "GET /v1/status", "GET /v1/me", "GET /v1/models",
    "GET /v1/models/{id}", "GET /v1/cluster/experts", "POST /v1/completions", "POST /v1/embeddings",
    "GET /v1/users", "POST /v1/users", "GET /v1/users/{user}", "PATCH /v1/users/{user}", "DELETE /v1/users/{user}",
    "GET /v1/users/{user}/keys", "POST /v1/users/{user}/keys", "DELETE /v1/users/{user}/keys/{key}",
    "GET /v1/groups", "POST /v1/groups", "GET /v1/groups/{group}", "DELETE /v1/groups/{group}",
    "PUT /v1/groups/{group}/members/{user}", "DELETE /v1/groups/{group}/members/{user}",
    # A client's own uploads, of which its own documents are made.
    "GET /v1/files", "POST /v1/files", "GET /v1/files/{id}", "DELETE /v1/files/{id}", "GET /v1/files/{id}/content",
    # Changes: they tell of what their caller may manage or wrote.
    "POST /v1/collections", "POST /v1/collections/{name}/documents", "POST /v1/collections/{name}/reembed",
    "DELETE /v1/collections/{name}/documents/{id}",
    "PUT /v1/collections/{name}/readers", "PATCH /v1/collections/{name}/readers",
    "PUT /v1/collections/{name}/documents/{id}/readers", "PATCH /v1/collections/{name}/documents/{id}/readers",
    "POST /v1/conversations", "PATCH /v1/conversations/{id}", "DELETE /v1/conversations/{id}",
    "DELETE /v1/conversations/{id}/messages/{message_id}",
    "POST /v1/collections/{name}/urls",
    "POST /v1/jobs/{id}/pause", "POST /v1/jobs/{id}/resume", "POST /v1/jobs/{id}/cancel",
    "POST /v1/collections/{name}/jobs/pause", "POST /v1/collections/{name}/jobs/resume",
    "POST /v1/collections/{name}/jobs/cancel",
    "POST /v1/collections/{name}/tune", "DELETE /v1/collections/{name}/tune",
    "POST /v1/vector_stores", "POST /v1/vector_stores/{id}", "DELETE /v1/vector_stores/{id}",
    "DELETE /v1/feedback/{id}", "POST /v1/feedback/{id}/review",
    # Of files that were added as such, by who manages the collection or uploaded them: tested beside their routes.
    "POST /v1/vector_stores/{id}/files", "GET /v1/vector_stores/{id}/files/{file_id}",
    "POST /v1/vector_stores/{id}/files/{file_id}", "DELETE /v1/vector_stores/{id}/files/{file_id}",
    "GET /v1/vector_stores/{id}/files/{file_id}/content", "POST /v1/vector_stores/{id}/file_batches",
    "GET /v1/vector_stores/{id}/file_batches/{batch_id}", "GET /v1/vector_stores/{id}/file_batches/{batch_id}/files",
}  # fmt: skip
"""A new route belongs here only if no text, name or count of a document can be in its answer; else it needs a try."""


async def test_every_route_is_tried_or_shows_nothing_of_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known: list[Route] = []
    from services import gateway_app

    make = gateway_app.Router.__init__

    def noting(self: Any, routes: list[Route]) -> None:
        known.extend(routes)
        make(self, routes)

    monkeypatch.setattr(gateway_app.Router, "__init__", noting)
    async with running_endpoint(tmp_path):
        pass
    named = {f"{route.method} {route.template}" for route in known}
    tried = {route for _, routes in TRIES.values() for route in routes}
    assert named - tried - NO_TEXT_OF_DOCUMENTS == set(), "new routes: give them a try, or say that they show nothing"
    assert (tried | NO_TEXT_OF_DOCUMENTS) - named == set()


async def run_tries(firm: Company, observed: Observed, num_tries: int) -> None:
    kinds, weights = list(TRIES), [weight for weight, _ in TRIES.values()]
    for number in range(num_tries):
        if number % TRIES_PER_CHANGE == 0:
            await firm.change()
        name = firm.random.choice(list(firm.people))
        (kind,) = firm.random.choices(kinds, weights)
        told = await kind(firm, name)
        await asyncio.sleep(0)
        observed.num_tries[kind.__name__] += 1
        observed.num_shown[kind.__name__] += len(marks(told))
        observed.leaks += [f"{kind.__name__} told {name} of {number}" for number in firm.leaks(name, told)]


async def test_random_tries_show_nothing_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with company(tmp_path, monkeypatch, seed=1, size=LARGE) as (firm, observed):
        await run_tries(firm, observed, NUM_TRIES)
        assert observed.leaks == [] and observed.store_leaks == []
        assert sum(observed.num_tries.values()) == NUM_TRIES
        # It was no test of silence.
        assert all(observed.num_shown[kind.__name__] > NUM_TRIES / 200 for kind in SHOW_TEXT), observed.num_shown
        assert len(firm.gone) > NUM_TRIES / 500 and firm.num_changes > NUM_TRIES / TRIES_PER_CHANGE


async def test_without_the_filter_the_store_gives_away_what_may_not_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The look into the database still keeps it from everybody: the second line holds where the first is gone."""
    whole = rag.access._conditions
    monkeypatch.setattr(rag.access, "_conditions", lambda *rights: {"must": whole(*rights)["must"][:1]})
    async with company(tmp_path, monkeypatch, seed=2) as (firm, observed):
        await run_searches(firm, observed, 200)
        assert len(observed.store_leaks) > 20
        assert observed.leaks == []


async def test_without_filter_and_database_routes_give_it_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That this test would find leaks if there were any."""
    whole = rag.access._conditions
    monkeypatch.setattr(rag.access, "_conditions", lambda *rights: {"must": whole(*rights)["must"][:1]})
    monkeypatch.setattr(Knowledge, "readable_versions", lambda _self, version_ids, _actor: set(version_ids))
    async with company(tmp_path, monkeypatch, seed=3) as (firm, observed):
        await run_searches(firm, observed, 200)
        assert len(observed.leaks) > 20


@pytest.mark.parametrize("asks_database", [True, False])
async def test_a_store_that_was_told_of_no_change_gives_away_what_the_database_keeps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asks_database: bool
) -> None:
    monkeypatch.setattr(EdgeVectorStore, "label_document", lambda *_: None)
    if not asks_database:
        monkeypatch.setattr(Knowledge, "readable_versions", lambda _self, version_ids, _actor: set(version_ids))
    async with company(tmp_path, monkeypatch, seed=4) as (firm, observed):
        await run_searches(firm, observed, 200)
        assert len(observed.store_leaks) > 5
        assert (observed.leaks == []) == asks_database


async def run_searches(firm: Company, observed: Observed, num_tries: int) -> None:
    """Searches alone, and without the claim that all that may be read is found: the store may lag here."""
    for _ in range(num_tries):
        name, box = firm.random.choice(list(firm.people)), _some_box(firm)
        path, body = f"/v1/collections/{box.id}/search", {"query": _question(firm), "top_k": 50}
        _, told = await firm.ask(name, "POST", path, body)
        observed.leaks += [f"{name} was told of {number}" for number in firm.leaks(name, told)]
