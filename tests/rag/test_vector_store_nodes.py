"""A Qdrant cluster with several copies: a deletion ends when no node has any of it, or says that one still does. Each
node is a whole Qdrant in memory, which follows the others late or not at all."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest
from qdrant_client import QdrantClient, models
from qdrant_client.http.exceptions import ResponseHandlingException

from rag.errors import StoreError
from rag.types import StoredChunk
from rag.vector_store_server import ServerVectorStore
from tests.seen import LABELS


class Node:
    """A client of one node. `lags_s`: how much later than the others it carries a deletion out."""

    def __init__(self, lags_s: float = 0.0, is_away: bool = False) -> None:
        self._real = QdrantClient(":memory:")
        self._lags_s = lags_s
        self._is_away = is_away
        self.deletions: list[dict[str, Any]] = []
        self.timers: list[threading.Timer] = []
        self.copies: list[Node] = []

    def __getattr__(self, name: str) -> Any:
        if self._is_away:
            raise ResponseHandlingException(ConnectionError("connection refused"))
        return getattr(self._real, name)

    def upsert(self, *args: Any, **options: Any) -> None:
        for node in (self, *self.copies):
            node._real.upsert(*args, **options)

    def create_collection(self, *args: Any, **options: Any) -> None:
        for node in (self, *self.copies):
            node._real.create_collection(*args, **options)

    def delete(self, *args: Any, **options: Any) -> None:
        self.deletions.append(options)
        for node in (self, *self.copies):
            node.later("delete", *args, **options)

    def delete_collection(self, *args: Any, **options: Any) -> None:
        for node in (self, *self.copies):
            node.later("delete_collection", *args, **options)

    def later(self, method: str, *args: Any, **options: Any) -> None:
        if self._lags_s == 0:
            getattr(self._real, method)(*args, **options)
            return
        self.timers.append(threading.Timer(self._lags_s, getattr(self._real, method), args, options))
        self.timers[-1].start()

    def stop(self) -> None:
        for timer in self.timers:
            timer.cancel()
            timer.join()


def cluster(*nodes: Node) -> ServerVectorStore:
    first: Any = nodes[0]
    first.copies = list(nodes[1:])
    store = ServerVectorStore(first, nodes)  # type: ignore[arg-type]
    for document in ("d1", "d2"):
        chunk = StoredChunk(f"{document}-0", "c1", document, f"v-{document}", "d.md", "text", 0, 4, 0)
        store.upsert("c1", [chunk], np.eye(4, dtype=np.float32)[:1], active=True, labels=LABELS)
    return store


def count_on(node: Node, document: str) -> int:
    wanted = models.Filter(must=[models.FieldCondition(key="document_id", match=models.MatchValue(value=document))])
    return int(node._real.count("windfarm_c1", count_filter=wanted).count)


def test_a_deletion_ends_when_the_last_node_has_carried_it_out() -> None:
    nodes = [Node(), Node(lags_s=0.2), Node(lags_s=0.4)]
    store = cluster(*nodes)
    store.delete_document("c1", "d1")
    assert [count_on(node, "d1") for node in nodes] == [0, 0, 0]
    assert [count_on(node, "d2") for node in nodes] == [1, 1, 1]
    store.delete_collection("c1")
    assert not any(node._real.collection_exists("windfarm_c1") for node in nodes)


def test_a_deletion_is_ordered_by_the_leader_and_waited_for() -> None:
    node = Node()
    store = cluster(node)
    store.delete_document("c1", "d1")
    store.delete_version("c1", "v-d2")
    for options in node.deletions:
        assert options["wait"] is True and options["ordering"] == models.WriteOrdering.STRONG


@pytest.mark.parametrize("what", ["document", "collection"])
def test_a_node_that_keeps_what_was_deleted_is_said_after_two_seconds(
    monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    nodes = [Node(), Node(lags_s=3600)]
    store = cluster(*nodes)
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    with pytest.raises(StoreError, match="1 of 2 nodes"):
        store.delete_document("c1", "d1") if what == "document" else store.delete_collection("c1")
    assert 2.0 < clock[0] < 2.1
    for node in nodes:
        node.stop()


def test_a_node_that_is_away_shows_nothing_and_holds_up_nothing() -> None:
    """It takes over the state of the others before the cluster asks it again."""
    here, away = Node(), Node()
    store = cluster(here, away)
    away._is_away = True
    store.delete_document("c1", "d1")
    assert count_on(here, "d1") == 0
