"""Rights become a filter that no search can leave out, and that lets through what the rights say and nothing else."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from qdrant_client import QdrantClient

from rag.access import (
    EVERYBODY,
    AccessFilter,
    CollectionGrant,
    PointLabels,
    Reader,
    StoreAsSeenBy,
    compile_filter,
    label_points,
    search_as,
)
from rag.types import StoredChunk
from rag.vector_store import VectorStore, open_vector_store
from rag.vector_store_server import ServerVectorStore

ANNA = Reader("user_anna", frozenset({"group_hr"}))
BEN = Reader("user_ben")
ADMIN = Reader("user_admin", is_administrator=True)
STRANGER = Reader("user_anna", frozenset({"group_hr"}), tenant="other")
EVERYWHERE = Reader("user_root", is_administrator=True, tenant=None)
READERS = (ANNA, BEN, ADMIN, STRANGER, EVERYWHERE)

NOT_INHERITED = {
    "hr": frozenset({"group_hr"}),
    "ben": frozenset({"user_ben"}),
    "all": frozenset({EVERYBODY}),
    "nobody": frozenset[str](),
}
DOCUMENTS: dict[str, frozenset[str] | None] = {"inherits": None, **NOT_INHERITED}
GRANTS = {
    "private": CollectionGrant("c1", "user_owner"),
    "for hr": CollectionGrant("c1", "user_owner", frozenset({"group_hr"})),
    "for all": CollectionGrant("c1", "user_owner", frozenset({EVERYBODY})),
    "of ben": CollectionGrant("c1", "user_ben"),
}


@pytest.fixture(params=["edge", "server"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[VectorStore]:
    made: VectorStore = (
        open_vector_store(tmp_path / "vectors")
        if request.param == "edge"
        else ServerVectorStore(QdrantClient(":memory:"))
    )
    yield made
    made.close()


def chunk(name: str) -> StoredChunk:
    return StoredChunk(f"{name}-0", "c1", name, f"v-{name}", f"{name}.md", f"secret of {name}", 0, 9, 0)


def fill(store: VectorStore, tenant: str = "default") -> None:
    for name, own in DOCUMENTS.items():
        labels = label_points(tenant, own)
        store.upsert("c1", [chunk(name)], np.eye(4, dtype=np.float32)[:1], active=True, labels=labels)


def names_found(store: VectorStore, reader: Reader, grant: CollectionGrant, **leg: Any) -> set[str]:
    legs: dict[str, Any] = leg or {"vector": np.eye(4, dtype=np.float32)[0], "text": "secret"}
    found = search_as(reader, store, [grant], limit=20, **legs)
    return {hit.chunk.document_id for hit in found}


def names_allowed(reader: Reader, grant: CollectionGrant) -> set[str]:
    """The rules in words of their own, to hold the filter against."""
    if reader.tenant not in (None, "default"):
        return set()
    if reader.is_administrator or reader.user_id == grant.owner_id:
        return set(DOCUMENTS)
    names = {reader.user_id, "everybody", *reader.group_ids}
    return {name for name, own in DOCUMENTS.items() if names & (grant.readers if own is None else own)}


@pytest.mark.parametrize("legs", ["both", "meaning", "words"])
def test_each_person_finds_what_they_may_read_and_nothing_else(store: VectorStore, legs: str) -> None:
    fill(store)
    leg: dict[str, Any] = {
        "both": {},
        "meaning": {"vector": np.eye(4, dtype=np.float32)[0], "text": None},
        "words": {"vector": None, "text": "secret"},
    }[legs]
    for reader, grant in itertools.product(READERS, GRANTS.values()):
        assert names_found(store, reader, grant, **leg) == names_allowed(reader, grant), (reader, grant)


def test_some_of_these_rights_differ() -> None:
    """The test above would pass for a filter that lets everything or nothing through, if these were all the same."""
    sets = {frozenset(names_allowed(reader, grant)) for reader, grant in itertools.product(READERS, GRANTS.values())}
    assert len(sets) >= 6


def test_an_index_of_another_tenant_gives_nothing_even_to_its_administrator(store: VectorStore) -> None:
    """Where an index were mixed up with another, the tenant in the payload still keeps them apart."""
    fill(store, tenant="other")
    assert names_found(store, ADMIN, GRANTS["for all"]) == set()
    assert names_found(store, EVERYWHERE, GRANTS["for all"]) == set()
    assert names_found(store, EVERYWHERE, CollectionGrant("c1", "x", tenant="other")) == set(DOCUMENTS)


def test_points_without_labels_are_found_by_nobody(store: VectorStore) -> None:
    store.upsert("c1", [chunk("bare")], np.eye(4, dtype=np.float32)[:1], active=True)
    for reader in READERS:
        assert names_found(store, reader, GRANTS["for all"]) == set()


def test_new_labels_hold_at_once(store: VectorStore) -> None:
    fill(store)
    store.label_document("c1", "hr", label_points("default", frozenset({"user_ben"})))
    assert "hr" in names_found(store, BEN, GRANTS["private"])
    assert "hr" not in names_found(store, ANNA, GRANTS["private"])
    assert store.list_versions()["v-hr"].labels == PointLabels("default", ("user_ben",))
    store.label_document("c1", "hr", label_points("default", frozenset({"user_ben", "group_hr"})))
    assert store.list_versions()["v-hr"].labels == PointLabels("default", ("group_hr", "user_ben"))
    store.label_document("nowhere", "hr", label_points("default", None))


def test_an_empty_and_an_unknown_collection_hold_nothing(store: VectorStore) -> None:
    assert names_found(store, ADMIN, CollectionGrant("nowhere", "x")) == set()
    fill(store)
    for name in DOCUMENTS:
        store.delete_document("c1", name)
    assert names_found(store, ADMIN, GRANTS["for all"]) == set()


def test_a_store_seen_by_somebody_knows_no_other_collections(store: VectorStore) -> None:
    fill(store)
    seen = StoreAsSeenBy(BEN, store, (GRANTS["of ben"],))
    assert len(seen.search(["c1"], vector=None, text="secret", limit=20)) == len(DOCUMENTS)
    assert seen.search(["c2"], vector=None, text="secret", limit=20) == []


@pytest.mark.parametrize("instead", [None, {}, {"c1": {"must": []}}, ["c1"], "c1"])
def test_no_store_searches_without_a_filter(store: VectorStore, instead: Any) -> None:
    fill(store)
    with pytest.raises(TypeError, match="AccessFilter"):
        store.search_filtered(instead, vector=None, text="secret", limit=5)


def test_a_filter_cannot_be_made_elsewhere() -> None:
    everything = {"c1": {"must": []}}
    for seal in (None, object(), "seal"):
        with pytest.raises(TypeError, match=r"rag\.access alone"):
            AccessFilter(seal, everything)
    with pytest.raises(TypeError, match="no subclasses"):
        type("Open", (AccessFilter,), {})
    for keep in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="neither kept nor sent"):
            keep(compile_filter(ANNA, []))
    with pytest.raises((TypeError, AttributeError)):
        compile_filter(ANNA, []).by_index = everything  # type: ignore[misc]


def test_a_filter_of_nobodys_collections_is_empty_and_not_open(store: VectorStore) -> None:
    fill(store)
    assert dict(compile_filter(ANNA, []).by_index) == {}
    assert store.search_filtered(compile_filter(ANNA, []), vector=None, text="secret", limit=5) == []


@pytest.mark.parametrize("name", ["everybody", "inherited", "nobody"])
def test_nobody_is_called_as_a_right(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        Reader(name)
    with pytest.raises(ValueError, match=name):
        Reader("user_1", frozenset({name}))


def test_records_of_rights_cannot_be_changed() -> None:
    for record, field in (
        (ANNA, "is_administrator"),
        (GRANTS["private"], "readers"),
        (label_points("t", None), "tenant"),
    ):
        with pytest.raises(AttributeError):
            setattr(copy.copy(record), field, True)
