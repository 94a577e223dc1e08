"""The story of one chat request: retrieve, decide whether that is evidence, build the prompt, generate and run tools,
verify the citations. Everything that happens comes out as an event; how events look on the wire is not known here.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Literal

from cluster.engine import Usage
from rag.language import words
from rag.refusal import judge_evidence, no_evidence_answer
from rag.types import Passage
from services.chat_types import (
    MAX_QUERY_CHARACTERS,
    ChatEvent,
    ChatRequest,
    CitationsReady,
    Evidence,
    Finished,
    KnowledgeOptions,
    ModelClient,
    RetrievalDone,
    Searcher,
    SearchResult,
    SentenceEmbedder,
    TextDelta,
)
from services.config import ChatConfig, PlatformConfig, RetrievalConfig
from services.errors import invalid
from services.prompting import fit_prompt, last_user_text
from services.rewrite import search_queries
from services.tools import KNOWLEDGE_SEARCH, TOOLS
from services.tools.loop import ToolLimits, ToolLoop
from services.tools.registry import Tool, ToolContext
from services.verification import AnswerVerifier


class Chat:
    """Tells chats. One per endpoint process; `searcher` is the knowledge base, `embedder` helps to attach citations
    over paraphrase."""

    def __init__(
        self,
        searcher: Searcher,
        *,
        retrieval: RetrievalConfig,
        chat: ChatConfig,
        embedder: SentenceEmbedder | None = None,
    ) -> None:
        self._searcher = searcher
        self._retrieval = retrieval
        self._chat = chat
        self._verifier = AnswerVerifier(searcher, embedder)

    async def __call__(self, request: ChatRequest, model: ModelClient) -> AsyncIterator[ChatEvent]:
        """Events in the order in which they happen, `Finished` last. Raises `ApiError`."""
        # 1. Check what no schema can.
        check_chat(request)
        tools = {name: TOOLS[name] for name in request.server_tools}
        schemas = [*(tool.schema for tool in tools.values()), *request.client_tools]
        question = last_user_text(request.messages)

        # 2. Retrieve, and decide whether what was found is evidence. A forced tool call goes first and alone.
        found = _Found(has_evidence=True)
        if request.knowledge and not is_forced(request.tool_choice):
            found = await self._retrieve(request, request.knowledge)
            evidence_found: Literal["found", "none"] = "found" if found.has_evidence else "none"
            is_rewritten = found.query.strip() != question.strip()
            yield RetrievalDone(found.query, tuple(found.passages), evidence_found, is_rewritten)
            if not found.has_evidence and not _has_other_tools(request, tools):
                for event in refuse(question, Usage(0, 0)):
                    yield event
                return

        # 3. Build the prompt, and say what did not fit.
        passages = found.passages if found.has_evidence else []
        offered = [] if request.tool_choice == "none" else schemas
        prompt = await fit_prompt(
            request,
            passages,
            offered,
            model=model,
            default_max_tokens=self._chat.default_max_tokens,
            ask_to_cite=self._chat.ask_model_to_cite,
        )
        if prompt.trimmed:
            yield prompt.trimmed

        # 4. Generate; tools run in between. Without evidence only what a tool said may be told.
        context = self._tool_context(request, prompt.passages, found)
        loop = ToolLoop(
            model,
            request_id=request.request_id,
            sampling=prompt.sampling,
            tools=tools,
            client_tools=request.client_tools,
            tool_choice=request.tool_choice,
            context=context,
            limits=ToolLimits(max_rounds=self._chat.max_tool_rounds),
            hold_first_text=not found.has_evidence,
        )
        finished: Finished | None = None
        async with aclosing(loop.run(prompt.messages)) as events:
            async for event in events:
                if isinstance(event, Finished):
                    finished = event
                else:
                    yield event
        assert finished is not None, "the loop ended without its last event"
        if loop.is_held:
            for event in refuse(question, finished.usage):
                yield event
            return

        # 5. Verify the model's citations, attach what it left out; where nothing holds, quote the documents themselves.
        if request.knowledge and finished.finish_reason != "tool_calls":
            verified = await self._verifier.verify(finished.text, question, context)
            if verified.added:
                yield TextDelta(verified.added)
            cited, said = verified.cited, finished.text + verified.added
            # A model may write nothing but marks of its own.
            text = cited.text if any(words(cited.text)) else no_evidence_answer(question)
            changed = text if text != said else None
            evidence: Evidence = "quoted" if verified.is_quoted else "found" if context.passages else "none"
            yield CitationsReady(cited.citations, changed, evidence, cited.unsupported)
            finished = Finished(finished.finish_reason, finished.usage, text)
        yield finished

    async def _retrieve(self, request: ChatRequest, knowledge: KnowledgeOptions) -> _Found:
        """Search for the question; for a follow-up together with the question before it."""
        threshold = self._threshold(knowledge)
        best: _Found | None = None
        for query in search_queries(request.messages):
            result = await self._search(request, knowledge, query)
            own = {} if knowledge.threshold is not None else result.thresholds
            is_found = judge_evidence(query, result.passages, threshold, own).is_found
            found = _Found(is_found, query, list(result.passages), dict(result.collection_names))
            if is_found:
                return found
            best = best or found
        assert best is not None, "checked: there is a question"
        return best

    async def _search(self, request: ChatRequest, knowledge: KnowledgeOptions, query: str) -> SearchResult:
        top_k = knowledge.top_k or self._retrieval.top_k
        async with request.search_turn(query):
            return await self._searcher.search(knowledge.collections, query, top_k=top_k, actor=request.actor)

    def _threshold(self, knowledge: KnowledgeOptions | None) -> float:
        asked = knowledge.threshold if knowledge else None
        return self._retrieval.evidence_threshold if asked is None else asked

    def _tool_context(self, request: ChatRequest, passages: Sequence[Passage], found: _Found) -> ToolContext:
        return ToolContext(
            searcher=self._searcher,
            collections=request.knowledge.collections if request.knowledge else (),
            actor=request.actor,
            evidence_threshold=self._threshold(request.knowledge),
            is_threshold_asked=request.knowledge is not None and request.knowledge.threshold is not None,
            passages=list(passages),
            collection_names=found.collection_names,
            search_turn=request.search_turn,
        )


def make_story(config: PlatformConfig, searcher: Searcher, embedder: SentenceEmbedder | None) -> Chat:
    return Chat(searcher, retrieval=config.retrieval, chat=config.chat, embedder=embedder)


@dataclass(slots=True)
class _Found:
    """What retrieval came to."""

    has_evidence: bool
    query: str = ""
    passages: list[Passage] = field(default_factory=list)
    collection_names: dict[str, str] = field(default_factory=dict)


def check_chat(request: ChatRequest) -> None:
    """What needs more than one field to be seen."""
    tool_names = {*request.server_tools, *(schema["function"]["name"] for schema in request.client_tools)}
    if len(tool_names) < len(request.server_tools) + len(request.client_tools):
        raise invalid("Two tools have the same name. Rename yours, or leave the server's out.", param="tools")
    if unknown := set(request.server_tools) - TOOLS.keys():
        raise invalid(
            f"There is no server tool {sorted(unknown)[0]!r}. There are: {', '.join(sorted(TOOLS))}.",
            param="windfarm_tools",
        )
    if is_forced(request.tool_choice) and not tool_names:
        raise invalid("tool_choice demands a call, but no tools are given.", param="tool_choice")
    if request.tool_choice not in ("none", "auto", "required") and request.tool_choice not in tool_names:
        raise invalid(f"tool_choice names {request.tool_choice!r}, which is not among the tools.", param="tool_choice")
    has_format = request.sampling.json_schema is not None or request.sampling.grammar is not None
    if tool_names and request.tool_choice != "none" and has_format:
        raise invalid(
            "A response format binds every token, so no tool could be called. Leave one of them out, or send "
            'tool_choice "none".',
            param="response_format",
        )
    if KNOWLEDGE_SEARCH.name in request.server_tools and not request.knowledge:
        raise invalid("The tool knowledge_search needs collections in 'knowledge'.", param="knowledge")
    if not request.knowledge:
        return
    question = last_user_text(request.messages)
    if not question.strip():
        raise invalid("An answer from documents needs a question: a user message with text.", param="messages")
    if len(question) > MAX_QUERY_CHARACTERS:
        raise invalid(
            f"A question to documents has at most {MAX_QUERY_CHARACTERS} characters, this one has {len(question)}. Put "
            "long texts into a document, and ask about them.",
            param="messages",
            code="query_too_long",
        )


def is_forced(choice: str) -> bool:
    return choice not in ("none", "auto")


def refuse(question: str, usage: Usage) -> list[ChatEvent]:
    """Nothing found answers the question: say so instead of guessing."""
    text = no_evidence_answer(question)
    return [TextDelta(text), CitationsReady((), None, "none"), Finished("stop", usage, text)]


def _has_other_tools(request: ChatRequest, tools: dict[str, Tool]) -> bool:
    """Tools that may know what the documents do not."""
    return request.tool_choice != "none" and bool(tools.keys() - {KNOWLEDGE_SEARCH.name} or request.client_tools)
