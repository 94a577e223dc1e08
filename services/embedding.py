"""What Serve runs for the embedding model: a service with its life given by Serve, called through the handle."""

import asyncio

from services.config import EmbeddingConfig
from services.embedding_service import EmbeddingService, open_configured_embedding
from services.environment import read_environment
from services.ray_adapter import close_replica_ports
from services.replica_log import log_into_replica_file


class Embedding(EmbeddingService):
    """Its methods `embed`, `embed_token_ids` and `describe` are for callers; `check_health` is for Serve."""

    async def __init__(self, config: EmbeddingConfig) -> None:  # type: ignore[misc]
        """Serve awaits this: the replica is ready when a real vector came out."""
        close_replica_ports()
        log_into_replica_file()
        model = await asyncio.to_thread(open_configured_embedding, config, read_environment())
        super().__init__(model, max_batch=config.max_batch, batch_wait_ms=config.batch_wait_ms)
        await self.start()

    async def __del__(self) -> None:
        """Serve awaits this at a graceful shutdown."""
        if hasattr(self, "_batcher"):
            await self.close()
