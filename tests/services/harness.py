"""A running endpoint without Ray: real listener, database, relay and model services; what is not under test is small.

`ScriptedEngine` does what a real model cannot do on demand: wait, fail in the middle, be busy.
"""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai

from cluster.engine import Engine, EngineLoad, GenerationChunk, GenerationRequest, ModelInfo, Usage
from cluster.expert_load import ExpertLoad
from services.accounts import Accounts, ensure_owner
from services.beats import BeatStore
from services.calls import Calls
from services.chat_types import ChatEvent, ChatRequest, ModelClient
from services.config import ChatConfig, PlatformConfig
from services.database import Collection, Database, Document
from services.discovery import Directory
from services.endpoint import Endpoint, Surroundings
from services.errors import unavailable
from services.limit_book import LimitBook
from services.listener import start_listener
from services.model_service import ModelService
from services.model_status import ApplicationState, ServeStates
from services.schema import upgrade

SECRET = "s3cret-of-this-start"
HELLO = [{"role": "user", "content": "Hello"}]
PATIENT = PlatformConfig(chat=ChatConfig(keep_alive_s=0.05))


class ScriptedEngine:
    """Plays a script for every request: chunks, errors to raise, events to wait for."""

    def __init__(self, *script: GenerationChunk | Exception | asyncio.Event, model: str = "tiny") -> None:
        self.script = script
        self.requests: list[GenerationRequest] = []
        self.was_closed = asyncio.Event()
        self.load = EngineLoad(0, 0)
        self.experts: ExpertLoad | None = None
        self.info = ModelInfo(model, "scripted", max_context=64, max_concurrency=4)

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    async def check_health(self) -> None: ...

    async def expert_load(self) -> ExpertLoad | None:
        return self.experts

    async def tokenize(self, text: str) -> list[int]:
        return list(text.encode())

    async def count_prompt_tokens(self, request: GenerationRequest) -> int:
        return 7

    async def generate(self, request: GenerationRequest) -> AsyncIterator[GenerationChunk]:
        self.requests.append(request)
        try:
            for step in self.script:
                if isinstance(step, asyncio.Event):
                    await step.wait()
                elif isinstance(step, Exception):
                    raise step
                else:
                    yield step
        finally:
            self.was_closed.set()


def words(*texts: str) -> tuple[GenerationChunk, ...]:
    """A whole answer, one token per text."""
    chunks = [GenerationChunk((index,), text) for index, text in enumerate(texts)]
    return (*chunks, GenerationChunk(finish_reason="stop", usage=Usage(3, len(texts))))


class Beats(dict[str, bytes]):
    """Where replicas announce themselves, in memory."""

    def put(self, key: str, value: bytes) -> None:
        self[key] = value

    def delete(self, key: str) -> None:
        self.pop(key, None)

    def read_all(self, prefix: str) -> dict[str, bytes]:
        return dict(self)


@dataclass
class Vectors:
    vectors: Any
    num_tokens: list[int]
    truncated: list[bool]
    model: str = "embed"


class EmbeddingCalls:
    """Vectors of four numbers, made from the length of the text or of its list of token ids."""

    def __init__(self) -> None:
        self.error: Exception | None = None

    async def call(self, method: str, /, *args: Any, **kwargs: Any) -> Any:
        assert method in ("embed", "embed_token_ids")
        if self.error is not None:
            raise self.error
        texts = args[0]
        vectors = np.array([[len(text), 1, 0, 0] for text in texts], dtype=np.float32)
        return Vectors(vectors, [len(text) for text in texts], [len(text) > 100 for text in texts])


@dataclass
class StoreCalls:
    """Answers calls from a dictionary of method names; notes what was asked."""

    answers: dict[str, Callable[..., Any]] = field(default_factory=dict)
    asked: list[tuple[str, tuple[Any, ...]]] = field(default_factory=list)

    async def call(self, method: str, /, *args: Any, **kwargs: Any) -> Any:
        self.asked.append((method, args))
        return self.answers[method](*args, **kwargs)


class BookCalls:
    """The limiter of windfarm without the process around it. While `is_away` nobody answers."""

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.book = LimitBook(**options)
        self.num_calls = 0
        self.is_away = False

    def restart(self, **options: Any) -> None:
        self.book = LimitBook(**(self.options | options))

    async def call(self, method: str, /, *args: Any, **kwargs: Any) -> Any:
        assert method == "exchange"
        self.num_calls += 1
        await asyncio.sleep(0)
        if self.is_away:
            raise unavailable("The part of windfarm that does this is restarting. Try again.", code="restarting")
        return self.book.exchange(*args, **kwargs)


async def wait_until(condition: Callable[[], Any]) -> None:
    """For states that nothing announces; fails after ten seconds."""
    for _ in range(1000):
        result = condition()
        if await result if inspect.isawaitable(result) else result:
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not happen within ten seconds")


async def plain_story(request: ChatRequest, model: ModelClient) -> AsyncIterator[ChatEvent]:
    """The model's own answer as events; for tests that are not about the story."""
    from services.chat_types import Finished, TextDelta

    generation = GenerationRequest(request.request_id, messages=request.messages, sampling=request.sampling)
    text = ""
    async for chunk in model.stream(generation):
        text += chunk.text
        if chunk.text:
            yield TextDelta(chunk.text, chunk)
        if chunk.usage is not None and chunk.finish_reason is not None:
            yield Finished(chunk.finish_reason, chunk.usage, text)


class Running:
    """A started endpoint with everything a test looks at."""

    def __init__(
        self,
        url: str,
        key: str,
        database: Database,
        directory: Directory,
        beats: BeatStore,
        endpoint: Endpoint,
        states: ServeStates,
    ) -> None:
        self.url = url
        self.endpoint = endpoint
        self.app = endpoint.app
        self.states = states
        self.key = key
        self.database = database
        self.accounts = Accounts(database)
        self.directory = directory
        self.beats = beats
        self.store = StoreCalls()
        self.limiter = BookCalls()
        self.embedding = EmbeddingCalls()
        self.services: list[ModelService] = []
        self.http = httpx.AsyncClient(
            base_url=url, headers={"authorization": f"Bearer {key}"}, timeout=60, trust_env=False
        )
        self.openai = openai.AsyncOpenAI(
            base_url=f"{url}/v1", api_key=key, max_retries=0, http_client=httpx.AsyncClient(trust_env=False)
        )

    async def add_model(self, engine: Engine, *, replica_id: str = "r1") -> ModelService:
        model = engine.info.model
        service = ModelService(engine, SECRET, app=f"llm-{model}", replica_id=replica_id, beats=self.beats)
        await service.start()
        self.services.append(service)
        await self.directory.refresh()
        return service

    async def chat(self, **fields: Any) -> httpx.Response:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}]} | fields
        return await self.http.post("/v1/chat/completions", json=body)


@asynccontextmanager
async def running_endpoint(
    home: Path,
    *engines: Engine,
    story: Callable[[ChatRequest, ModelClient], AsyncIterator[ChatEvent]] = plain_story,
    config: PlatformConfig | None = None,
    states: dict[str, ApplicationState] | None = None,
    limiter: BookCalls | None = None,
    beats: BeatStore | None = None,
    store: Calls | None = None,
    embedding: EmbeddingCalls | None = None,
    proves: bool = False,
    documents: Sequence[str] = (),
    database_url: str | None = None,
) -> AsyncIterator[Running]:
    """`proves`: also run the proof behind `/ready`, which sends a request of its own to the model. `documents`: ids of
    some that the owner may read; answers that rest on others are not shown. `store`: who answers in the place of
    `StoreCalls`."""
    url = database_url or f"sqlite:///{home}/windfarm.db"
    upgrade(url)
    database = Database(url)
    owner = ensure_owner(Accounts(database), home)
    _add_documents(database, documents)
    beats = Beats() if beats is None else beats  # an empty one is false
    async with AsyncExitStack() as stack:
        directory = Directory(beats)
        await directory.start()
        stack.push_async_callback(directory.stop)
        serve_states = ServeStates(lambda: states or {})
        await serve_states.refresh()
        scripted_store = StoreCalls()
        running_limiter = limiter or BookCalls()
        running_embedding = embedding or EmbeddingCalls()
        endpoint = Endpoint(
            Surroundings(
                config=config or PlatformConfig(),
                home=home,
                secret=SECRET,
                listen_host="127.0.0.1",
                database=database,
                replicas=directory,
                states=serve_states,
                store=store or scripted_store,
                embedding=running_embedding,
                limiter=running_limiter,
                story=story,
            )
        )
        listener = await start_listener(endpoint.app, websockets=True)
        stack.push_async_callback(endpoint.stop)
        stack.push_async_callback(listener.stop)
        running = Running(listener.url, owner.key, database, directory, beats, endpoint, serve_states)
        running.store = scripted_store
        running.limiter = running_limiter
        running.embedding = running_embedding
        stack.push_async_callback(_stop_all, running)
        for number, engine in enumerate(engines):
            await running.add_model(engine, replica_id=f"r{number}")
        if proves:
            await endpoint.start()
        yield running


def _add_documents(database: Database, document_ids: Sequence[str]) -> None:
    owner = Accounts(database).owner_id()
    assert owner is not None
    if not document_ids:
        return
    with database.write() as session:
        model = {"embedding_model": "hash", "embedding_dimension": 4}
        session.add(Collection(id="col_1", index_id="col_1", name="towers", owner_id=owner, **model))
        session.flush()
        session.add_all(
            Document(id=each, collection_id="col_1", name=f"{each}.md", owner_id=owner) for each in document_ids
        )


async def _stop_all(running: Running) -> None:
    await running.http.aclose()
    await running.openai.close()
    for service in running.services:
        await service.stop(drain_s=0)
    running.database.close()


def events_of(text: str) -> list[Any]:
    """The `data:` events of a stream, `[DONE]` as a string."""
    data = [line[6:] for line in text.split("\n") if line.startswith("data: ")]
    return [entry if entry == "[DONE]" else json.loads(entry) for entry in data]


def error_of(answer: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


async def until_ready(running: Running) -> None:
    async def is_ready() -> bool:
        return (await running.http.get("/ready")).status_code == 200

    await wait_until(is_ready)


def chat_body(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": HELLO} | fields
