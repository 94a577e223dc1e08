"""The vector store in our own process: Qdrant's engine (`qdrant-edge-py`), one shard folder per collection.

One process owns the folder; a lock file says so. Writes go through the engine's write-ahead log before they are
acknowledged. The engine does not merge segments by itself: somebody calls `optimize`, beside which all goes on.
"""

from __future__ import annotations

import fcntl
import os
import re
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import qdrant_edge as qe

from rag.access import READERS, TENANT, VISIBILITY, AccessFilter, PointLabels, QdrantFilter
from rag.bm25 import encode_document, encode_query
from rag.errors import StoreError, StoreLocked, StoreMissing
from rag.types import StoredChunk, Vectors
from rag.vector_store import (
    DENSE,
    SPARSE,
    Inventory,
    PlacedVectors,
    ScoredChunk,
    VersionState,
    check_filter,
    check_upsert,
    chunk_to_payload,
    join_legs,
    placed_vectors,
    point_id,
    searchable_text,
    take_inventory,
    visibility,
)
from rag.vector_store_shard import Shard, require_space, sweep

LOCK_FILE = "owner.lock"
_FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}")
_BATCH = 256
_PAGE = 1024
_MANY = 10_000_000
_LOCK_POLL_S = 0.05


class EdgeVectorStore:
    """See `VectorStore`. Make it with `open`."""

    def __init__(self, root: Path, lock_file: IO[str]) -> None:
        self._root = root
        self._lock_file: IO[str] | None = lock_file
        self._shards: dict[str, Shard] = {}
        self._shards_lock = threading.Lock()
        for name in self.list_collections():
            self._shards[name] = Shard.load(root / name)

    @classmethod
    def open(cls, root: Path, *, create: bool = True, lock_timeout_s: float = 0.0) -> EdgeVectorStore:
        if not root.is_dir() and not create:
            raise StoreMissing(
                f"The vector store's folder {root} is gone. Restore it from a backup, or delete the collections and "
                "ingest their documents again."
            )
        root.mkdir(parents=True, exist_ok=True)
        lock_file = _acquire(root / LOCK_FILE, lock_timeout_s)
        try:
            sweep(root)
            return cls(root, lock_file)
        except BaseException:
            lock_file.close()
            raise

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
        shard = self._shard_or_new(collection_id, vectors.shape[1])
        if shard.dimension != vectors.shape[1]:
            raise StoreError(
                f"Collection {collection_id!r} holds vectors of dimension {shard.dimension}, not {vectors.shape[1]}. "
                "It was built with another embedding model; embed it anew."
            )
        require_space(self._root, 4 * vectors.nbytes)
        for start in range(0, len(chunks), _BATCH):
            part = slice(start, start + _BATCH)
            points = [
                _point(chunk, row, active, labels) for chunk, row in zip(chunks[part], vectors[part], strict=True)
            ]
            shard.update(qe.UpdateOperation.upsert_points(points), len(points))

    def activate_version(
        self, collection_id: str, version_id: str, *, labels: PointLabels, replaces: str | None = None
    ) -> None:
        shard = self._shard(collection_id)
        if shard is None:
            return
        with shard.visibility.exclusive():
            shard.update(_show(version_id, True, labels))
            if replaces is not None and replaces != version_id:
                shard.update(_show(replaces, False))

    def deactivate_version(self, collection_id: str, version_id: str) -> None:
        if shard := self._shard(collection_id):
            shard.update(_show(version_id, False))

    def label_document(self, collection_id: str, document_id: str, labels: PointLabels) -> None:
        if shard := self._shard(collection_id):
            of_document = qe.Filter(must=[_equals("document_id", document_id)])
            # Points in merged segments are written anew with their new payload.
            num_points = self.count(collection_id, document_id=document_id)
            shard.update(qe.UpdateOperation.set_payload_by_filter(of_document, labels.payload), num_points)

    def delete_version(self, collection_id: str, version_id: str) -> None:
        self._delete_where(collection_id, "version_id", version_id)

    def delete_document(self, collection_id: str, document_id: str) -> None:
        self._delete_where(collection_id, "document_id", document_id)

    def _delete_where(self, collection_id: str, field: str, value: str) -> None:
        if shard := self._shard(collection_id):
            wanted = qe.Filter(must=[_equals(field, value)])
            num_points = shard.use(lambda edge: int(edge.count(qe.CountRequest(exact=True, filter=wanted))))
            shard.update(qe.UpdateOperation.delete_points_by_filter(wanted), num_points)

    def delete_collection(self, collection_id: str) -> None:
        with self._shards_lock:
            self._check_open()
            shard = self._shards.pop(collection_id, None)
            if shard is not None:
                shard.remove()

    def list_collections(self) -> list[str]:
        return sorted(entry.name for entry in self._root.iterdir() if entry.is_dir() and entry.name[0] != ".")

    def count(
        self,
        collection_id: str,
        *,
        document_id: str | None = None,
        version_id: str | None = None,
        active: bool | None = None,
    ) -> int:
        shard = self._shard(collection_id)
        if shard is None:
            return 0
        wanted = _filter(document_id=document_id, version_id=version_id, active=active)
        return int(shard.use(lambda edge: edge.count(qe.CountRequest(exact=True, filter=wanted))))

    def measure(self, collection_id: str, *, document_id: str) -> Inventory:
        shard = self._shard(collection_id)
        return take_inventory(() if shard is None else _vectors_of(shard, document_id))

    def vectors_of(self, collection_id: str, version_id: str) -> PlacedVectors:
        shard = self._shard(collection_id)
        return placed_vectors(_placed(shard, version_id) if shard is not None else ())

    def list_versions(self) -> dict[str, VersionState]:
        versions: dict[str, VersionState] = {}
        for collection_id, shard in self._open_shards():
            total = shard.use(lambda edge: _count_by_version(edge, None))
            visible = shard.use(lambda edge: _count_by_version(edge, _filter(active=True)))
            labels = shard.use(_labels_by_version)
            for version_id, num_points in total.items():
                versions[version_id] = VersionState(
                    collection_id, num_points, visible.get(version_id, 0), labels.get(version_id)
                )
        return versions

    def search_filtered(
        self, access: AccessFilter, *, vector: npt.NDArray[np.float32] | None, text: str | None, limit: int
    ) -> list[ScoredChunk]:
        check_filter(access)
        found: list[ScoredChunk] = []
        for collection_id, allowed in access.by_index.items():
            if shard := self._shard(collection_id):
                found += _search_shard(shard, _access_filter(allowed), vector, text, limit)
        return found

    def flush(self) -> None:
        for _, shard in self._open_shards():
            shard.use(lambda edge: edge.flush())

    def optimize(self) -> bool:
        num_merged = sum(shard.optimize() for _, shard in self._open_shards())
        return num_merged > 0

    def close(self) -> None:
        with self._shards_lock:
            for shard in self._shards.values():
                shard.close()
            self._shards.clear()
            if self._lock_file is not None:
                self._lock_file.close()
                self._lock_file = None

    def _open_shards(self) -> list[tuple[str, Shard]]:
        with self._shards_lock:
            self._check_open()
            return sorted(self._shards.items())

    def _shard(self, collection_id: str) -> Shard | None:
        with self._shards_lock:
            self._check_open()
            return self._shards.get(collection_id)

    def _shard_or_new(self, collection_id: str, dimension: int) -> Shard:
        if not _FOLDER_NAME.fullmatch(collection_id):
            raise StoreError(f"{collection_id!r} cannot name a collection's folder; use letters, digits, - and _.")
        with self._shards_lock:
            self._check_open()
            if collection_id not in self._shards:
                self._shards[collection_id] = Shard.create(self._root, collection_id, dimension)
            return self._shards[collection_id]

    def _check_open(self) -> None:
        if self._lock_file is None:
            raise StoreError("The vector store is closed.")


def _point(chunk: StoredChunk, row: npt.NDArray[np.float32], active: bool, labels: PointLabels | None) -> qe.Point:
    words = encode_document(searchable_text(chunk), chunk.language)
    vectors: Any = {DENSE: row.tolist(), SPARSE: qe.SparseVector(list(words.indices), list(words.values))}
    payload = chunk_to_payload(chunk, active=active, labels=labels)
    return qe.Point(point_id(chunk.version_id, chunk.index), vectors, payload)


def _equals(field: str, value: str) -> qe.FieldCondition:
    return qe.FieldCondition(field, match=qe.MatchValue(value))


def _filter(
    *, document_id: str | None = None, version_id: str | None = None, active: bool | None = None
) -> qe.Filter | None:
    shown = None if active is None else visibility(active)
    wanted = {"document_id": document_id, "version_id": version_id, VISIBILITY: shown}
    conditions: list[Any] = [_equals(field, value) for field, value in wanted.items() if value is not None]
    return qe.Filter(must=conditions) if conditions else None


def _vectors_of(shard: Shard, document_id: str) -> Iterator[tuple[list[int], list[float]]]:
    offset: Any = None
    wanted = qe.Filter(must=[_equals("document_id", document_id)])
    while True:
        page = qe.ScrollRequest(
            offset=offset, limit=_PAGE, filter=wanted, with_payload=False, with_vector=[DENSE, SPARSE]
        )
        records, offset = shard.use(lambda edge, page=page: edge.scroll(page))  # type: ignore[misc]
        for record in records:
            vectors: Any = record.vector
            yield list(vectors[SPARSE].indices) if SPARSE in vectors else [], vectors[DENSE]
        if offset is None:
            return


def _placed(shard: Shard, version_id: str) -> Iterator[tuple[dict[str, Any], list[float]]]:
    offset: Any = None
    wanted = qe.Filter(must=[_equals("version_id", version_id)])
    while True:
        page = qe.ScrollRequest(offset=offset, limit=_PAGE, filter=wanted, with_payload=True, with_vector=[DENSE])
        records, offset = shard.use(lambda edge, page=page: edge.scroll(page))  # type: ignore[misc]
        for record in records:
            vectors: Any = record.vector
            yield dict(record.payload or {}), vectors[DENSE]
        if offset is None:
            return


def _access_filter(allowed: QdrantFilter) -> qe.Filter:
    conditions: list[Any] = [
        qe.FieldCondition(condition["key"], match=qe.MatchAny(condition["match"]["any"]))
        for condition in allowed["must"]
    ]
    return qe.Filter(must=conditions)


def _show(version_id: str, active: bool, labels: PointLabels | None = None) -> qe.UpdateOperation:
    of_version = qe.Filter(must=[_equals("version_id", version_id)])
    payload = {VISIBILITY: visibility(active)} | (labels.payload if labels is not None else {})
    return qe.UpdateOperation.set_payload_by_filter(of_version, payload)


def _count_by(edge: qe.EdgeShard, field: str, wanted: qe.Filter | None) -> dict[str, int]:
    request = qe.FacetRequest(field, limit=_MANY, exact=True, filter=wanted)
    # A value whose last point was deleted is still listed, with 0.
    return {str(hit.value): hit.count for hit in edge.facet(request).hits if hit.count > 0}


def _count_by_version(edge: qe.EdgeShard, wanted: qe.Filter | None) -> dict[str, int]:
    return _count_by(edge, "version_id", wanted)


def _labels_by_version(edge: qe.EdgeShard) -> dict[str, PointLabels]:
    """What all points of a version say, where they agree. One count per tenant, user and group: there are few."""
    total = _count_by_version(edge, None)
    said: dict[str, dict[str, list[str]]] = {field: {} for field in (TENANT, READERS)}
    differing: set[str] = set()
    for field, words in said.items():
        for value in _count_by(edge, field, None):
            for version_id, count in _count_by_version(edge, qe.Filter(must=[_equals(field, value)])).items():
                words.setdefault(version_id, []).append(value)
                if count != total.get(version_id):
                    differing.add(version_id)
    return {
        version_id: PointLabels(tenants[0], tuple(sorted(readers)))
        for version_id, readers in said[READERS].items()
        if len(tenants := said[TENANT].get(version_id, [])) == 1 and version_id not in differing
    }


def _search_shard(
    shard: Shard, visible: qe.Filter, vector: npt.NDArray[np.float32] | None, text: str | None, limit: int
) -> list[ScoredChunk]:
    by_meaning: list[qe.ScoredPoint] = []
    by_words: list[qe.ScoredPoint] = []
    with shard.visibility.shared():
        if vector is not None:
            dense = qe.QueryRequest(
                limit=limit,
                query=qe.Query.Nearest(vector.tolist(), using=DENSE),
                filter=visible,
                with_payload=True,
                params=qe.SearchParams(quantization=qe.QuantizationSearchParams(rescore=True, oversampling=2.0)),
            )
            by_meaning = shard.use(lambda edge: edge.query(dense))
        words = encode_query(text) if text else None
        if words and words.indices:
            sparse = qe.QueryRequest(
                limit=limit,
                query=qe.Query.Nearest(qe.SparseVector(list(words.indices), list(words.values)), using=SPARSE),
                filter=visible,
                with_payload=True,
                with_vector=[DENSE] if vector is not None else False,
            )
            by_words = shard.use(lambda edge: edge.query(sparse))
    return join_legs(by_meaning, by_words, vector)


def _acquire(path: Path, timeout_s: float) -> IO[str]:
    """Take the folder for this process. The kernel frees the lock when its owner ends, however it ends; it cannot be
    awaited with a time limit, hence the polling."""
    lock_file = path.open("a+")
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            fcntl.flock(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() < deadline:
                time.sleep(_LOCK_POLL_S)
                continue
            lock_file.seek(0)
            owner = lock_file.read().strip() or "unknown"
            lock_file.close()
            raise StoreLocked(
                f"The vector store in {path.parent} is in use by process {owner}. Stop that windfarm, or use another "
                "data folder (WINDFARM_HOME)."
            ) from None
        lock_file.truncate(0)
        lock_file.write(str(os.getpid()))
        lock_file.flush()
        return lock_file
