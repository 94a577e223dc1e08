"""The records that flow through a chat: what a request asks for, what it talks to, and the events that come out.

The chat story yields these events; the endpoint renders them as OpenAI JSON or server-sent events. Nothing here knows
of HTTP or Ray.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from cluster.engine import GenerationChunk, GenerationRequest, SamplingParams, Usage
from rag.citations import CitedPassage
from rag.types import Citation, Passage

MAX_QUERY_CHARACTERS = 20_000
"""Of what documents are searched for, on every route."""

Message = Mapping[str, Any]
"""An OpenAI chat message."""

FinishReason = Literal["stop", "length", "tool_calls"]
ToolChoice = Literal["none", "auto", "required"] | str
"""Any other string is the name of the one tool that must be called."""


SearchTurn = Callable[[str], AbstractAsyncContextManager[object]]
"""Goes around one search for these words: waits until it may begin. Raises `ApiError` where too many wait already."""


def at_once(_query: str) -> AbstractAsyncContextManager[object]:
    """The turn of a search that has no others beside it."""
    return nullcontext()


@dataclass(frozen=True, slots=True)
class KnowledgeOptions:
    """Which collections the answer must rest on. `None` means the configured default."""

    collections: tuple[str, ...]
    top_k: int | None = None
    threshold: float | None = None


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """One checked chat request. `client_tools` are OpenAI tool schemas whose calls go back to the client;
    `server_tools` names tools that run here. `actor` is who asks, handed to the store's access check; `search_turn` is
    that of each of its searches."""

    request_id: str
    model: str
    messages: Sequence[Message]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    knowledge: KnowledgeOptions | None = None
    server_tools: tuple[str, ...] = ()
    client_tools: tuple[Mapping[str, Any], ...] = ()
    tool_choice: ToolChoice = "auto"
    actor: str | None = None
    search_turn: SearchTurn = at_once


class ModelClient(Protocol):
    """The way to one model. Errors are those of `services.errors`."""

    @property
    def max_context(self) -> int:
        """Tokens of prompt and answer together."""

    @property
    def template_knows_tools(self) -> bool:
        """Whether the model's own template shows tools; otherwise the prompt describes them."""

    def stream(self, request: GenerationRequest) -> AsyncIterator[GenerationChunk]:
        """One generation; closing the iterator cancels it."""

    async def count_tokens(self, request: GenerationRequest) -> int:
        """Tokens of the rendered prompt."""


@dataclass(frozen=True, slots=True)
class SearchResult:
    """Passages, best first, with the names of the collections whose ids their chunks carry."""

    passages: Sequence[Passage]
    collection_names: Mapping[str, str] = field(default_factory=dict)
    thresholds: Mapping[str, float] = field(default_factory=dict)
    """The evidence threshold of each tuned collection, by the same ids."""


class Searcher(Protocol):
    """The knowledge base. Raises for an unknown collection or one that the actor may not read."""

    async def search(
        self, collections: Sequence[str], query: str, *, top_k: int | None, actor: str | None
    ) -> SearchResult: ...

    async def check_quotes(self, citations: Sequence[Citation], *, actor: str | None) -> Sequence[bool]:
        """Whether each quote stands letter by letter in its stored version, and the actor may read that now."""


class SentenceEmbedder(Protocol):
    """Used to attach citations by meaning; rows are normalised."""

    async def embed_passages(self, texts: Sequence[str]) -> Any: ...


@dataclass(frozen=True, slots=True)
class TextDelta:
    """Text to append to the answer."""

    text: str
    chunk: GenerationChunk | None = None
    """What the engine said with it (token ids, logprobs), where there is more than text."""


@dataclass(frozen=True, slots=True)
class RetrievalDone:
    """What was found. `evidence` "none": nothing above the threshold, the model is not asked."""

    query: str
    passages: tuple[Passage, ...]
    evidence: Literal["found", "none"]
    is_rewritten: bool = False
    """Whether `query` is another text than the question, made from the turns before it."""


@dataclass(frozen=True, slots=True)
class ContextTrimmed:
    """What did not fit into the model's context and was left out."""

    num_messages: int
    num_passages: int
    reason: str


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the model asked for. `side` "client": it ends the answer with finish_reason "tool_calls"."""

    call_id: str
    name: str
    arguments: str
    """JSON text, as OpenAI has it."""
    side: Literal["server", "client"]
    index: int = 0


@dataclass(frozen=True, slots=True)
class ToolResult:
    call_id: str
    name: str
    content: str
    is_error: bool = False
    document_ids: tuple[str, ...] = ()
    """The documents whose text the answer may hold from here on."""


Evidence = Literal["found", "quoted", "none"]


@dataclass(frozen=True, slots=True)
class CitationsReady:
    """The verified citations of the whole answer. `answer` is the final text where the server changed what it had
    streamed (marks attached or removed), otherwise `None`. `evidence` "quoted": passages were found, none confirms what
    the model wrote, so a sentence of theirs was added. `unsupported`: the places of the final text that state something
    which no passage says."""

    citations: tuple[CitedPassage, ...]
    answer: str | None
    evidence: Evidence
    unsupported: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event of every chat that did not fail. `usage` is the sum over all generations of this request."""

    finish_reason: FinishReason
    usage: Usage
    text: str
    """The final answer, with citation marks."""


ChatEvent = TextDelta | RetrievalDone | ContextTrimmed | ToolCall | ToolResult | CitationsReady | Finished
