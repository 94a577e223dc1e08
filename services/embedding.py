"""What Serve runs for the embedding model: a service with its life given by Serve, called through the handle."""

import asyncio
from pathlib import Path

from cluster.engines.cross_encoder import CrossEncoder
from services.config import EmbeddingConfig
from services.embedding_service import EmbeddingService, open_configured_embedding
from services.environment import read_environment
from services.errors import conflict
from services.ray_adapter import close_replica_ports, hide_foreign_gpus
from services.replica_log import log_into_replica_file


def _open_reranker(config: EmbeddingConfig) -> CrossEncoder | None:
    return CrossEncoder(Path(config.reranker).expanduser()) if config.reranker else None


class Embedding(EmbeddingService):
    """Its methods `embed`, `embed_token_ids` and `describe` are for callers; `check_health` is for Serve."""

    async def __init__(self, config: EmbeddingConfig) -> None:  # type: ignore[misc]
        """Serve awaits this: the replica is ready when a real vector came out."""
        close_replica_ports()
        hide_foreign_gpus()
        log_into_replica_file()
        model = await asyncio.to_thread(open_configured_embedding, config, read_environment())
        super().__init__(model, max_batch=config.max_batch, batch_wait_ms=config.batch_wait_ms)
        self._reranker = await asyncio.to_thread(_open_reranker, config)
        await self.start()

    async def rerank(self, query: str, texts: list[str]) -> list[float]:
        """Scores of the configured cross-encoder."""
        if self._reranker is None:
            raise conflict("No cross-encoder is configured: set `reranker` in the section of `embed`.")
        return await asyncio.to_thread(self._reranker.scores, query, texts)

    async def __del__(self) -> None:
        """Serve awaits this at a graceful shutdown."""
        if hasattr(self, "_batcher"):
            await self.close()
