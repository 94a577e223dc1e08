"""A large shard is merged in another process, on a copy, while everything else goes on."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import qdrant_edge as qe

from rag import vector_store_shard
from rag.access import CollectionGrant, Reader, StoreAsSeenBy, label_points
from rag.errors import StoreError
from rag.types import StoredChunk
from rag.vector_store import VectorStore, open_vector_store, point_id

LABELS = label_points("default", None)
OWNER = Reader("owner")
NUM_POINTS = 600


@pytest.fixture(autouse=True)
def small_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine builds a graph from a kilobyte of vectors on, and such a shard counts as a large one."""
    monkeypatch.setattr(vector_store_shard, "_SMALL", 100)
    config = vector_store_shard._config

    def with_low_threshold(dimension: int) -> qe.EdgeConfig:
        usual = config(dimension)
        return qe.EdgeConfig(
            vectors=usual.vectors,
            sparse_vectors=usual.sparse_vectors,
            optimizers=qe.EdgeOptimizersConfig(indexing_threshold=1),
            wal_enabled=True,
        )

    monkeypatch.setattr(vector_store_shard, "_config", with_low_threshold)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[VectorStore]:
    opened = open_vector_store(tmp_path / "vectors")
    write(opened, "v1", NUM_POINTS)
    yield opened
    opened.close()


def write(store: VectorStore, version: str, count: int) -> None:
    chunks = [
        StoredChunk(
            chunk_id=point_id(version, index),
            collection_id="c1",
            document_id=f"of-{version}",
            version_id=version,
            document_name=f"{version}.txt",
            text=f"{version} passage{index}",
            start=0,
            end=4,
            index=index,
        )
        for index in range(count)
    ]
    vectors = np.random.default_rng(count).standard_normal((count, 8)).astype(np.float32)
    store.upsert("c1", chunks, vectors, active=True, labels=LABELS)


def texts(store: VectorStore, words: str) -> list[str]:
    seen = StoreAsSeenBy(OWNER, store, (CollectionGrant("c1", "owner"),))
    return [hit.chunk.text for hit in seen.search(["c1"], vector=None, text=words, limit=5)]


class PausedMerger:
    """Holds the merger back until it is told to go on, so that something can happen meanwhile."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.has_begun, self.may_go_on = threading.Event(), threading.Event()
        run = vector_store_shard.Shard._run_merger

        def wait_and_run(shard: vector_store_shard.Shard, copy: Path) -> bool:
            self.has_begun.set()
            assert self.may_go_on.wait(60)
            return run(shard, copy)

        monkeypatch.setattr(vector_store_shard.Shard, "_run_merger", wait_and_run)

    def begin(self, store: VectorStore) -> tuple[threading.Thread, list[bool]]:
        merged: list[bool] = []
        thread = threading.Thread(target=lambda: merged.append(store.optimize()))
        thread.start()
        assert self.has_begun.wait(60)
        return thread, merged


def test_what_is_written_and_deleted_while_a_shard_is_merged_is_kept(
    tmp_path: Path, store: VectorStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(store, "doomed", 20)
    merger = PausedMerger(monkeypatch)
    thread, merged = merger.begin(store)
    write(store, "v2", 30)
    store.delete_document("c1", "of-doomed")
    assert texts(store, "passage29")
    merger.may_go_on.set()
    thread.join()
    assert merged == [True]
    for _ in range(2):
        counts = {version: state.num_active for version, state in store.list_versions().items()}
        assert counts == {"v1": NUM_POINTS, "v2": 30}
        assert texts(store, "v2 passage29")[0] == "v2 passage29" and "doomed" not in str(texts(store, "doomed"))
        assert {entry.name for entry in (tmp_path / "vectors").iterdir()} == {"c1", "owner.lock"}
        store.close()
        store = open_vector_store(tmp_path / "vectors")
    store.close()


def test_a_merged_shard_is_left_alone_until_enough_has_changed(store: VectorStore) -> None:
    assert store.optimize()
    assert not store.optimize()
    write(store, "v2", NUM_POINTS // 20)
    assert not store.optimize()


def test_too_much_written_meanwhile_keeps_the_shard_as_it_is(
    store: VectorStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vector_store_shard, "_MOST_REPEATED", 10)
    merger = PausedMerger(monkeypatch)
    thread, merged = merger.begin(store)
    write(store, "v2", 11)
    merger.may_go_on.set()
    thread.join()
    assert merged == [False]
    assert store.count("c1") == NUM_POINTS + 11


def test_closing_and_deleting_do_not_wait_for_a_merger(
    tmp_path: Path, store: VectorStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    merger = PausedMerger(monkeypatch)
    thread, merged = merger.begin(store)
    deleting = threading.Thread(target=store.delete_collection, args=("c1",))
    deleting.start()
    merger.may_go_on.set()
    deleting.join()
    thread.join()
    assert merged == [False]
    assert [entry.name for entry in (tmp_path / "vectors").iterdir()] == ["owner.lock"]


def test_a_merger_that_fails_is_an_error_and_changes_nothing(
    tmp_path: Path, store: VectorStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged = tmp_path / "rag"
    damaged.mkdir()
    (damaged / "__init__.py").write_text("raise SystemExit(1)", encoding="utf-8")
    monkeypatch.setattr(vector_store_shard, "_SOURCE_ROOT", tmp_path)
    with pytest.raises(StoreError, match="ended with status 1"):
        store.optimize()
    assert store.count("c1") == NUM_POINTS
    write(store, "v2", 5)
    assert store.count("c1") == NUM_POINTS + 5


@pytest.mark.parametrize(
    "left", [(".ready-c1",), (".ready-c1", "c1"), (".deleted-c1", ".ready-c1"), (".copy-c1", "c1")]
)
def test_a_kill_while_folders_change_places_loses_nothing(
    tmp_path: Path, store: VectorStore, left: tuple[str, ...]
) -> None:
    root = tmp_path / "vectors"
    store.close()
    whole = root / "c1"
    for name in left:
        if name != "c1":
            shutil.copytree(whole, root / name)
    if "c1" not in left:
        shutil.rmtree(whole)
    again = open_vector_store(root)
    assert again.count("c1") == NUM_POINTS
    assert {entry.name for entry in root.iterdir()} == {"c1", "owner.lock"}
    again.close()
