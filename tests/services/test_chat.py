from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import aclosing
from typing import Any

import numpy as np
import pytest

from cluster.engine import SamplingParams
from rag.types import Citation, Passage, StoredChunk
from services.chat import Chat
from services.chat_types import (
    ChatEvent,
    ChatRequest,
    CitationsReady,
    ContextTrimmed,
    Finished,
    KnowledgeOptions,
    RetrievalDone,
    SearchResult,
    TextDelta,
    ToolCall,
    ToolResult,
)
from services.config import ChatConfig, RetrievalConfig
from services.errors import ApiError
from services.tools.knowledge import KNOWLEDGE_SEARCH
from services.tools.registry import ToolContext, run_tool
from tests.services.scripted_model import ScriptedModel

LEAVE = "Parental leave lasts twelve weeks and is fully paid."
TRAVEL = "Trains are booked in second class."


class Shelf:
    """A knowledge base of fixed passages; `cosines` says how near each question is to them, `tuned` the threshold that
    the collection was tuned to."""

    def __init__(
        self, *texts: str, cosines: dict[str, float] | None = None, cosine: float = 0.9, tuned: float | None = None
    ) -> None:
        self._texts = texts
        self._cosines = cosines or {}
        self._cosine = cosine
        self._thresholds = {} if tuned is None else {"col": tuned}
        self.queries: list[str] = []
        self.gone: set[str] = set()
        """Versions that were deleted after the search."""

    async def search(
        self, collections: Sequence[str], query: str, *, top_k: int | None, actor: str | None
    ) -> SearchResult:
        self.queries.append(query)
        cosine = self._cosines.get(query, self._cosine)
        passages = [
            Passage(
                StoredChunk(f"c{n}", "col", f"d{n}", f"v{n}", f"{n}.md", text, 100, 100 + len(text), 0), 1.0 / (n + 1)
            )
            for n, text in enumerate(self._texts[:top_k])
        ]
        for passage in passages:
            passage.leg_scores["dense"] = cosine
        return SearchResult(passages, {"col": "Handbook"}, self._thresholds)

    async def check_quotes(self, citations: Sequence[Citation], *, actor: str | None) -> list[bool]:
        stored = {f"v{n}": "." * 100 + text for n, text in enumerate(self._texts) if f"v{n}" not in self.gone}
        return [stored.get(each.version_id, "")[each.start : each.end] == each.quote for each in citations]


KNOWLEDGE = KnowledgeOptions(("Handbook",))


def user(*texts: str) -> list[dict[str, str]]:
    return [{"role": "user" if index % 2 == 0 else "assistant", "content": text} for index, text in enumerate(texts)]


def make_chat(shelf: Shelf, **options: Any) -> Chat:
    return Chat(shelf, retrieval=RetrievalConfig(), chat=ChatConfig(), **options)


async def tell(
    model: ScriptedModel,
    shelf: Shelf,
    messages: list[dict[str, str]] | None = None,
    *,
    embedder: Any = None,
    **fields: Any,
) -> list[ChatEvent]:
    fields = {"knowledge": KNOWLEDGE} | fields
    request = ChatRequest("chatcmpl-1", "tiny", messages or user("How long is parental leave?"), **fields)
    return [event async for event in make_chat(shelf, embedder=embedder)(request, model)]


def only(events: list[ChatEvent], kind: type) -> Any:
    (found,) = [event for event in events if isinstance(event, kind)]
    return found


def text_of(events: list[ChatEvent]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextDelta))


async def test_a_plain_chat_is_just_the_model() -> None:
    shelf = Shelf(LEAVE)
    events = await tell(ScriptedModel("Hello there."), shelf, user("Hi"), knowledge=None)
    assert [type(event) for event in events if not isinstance(event, TextDelta)] == [Finished]
    assert text_of(events) == only(events, Finished).text == "Hello there."
    assert shelf.queries == []


async def test_an_answer_from_documents_is_told_in_order() -> None:
    model = ScriptedModel("Parental leave lasts twelve weeks.")
    events = await tell(model, Shelf(LEAVE, TRAVEL))
    kinds = [type(event) for event in events if not isinstance(event, TextDelta)]
    assert kinds == [RetrievalDone, CitationsReady, Finished]
    assert only(events, RetrievalDone).evidence == "found"
    assert LEAVE in str(model.prompts[0][-1]["content"])
    ready = only(events, CitationsReady)
    assert ready.answer == only(events, Finished).text == "Parental leave lasts twelve weeks [1]."
    citation = ready.citations[0].citation
    assert (citation.collection, citation.quote, citation.start) == ("Handbook", LEAVE, 100)


async def test_text_streams_before_the_citations_are_known() -> None:
    events = await tell(ScriptedModel("Parental leave lasts twelve weeks."), Shelf(LEAVE))
    place = [isinstance(event, CitationsReady) for event in events].index(True)
    assert sum(isinstance(event, TextDelta) for event in events[:place]) > 2


async def test_an_answer_with_right_marks_is_not_changed() -> None:
    events = await tell(ScriptedModel("Parental leave lasts twelve weeks [1]."), Shelf(LEAVE))
    assert only(events, CitationsReady).answer is None
    assert len(only(events, CitationsReady).citations) == 1


async def test_a_citation_that_does_not_exist_is_taken_out() -> None:
    events = await tell(ScriptedModel("Cows fly [4]."), Shelf(LEAVE))
    assert only(events, Finished).text.startswith("Cows fly.\n")
    assert [cited.citation.number for cited in only(events, CitationsReady).citations] == [1]


@pytest.mark.parametrize("shelf", [Shelf(), Shelf(LEAVE, cosine=0.7)])
async def test_without_evidence_the_model_is_not_asked(shelf: Shelf) -> None:
    model = ScriptedModel("I guess twelve weeks.")
    events = await tell(model, shelf, user("Wie hoch ist der Eiffelturm?"))
    assert model.requests == []
    assert only(events, RetrievalDone).evidence == only(events, CitationsReady).evidence == "none"
    assert text_of(events) == only(events, Finished).text
    assert "keine Antwort" in text_of(events)
    assert only(events, Finished).usage.num_completion_tokens == 0


async def test_the_threshold_of_the_request_wins() -> None:
    strict = KnowledgeOptions(("Handbook",), threshold=0.99)
    events = await tell(ScriptedModel("x"), Shelf(LEAVE), knowledge=strict)
    assert only(events, RetrievalDone).evidence == "none"


@pytest.mark.parametrize(("cosine", "tuned", "evidence"), [(0.9, 0.99, "none"), (0.7, 0.6, "found")])
async def test_the_threshold_of_a_tuned_collection_is_in_force(cosine: float, tuned: float, evidence: str) -> None:
    shelf = Shelf(TRAVEL, cosine=cosine, tuned=tuned)
    events = await tell(ScriptedModel("Trains are booked in second class."), shelf)
    assert only(events, RetrievalDone).evidence == evidence
    asked = KnowledgeOptions(("Handbook",), threshold=0.8)
    events = await tell(ScriptedModel("Trains are booked in second class."), shelf, knowledge=asked)
    assert only(events, RetrievalDone).evidence != evidence, "that of the request wins"


@pytest.mark.parametrize(("is_asked", "said"), [(False, "The documents say nothing"), (True, TRAVEL)])
async def test_the_search_tool_keeps_to_the_tuned_threshold_unless_the_request_names_one(
    is_asked: bool, said: str
) -> None:
    shelf = Shelf(TRAVEL, cosine=0.9, tuned=0.99)
    context = ToolContext(
        shelf, ("Handbook",), evidence_threshold=0.8, is_threshold_asked=is_asked, collection_names={}
    )
    assert said in await run_tool(KNOWLEDGE_SEARCH, '{"query": "parental leave"}', context, timeout_s=5)


async def test_a_follow_up_is_searched_with_the_question_before() -> None:
    together = "How long is parental leave?\nAnd is it paid?"
    shelf = Shelf(LEAVE, cosine=0.7, cosines={together: 0.9})
    messages = user("How long is parental leave?", "Twelve weeks.", "And is it paid?")
    events = await tell(ScriptedModel("It is fully paid."), shelf, messages)
    assert only(events, RetrievalDone).query == together
    assert only(events, RetrievalDone).evidence == "found" and only(events, RetrievalDone).is_rewritten
    alone = await tell(ScriptedModel("x"), Shelf(LEAVE), user("How long is parental leave?"))
    assert not only(alone, RetrievalDone).is_rewritten


async def test_what_did_not_fit_is_told() -> None:
    long_history = user(*["word " * 40] * 8, "How long is parental leave?")
    events = await tell(ScriptedModel("Twelve weeks.", max_context=200), Shelf(LEAVE), long_history)
    assert only(events, ContextTrimmed).num_messages > 0


async def test_citations_refer_to_the_passages_that_were_shown() -> None:
    shelf = Shelf(LEAVE, *["filler " * 30] * 4)
    model = ScriptedModel("Parental leave lasts twelve weeks [5].", max_context=140)
    events = await tell(model, shelf, knowledge=KnowledgeOptions(("Handbook",), top_k=5))
    assert only(events, ContextTrimmed).num_passages > 0
    assert [cited.citation.number for cited in only(events, CitationsReady).citations] == [1]


async def test_a_tool_may_answer_where_the_documents_do_not() -> None:
    call = '<tool_call>{"name": "calculator", "arguments": {"expression": "2+3"}}</tool_call>'
    events = await tell(
        ScriptedModel(call, "It is 5."), Shelf(LEAVE, cosine=0.7), user("What is 2+3?"), server_tools=("calculator",)
    )
    assert only(events, ToolResult).content == "5"
    assert text_of(events) == only(events, Finished).text == "It is 5."


async def test_a_guess_without_evidence_and_without_a_tool_is_held_back() -> None:
    events = await tell(
        ScriptedModel("I guess 7."), Shelf(LEAVE, cosine=0.7), user("What is 2+3?"), server_tools=("calculator",)
    )
    assert "could not find" in text_of(events)
    assert "guess" not in text_of(events)
    assert only(events, Finished).usage.num_completion_tokens > 0


async def test_a_forced_search_finds_what_the_answer_cites() -> None:
    model = ScriptedModel('{"query": "parental leave"}', "Parental leave lasts twelve weeks.")
    events = await tell(model, Shelf(LEAVE), server_tools=("knowledge_search",), tool_choice="knowledge_search")
    assert [type(event) for event in events[:2]] == [ToolCall, ToolResult]
    assert LEAVE in only(events, ToolResult).content
    assert only(events, CitationsReady).citations[0].citation.quote == LEAVE


async def test_a_search_by_the_model_keeps_the_numbers_of_known_passages() -> None:
    call = '<tool_call>{"name": "knowledge_search", "arguments": {"query": "trains", "top_k": 2}}</tool_call>'
    model = ScriptedModel(call, "Trains are booked in second class [2].")
    knowledge = KnowledgeOptions(("Handbook",), top_k=1)
    events = await tell(model, Shelf(LEAVE, TRAVEL), knowledge=knowledge, server_tools=("knowledge_search",))
    assert only(events, ToolResult).content == f"[1] {LEAVE}\n\n[2] {TRAVEL}"
    assert [cited.citation.number for cited in only(events, CitationsReady).citations] == [2]


async def test_a_forced_search_that_finds_nothing_says_so() -> None:
    model = ScriptedModel('{"query": "towers"}', "The documents do not say.")
    events = await tell(
        model, Shelf(LEAVE, cosine=0.7), server_tools=("knowledge_search",), tool_choice="knowledge_search"
    )
    assert "say nothing about this" in only(events, ToolResult).content
    assert only(events, CitationsReady).evidence == "none"


async def test_client_tools_get_their_call_without_citations() -> None:
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
    call = '<tool_call>{"name": "get_weather", "arguments": {"city": "Paris"}}</tool_call>'
    events = await tell(ScriptedModel(call), Shelf(LEAVE), client_tools=(tool,))
    assert json.loads(only(events, ToolCall).arguments) == {"city": "Paris"}
    assert only(events, Finished).finish_reason == "tool_calls"
    assert not [event for event in events if isinstance(event, CitationsReady)]


async def test_meaning_is_asked_only_where_words_of_another_language_left_a_sentence_alone() -> None:
    class Embedder:
        num_calls = 0

        async def embed_passages(self, texts: Sequence[str]) -> Any:
            self.num_calls += 1
            return np.ones((len(texts), 1), dtype=np.float32)

    embedder = Embedder()
    train = "The train to Berlin costs 90 euros, and Dr. Weber pays for it. It is full on Mondays."
    for said in ("The train to Berlin costs 90 euros.", "The train has a good kitchen. Dr. Weber pays."):
        await tell(ScriptedModel(said), Shelf(train), embedder=embedder)
    assert embedder.num_calls == 0
    german = ScriptedModel("Der Zug nach Berlin kostet laut Dr. Weber 90 Euro.")
    events = await tell(german, Shelf(train), embedder=embedder)
    assert embedder.num_calls == 1
    assert len(only(events, CitationsReady).citations) == 1


async def test_leaving_the_chat_cancels_the_generation() -> None:
    model = ScriptedModel("A long answer that nobody waits for.")
    request = ChatRequest("r", "tiny", user("How long is parental leave?"), knowledge=KNOWLEDGE)
    async with aclosing(make_chat(Shelf(LEAVE))(request, model)) as events:  # type: ignore[type-var]
        async for event in events:
            if isinstance(event, TextDelta):
                break
    assert model.num_cancelled == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"server_tools": ("teleport",)}, "no server tool 'teleport'"),
        ({"tool_choice": "required"}, "no tools are given"),
        ({"server_tools": ("calculator",), "tool_choice": "datetime"}, "not among the tools"),
        ({"server_tools": ("knowledge_search",), "knowledge": None}, "needs collections"),
        ({"server_tools": ("calculator",), "sampling": SamplingParams(json_schema={})}, "response format"),
        ({"server_tools": ("calculator",), "sampling": SamplingParams(grammar="root ::= x")}, "response format"),
        ({"messages": user(" ")}, "needs a question"),
        ({"messages": user("wind " * 20_000)}, "at most 20000 characters, this one has 100000"),
        (
            {
                "server_tools": ("calculator",),
                "client_tools": ({"type": "function", "function": {"name": "calculator"}},),
            },
            "same name",
        ),
    ],
)
async def test_requests_that_contradict_themselves_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ApiError, match=message):
        await tell(ScriptedModel("x"), Shelf(LEAVE), **fields)


async def test_an_answer_of_nothing_but_marks_becomes_a_quote() -> None:
    events = await tell(ScriptedModel("[1]\n[2]\n[3]"), Shelf(LEAVE))
    assert only(events, Finished).text == only(events, CitationsReady).answer == f"The documents say: “{LEAVE}” [1]"


async def test_where_nothing_confirms_the_answer_the_documents_are_quoted() -> None:
    events = await tell(ScriptedModel("Cows fly."), Shelf(TRAVEL, LEAVE), user("How long is parental leave?"))
    ready = only(events, CitationsReady)
    assert ready.evidence == "quoted"
    assert ready.answer is None
    assert text_of(events) == only(events, Finished).text == f"Cows fly.\n\nThe documents say: “{LEAVE}” [2]"
    citation = ready.citations[0]
    assert citation.citation.quote == LEAVE
    ((start, end),) = citation.answer_spans
    assert only(events, Finished).text[start:end].endswith("[2]")


async def test_meaning_chooses_the_quote_among_sentences_with_the_same_words() -> None:
    class Embedder:
        async def embed_passages(self, texts: list[str]) -> np.ndarray:
            return np.array([[1.0, 0.0] if "twelve" in text or text.endswith("?") else [0.0, 1.0] for text in texts])

    told = user("Parental leave: how many weeks?")
    both = "Parental leave is counted in weeks of work. It lasts for twelve of them at home."
    events = await tell(ScriptedModel("Cows fly."), Shelf(both), told, embedder=Embedder())
    assert only(events, CitationsReady).citations[0].citation.quote == "It lasts for twelve of them at home."


async def test_a_sentence_that_no_passage_says_is_marked_with_its_place() -> None:
    model = ScriptedModel("Parental leave lasts twelve weeks. Elephants like ripe mangos.")
    events = await tell(model, Shelf(LEAVE))
    ready, text = only(events, CitationsReady), only(events, Finished).text
    assert [text[start:end] for start, end in ready.unsupported] == ["Elephants like ripe mangos."]


async def test_a_quote_that_left_its_document_meanwhile_is_not_cited() -> None:
    shelf = Shelf(LEAVE)
    shelf.gone.add("v0")
    events = await tell(ScriptedModel("Parental leave lasts twelve weeks [1]."), shelf)
    ready, text = only(events, CitationsReady), only(events, Finished).text
    assert ready.citations == ()
    assert text == "Parental leave lasts twelve weeks."
    assert ready.unsupported == ((0, len(text)),)


async def test_documents_that_contradict_each_other_are_both_cited() -> None:
    old = "Parental leave lasts ten weeks and is fully paid."
    events = await tell(ScriptedModel("Parental leave lasts twelve weeks and is fully paid."), Shelf(LEAVE, old))
    ready = only(events, CitationsReady)
    assert [each.citation.quote for each in ready.citations] == [LEAVE, old]
    assert only(events, Finished).text.endswith(f"Another document says otherwise: “{old}” [2]")
    assert f"“{old}” [2]" in text_of(events), "what the server adds is streamed too"
