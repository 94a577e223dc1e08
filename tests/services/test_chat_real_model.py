"""The chat story with the real parts: llama.cpp with the bundled model, the real embedding model, the embedded store,
handbook pages. What a model of 135 million parameters says is not judged; what the server makes sure of is."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from cluster.engine import Engine, GenerationChunk, GenerationRequest, SamplingParams
from cluster.engines.choice import EngineChoice, make_engine
from cluster.engines.embedding_choice import open_embedding
from cluster.engines.settings import EngineSettings
from cluster.home import open_home
from cluster.weights.prepare import prepare
from rag.chunking import chunk_document
from rag.language import detect_language
from rag.retriever import RetrievalSettings, retrieve
from rag.tokens import load_token_spans
from rag.types import Citation, ParsedDocument, StoredChunk
from rag.vector_store import VectorStore, open_vector_store
from services.chat import Chat
from services.chat_types import (
    ChatEvent,
    ChatRequest,
    CitationsReady,
    Finished,
    KnowledgeOptions,
    RetrievalDone,
    SearchResult,
    TextDelta,
    ToolCall,
    ToolResult,
)
from services.config import ChatConfig, RetrievalConfig
from services.embedding_service import EmbeddingService
from tests.seen import LABELS, seen
from tests.support_pairs import compute_cosines, read_cosines, read_written

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="module")]

HANDBOOK = Path(__file__).parents[1] / "data" / "company-kb" / "gds-way-en" / "standards"
PAGES = ["pull-requests.md", "storing-credentials.md", "alerting.md"]
GREEDY = SamplingParams(temperature=0.0, max_tokens=48)


class DirectModel:
    """An engine without a relay in between."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.num_generations = 0

    @property
    def max_context(self) -> int:
        return self._engine.info.max_context

    @property
    def template_knows_tools(self) -> bool:
        return self._engine.info.template_knows_tools

    def stream(self, request: GenerationRequest) -> AsyncIterator[GenerationChunk]:
        self.num_generations += 1
        return self._engine.generate(request)

    async def count_tokens(self, request: GenerationRequest) -> int:
        return await self._engine.count_prompt_tokens(request)


class Handbook:
    """Real retrieval over the pages, without a database."""

    def __init__(self, store: VectorStore, embedder: EmbeddingService) -> None:
        self._store = store
        self.embedder = embedder

    async def search(
        self, collections: Sequence[str], query: str, *, top_k: int | None, actor: str | None
    ) -> SearchResult:
        settings = RetrievalSettings(top_k=top_k or 3)
        store = seen(self._store, "col")
        passages = await retrieve(query, ["col"], embedder=self.embedder, store=store, settings=settings)
        return SearchResult(passages, {"col": "handbook"})

    async def check_quotes(self, citations: Sequence[Citation], *, actor: str | None) -> list[bool]:
        pages = {f"v-{page}": (HANDBOOK / page).read_text("utf-8") for page in PAGES}
        return [pages[each.version_id][each.start : each.end] == each.quote for each in citations]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def model() -> AsyncIterator[DirectModel]:
    location = prepare("tiny", "gguf", open_home())
    settings = EngineSettings("tiny", location, max_context=2048, parallel_requests=1)
    engine = make_engine(EngineChoice("llamacpp", "gguf", uses_gpu=False), settings)
    await engine.start()
    yield DirectModel(engine)
    await engine.stop()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def handbook(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Handbook]:
    opened = open_embedding("embed", open_home(), precision="auto", threads=2)
    embedder = EmbeddingService(opened)
    await embedder.start()
    store = open_vector_store(tmp_path_factory.mktemp("vectors"))
    spans = load_token_spans(Path((await embedder.describe())["tokenizer_file"]))
    for page in PAGES:
        text = (HANDBOOK / page).read_text("utf-8")
        chunks = [
            StoredChunk(
                chunk_id=f"{page}-{chunk.index}",
                collection_id="col",
                document_id=page,
                version_id=f"v-{page}",
                document_name=page,
                text=chunk.text,
                start=chunk.start,
                end=chunk.end,
                index=chunk.index,
                headings=chunk.headings,
                language=detect_language(text),
            )
            for chunk in chunk_document(ParsedDocument(text, "text/markdown"), spans, 200, 32)
        ]
        vectors = await embedder.embed_passages([chunk.text for chunk in chunks])
        store.upsert("col", chunks, vectors, active=True, labels=LABELS)
    yield Handbook(store, embedder)
    store.close()
    await embedder.close()


async def tell(model: DirectModel, handbook: Handbook, question: str, **fields: Any) -> list[ChatEvent]:
    chat = Chat(handbook, retrieval=RetrievalConfig(), chat=ChatConfig(), embedder=handbook.embedder)
    request = ChatRequest(
        "chatcmpl-real", "tiny", [{"role": "user", "content": question}], **({"sampling": GREEDY} | fields)
    )
    return [event async for event in chat(request, model)]


def only(events: list[ChatEvent], kind: type) -> Any:
    (found,) = [event for event in events if isinstance(event, kind)]
    return found


async def test_a_question_about_the_handbook_is_answered_with_a_right_citation(
    model: DirectModel, handbook: Handbook
) -> None:
    question = "Who is responsible for obtaining a code review of a pull request?"
    events = await tell(model, handbook, question, knowledge=KnowledgeOptions(("handbook",)))
    assert sum(isinstance(event, TextDelta) for event in events) > 3
    assert only(events, RetrievalDone).passages[0].chunk.document_id == "pull-requests.md"
    ready = only(events, CitationsReady)
    assert {cited.citation.document_name for cited in ready.citations} == {"pull-requests.md"}
    for cited in ready.citations:
        page = (HANDBOOK / cited.citation.document_name).read_text("utf-8")
        assert page[cited.citation.start : cited.citation.end] == cited.citation.quote
        for start, end in cited.answer_spans:
            assert f"[{cited.citation.number}]" in only(events, Finished).text[start:end]


async def test_the_cited_text_holds_the_number_that_was_asked_for(model: DirectModel, handbook: Handbook) -> None:
    question = "How many key questions does April Wensel suggest when reviewing?"
    events = await tell(model, handbook, question, knowledge=KnowledgeOptions(("handbook",)))
    said = only(events, Finished).text
    first = min(only(events, CitationsReady).citations, key=lambda each: each.answer_spans[0])
    assert "3 key questions" in first.citation.quote
    start, end = first.answer_spans[0]
    assert "3 key questions" in said[start:end]
    assert (first.citation.document_name, first.citation.number) == ("pull-requests.md", 1)


async def test_the_kept_cosines_of_labelled_pairs_are_those_of_the_embedding_model(handbook: Handbook) -> None:
    """Which the measure of support is judged with; each CPU computes a little differently."""
    for name, file in (("written", "written.tsv"), ("held-out", "held-out.tsv")):
        kept, pairs = read_cosines(name)[::20], read_written(file)[::20]
        assert await compute_cosines(pairs, handbook.embedder) == pytest.approx(kept, abs=0.02)


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("What is the capital of Mongolia?", "I could not find"),
        ("Wie backe ich ein Sauerteigbrot?", "In den gewählten Dokumenten"),
    ],
)
async def test_a_question_that_the_handbook_does_not_answer_is_not_guessed(
    model: DirectModel, handbook: Handbook, question: str, answer: str
) -> None:
    before = model.num_generations
    events = await tell(model, handbook, question, knowledge=KnowledgeOptions(("handbook",)))
    assert only(events, Finished).text.startswith(answer)
    assert model.num_generations == before


async def test_a_forced_calculator_gets_arguments_from_the_real_model(model: DirectModel, handbook: Handbook) -> None:
    events = await tell(model, handbook, "What is 37 * 21?", server_tools=("calculator",), tool_choice="calculator")
    assert set(json.loads(only(events, ToolCall).arguments)) == {"expression"}
    assert only(events, ToolResult).content == "777"
    assert only(events, Finished).finish_reason in ("stop", "length")


async def test_a_forced_look_at_the_clock_gets_arguments_from_the_real_model(
    model: DirectModel, handbook: Handbook
) -> None:
    before = datetime.now(UTC).replace(microsecond=0)
    events = await tell(model, handbook, "What time is it?", server_tools=("datetime",), tool_choice="datetime")
    assert set(json.loads(only(events, ToolCall).arguments)) <= {"timezone"}
    told, zone = only(events, ToolResult).content.rstrip(")").split(" (")
    now = datetime.strptime(f"{told} {zone.rsplit('UTC', 1)[1]}", "%A, %Y-%m-%d %H:%M:%S %z")
    assert before <= now <= datetime.now(UTC)
    assert only(events, Finished).finish_reason in ("stop", "length")


async def test_a_required_call_of_the_real_model_is_always_a_valid_one(model: DirectModel, handbook: Handbook) -> None:
    events = await tell(
        model, handbook, "What time is it?", server_tools=("calculator", "datetime"), tool_choice="required"
    )
    call = next(event for event in events if isinstance(event, ToolCall))
    assert call.name in ("calculator", "datetime")
    assert isinstance(json.loads(call.arguments), dict)


async def test_a_forced_client_tool_goes_back_with_arguments_of_its_schema(
    model: DirectModel, handbook: Handbook
) -> None:
    parameters = {
        "type": "object",
        "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    }
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": parameters}}
    events = await tell(model, handbook, "Weather in Rome?", client_tools=(tool,), tool_choice="get_weather")
    assert json.loads(only(events, ToolCall).arguments)["city"] in ("Paris", "Rome")
    assert only(events, Finished).finish_reason == "tool_calls"


async def test_a_forced_search_of_the_real_model_runs_in_the_handbook(model: DirectModel, handbook: Handbook) -> None:
    events = await tell(
        model,
        handbook,
        "How should credentials be stored?",
        knowledge=KnowledgeOptions(("handbook",)),
        server_tools=("knowledge_search",),
        tool_choice="knowledge_search",
    )
    assert json.loads(only(events, ToolCall).arguments)["query"]
    assert not only(events, ToolResult).is_error
    for cited in only(events, CitationsReady).citations:
        page = (HANDBOOK / cited.citation.document_name).read_text("utf-8")
        assert page[cited.citation.start : cited.citation.end] == cited.citation.quote
