"""Random (person, question, route) tries at the real endpoint (10,000 with `make test-leaks`), while people join and
leave, rights come and go and documents are deleted: nothing is told of a document that the person may not read. See
`leaking` for what is real.

Two things keep the rights: the filter of the search, and the look into the database at what was found. Each is taken
out in a test of its own, which must then find what the other alone keeps or lets through.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import AsyncIterator
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
from services.store_opening import open_store
from services.store_service import StoreService
from tests.services.harness import ScriptedEngine, running_endpoint, words
from tests.services.leak_tries import NO_TEXT_OF_DOCUMENTS, SHOW_TEXT, TRIES, some_box, some_question
from tests.services.leaking import (
    LARGE,
    SMALL,
    AtOnce,
    Company,
    DirectCalls,
    EchoModel,
    Embedder,
    Size,
    marks,
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
        assert firm.num_drawn > NUM_TRIES / 500, "pages were drawn for those who may see them"
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
        name, box = firm.random.choice(list(firm.people)), some_box(firm)
        path, body = f"/v1/collections/{box.id}/search", {"query": some_question(firm), "top_k": 50}
        _, told = await firm.ask(name, "POST", path, body)
        observed.leaks += [f"{name} was told of {number}" for number in firm.leaks(name, told)]
