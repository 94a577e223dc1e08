"""The embedding model as a service: texts in, vectors out; prefixes, cutting, batching and health.

Knows nothing of Ray. One replica holds one model. Everything slow runs beside the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Sequence
from typing import Any, get_args

import numpy as np

from cluster.engines.embedding import Vectors
from cluster.engines.embedding_choice import OpenedEmbedding, open_embedding
from cluster.engines.embedding_text import EmbeddingInput
from cluster.errors import EngineDead, InvalidRequest
from cluster.home import open_home
from services.config import EmbeddingConfig, Environment
from services.embedding_batcher import EmbeddingBatcher
from services.embedding_result import EmbeddingResult, TextKind

_log = logging.getLogger(__name__)

_CHECK_TEXT = "health"
_CHECK_WITHIN_S = 60.0
"""A check waits for the batches before it; only far beyond their time is the engine called dead."""


def open_configured_embedding(config: EmbeddingConfig, environment: Environment) -> OpenedEmbedding:
    """Prepare and load what the configuration names. Takes seconds; blocks."""
    threads = config.threads or environment.threads or len(os.sched_getaffinity(0))
    model = open_embedding(config.source, open_home(environment.home), precision=config.precision, threads=threads)
    _log.info("%s runs as %s: %s", model.identity, model.engine.backend, model.reason)
    return model


class EmbeddingService:
    """Usable as an `Embedder` of `rag` (after `start`) and through the methods that the deployment offers."""

    def __init__(self, model: OpenedEmbedding, *, max_batch: int = 32, batch_wait_ms: float = 2.0) -> None:
        self._model = model
        self._batcher = EmbeddingBatcher(model.engine, max_batch=max_batch, batch_wait_s=batch_wait_ms / 1000)

    async def start(self) -> None:
        """Returns when a real vector came out."""
        self._batcher.start()
        await self.check_health()

    @property
    def model_name(self) -> str:
        return self._model.identity

    @property
    def dimension(self) -> int:
        return self._model.engine.dimension

    async def embed(self, texts: Sequence[str], kind: TextKind = "raw") -> EmbeddingResult:
        """Vectors of texts, with the model's prefix for that kind. An empty list gives an empty result."""
        if kind not in get_args(TextKind):
            raise InvalidRequest(f"Unknown kind {kind!r} of text: use query, passage or raw.", param="kind")
        prefix = "" if kind == "raw" else self._model.spec.prefixes.get(kind, "")
        inputs = await asyncio.to_thread(self._model.tokenizer.encode, texts, prefix)
        return await self._embed_inputs(inputs, is_urgent=kind == "query")

    async def embed_token_ids(self, token_ids: Sequence[Sequence[int]]) -> EmbeddingResult:
        """The same for token ids of this very model, used as they are."""
        return await self._embed_inputs(self._model.tokenizer.accept_ids(token_ids), is_urgent=False)

    async def embed_queries(self, texts: Sequence[str]) -> Vectors:
        return (await self.embed(texts, "query")).vectors

    async def embed_passages(self, texts: Sequence[str]) -> Vectors:
        return (await self.embed(texts, "passage")).vectors

    async def describe(self) -> dict[str, Any]:
        """What runs here and why. `tokenizer_file` lets others count and cut as the model does."""
        model = self._model
        return {
            "model": model.identity,
            "dimension": model.engine.dimension,
            "max_tokens": model.spec.max_tokens,
            "backend": model.engine.backend,
            "precision": model.engine.backend.partition("-")[2],
            "reason": model.reason,
            "probe_texts_per_s": dict(model.probe),
            "threads": model.threads,
            "prefixes": dict(model.spec.prefixes),
            "tokenizer_file": str(model.tokenizer.file),
            "num_waiting": self._batcher.num_waiting,
        }

    async def check_health(self) -> None:
        """Compute a real vector. Raises `EngineDead` when none comes."""
        self._batcher.check()
        try:
            async with asyncio.timeout(_CHECK_WITHIN_S):
                result = await self.embed([_CHECK_TEXT], "query")
        except TimeoutError:
            raise EngineDead(f"The embedding engine gave no vector within {_CHECK_WITHIN_S:.0f} seconds.") from None
        length = float(np.linalg.norm(result.vectors[0]))
        if not abs(length - 1) < 1e-3:
            raise EngineDead(f"The embedding engine gives vectors of length {length:.3f} instead of 1.")

    async def close(self) -> None:
        """Free the model. Safe to call twice."""
        await self._batcher.close()

    async def _embed_inputs(self, inputs: Sequence[EmbeddingInput], *, is_urgent: bool) -> EmbeddingResult:
        vectors = await self._batcher.embed([item.token_ids for item in inputs], is_urgent=is_urgent)
        return EmbeddingResult(
            vectors=vectors,
            num_tokens=[len(item.token_ids) for item in inputs],
            truncated=[item.is_truncated for item in inputs],
            model=self.model_name,
        )
