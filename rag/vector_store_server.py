"""The vector store on a Qdrant server: one server collection per collection of ours, named `windfarm_<id>`.

The swap of two versions is one batch request; the server applies it in order, but a search that runs in between may
see both. Where a cluster keeps several copies of a collection, a deletion is ordered by the leader of each shard and
waits until it is applied; then it looks at each node that the configuration names, and ends when none of them has any
of it. `QdrantClient(":memory:")` obeys the same contract and is what the tests use.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
from qdrant_client import QdrantClient, models
from qdrant_client.http.exceptions import ApiException, ResponseHandlingException, UnexpectedResponse

from rag.access import READERS, TENANT, VISIBILITY, AccessFilter, PointLabels, QdrantFilter
from rag.bm25 import encode_document, encode_query
from rag.errors import StoreError, StoreUnavailable
from rag.types import StoredChunk, Vectors
from rag.vector_store import (
    DENSE,
    INDEXED_KEYWORDS,
    SPARSE,
    Inventory,
    ScoredChunk,
    VersionState,
    check_filter,
    check_upsert,
    chunk_to_payload,
    join_legs,
    point_id,
    searchable_text,
    take_inventory,
    visibility,
)

PREFIX = "windfarm_"
_BATCH = 256
_PAGE = 4096
_GONE_WITHIN_S = 2.0
_GONE_POLL_S = 0.02

_log = logging.getLogger(__name__)


class ServerVectorStore:
    """See `VectorStore`."""

    def __init__(self, client: QdrantClient, nodes: Sequence[QdrantClient] = ()) -> None:
        self._client = client
        self._nodes = tuple(nodes) or (client,)
        self._dimensions: dict[str, int] = {}
        self._create_lock = threading.Lock()

    @classmethod
    def connect(cls, url: str, *, nodes: Sequence[str] = (), api_key: str | None = None) -> ServerVectorStore:
        # The client's version check only warns; a server that does not answer must be an error at once.
        clients = [QdrantClient(url=each, api_key=api_key, check_compatibility=False) for each in (url, *nodes)]
        store = cls(clients[0], clients[1:])
        store.list_collections()
        return store

    def upsert(
        self,
        collection_id: str,
        chunks: Sequence[StoredChunk],
        vectors: Vectors,
        *,
        active: bool,
        labels: PointLabels | None = None,
    ) -> None:
        check_upsert(collection_id, chunks, vectors)
        if not chunks:
            return
        self._ensure(collection_id, vectors.shape[1])
        for start in range(0, len(chunks), _BATCH):
            part = slice(start, start + _BATCH)
            points = [
                _point(chunk, row, active, labels) for chunk, row in zip(chunks[part], vectors[part], strict=True)
            ]
            with _as_store_error("write chunks"):
                self._client.upsert(_name(collection_id), points, wait=True)

    def activate_version(
        self, collection_id: str, version_id: str, *, labels: PointLabels, replaces: str | None = None
    ) -> None:
        changes = {version_id: {VISIBILITY: visibility(True)} | labels.payload}
        if replaces is not None and replaces != version_id:
            changes[replaces] = {VISIBILITY: visibility(False)}
        self._change(collection_id, [(changed, _filter(version_id=each)) for each, changed in changes.items()])

    def deactivate_version(self, collection_id: str, version_id: str) -> None:
        self._change(collection_id, [({VISIBILITY: visibility(False)}, _filter(version_id=version_id))])

    def label_document(self, collection_id: str, document_id: str, labels: PointLabels) -> None:
        self._change(collection_id, [(labels.payload, _filter(document_id=document_id))])

    def _change(self, collection_id: str, changes: Sequence[tuple[dict[str, Any], models.Filter]]) -> None:
        if not self._exists(collection_id):
            return
        operations: list[Any] = [
            models.SetPayloadOperation(set_payload=models.SetPayload(payload=payload, filter=wanted))
            for payload, wanted in changes
        ]
        with _as_store_error("change what is visible"):
            self._client.batch_update_points(_name(collection_id), operations, wait=True)

    def delete_version(self, collection_id: str, version_id: str) -> None:
        self._delete_where(collection_id, _filter(version_id=version_id))

    def delete_document(self, collection_id: str, document_id: str) -> None:
        self._delete_where(collection_id, _filter(document_id=document_id))

    def _delete_where(self, collection_id: str, wanted: models.Filter) -> None:
        if self._exists(collection_id):
            name = _name(collection_id)
            with _as_store_error("delete chunks"):
                self._client.delete(
                    name, models.FilterSelector(filter=wanted), wait=True, ordering=models.WriteOrdering.STRONG
                )
            self._until_gone(lambda node: _num_points(node, name, wanted))

    def delete_collection(self, collection_id: str) -> None:
        with self._create_lock, _as_store_error("delete a collection"):
            self._dimensions.pop(collection_id, None)
            self._client.delete_collection(_name(collection_id))
        self._until_gone(lambda node: int(node.collection_exists(_name(collection_id))))

    def _until_gone(self, count_left: Callable[[QdrantClient], int]) -> None:
        """Wait until no node has anything left; `StoreError` where one still does after two seconds. A node that does
        not answer shows nothing to anybody, and takes over the state of the others before it is asked again."""
        deadline = time.monotonic() + _GONE_WITHIN_S
        waiting = list(self._nodes)
        while waiting:
            waiting = [node for node in waiting if _left_on(node, count_left) > 0]
            if not waiting:
                return
            if time.monotonic() > deadline:
                raise StoreError(
                    f"{len(waiting)} of {len(self._nodes)} nodes of the Qdrant cluster still hold what was deleted "
                    f"{_GONE_WITHIN_S:g} seconds ago. Nobody can read it; windfarm deletes it again at its next start. "
                    "Look at the cluster's replicas (`/collections/NAME/cluster`)."
                )
            time.sleep(_GONE_POLL_S)

    def list_collections(self) -> list[str]:
        with _as_store_error("list collections"):
            names = [entry.name for entry in self._client.get_collections().collections]
        return sorted(name.removeprefix(PREFIX) for name in names if name.startswith(PREFIX))

    def count(
        self,
        collection_id: str,
        *,
        document_id: str | None = None,
        version_id: str | None = None,
        active: bool | None = None,
    ) -> int:
        if not self._exists(collection_id):
            return 0
        wanted = _filter(document_id=document_id, version_id=version_id, active=active)
        with _as_store_error("count chunks"):
            return self._client.count(_name(collection_id), count_filter=wanted, exact=True).count

    def measure(self, collection_id: str, *, document_id: str) -> Inventory:
        if not self._exists(collection_id):
            return take_inventory(())
        return take_inventory(self._vectors_of(collection_id, document_id))

    def _vectors_of(self, collection_id: str, document_id: str) -> Iterator[tuple[list[int], list[float]]]:
        offset: Any = None
        while True:
            with _as_store_error("read a document's vectors"):
                records, offset = self._client.scroll(
                    _name(collection_id),
                    scroll_filter=_filter(document_id=document_id),
                    limit=_PAGE,
                    offset=offset,
                    with_payload=False,
                    with_vectors=[DENSE, SPARSE],
                )
            for record in records:
                vectors: Any = record.vector
                yield vectors[SPARSE].indices if SPARSE in vectors else [], vectors[DENSE]
            if offset is None:
                return

    def list_versions(self) -> dict[str, VersionState]:
        versions: dict[str, VersionState] = {}
        for collection_id in self.list_collections():
            for payload in self._payloads(collection_id):
                version_id, labels = payload["version_id"], _labels(payload)
                before = versions.get(version_id, VersionState(collection_id, 0, 0, labels))
                is_active = payload[VISIBILITY] == visibility(True)
                versions[version_id] = VersionState(
                    collection_id,
                    before.num_points + 1,
                    before.num_active + int(is_active),
                    labels if labels == before.labels else None,
                )
        return versions

    def _payloads(self, collection_id: str) -> Iterator[dict[str, Any]]:
        offset: Any = None
        while True:
            with _as_store_error("list versions"):
                records, offset = self._client.scroll(
                    _name(collection_id),
                    limit=_PAGE,
                    offset=offset,
                    with_payload=["version_id", VISIBILITY, TENANT, READERS],
                )
            yield from (record.payload or {} for record in records)
            if offset is None:
                return

    def search_filtered(
        self, access: AccessFilter, *, vector: npt.NDArray[np.float32] | None, text: str | None, limit: int
    ) -> list[ScoredChunk]:
        check_filter(access)
        found: list[ScoredChunk] = []
        for collection_id, allowed in access.by_index.items():
            if self._exists(collection_id):
                found += self._search_one(_name(collection_id), _access_filter(allowed), vector, text, limit)
        return found

    def _search_one(
        self,
        name: str,
        visible: models.Filter,
        vector: npt.NDArray[np.float32] | None,
        text: str | None,
        limit: int,
        document_ids: Sequence[str] | None = None,
    ) -> list[ScoredChunk]:
        requests: list[models.QueryRequest] = []
        if vector is not None:
            requests.append(
                models.QueryRequest(
                    query=vector.tolist(),
                    using=DENSE,
                    filter=visible,
                    limit=limit,
                    with_payload=True,
                    params=models.SearchParams(
                        quantization=models.QuantizationSearchParams(rescore=True, oversampling=2.0)
                    ),
                )
            )
        words = encode_query(text) if text else None
        if words and words.indices:
            requests.append(
                models.QueryRequest(
                    query=models.SparseVector(indices=list(words.indices), values=list(words.values)),
                    using=SPARSE,
                    filter=visible,
                    limit=limit,
                    with_payload=True,
                    with_vector=[DENSE] if vector is not None else False,
                )
            )
        if not requests:
            return []
        with _as_store_error("search"):
            answers = [answer.points for answer in self._client.query_batch_points(name, requests)]
        by_meaning = answers[0] if vector is not None else []
        by_words = answers[-1] if words and words.indices else []
        return join_legs(by_meaning, by_words, vector)

    def flush(self) -> None:
        """Nothing to do: every write waits until the server has it."""

    def optimize(self) -> bool:
        """The server does this by itself."""
        return False

    def close(self) -> None:
        for client in {self._client, *self._nodes}:
            client.close()

    def _exists(self, collection_id: str) -> bool:
        with _as_store_error("look for a collection"):
            return self._client.collection_exists(_name(collection_id))

    def _ensure(self, collection_id: str, dimension: int) -> None:
        with self._create_lock:
            if collection_id not in self._dimensions:
                if not self._exists(collection_id):
                    self._create(_name(collection_id), dimension)
                self._dimensions[collection_id] = self._stored_dimension(_name(collection_id))
            stored = self._dimensions[collection_id]
        if stored != dimension:
            raise StoreError(
                f"Collection {collection_id!r} holds vectors of dimension {stored}, not {dimension}. "
                "It was built with another embedding model; embed it anew."
            )

    def _create(self, name: str, dimension: int) -> None:
        with _as_store_error("make a collection"):
            self._client.create_collection(
                name,
                vectors_config={DENSE: models.VectorParams(size=dimension, distance=models.Distance.COSINE)},
                sparse_vectors_config={SPARSE: models.SparseVectorParams(modifier=models.Modifier.IDF)},
                quantization_config=models.ScalarQuantization(
                    scalar=models.ScalarQuantizationConfig(type=models.ScalarType.INT8, quantile=0.99, always_ram=True)
                ),
            )
            for field in INDEXED_KEYWORDS:
                self._client.create_payload_index(name, field, models.PayloadSchemaType.KEYWORD, wait=True)
            of_tenants = models.KeywordIndexParams(type=models.KeywordIndexType.KEYWORD, is_tenant=True)
            self._client.create_payload_index(name, TENANT, of_tenants, wait=True)

    def _stored_dimension(self, name: str) -> int:
        with _as_store_error("read a collection's settings"):
            vectors = self._client.get_collection(name).config.params.vectors
        if not isinstance(vectors, dict) or DENSE not in vectors:
            raise StoreError(f"The server's collection {name!r} was not made by windfarm; it has no vector {DENSE!r}.")
        return vectors[DENSE].size


def _num_points(node: QdrantClient, name: str, wanted: models.Filter) -> int:
    return node.count(name, count_filter=wanted, exact=True).count if node.collection_exists(name) else 0


def _left_on(node: QdrantClient, count_left: Callable[[QdrantClient], int]) -> int:
    """1 where a node answers with an error: then nobody knows."""
    try:
        return count_left(node)
    except (ResponseHandlingException, OSError) as error:
        _log.warning("A node of the Qdrant cluster does not answer, so it was not asked for what is deleted: %s", error)
        return 0
    except ApiException as error:
        _log.warning("A node of the Qdrant cluster could not say whether a deletion reached it: %s", error)
        return 1


def _name(collection_id: str) -> str:
    return f"{PREFIX}{collection_id}"


def _point(
    chunk: StoredChunk, row: npt.NDArray[np.float32], active: bool, labels: PointLabels | None
) -> models.PointStruct:
    words = encode_document(searchable_text(chunk), chunk.language)
    vectors: Any = {
        DENSE: row.tolist(),
        SPARSE: models.SparseVector(indices=list(words.indices), values=list(words.values)),
    }
    payload = chunk_to_payload(chunk, active=active, labels=labels)
    return models.PointStruct(id=point_id(chunk.version_id, chunk.index), vector=vectors, payload=payload)


def _labels(payload: dict[str, Any]) -> PointLabels | None:
    if TENANT not in payload or READERS not in payload:
        return None
    return PointLabels(payload[TENANT], tuple(sorted(payload[READERS])))


def _access_filter(allowed: QdrantFilter) -> models.Filter:
    return models.Filter.model_validate(allowed)


def _filter(
    *, document_id: str | None = None, version_id: str | None = None, active: bool | None = None
) -> models.Filter:
    shown = None if active is None else visibility(active)
    wanted = {"document_id": document_id, "version_id": version_id, VISIBILITY: shown}
    conditions: list[Any] = [
        models.FieldCondition(key=field, match=models.MatchValue(value=value))
        for field, value in wanted.items()
        if value is not None
    ]
    return models.Filter(must=conditions)


@contextmanager
def _as_store_error(what: str) -> Iterator[None]:
    """What the client raises for a server that is away, refuses or does not understand."""
    try:
        yield
    except (ApiException, OSError, ValueError) as error:
        if _is_away(error):
            raise StoreUnavailable(
                f"The Qdrant server does not answer ({error}). Check that it runs and that its address in "
                "store.qdrant.url or WINDFARM_QDRANT_URL is right; what waits for it goes on by itself."
            ) from error
        raise StoreError(f"The Qdrant server could not {what}: {error}") from error


def _is_away(error: Exception) -> bool:
    """No connection, no answer in time, or a server (or the proxy before it) that says it cannot answer now."""
    if isinstance(error, UnexpectedResponse):
        return error.status_code in (502, 503, 504)
    if isinstance(error, ResponseHandlingException):
        # An answer that is there but not understood is wrapped in the same way.
        return not isinstance(error.source, ValueError)
    return isinstance(error, OSError)
