"""The small records that flow through `rag`: parsed documents, chunks, passages. Offsets count characters of the
parsed text (Python string indices), so `text[start:end]` is always the exact span."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class PageSpan:
    """Characters `start` to `end` (exclusive) of the parsed text lie on page `number` (from 1)."""

    number: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class ParsedDocument:
    """Text of one file. `pages` is empty for formats that have none; `warnings` are sentences for people."""

    text: str
    mime_type: str
    title: str | None = None
    pages: tuple[PageSpan, ...] = ()
    language: str | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TextChunk:
    """A passage to index: `text == document.text[start:end]`. `headings` from the outermost to the innermost."""

    index: int
    text: str
    start: int
    end: int
    num_tokens: int
    page: int | None = None
    headings: tuple[str, ...] = ()
    table_header: str | None = None
    """Header of the table whose later rows this is; it stands elsewhere in the document."""


@dataclass(frozen=True, slots=True)
class StoredChunk:
    """What the vector store keeps of a chunk, beside its vectors."""

    chunk_id: str
    collection_id: str
    document_id: str
    version_id: str
    document_name: str
    text: str
    start: int
    end: int
    index: int
    page: int | None = None
    title: str | None = None
    headings: tuple[str, ...] = ()
    language: str | None = None
    table_header: str | None = None


@dataclass(frozen=True, slots=True)
class Passage:
    """A chunk that was found. `score` is the fused score; `leg_scores` holds each leg's own (dense: cosine)."""

    chunk: StoredChunk
    score: float
    leg_scores: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Citation:
    """A verified reference `[number]` of an answer: `quote` stands letter by letter in the document version."""

    number: int
    document_id: str
    version_id: str
    document_name: str
    collection: str
    page: int | None
    start: int
    end: int
    quote: str
    score: float


Vectors = npt.NDArray[np.float32]
"""Shape (num_texts, dimension), L2-normalised rows."""


class Embedder(Protocol):
    """Turns text into vectors. Implementations add the model's prefixes (`query: `, `passage: `) themselves."""

    @property
    def model_name(self) -> str: ...

    @property
    def dimension(self) -> int: ...

    async def embed_queries(self, texts: Sequence[str]) -> Vectors: ...

    async def embed_passages(self, texts: Sequence[str]) -> Vectors: ...
