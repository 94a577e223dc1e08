"""The knowledge base and the embedding model as the chat story wants them, behind calls to their deployments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rag.types import Passage
from services.calls import Calls


class RemoteSearcher:
    def __init__(self, store: Calls) -> None:
        self._store = store

    async def search(
        self, collections: Sequence[str], query: str, *, top_k: int | None, actor: str | None
    ) -> Sequence[Passage]:
        result = await self._store.call("search", list(collections), query, top_k, actor)
        passages: Sequence[Passage] = result.passages
        return passages


class RemoteSentenceEmbedder:
    def __init__(self, embedding: Calls) -> None:
        self._embedding = embedding

    async def embed_passages(self, texts: Sequence[str]) -> Any:
        return (await self._embedding.call("embed", list(texts), "passage")).vectors
