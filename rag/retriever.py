"""From a question to passages: embed it, search by meaning and by words, fuse, keep the best.

`HybridRetriever` does it behind LangChain's interface; `retrieve` gives what it finds as passages, for the service.
The store that it is given knows who asks: only what they may read is found.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from langchain_core.callbacks import AsyncCallbackManagerForRetrieverRun, CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from pydantic import ConfigDict

from rag.ranking import RetrievalSettings, rank
from rag.types import Passage, StoredChunk, Vectors
from rag.vector_store import ScoredChunk


class EmbedsQueries(Protocol):
    """The part of an `Embedder` that retrieval needs."""

    async def embed_queries(self, texts: Sequence[str]) -> Vectors: ...


class Searches(Protocol):
    """A store as somebody may see it: the rights are in it already."""

    def search(
        self,
        collection_ids: Sequence[str],
        *,
        vector: npt.NDArray[np.float32] | None,
        text: str | None,
        limit: int,
    ) -> list[ScoredChunk]: ...


async def retrieve(
    query: str,
    collection_ids: Sequence[str],
    *,
    embedder: EmbedsQueries,
    store: Searches,
    settings: RetrievalSettings,
) -> list[Passage]:
    """What `HybridRetriever` finds, as passages, best first."""
    retriever = HybridRetriever(collection_ids=list(collection_ids), embedder=embedder, store=store, settings=settings)
    return [to_passage(document) for document in await retriever.ainvoke(query)]


class HybridRetriever(BaseRetriever):
    """Text in, LangChain's `Document`s out, best first, with what a citation needs as metadata."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    collection_ids: list[str]
    embedder: Any
    """An `Embedder`, or what of it is `EmbedsQueries`."""
    store: Any
    """It `Searches`."""
    settings: RetrievalSettings = RetrievalSettings()

    async def _aget_relevant_documents(
        self, query: str, *, run_manager: AsyncCallbackManagerForRetrieverRun
    ) -> list[Document]:
        return await self._documents(query)

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
        """For scripts; inside a running event loop use `ainvoke`."""
        return asyncio.run(self._documents(query))

    async def _documents(self, query: str) -> list[Document]:
        if not query.strip() or not self.collection_ids:
            return []
        vector = (await self.embedder.embed_queries([query]))[0]
        limit = max(self.settings.candidates, self.settings.top_k)
        found = await asyncio.to_thread(self.store.search, self.collection_ids, vector=vector, text=query, limit=limit)
        return [to_document(passage) for passage in rank(found, self.settings)]


_LEG_SCORE = "_score"
_SAME_NAMES = (
    "collection_id",
    "document_id",
    "version_id",
    "title",
    "page",
    "start",
    "end",
    "index",
    "language",
    "table_header",
)


def to_document(passage: Passage) -> Document:
    chunk = passage.chunk
    metadata = {
        **{name: getattr(chunk, name) for name in _SAME_NAMES},
        "document": chunk.document_name,
        "headings": list(chunk.headings),
        "score": passage.score,
        **{f"{leg}{_LEG_SCORE}": score for leg, score in passage.leg_scores.items()},
    }
    return Document(id=chunk.chunk_id, page_content=chunk.text, metadata=metadata)


def to_passage(document: Document) -> Passage:
    """The reverse of `to_document`: nothing is lost on the way."""
    known = document.metadata
    chunk = StoredChunk(
        chunk_id=str(document.id),
        document_name=known["document"],
        text=document.page_content,
        headings=tuple(known["headings"]),
        **{name: known[name] for name in _SAME_NAMES},
    )
    legs = {name.removesuffix(_LEG_SCORE): score for name, score in known.items() if name.endswith(_LEG_SCORE)}
    return Passage(chunk, known["score"], legs)
