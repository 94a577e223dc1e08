"""One contract for both stores: the embedded engine and the client of a server (in memory)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import qdrant_edge
from qdrant_client import QdrantClient

from rag.access import TENANT
from rag.errors import StoreError, StoreLocked, StoreMissing, StoreUnavailable
from rag.types import StoredChunk, Vectors
from rag.vector_store import (
    INDEXED_KEYWORDS,
    ScoredChunk,
    ServerSettings,
    VectorStore,
    VersionState,
    open_vector_store,
)
from rag.vector_store_edge import EdgeVectorStore
from rag.vector_store_server import ServerVectorStore
from tests.seen import LABELS, seen

ROOT = Path(__file__).parents[2]


CLUSTER = ServerSettings(shards=6, replication_factor=3, quantization="none")


@pytest.fixture(params=["edge", "server", "cluster"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[VectorStore]:
    """The embedded engine, a server, and a server with settings of a cluster (which the client in memory takes as a
    server does; it has one node)."""
    made: VectorStore = (
        open_vector_store(tmp_path / "vectors")
        if request.param == "edge"
        else ServerVectorStore(QdrantClient(":memory:"), settings=CLUSTER if request.param == "cluster" else None)
    )
    yield made
    made.close()


def chunk(
    text: str, *, index: int = 0, version: str = "v1", document: str = "d1", collection: str = "c1"
) -> StoredChunk:
    return StoredChunk(
        chunk_id=f"{version}-{index}",
        collection_id=collection,
        document_id=document,
        version_id=version,
        document_name=f"{document}.md",
        text=text,
        start=10 * index,
        end=10 * index + len(text),
        index=index,
        page=index + 1,
        headings=("Handbook", "Leave"),
        language="en",
    )


def axis(*numbers: int) -> Vectors:
    """Unit vectors along the given axes."""
    return np.eye(8, dtype=np.float32)[list(numbers)]


def found(
    store: VectorStore, *collections: str, vector: Vectors | None, text: str | None, limit: int
) -> list[ScoredChunk]:
    return seen(store, *collections).search(collections, vector=vector, text=text, limit=limit)


def found_texts(store: VectorStore, *collections: str, axis_number: int = 0, text: str | None = None) -> set[str]:
    hits = found(store, *(collections or ("c1",)), vector=axis(axis_number)[0], text=text, limit=10)
    return {hit.chunk.text for hit in hits}


def test_a_chunk_comes_back_as_it_was_stored(store: VectorStore) -> None:
    stored = chunk("Parental leave lasts twelve weeks.")
    store.upsert("c1", [stored], axis(0), active=True, labels=LABELS)
    (hit,) = found(store, "c1", vector=axis(0)[0], text="leave", limit=5)
    assert hit.chunk == stored
    assert hit.dense == pytest.approx(1.0, abs=1e-3)
    assert hit.sparse > 0


def test_a_repeated_upsert_does_not_double(store: VectorStore) -> None:
    for _ in range(3):
        store.upsert("c1", [chunk("one"), chunk("two", index=1)], axis(0, 1), active=True, labels=LABELS)
    assert store.count("c1") == 2


def test_a_hidden_version_is_not_found_by_either_leg(store: VectorStore) -> None:
    store.upsert("c1", [chunk("secret plan")], axis(0), active=False)
    assert found_texts(store, text="secret plan") == set()
    assert store.count("c1", active=False) == 1


def test_activation_replaces_the_old_version(store: VectorStore) -> None:
    store.upsert("c1", [chunk("old text", version="v1")], axis(0), active=True, labels=LABELS)
    store.upsert("c1", [chunk("new text", version="v2")], axis(0), active=False)
    assert found_texts(store, text="text") == {"old text"}
    store.activate_version("c1", "v2", labels=LABELS, replaces="v1")
    assert found_texts(store, text="text") == {"new text"}
    assert store.list_versions() == {
        "v1": VersionState("c1", 1, 0, LABELS),
        "v2": VersionState("c1", 1, 1, LABELS),
    }


def test_activation_may_be_repeated(store: VectorStore) -> None:
    store.upsert("c1", [chunk("text", version="v2")], axis(0), active=False)
    for _ in range(2):
        store.activate_version("c1", "v2", labels=LABELS, replaces="v1")
    store.activate_version("c1", "v2", labels=LABELS, replaces="v2")
    assert store.list_versions()["v2"].is_active


def test_the_words_leg_finds_inflected_forms_and_rare_words_weigh_more(store: VectorStore) -> None:
    texts = ["The invoice numbers are listed", "The meeting room", "The meeting about invoices of Zyx", "The meeting"]
    store.upsert(
        "c1", [chunk(text, index=i) for i, text in enumerate(texts)], axis(0, 1, 2, 3), active=True, labels=LABELS
    )
    hits = found(store, "c1", vector=None, text="invoice meetings zyx", limit=10)
    assert max(hits, key=lambda hit: hit.sparse).chunk.text == "The meeting about invoices of Zyx"
    assert {hit.chunk.text for hit in hits} == set(texts)
    assert all(hit.dense is None for hit in hits)


def test_word_statistics_belong_to_one_collection(store: VectorStore) -> None:
    store.upsert(
        "c1", [chunk("invoice payment"), chunk("other thing", index=1)], axis(0, 1), active=True, labels=LABELS
    )
    alone = found(store, "c1", vector=None, text="invoice", limit=1)[0].sparse
    many = [chunk("invoice", index=i, version="w", document="e", collection="c2") for i in range(20)]
    store.upsert("c2", many, np.repeat(axis(0), 20, axis=0), active=True, labels=LABELS)
    assert found(store, "c1", vector=None, text="invoice", limit=1)[0].sparse == pytest.approx(alone)


def test_what_only_the_words_found_has_its_exact_cosine_too(store: VectorStore) -> None:
    store.upsert("c1", [chunk("alpha", index=i) for i in range(3)], axis(0, 0, 0), active=True, labels=LABELS)
    store.upsert("c1", [chunk("omega", index=9)], axis(5), active=True, labels=LABELS)
    hits = found(store, "c1", vector=axis(0)[0], text="omega", limit=2)
    (omega,) = [hit for hit in hits if hit.chunk.text == "omega"]
    assert omega.dense == pytest.approx(0.0, abs=1e-3)
    assert omega.sparse > 0


def test_a_search_joins_several_collections_and_ignores_unknown_ones(store: VectorStore) -> None:
    store.upsert("c1", [chunk("first")], axis(0), active=True, labels=LABELS)
    store.upsert("c2", [chunk("second", version="w", collection="c2")], axis(0), active=True, labels=LABELS)
    assert found_texts(store, "c1", "c2", "c1", "nowhere") == {"first", "second"}
    assert found_texts(store, "c2") == {"second"}


def test_deleting_a_version_document_or_collection_leaves_nothing_of_it(store: VectorStore) -> None:
    for version, document in (("v1", "d1"), ("v2", "d1"), ("v3", "d2")):
        store.upsert("c1", [chunk("text", version=version, document=document)], axis(0), active=True, labels=LABELS)
    store.delete_version("c1", "v1")
    assert set(store.list_versions()) == {"v2", "v3"}
    store.delete_document("c1", "d1")
    assert set(store.list_versions()) == {"v3"}
    assert store.count("c1", document_id="d1") == 0
    store.delete_collection("c1")
    assert store.list_collections() == []
    assert found_texts(store) == set()
    store.delete_collection("c1")


def test_a_deleted_collection_may_come_back_with_another_dimension(store: VectorStore) -> None:
    store.upsert("c1", [chunk("text")], axis(0), active=True, labels=LABELS)
    store.delete_collection("c1")
    store.upsert("c1", [chunk("text")], np.eye(4, dtype=np.float32)[:1], active=True, labels=LABELS)
    assert store.count("c1") == 1


def test_operations_on_an_unknown_collection_do_nothing(store: VectorStore) -> None:
    store.activate_version("none", "v1", labels=LABELS)
    store.deactivate_version("none", "v1")
    store.delete_version("none", "v1")
    store.delete_document("none", "d1")
    assert store.count("none") == 0
    assert store.list_collections() == []


def test_vectors_of_another_model_are_refused(store: VectorStore) -> None:
    store.upsert("c1", [chunk("text")], axis(0), active=True, labels=LABELS)
    with pytest.raises(StoreError, match="dimension 8, not 4"):
        store.upsert("c1", [chunk("text")], np.eye(4, dtype=np.float32)[:1], active=True, labels=LABELS)


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (np.zeros((2, 8), dtype=np.float32), "one row per chunk"),
        (np.full((1, 8), np.nan, dtype=np.float32), "NaN"),
    ],
)
def test_wrong_vectors_are_refused(store: VectorStore, vectors: Vectors, message: str) -> None:
    with pytest.raises(StoreError, match=message):
        store.upsert("c1", [chunk("text")], vectors, active=True, labels=LABELS)


def test_a_chunk_of_another_collection_is_refused(store: VectorStore) -> None:
    with pytest.raises(StoreError, match="'c2'"):
        store.upsert("c1", [chunk("text", collection="c2")], axis(0), active=True, labels=LABELS)


def test_no_search_sees_both_versions_or_neither_during_swaps(tmp_path: Path) -> None:
    store = open_vector_store(tmp_path / "vectors")
    for version in ("v1", "v2"):
        store.upsert("c1", [chunk(version, version=version)], axis(0), active=version == "v1", labels=LABELS)
    seen: list[int] = []
    done = threading.Event()

    def search() -> None:
        while not done.is_set():
            seen.append(len(found(store, "c1", vector=axis(0)[0], text=None, limit=5)))

    threads = [threading.Thread(target=search) for _ in range(3)]
    for thread in threads:
        thread.start()
    for round_number in range(100):
        new, old = ("v2", "v1") if round_number % 2 == 0 else ("v1", "v2")
        store.activate_version("c1", new, labels=LABELS, replaces=old)
    done.set()
    for thread in threads:
        thread.join()
    store.close()
    assert set(seen) == {1}


def test_everything_is_there_after_closing_and_opening(tmp_path: Path) -> None:
    store = open_vector_store(tmp_path / "vectors")
    store.upsert(
        "c1", [chunk("kept", index=i) for i in range(600)], np.repeat(axis(0), 600, axis=0), active=True, labels=LABELS
    )
    store.optimize()
    store.close()
    store.close()
    again = open_vector_store(tmp_path / "vectors", create=False)
    assert again.list_versions() == {"v1": VersionState("c1", 600, 600, LABELS)}
    with pytest.raises(StoreError, match="dimension 8"):
        again.upsert("c1", [chunk("x")], np.eye(4, dtype=np.float32)[:1], active=True, labels=LABELS)
    again.close()


def test_a_closed_store_says_so(tmp_path: Path) -> None:
    store = open_vector_store(tmp_path / "vectors")
    store.close()
    with pytest.raises(StoreError, match="closed"):
        found(store, "c1", vector=axis(0)[0], text=None, limit=1)


def test_a_missing_folder_is_not_made_where_it_must_exist(tmp_path: Path) -> None:
    with pytest.raises(StoreMissing, match="is gone"):
        open_vector_store(tmp_path / "vectors", create=False)
    assert not (tmp_path / "vectors").exists()


def test_a_second_owner_is_refused_with_the_process_named(tmp_path: Path) -> None:
    store = open_vector_store(tmp_path / "vectors")
    with pytest.raises(StoreLocked, match=str(os.getpid())):
        open_vector_store(tmp_path / "vectors")
    store.close()
    open_vector_store(tmp_path / "vectors").close()


def test_a_waiting_owner_gets_the_folder_when_it_is_released(tmp_path: Path) -> None:
    first = open_vector_store(tmp_path / "vectors")
    opened: list[VectorStore] = []
    waiter = threading.Thread(target=lambda: opened.append(open_vector_store(tmp_path / "vectors", lock_timeout_s=30)))
    waiter.start()
    first.close()
    waiter.join()
    opened[0].close()


def test_leftovers_of_a_kill_are_swept(tmp_path: Path) -> None:
    root = tmp_path / "vectors"
    open_vector_store(root).close()
    (root / ".new-c1").mkdir()
    (root / ".deleted-c2" / "segments").mkdir(parents=True)
    store = open_vector_store(root)
    assert store.list_collections() == []
    assert not any(entry.is_dir() for entry in root.iterdir())
    store.close()


@pytest.mark.parametrize("name", ["../escape", "", ".hidden", "a/b"])
def test_a_collection_id_cannot_leave_the_folder(tmp_path: Path, name: str) -> None:
    store = EdgeVectorStore.open(tmp_path / "vectors")
    with pytest.raises(StoreError, match="folder"):
        store.upsert(name, [chunk("text", collection=name)], axis(0), active=True, labels=LABELS)
    store.close()


def test_a_server_that_does_not_answer_is_an_error_at_once() -> None:
    with pytest.raises(StoreUnavailable, match=r"Qdrant server does not answer.*Check that it runs"):
        open_vector_store(url="http://127.0.0.1:9")


def test_neither_folder_nor_url_is_an_error() -> None:
    with pytest.raises(StoreError, match="folder or the URL"):
        open_vector_store()


WRITER = """
import sys
from pathlib import Path
import numpy as np
from rag.access import label_points
from rag.types import StoredChunk
from rag.vector_store import open_vector_store

store = open_vector_store(Path(sys.argv[1]))
number = 0
while True:
    version = f"v{number}"
    chunks = [StoredChunk(f"{version}-{i}", "c1", "d1", version, "d.md", f"text {i}", 0, 1, i) for i in range(5)]
    store.upsert("c1", chunks, np.eye(8, dtype=np.float32)[:5], active=False)
    store.activate_version("c1", version, labels=label_points("default", None), replaces=f"v{number - 1}")
    sys.stdout.write(f"{number}\\n")
    sys.stdout.flush()
    number += 1
"""


@pytest.fixture
def start_writer(tmp_path: Path) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", WRITER, str(tmp_path / "vectors")]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.parametrize("acknowledged", [1, 7, 40])
def test_no_acknowledged_write_is_lost_by_a_kill(
    tmp_path: Path, start_writer: Callable[[], subprocess.Popen[str]], acknowledged: int
) -> None:
    writer = start_writer()
    assert writer.stdout is not None
    for _ in range(acknowledged):
        last = int(writer.stdout.readline())
    writer.send_signal(signal.SIGKILL)
    rest = writer.stdout.read().split()
    last = int(rest[-1]) if rest else last
    writer.wait()

    store = open_vector_store(tmp_path / "vectors", create=False)
    versions = store.list_versions()
    for number in range(last + 1):
        assert versions[f"v{number}"].num_points == 5
    # The version after the last acknowledged one may have come through whole, in part or not at all.
    assert all(not versions[f"v{number}"].is_active for number in range(last))
    assert versions[f"v{last}"].is_active or versions[f"v{last + 1}"].is_active
    store.close()


def test_vectors_leave_with_their_places_and_without_text(store: VectorStore) -> None:
    chunks = [chunk(f"passage number {index}", index=index) for index in range(5)]
    store.upsert("c1", [chunks[i] for i in (3, 0, 4, 1, 2)], axis(3, 0, 4, 1, 2), active=False, labels=LABELS)
    store.upsert("c1", [chunk("another version", version="v2")], axis(7), active=True, labels=LABELS)
    placed = store.vectors_of("c1", "v1")
    assert [place.index for place in placed.places] == [0, 1, 2, 3, 4]
    np.testing.assert_allclose(placed.vectors, axis(0, 1, 2, 3, 4), atol=1e-6)
    for place, original in zip(placed.places, chunks, strict=True):
        assert not hasattr(place, "text")
        for name in ("start", "end", "page", "headings", "language", "title"):
            assert getattr(place, name) == getattr(original, name)
    for unknown in (store.vectors_of("c1", "v9"), store.vectors_of("c9", "v1")):
        assert unknown.places == () and len(unknown.vectors) == 0


def test_a_cluster_is_told_shards_replicas_quantization_and_the_index_of_tenants(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: dict[str, Any] = {}
    client = QdrantClient(":memory:")
    make, index = client.create_collection, client.create_payload_index
    monkeypatch.setattr(client, "create_collection", lambda name, **how: asked.update(how) or make(name, **how))
    monkeypatch.setattr(
        client,
        "create_payload_index",
        lambda *what, **how: asked.setdefault("indexes", []).append(what[1:]) or index(*what, **how),
    )
    ServerVectorStore(client, settings=CLUSTER).upsert("c1", [chunk("text")], axis(0), active=True, labels=LABELS)
    assert (asked["shard_number"], asked["replication_factor"], asked["write_consistency_factor"]) == (6, 3, 3)
    assert asked["quantization_config"] is None
    (tenants,) = (schema for field, schema in asked["indexes"] if field == "tenant")
    assert tenants.is_tenant
    ServerVectorStore(client).upsert("c2", [chunk("text", collection="c2")], axis(0), active=True, labels=LABELS)
    assert asked["quantization_config"].scalar.type == "int8" and asked["shard_number"] is None


def test_every_field_that_searches_filter_by_is_indexed_in_a_shard(tmp_path: Path) -> None:
    """Without an index the engine would look at every passage, and searches would still be right, only slow."""
    store = EdgeVectorStore.open(tmp_path / "vectors")
    store.upsert("c1", [chunk("Leave is 31 days.")], axis(0), active=True, labels=LABELS)
    store.close()
    shard = qdrant_edge.EdgeShard.load(str(tmp_path / "vectors" / "c1"))
    schema = shard.info().payload_schema
    shard.close()
    assert schema.keys() == {*INDEXED_KEYWORDS, TENANT}
