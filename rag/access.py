"""Who may read what, compiled into the one filter that every search of the vector store carries.

The store takes an `AccessFilter` and nothing else, and only this module can make one: whoever forgets the rights of the
person who asks has nothing to search with. What a document's own readers are stands in the payload of its points; the
readers of a collection, and who belongs to which group, are asked from the caller (from the database) for each search
and never stored beside the vectors, so that a change of them needs no write there. Pure values; no Qdrant, no database.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, final

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from rag.vector_store import ScoredChunk

DEFAULT_TENANT = "default"
EVERYBODY = "everybody"
"""As a reader: all users of the tenant."""

TENANT, READERS, VISIBILITY = "tenant", "readers", "visibility"
"""Payload fields that the filter asks for. A point that lacks one of them is found by nobody."""
VISIBLE, HIDDEN = "active", "hidden"
"""Words and not flags: version 0.9.0 of the embedded engine cannot filter flags."""

_INHERITED, _NOBODY = "inherited", "nobody"
_RESERVED = frozenset({EVERYBODY, _INHERITED, _NOBODY})

QdrantFilter = Mapping[str, Any]
"""A filter in the form of Qdrant's REST interface, with `must` alone: each condition names a payload field and the
keywords of which it must hold one."""


@dataclass(frozen=True, slots=True)
class Reader:
    """A person who asks, as the database knows them right now.

    `tenant` None: may look into every tenant. An administrator reads everything in the tenants that they may look into.
    """

    user_id: str
    group_ids: frozenset[str] = frozenset()
    is_administrator: bool = False
    tenant: str | None = DEFAULT_TENANT

    def __post_init__(self) -> None:
        if wrong := self.names & (_RESERVED - {EVERYBODY}) | {self.user_id, *self.group_ids} & _RESERVED:
            raise ValueError(f"{sorted(wrong)[0]!r} cannot be the id of a user or group; it has a meaning of its own.")

    @property
    def names(self) -> frozenset[str]:
        """Under what this person may stand in a list of readers."""
        return frozenset({self.user_id, EVERYBODY}) | self.group_ids

    def is_of(self, tenant: str) -> bool:
        return self.tenant is None or self.tenant == tenant


@dataclass(frozen=True, slots=True)
class CollectionGrant:
    """What the database says of one collection: its index in the vector store, and who may read what has no readers
    of its own. `readers` holds ids of users and groups, and `EVERYBODY`. The owner reads everything in it."""

    index_id: str
    owner_id: str
    readers: frozenset[str] = frozenset()
    tenant: str = DEFAULT_TENANT

    def is_managed_by(self, reader: Reader) -> bool:
        """Whether somebody may read all of it and change it."""
        return reader.is_of(self.tenant) and (reader.is_administrator or reader.user_id == self.owner_id)

    def is_read_by(self, reader: Reader) -> bool:
        """Whether somebody may read its documents that have no readers of their own."""
        return self.is_managed_by(reader) or (reader.is_of(self.tenant) and not self.readers.isdisjoint(reader.names))


@dataclass(frozen=True, slots=True)
class PointLabels:
    """What the payload of a document's points says of its readers."""

    tenant: str
    readers: tuple[str, ...]

    @property
    def payload(self) -> dict[str, Any]:
        return {TENANT: self.tenant, READERS: list(self.readers)}


def label_points(tenant: str, own_readers: frozenset[str] | None) -> PointLabels:
    """`own_readers` None: those of the collection; empty: nobody but who manages the collection."""
    if own_readers is None:
        return PointLabels(tenant, (_INHERITED,))
    return PointLabels(tenant, tuple(sorted(own_readers)) or (_NOBODY,))


_SEAL = object()


@final
class AccessFilter:
    """Which indexes somebody may search, with the filter for each. Only this module can make one."""

    __slots__ = ("_by_index",)

    def __init__(self, seal: object, by_index: Mapping[str, QdrantFilter]) -> None:
        if seal is not _SEAL:
            raise TypeError("Access filters are made by rag.access alone. Search with `search_as` or `StoreAsSeenBy`.")
        self._by_index = dict(by_index)

    def __init_subclass__(cls) -> None:
        raise TypeError("AccessFilter has no subclasses: one could leave its conditions out.")

    def __reduce__(self) -> str:
        raise TypeError("An access filter is made for one search, neither kept nor sent.")

    @property
    def by_index(self) -> Mapping[str, QdrantFilter]:
        return self._by_index


def compile_filter(
    reader: Reader, collections: Sequence[CollectionGrant], document_ids: Sequence[str] | None = None
) -> AccessFilter:
    """The mandatory filter of one search. A collection of another tenant is not searched at all. `document_ids`: only
    these documents, as far as the reader may read them."""
    allowed = {
        grant.index_id: _conditions(reader, grant, document_ids) for grant in collections if reader.is_of(grant.tenant)
    }
    return AccessFilter(_SEAL, allowed)


def _conditions(reader: Reader, grant: CollectionGrant, document_ids: Sequence[str] | None) -> QdrantFilter:
    must = [_one_of(VISIBILITY, [VISIBLE]), _one_of(TENANT, [grant.tenant])]
    if not grant.is_managed_by(reader):
        names = reader.names | ({_INHERITED} if grant.is_read_by(reader) else set())
        must.append(_one_of(READERS, sorted(names)))
    if document_ids is not None:
        must.append(_one_of("document_id", document_ids))
    return {"must": must}


def _one_of(key: str, keywords: Sequence[str]) -> dict[str, Any]:
    return {"key": key, "match": {"any": list(keywords)}}


class FilteredStore(Protocol):
    """The only way into a vector store that gives text back."""

    def search_filtered(
        self, access: AccessFilter, *, vector: npt.NDArray[np.float32] | None, text: str | None, limit: int
    ) -> list[ScoredChunk]: ...


def search_as(
    reader: Reader,
    store: FilteredStore,
    collections: Sequence[CollectionGrant],
    *,
    vector: npt.NDArray[np.float32] | None,
    text: str | None,
    limit: int,
    document_ids: Sequence[str] | None = None,
) -> list[ScoredChunk]:
    """What `reader` may find there, with `document_ids` in these documents alone. Raises `StoreError`."""
    access = compile_filter(reader, collections, document_ids)
    return store.search_filtered(access, vector=vector, text=text, limit=limit)


@dataclass(frozen=True)
class StoreAsSeenBy:
    """A store for one reader and fixed collections, as the retriever wants it; for indexes that no database knows."""

    reader: Reader
    store: FilteredStore
    collections: Sequence[CollectionGrant] = field(default_factory=tuple)

    def search(
        self, collection_ids: Sequence[str], *, vector: npt.NDArray[np.float32] | None, text: str | None, limit: int
    ) -> list[ScoredChunk]:
        """`collection_ids` are index ids here; those without a grant hold nothing."""
        wanted = [grant for grant in self.collections if grant.index_id in collection_ids]
        return search_as(self.reader, self.store, wanted, vector=vector, text=text, limit=limit)
