"""From a question to passages: embed it, search by meaning and by words, fuse, keep the best.

`retrieve` is the plain function that the service calls; `HybridRetriever` is the same behind LangChain's interface.
Only active versions of documents are found. Who may read which collection is decided before.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from langchain_core.callbacks import AsyncCallbackManagerForRetrieverRun, CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from pydantic import ConfigDict

from rag.fusion import FusionMethod, fuse
from rag.types import Embedder, Passage
from rag.vector_store import ScoredChunk


class Searches(Protocol):
    """The part of a `VectorStore` that retrieval needs."""

    def search(
        self,
        collection_ids: Sequence[str],
        *,
        vector: npt.NDArray[np.float32] | None,
        text: str | None,
        limit: int,
    ) -> list[ScoredChunk]: ...


@dataclass(frozen=True, slots=True)
class RetrievalSettings:
    """`candidates` is what each leg contributes, `top_k` what is left after fusion."""

    top_k: int = 5
    candidates: int = 50
    fusion: FusionMethod = "dbsf"
    dense_weight: float = 0.7


async def retrieve(
    query: str,
    collection_ids: Sequence[str],
    *,
    embedder: Embedder,
    store: Searches,
    settings: RetrievalSettings,
) -> list[Passage]:
    """The best passages for a question, best first."""
    if not query.strip() or not collection_ids:
        return []
    vector = (await embedder.embed_queries([query]))[0]
    candidates = max(settings.candidates, settings.top_k)
    found = await asyncio.to_thread(store.search, collection_ids, vector=vector, text=query, limit=candidates)
    return rank(found, settings)


def rank(found: Sequence[ScoredChunk], settings: RetrievalSettings) -> list[Passage]:
    """Fuse the legs. A passage has a `bm25` score only where its words were found."""
    by_key = {(hit.chunk.version_id, hit.chunk.index): hit for hit in found}
    dense = {key: hit.dense for key, hit in by_key.items() if hit.dense is not None}
    sparse = {key: hit.sparse for key, hit in by_key.items() if hit.sparse > 0}
    weights = (settings.dense_weight, 1.0 - settings.dense_weight)
    fused = fuse([dense, sparse], method=settings.fusion, weights=weights)
    best = sorted(fused, key=lambda key: (-fused[key], key))[: settings.top_k]
    return [_passage(by_key[key], fused[key]) for key in best]


def _passage(hit: ScoredChunk, score: float) -> Passage:
    legs = {"dense": hit.dense, "bm25": hit.sparse or None}
    return Passage(hit.chunk, score, {leg: value for leg, value in legs.items() if value is not None})


class HybridRetriever(BaseRetriever):
    """LangChain's view of `retrieve`: text in, `Document`s out, with what a citation needs as metadata."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    collection_ids: list[str]
    embedder: Any
    """An `Embedder`."""
    store: Any
    """A `VectorStore`."""
    settings: RetrievalSettings = RetrievalSettings()

    async def _aget_relevant_documents(
        self, query: str, *, run_manager: AsyncCallbackManagerForRetrieverRun
    ) -> list[Document]:
        return await self._documents(query)

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
        """For scripts; inside a running event loop use `ainvoke`."""
        return asyncio.run(self._documents(query))

    async def _documents(self, query: str) -> list[Document]:
        passages = await retrieve(
            query, self.collection_ids, embedder=self.embedder, store=self.store, settings=self.settings
        )
        return [to_document(passage) for passage in passages]


def to_document(passage: Passage) -> Document:
    chunk = passage.chunk
    metadata = {
        "collection_id": chunk.collection_id,
        "document_id": chunk.document_id,
        "version_id": chunk.version_id,
        "document": chunk.document_name,
        "title": chunk.title,
        "headings": list(chunk.headings),
        "page": chunk.page,
        "start": chunk.start,
        "end": chunk.end,
        "score": passage.score,
        **{f"{leg}_score": score for leg, score in passage.leg_scores.items()},
    }
    return Document(id=chunk.chunk_id, page_content=chunk.text, metadata=metadata)
