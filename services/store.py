"""What Serve runs for the knowledge base: one replica that owns database migration, vectors and ingestion."""

import asyncio

from ray import serve

from services.config import StoreConfig
from services.environment import read_environment
from services.ray_adapter import close_replica_ports, connected_client, serve_details
from services.ray_status import count_running
from services.replica_count import ReplicaCount
from services.replica_log import log_into_replica_file
from services.retrieval import HandleEmbedder
from services.store_opening import open_store
from services.store_service import StoreService

_EMBED_APP, _EMBED_DEPLOYMENT = "embed", "Embedding"


def _count_embedding_replicas() -> int:
    return count_running(serve_details(connected_client()), _EMBED_APP, _EMBED_DEPLOYMENT)


class Store(StoreService):
    """A `StoreService` with its life given by Serve. Callers use its methods through the handle."""

    async def __init__(self, config: StoreConfig) -> None:  # type: ignore[misc]
        """Serve awaits this. It ends when the folder is ours and everything agrees; it does not wait for the model."""
        close_replica_ports()
        log_into_replica_file()
        parts = await asyncio.to_thread(open_store, config, read_environment())
        # Applications start side by side, so the other one may not be known yet.
        handle = serve.get_deployment_handle(_EMBED_DEPLOYMENT, app_name=_EMBED_APP, _check_exists=False)
        super().__init__(parts, HandleEmbedder(handle), num_replicas=ReplicaCount(_count_embedding_replicas))
        await self.start()

    async def __del__(self) -> None:
        """Serve awaits this at a graceful shutdown; after a kill the next start puts things right."""
        if hasattr(self, "_parts"):
            await self.close()
