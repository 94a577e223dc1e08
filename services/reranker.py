"""The configured reranker: a service with a `/rerank` URL as Cohere and Jina have it, or a cross-encoder folder.

The request holds `query`, `documents`, `top_n` and, where one is configured, `model`; the answer `results`, each with
`index` and `relevance_score`. A reranker that fails is an error of the search: leaving it out would change the result.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx

from rag.reranking import Reranking
from services.calls import Calls
from services.config import RetrievalConfig
from services.errors import ApiError, unavailable
from services.setup_errors import ConfigError

BESIDE_EMBEDDING = "embed"
"""The cross-encoder that the embedding application loads (`reranker` in its section)."""
_TIMEOUT_S = 30.0


class HttpReranker:
    """A reranking service behind a URL. One connection pool for its life."""

    def __init__(self, url: str, *, model: str | None = None, key: str | None = None) -> None:
        self._url = url
        self._model = model
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.AsyncClient(headers=headers, timeout=_TIMEOUT_S, trust_env=False, follow_redirects=False)

    async def scores(self, query: str, texts: Sequence[str]) -> list[float]:
        body: dict[str, Any] = {"query": query, "documents": list(texts), "top_n": len(texts)}
        if self._model is not None:
            body["model"] = self._model
        try:
            response = await self._http.post(self._url, json=body)
        except httpx.HTTPError as error:
            raise self._failed(f"does not answer ({error or type(error).__name__})") from error
        if response.status_code != 200:
            raise self._failed(f"answered with status {response.status_code}: {response.text[:200]}")
        try:
            results = response.json()["results"]
            by_index = {int(result["index"]): float(result["relevance_score"]) for result in results}
        except (ValueError, KeyError, TypeError) as error:
            raise self._failed("gave no list of results with `index` and `relevance_score`") from error
        if by_index.keys() != set(range(len(texts))):
            raise self._failed(f"scored {len(by_index)} of {len(texts)} passages")
        return [by_index[index] for index in range(len(texts))]

    async def close(self) -> None:
        await self._http.aclose()

    def _failed(self, what: str) -> ApiError:
        return unavailable(
            f"The reranker at {self._url} {what}. Check it, or set `retrieval.rerank` to null.", code="reranker_failed"
        )


class RemoteReranker:
    """The cross-encoder of the embedding deployment."""

    def __init__(self, embedding: Calls) -> None:
        self._embedding = embedding

    async def scores(self, query: str, texts: Sequence[str]) -> list[float]:
        found: list[float] = await self._embedding.call("rerank", query, list(texts))
        return found


class LocalReranker:
    """A cross-encoder in this process, for evaluations."""

    def __init__(self, folder: str) -> None:
        from cluster.engines.cross_encoder import CrossEncoder

        self._model = CrossEncoder(Path(folder).expanduser())

    async def scores(self, query: str, texts: Sequence[str]) -> list[float]:
        return await asyncio.to_thread(self._model.scores, query, texts)

    async def close(self) -> None:
        self._model.close()


def make_reranking(config: RetrievalConfig, embedding: Calls) -> Reranking | None:
    """What the endpoint reranks with; None where nothing is configured. Raises `ConfigError`."""
    if config.rerank is None:
        return None
    reranker = RemoteReranker(embedding) if config.rerank == BESIDE_EMBEDDING else _by_url(config)
    return Reranking(reranker, config.rerank_candidates)


@asynccontextmanager
async def serving_reranking(config: RetrievalConfig, embedding: Calls) -> AsyncIterator[Reranking | None]:
    """The same for one piece of work in another process than the endpoint's."""
    reranking = make_reranking(config, embedding)
    try:
        yield reranking
    finally:
        if reranking is not None and isinstance(reranking.reranker, HttpReranker):
            await reranking.reranker.close()


@asynccontextmanager
async def opened_reranking(config: RetrievalConfig, folder: str | None) -> AsyncIterator[Reranking | None]:
    """The same for an evaluation, which has no deployments to call; `folder` is that of the embedding section."""
    if config.rerank is None:
        yield None
        return
    if config.rerank == BESIDE_EMBEDDING and folder is None:
        raise ConfigError("`rerank: embed` needs the folder of a cross-encoder: `reranker` in the section of `embed`.")
    if config.rerank == BESIDE_EMBEDDING:
        reranker: HttpReranker | LocalReranker = await asyncio.to_thread(LocalReranker, str(folder))
    else:
        reranker = _by_url(config)
    try:
        yield Reranking(reranker, config.rerank_candidates)
    finally:
        await reranker.close()


def _by_url(config: RetrievalConfig) -> HttpReranker:
    assert config.rerank is not None
    if not config.rerank.startswith(("http://", "https://")):
        raise ConfigError(f"retrieval.rerank is {config.rerank!r}. Name a URL (http://.../rerank), `embed`, or null.")
    key = os.environ.get(config.rerank_key_env) if config.rerank_key_env else None
    if config.rerank_key_env and not key:
        raise ConfigError(f"retrieval.rerank_key_env names {config.rerank_key_env}, which is not set. Set it first.")
    return HttpReranker(config.rerank, model=config.rerank_model, key=key)
