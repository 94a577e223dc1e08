"""The one contract between `rag` and a vector database, and the choice between the two that we have.

Text comes out through `search_filtered` alone, which takes the filter that only `rag.access` can make.
Each collection is an index of its own (a shard folder of the embedded engine, a collection of a server): dimension,
word statistics (IDF) and deletion then belong to that collection alone, and one tenant's words do not shift another's
scores. All calls block; call them in threads. They may be called from several threads at once. What a method has
acknowledged by returning survives a kill of the process.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol
from uuid import UUID, uuid5

import numpy as np
import numpy.typing as npt

from rag.access import HIDDEN, READERS, VISIBILITY, VISIBLE, AccessFilter, PointLabels
from rag.errors import StoreError
from rag.types import StoredChunk, Vectors

DENSE = "dense"
SPARSE = "bm25"
INDEXED_KEYWORDS = ("document_id", "version_id", VISIBILITY, READERS)
"""Payload fields with an index, beside the tenant's, whose index is of another kind."""
_CHUNK_FIELDS = tuple(field.name for field in fields(StoredChunk))
_NUM_SAMPLED = 4
POINT_NAMESPACE = UUID("5f0f5f0c-7f0c-5d67-9a35-8f6d2f4c1b11")


@dataclass(frozen=True, slots=True)
class ScoredChunk:
    """A chunk that one leg or both found.

    `dense` is the cosine with the query vector; it is exact and always there when a vector was given, also where only
    the words were found. `sparse` is the BM25 score, 0.0 where the words leg did not find the chunk.
    """

    chunk: StoredChunk
    dense: float | None
    sparse: float


@dataclass(frozen=True, slots=True)
class VersionState:
    """What the store holds of one document version. `labels`: what all of its points say; None where they differ."""

    collection_id: str
    num_points: int
    num_active: int
    labels: PointLabels | None = None

    @property
    def is_active(self) -> bool:
        return self.num_points > 0 and self.num_active == self.num_points


@dataclass(frozen=True, slots=True)
class Inventory:
    """What a document has in the store. `num_words` counts different words of the sparse index, `num_word_entries` the
    entries of all points under them; `sample` holds some of the vectors."""

    num_points: int
    num_words: int
    num_word_entries: int
    sample: tuple[npt.NDArray[np.float32], ...]


class VectorStore(Protocol):
    """Chunks with their dense vectors and words. Every method may raise `StoreError`."""

    def upsert(
        self,
        collection_id: str,
        chunks: Sequence[StoredChunk],
        vectors: Vectors,
        *,
        active: bool,
        labels: PointLabels | None = None,
    ) -> None:
        """Write chunks with their vectors (n, dimension). The same chunk of the same version is written over, never
        doubled. The first upsert makes the collection and fixes its dimension. Without labels nobody finds them."""

    def activate_version(
        self, collection_id: str, version_id: str, *, labels: PointLabels, replaces: str | None = None
    ) -> None:
        """Make a version visible to its readers and hide the one it replaces, in one step. May be repeated."""

    def label_document(self, collection_id: str, document_id: str, labels: PointLabels) -> None:
        """Change who may read the points of a document, those of all its versions. May be repeated."""

    def deactivate_version(self, collection_id: str, version_id: str) -> None: ...

    def delete_version(self, collection_id: str, version_id: str) -> None: ...

    def delete_document(self, collection_id: str, document_id: str) -> None: ...

    def delete_collection(self, collection_id: str) -> None:
        """Remove a collection with all its data; unknown ones are no error."""

    def list_collections(self) -> list[str]: ...

    def count(
        self,
        collection_id: str,
        *,
        document_id: str | None = None,
        version_id: str | None = None,
        active: bool | None = None,
    ) -> int:
        """Number of chunks, exact; 0 for an unknown collection."""

    def measure(self, collection_id: str, *, document_id: str) -> Inventory: ...

    def list_versions(self) -> dict[str, VersionState]:
        """Every version that has at least one chunk, by version id."""

    def search_filtered(
        self, access: AccessFilter, *, vector: npt.NDArray[np.float32] | None, text: str | None, limit: int
    ) -> list[ScoredChunk]:
        """Up to `limit` chunks that the filter lets through, by each leg that is given (vector: meaning, text: words),
        joined, in no promised order. Unknown collections hold nothing."""

    def flush(self) -> None:
        """Write what is buffered to disk; acknowledged writes are safe without it (write-ahead log)."""

    def optimize(self) -> bool:
        """Merge and index what was written since; True if there was work. Slow: call when idle."""

    def close(self) -> None:
        """Flush, release the folder. Safe to call twice."""


def open_vector_store(
    path: Path | None = None,
    *,
    url: str | None = None,
    nodes: Sequence[str] = (),
    api_key: str | None = None,
    create: bool = True,
    lock_timeout_s: float = 0.0,
) -> VectorStore:
    """The embedded store at `path`, or the server at `url`; `nodes` are the URLs of its replicas, if it has several.

    With `create=False` a missing folder raises `StoreMissing`. A folder that another process owns is waited for up to
    `lock_timeout_s`, then `StoreLocked` is raised.
    """
    if url is not None:
        from rag.vector_store_server import ServerVectorStore

        return ServerVectorStore.connect(url, nodes=nodes, api_key=api_key)
    if path is None:
        raise StoreError("A vector store needs a folder or the URL of a Qdrant server; give one of them.")
    from rag.vector_store_edge import EdgeVectorStore

    return EdgeVectorStore.open(path, create=create, lock_timeout_s=lock_timeout_s)


def point_id(version_id: str, chunk_index: int) -> str:
    """The same chunk of the same version always has the same id, so that a repeated write cannot double it."""
    return str(uuid5(POINT_NAMESPACE, f"{version_id}/{chunk_index}"))


def chunk_to_payload(chunk: StoredChunk, *, active: bool, labels: PointLabels | None) -> dict[str, Any]:
    payload: dict[str, Any] = {name: value for name in _CHUNK_FIELDS if (value := getattr(chunk, name)) is not None}
    payload["headings"] = list(chunk.headings)
    payload[VISIBILITY] = visibility(active)
    return payload | (labels.payload if labels is not None else {})


def chunk_from_payload(payload: Mapping[str, Any]) -> StoredChunk:
    values = {name: value for name, value in payload.items() if name in _CHUNK_FIELDS}
    values["headings"] = tuple(values.get("headings", ()))
    return StoredChunk(**values)


def visibility(active: bool) -> str:
    return VISIBLE if active else HIDDEN


def take_inventory(points: Iterable[tuple[Sequence[int], Sequence[float]]]) -> Inventory:
    """From the word indices and the vector of each point."""
    words: set[int] = set()
    num_points = num_entries = 0
    sample: list[npt.NDArray[np.float32]] = []
    for indices, vector in points:
        num_points += 1
        num_entries += len(indices)
        words.update(indices)
        if len(sample) < _NUM_SAMPLED:
            sample.append(np.asarray(vector, dtype=np.float32))
    return Inventory(num_points, len(words), num_entries, tuple(sample))


def check_filter(access: AccessFilter) -> None:
    """A search without the rights of somebody is a fault of the program, not of whoever asks."""
    if type(access) is not AccessFilter:
        raise TypeError(f"A search takes an AccessFilter of rag.access, not {type(access).__name__}.")


def searchable_text(chunk: StoredChunk) -> str:
    """What the words leg indexes: the chunk below its headings, which often say what it is about."""
    return "\n".join((*chunk.headings, chunk.text))


def check_upsert(collection_id: str, chunks: Sequence[StoredChunk], vectors: Vectors) -> None:
    """Refuse what would store something other than what the caller means."""
    if vectors.ndim != 2 or len(vectors) != len(chunks):
        raise StoreError(
            f"{len(chunks)} chunks came with vectors of shape {vectors.shape}; one row per chunk is needed."
        )
    if not np.isfinite(vectors).all():
        raise StoreError("A vector holds NaN or infinity; the embedding model gave a wrong result.")
    strangers = {chunk.collection_id for chunk in chunks} - {collection_id}
    if strangers:
        raise StoreError(f"Chunks of collection {sorted(strangers)[0]!r} cannot be written to {collection_id!r}.")


class FoundPoint(Protocol):
    """What both Qdrants give back for a hit."""

    @property
    def id(self) -> Any: ...
    @property
    def score(self) -> float: ...
    @property
    def payload(self) -> dict[str, Any] | None: ...
    @property
    def vector(self) -> Any: ...


def join_legs(
    by_meaning: Sequence[FoundPoint], by_words: Sequence[FoundPoint], vector: npt.NDArray[np.float32] | None
) -> list[ScoredChunk]:
    """One record per chunk. Where only the words found it, the cosine comes from the stored vector."""
    word_scores = {str(point.id): float(point.score) for point in by_words}
    found = {
        str(point.id): ScoredChunk(
            chunk_from_payload(point.payload or {}), float(point.score), word_scores.get(str(point.id), 0.0)
        )
        for point in by_meaning
    }
    rest = [point for point in by_words if str(point.id) not in found]
    cosines: list[float | None] = [None] * len(rest)
    if vector is not None and rest:
        cosines = exact_cosines(vector, [point.vector[DENSE] for point in rest]).tolist()
    for point, cosine in zip(rest, cosines, strict=True):
        found[str(point.id)] = ScoredChunk(chunk_from_payload(point.payload or {}), cosine, float(point.score))
    return list(found.values())


def exact_cosines(query: npt.NDArray[np.float32], rows: Sequence[Sequence[float]]) -> npt.NDArray[np.float32]:
    """Cosine of one query with each row; both are normalised by the embedder, rows may lose that by rounding."""
    matrix = np.asarray(rows, dtype=np.float32)
    norms = np.linalg.norm(matrix, axis=1) * float(np.linalg.norm(query))
    result: npt.NDArray[np.float32] = (matrix @ query) / np.maximum(norms, 1e-12)
    return result
