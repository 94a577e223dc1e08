"""What the page knows about conversations, documents and answers: plain frozen records, made from the API's JSON.

Texts in here come from people, documents and models: nothing of it may reach the page without `ui.markup`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

JobState = Literal["queued", "parsing", "embedding", "done", "failed", "cancelled"]
FINAL_STATES = ("done", "failed", "cancelled")


@dataclass(frozen=True, slots=True)
class Account:
    """Who the key belongs to."""

    name: str


@dataclass(frozen=True, slots=True)
class Collection:
    name: str
    description: str = ""
    num_documents: int | None = None
    refusals: str = ""
    """How often it refuses and answers wrongly, as measured; empty where it was not tuned."""


@dataclass(frozen=True, slots=True)
class Document:
    """A stored document; `text` only where a single one was asked for."""

    id: str
    name: str
    num_chunks: int | None = None
    text: str = ""


@dataclass(frozen=True, slots=True)
class Job:
    """One file on its way into a collection. `progress` goes from 0 to 1."""

    id: str
    filename: str
    state: str
    progress: float = 0.0
    num_chunks: int | None = None
    is_unchanged: bool = False
    error: str | None = None
    warnings: tuple[str, ...] = ()

    @property
    def is_finished(self) -> bool:
        return self.state in FINAL_STATES


@dataclass(frozen=True, slots=True)
class Citation:
    """Reference `[number]` of an answer: characters `start` to `end` of the document's text."""

    number: int
    document_id: str
    document: str
    collection: str
    page: int | None
    start: int
    end: int
    text: str
    score: float | None
    version_id: str = ""


@dataclass(frozen=True, slots=True)
class PageImage:
    """A drawn page of a document. `first_mark` is where its first mark begins, as a share of the page's height; none
    where nothing is marked."""

    png_base64: str
    width: int
    height: int
    first_mark: float | None = None


@dataclass(frozen=True, slots=True)
class DocumentView:
    """A document where it is cited. `is_current` is false where the document has changed since the answer."""

    name: str
    is_current: bool
    page: int | None
    num_pages: int
    before: str
    marked: str
    after: str
    is_beginning: bool
    is_end: bool
    image: PageImage | None = None


@dataclass(frozen=True, slots=True)
class ToolStep:
    """One tool call of an answer; `result` is None while the tool runs."""

    name: str
    arguments: str
    result: str | None = None
    is_error: bool = False


@dataclass(frozen=True, slots=True)
class Trimmed:
    """What did not fit into the model's context."""

    num_messages: int = 0
    num_passages: int = 0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation. `evidence` is "none" where the documents do not hold the answer, "quoted" where
    only the quote in it is confirmed."""

    role: str
    content: str
    id: str = ""
    citations: tuple[Citation, ...] = ()
    steps: tuple[ToolStep, ...] = ()
    trimmed: Trimmed | None = None
    evidence: str | None = None
    unsupported: tuple[tuple[int, int], ...] = ()
    """Places of `content` that state something which no passage says."""
    query: str = ""
    """What was searched for, where that is not the question itself."""
    state: str = "complete"
    """`complete`, `stopped` (by its reader) or `failed`."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation; `messages` only where a single one was asked for."""

    id: str
    title: str
    model: str | None = None
    collections: tuple[str, ...] = ()
    messages: tuple[Message, ...] = ()


# Events of a streamed answer, in the order in which they come.


@dataclass(frozen=True, slots=True)
class Retrieved:
    """The knowledge base was searched for `query`."""

    num_passages: int
    query: str = ""


@dataclass(frozen=True, slots=True)
class ToolCalled:
    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ToolAnswered:
    id: str
    name: str
    result: str
    is_error: bool


@dataclass(frozen=True, slots=True)
class ContextTrimmed:
    trimmed: Trimmed


@dataclass(frozen=True, slots=True)
class TextAdded:
    text: str


@dataclass(frozen=True, slots=True)
class Cited:
    """The verified citations; `answer` is the final text where the server changed it."""

    citations: tuple[Citation, ...]
    answer: str | None
    evidence: str | None
    unsupported: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Finished:
    """The answer is complete; a stream without this event was cut."""

    reason: str | None = None
    usage: dict[str, Any] = field(default_factory=dict)


ChatEvent = Retrieved | ToolCalled | ToolAnswered | ContextTrimmed | TextAdded | Cited | Finished
