"""The knowledge base and the embedding model as the chat story wants them, behind calls to their deployments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rag.reranking import Reranking
from rag.types import Citation
from services.calls import Calls
from services.chat_types import SearchResult
from services.config import RetrievalConfig


class RemoteSearcher:
    """Searches as the configuration says; the store knows nothing of this part of it."""

    def __init__(self, store: Calls, retrieval: RetrievalConfig, reranking: Reranking | None = None) -> None:
        self._store = store
        self._retrieval = retrieval
        self._reranking = reranking

    async def search(
        self,
        collections: Sequence[str],
        query: str,
        *,
        top_k: int | None,
        actor: str | None,
        documents: Sequence[str] | None = None,
        is_reranked: bool = True,
    ) -> SearchResult:
        """`documents`: only passages of these. `is_reranked`: whether a configured reranker has its say."""
        settings = self._retrieval
        wanted = top_k or settings.top_k
        reranking = self._reranking if is_reranked else None
        found: SearchResult = await self._store.call(
            "search",
            list(collections),
            query,
            wanted if reranking is None else reranking.depth(wanted),
            actor,
            candidates=settings.candidates,
            fusion=settings.fusion,
            dense_weight=settings.dense_weight,
            documents=documents,
        )
        if reranking is None:
            return found
        return replace(found, passages=await reranking.best(query, found.passages, wanted))

    async def tune(self, collection: str, questions: Sequence[tuple[str, list[str]]] | None, actor: str) -> Any:
        return await self._store.call("tune", collection, questions, actor, retrieval=self._retrieval)

    async def check_quotes(self, citations: Sequence[Citation], *, actor: str | None) -> Sequence[bool]:
        quotes = [(each.version_id, each.start, each.end, each.quote) for each in citations]
        hold: list[bool] = await self._store.call("check_quotes", quotes, actor)
        return hold


class RemoteSentenceEmbedder:
    def __init__(self, embedding: Calls) -> None:
        self._embedding = embedding

    async def embed_passages(self, texts: Sequence[str]) -> Any:
        return (await self._embedding.call("embed", list(texts), "passage")).vectors
