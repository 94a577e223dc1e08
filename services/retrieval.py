"""The embedding deployment as an `Embedder`, and the collections as what the retriever searches in.

Model and dimension are asked from the deployment; where an answer comes from another model than before (the
configuration was changed), the call fails and the next one knows the new model.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError

from cluster.errors import EngineBusy, EngineDead
from rag.access import search_as
from rag.chunking import TokenSpans
from rag.errors import EmbedderUnavailable, EmbeddingMismatch
from rag.read_write_lock import ReadWriteLock
from rag.tokens import load_token_spans
from rag.types import Embedder, Vectors
from rag.vector_store import ScoredChunk, VectorStore
from services.database import Collection
from services.knowledge import Knowledge
from services.tuning import is_valid

# The last two come out of the replica itself; Serve restarts one whose engine is dead.
_GONE = (
    RayActorError,
    BackPressureError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
    EngineDead,
    EngineBusy,
)


class HandleEmbedder:
    """See `rag.types.Embedder`. Knows its model after `connect`."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._token_spans: TokenSpans | None = None
        self._described: dict[str, Any] = {}

    @property
    def model_name(self) -> str:
        return str(self._described["model"])

    @property
    def dimension(self) -> int:
        return int(self._described["dimension"])

    @property
    def max_tokens(self) -> int:
        return int(self._described["max_tokens"])

    async def connect(self) -> None:
        """Wait until the model answers and learn what it is; cheap where it is still the same."""
        described: dict[str, Any] = await self.call("describe")
        if self._token_spans is None or described["model"] != self.model_name:
            self._token_spans = await asyncio.to_thread(load_token_spans, Path(described["tokenizer_file"]))
        self._described = described

    def token_spans(self, text: str) -> Sequence[tuple[int, int]]:
        assert self._token_spans is not None, "connected"
        return self._token_spans(text)

    async def embed_queries(self, texts: Sequence[str]) -> Vectors:
        return await self._embed(texts, "query")

    async def embed_passages(self, texts: Sequence[str]) -> Vectors:
        return await self._embed(texts, "passage")

    async def _embed(self, texts: Sequence[str], kind: str) -> Vectors:
        result = await self.call("embed", list(texts), kind)
        if result.model != self.model_name:
            before = self.model_name
            await self.connect()
            raise EmbeddingMismatch(
                f"The embedding model changed from {before} to {self.model_name}. Try again; collections of the former "
                "one need `windfarm reembed NAME`."
            )
        vectors: Vectors = result.vectors
        return vectors

    async def call(self, method: str, /, *args: Any, **kwargs: Any) -> Any:
        """Any method of the deployment. Raises `EmbedderUnavailable` where it is not there."""
        try:
            return await getattr(self._handle, method).remote(*args, **kwargs)
        except _GONE as error:
            raise EmbedderUnavailable("The embedding model is not running right now.") from error


class BegunEmbedding:
    """One question, whose vector is computed from now on, as the embedder of the search for it."""

    def __init__(self, embedder: Embedder, query: str) -> None:
        self._query = query
        self._task = asyncio.ensure_future(embedder.embed_queries([query])) if query.strip() else None

    async def embed_queries(self, texts: Sequence[str]) -> Vectors:
        assert self._task is not None and list(texts) == [self._query], "made for this question"
        return await self._task

    def close(self) -> None:
        """Nobody needs it any more; where it has failed, whoever asked knows already."""
        if self._task is not None:
            self._task.cancel()
            self._task.add_done_callback(lambda task: task.cancelled() or task.exception())


class SearchableCollections:
    """What the retriever sees as its store: collections by name, as one person may read them.

    Each search asks the database who they are and what they may read, searches with the filter made of that, and asks
    again before it gives anything away: what the store says of readers may be older than what the database says. So a
    right that was taken shows nothing from that moment, also where the store could not be told yet.
    `visible` is shared by searches and held alone while a version takes another's place, so that no search sees both
    or neither.
    """

    def __init__(
        self,
        knowledge: Knowledge,
        store: VectorStore,
        visible: ReadWriteLock,
        actor: str,
        check_embedding: Callable[[Collection], None],
        documents: Sequence[str] | None = None,
    ) -> None:
        self._knowledge = knowledge
        self._store = store
        self._visible = visible
        self._actor = actor
        self._check_embedding = check_embedding
        self._documents = documents
        self.names_by_index: dict[str, str] = {}
        self.thresholds: dict[str, float] = {}
        """Of tuned collections, by the id that their passages carry."""

    def search(
        self, collection_ids: Sequence[str], *, vector: npt.NDArray[Any] | None, text: str | None, limit: int
    ) -> list[ScoredChunk]:
        """`collection_ids` are names here. Raises where the actor may not read one."""
        with self._visible.shared():
            reader, collections, grants = self._knowledge.searchable(collection_ids, self._actor)
            for collection in collections:
                self._check_embedding(collection)
            self.names_by_index = {collection.index_id: collection.name for collection in collections}
            self.thresholds = {
                collection.index_id: float(collection.tuning["evidence_threshold"])
                for collection in collections
                if collection.tuning is not None and is_valid(collection.tuning, collection.embedding_model)
            }
            found = search_as(
                reader, self._store, grants, vector=vector, text=text, limit=limit, document_ids=self._documents
            )
            readable = self._knowledge.readable_versions({hit.chunk.version_id for hit in found}, self._actor)
            return [hit for hit in found if hit.chunk.version_id in readable]
