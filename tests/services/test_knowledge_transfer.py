"""Collections move from the embedded store to a server without embedding again: all or nothing, by rights, checked."""

from __future__ import annotations

import asyncio
import json
import struct
import zipfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from qdrant_client import QdrantClient

from rag.errors import StoreError
from rag.vector_store_server import ServerVectorStore
from services.api_client import ApiClient, ApiFailed
from services.reconciler import reconcile
from services.sharing import ReaderChange, ReaderNames
from tests.services.knowledge_endpoint import KnowledgeEndpoint, knowledge_endpoint

pytestmark = pytest.mark.asyncio(loop_scope="module")

DOCUMENTS = Path(__file__).parents[1] / "data" / "documents"
QUESTION = {"query": "When is the rent due?", "top_k": 5}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def source(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[KnowledgeEndpoint]:
    async with knowledge_endpoint(tmp_path_factory.mktemp("source")) as running:
        await running.service.create_collection("house", "Rules of the house", running.owner_id)
        await running.ingest("house", "rent.md", "# Rent\n\nThe rent is due on Monday.\n\n" + "More words. " * 200)
        await running.ingest("house", "memo.pdf", (DOCUMENTS / "fake-memo.pdf").read_bytes())
        await running.ingest("house", "empty.txt", "   \n")
        await running.service.create_collection("second", "", running.owner_id)
        await running.ingest("second", "dog.txt", "The dog is called Rex.")
        yield running


@asynccontextmanager
async def on_a_server(home: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[KnowledgeEndpoint]:
    """Another windfarm, whose vectors lie on a Qdrant server (its client in memory)."""
    client = QdrantClient(":memory:")
    monkeypatch.setattr("services.store_opening.open_vector_store", lambda *_, **__: ServerVectorStore(client))
    async with knowledge_endpoint(home) as running:
        yield running


async def call(running: KnowledgeEndpoint, work: Callable[[ApiClient], Any], key: str | None = None) -> Any:
    def run() -> Any:
        with ApiClient(running.url, key or running.key) as client:
            return work(client)

    return await asyncio.to_thread(run)


async def exported(running: KnowledgeEndpoint, target: Path, collections: str = "") -> Path:
    await call(running, lambda client: client.download("/v1/kb/export", target, collections=collections))
    return target


async def imported(running: KnowledgeEndpoint, file: Path, key: str | None = None) -> Any:
    return await call(running, lambda client: client.send_file("/v1/kb/import", file), key)


async def state_of(running: KnowledgeEndpoint, name: str) -> Any:
    documents = await running.service.list_documents(name, running.owner_id)
    texts = [await running.service.document(each["id"], running.owner_id) for each in documents]
    return await running.service.collection(name, running.owner_id), texts


async def test_a_knowledge_base_moves_to_a_server_without_embedding_again(
    source: KnowledgeEndpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = await exported(source, tmp_path / "all.kb")
    before = (await source.http.post("/v1/collections/house/search", json=QUESTION)).json()
    async with on_a_server(tmp_path / "home", monkeypatch) as target:
        embedder: Any = target.service._embedder
        answer = await imported(target, file)
        assert embedder.num_texts == 0, "nothing was embedded"
        assert {entry["name"]: entry["num_documents"] for entry in answer["collections"]} == {"house": 3, "second": 1}
        after = (await target.http.post("/v1/collections/house/search", json=QUESTION)).json()
        assert [p["text"] for p in after["passages"]] == [p["text"] for p in before["passages"]]
        for one, other in zip(after["passages"], before["passages"], strict=True):
            assert {k: v for k, v in one.items() if "score" not in k} == {
                k: v for k, v in other.items() if "score" not in k
            }
            assert one["scores"]["dense"] == pytest.approx(other["scores"]["dense"], abs=1e-4)
        for name in ("house", "second"):
            assert await state_of(target, name) == await state_of(source, name)
        memo = next(d for d in await target.service.list_documents("house", target.owner_id) if d["name"] == "memo.pdf")
        page = await target.http.get(f"/v1/collections/house/documents/{memo['id']}/pages/1")
        assert page.content.startswith(b"\x89PNG"), "the original came along"
        parts = target.service._parts
        report = reconcile(parts.database, parts.vectors, parts.journal, parts.blobs, owns_all=False)
        assert report.agreed and report.num_passages == report.num_passages
        with pytest.raises(ApiFailed, match="here already"):
            await imported(target, file)


async def test_single_collections_are_exported_by_name(source: KnowledgeEndpoint, tmp_path: Path) -> None:
    file = await exported(source, tmp_path / "one.kb", "second")
    with zipfile.ZipFile(file) as archive:
        manifest = json.loads(archive.read("manifest.json"))
    assert [each["name"] for each in manifest["collections"]] == ["second"]
    with pytest.raises(ApiFailed, match="no collection named 'none'"):
        await exported(source, tmp_path / "none.kb", "none")
    assert not list(tmp_path.glob("none*")) and not list((source.home / "uploads").glob("transfer-*"))


async def test_only_those_who_manage_export_and_only_administrators_import(
    source: KnowledgeEndpoint, tmp_path: Path
) -> None:
    file = await exported(source, tmp_path / "all.kb")
    key = await source.member_key("reads only")
    reader = source.running.accounts.authenticate(key).user_id
    change = ReaderChange(add=ReaderNames(users=("reads only",)))
    await source.service.share("house", None, change, source.owner_id)
    assert (await source.service.list_documents("house", reader)) != []
    for collections, said in (("house", "not change it"), ("second", "no collection"), ("", "nothing to export")):
        with pytest.raises(ApiFailed, match=said):
            await call(source, lambda c, n=collections: c.download("/v1/kb/export", tmp_path / "x", collections=n), key)
    with pytest.raises(ApiFailed, match="Only owners and administrators import") as refused:
        await imported(source, file, key)
    assert refused.value.status == 403


async def test_readers_of_documents_never_become_more(
    source: KnowledgeEndpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await source.service.create_collection("private", "", source.owner_id)
    document_id = await source.ingest("private", "salaries.txt", "The salary of Ada is 9000.")
    await source.member_key("known here")
    await source.service.share(
        "private", document_id, ReaderChange(add=ReaderNames(users=("known here",))), source.owner_id
    )
    file = await exported(source, tmp_path / "private.kb", "private")
    async with on_a_server(tmp_path / "home", monkeypatch) as target:
        await imported(target, file)
        readers = await target.service.readers("private", document_id, target.owner_id)
        assert "known here" not in json.dumps(readers)
        everybody = target.running.accounts.authenticate(await target.member_key("somebody")).user_id
        assert await target.service.list_collections(everybody) == []
        assert (await target.service.search(["private"], "salary of Ada", 5, target.owner_id)).passages


def damaged(file: Path, how: str) -> None:
    data = bytearray(file.read_bytes())
    if how == "cut":
        data = data[: len(data) // 2]
    elif how == "a bit":
        with zipfile.ZipFile(file) as archive:
            vectors = [each for each in archive.infolist() if each.filename.endswith("vectors.f32")]
            info = max(vectors, key=lambda each: each.file_size)
        name_length, extra_length = struct.unpack_from("<HH", data, info.header_offset + 26)
        data[info.header_offset + 30 + name_length + extra_length + 5] ^= 1
    elif how == "no zip":
        data = bytearray(b"hello")
    file.write_bytes(data)
    if how == "manifest":
        rewrite(file, "manifest.json", lambda text: text.replace(b"The", b"the").replace(b"house", b"mouse"))
    if how == "member":
        rewrite(file, "text.txt", lambda text: text.replace(b"Monday", b"Friday"))


def rewrite(file: Path, ending: str, change: Callable[[bytes], bytes]) -> None:
    with zipfile.ZipFile(file) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
        comment = archive.comment
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members:
            archive.writestr(name, change(content) if name.endswith(ending) else content)
        archive.comment = comment


@pytest.mark.parametrize("how", ["cut", "a bit", "no zip", "manifest", "member"])
async def test_a_damaged_file_changes_nothing(
    source: KnowledgeEndpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    file = await exported(source, tmp_path / "all.kb")
    damaged(file, how)
    async with on_a_server(tmp_path / "home", monkeypatch) as target:
        with pytest.raises(ApiFailed, match="damaged") as refused:
            await imported(target, file)
        assert refused.value.code == "damaged_archive"
        assert await target.service.list_collections(target.owner_id) == []
        assert target.service._parts.vectors.list_collections() == []


async def test_another_embedding_model_is_refused(
    source: KnowledgeEndpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = await exported(source, tmp_path / "all.kb")
    async with on_a_server(tmp_path / "home", monkeypatch) as target:
        embedder: Any = target.service._embedder
        embedder.model_name = "another@2222"
        with pytest.raises(ApiFailed, match=r"embedded with hash .*another@2222") as refused:
            await imported(target, file)
        assert refused.value.code == "embedding_mismatch"
        assert await target.service.list_collections(target.owner_id) == []


async def test_an_import_that_fails_in_the_middle_leaves_nothing(
    source: KnowledgeEndpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = await exported(source, tmp_path / "all.kb", "house,second")
    async with on_a_server(tmp_path / "home", monkeypatch) as target:
        parts = target.service._parts
        write = parts.vectors.upsert
        num_writes = 0

        def fail_later(*arguments: Any, **options: Any) -> None:
            nonlocal num_writes
            num_writes += 1
            if num_writes == 3:
                raise StoreError("The Qdrant server could not write chunks: it is gone")
            write(*arguments, **options)

        monkeypatch.setattr(parts.vectors, "upsert", fail_later)
        with pytest.raises(ApiFailed, match="it is gone"):
            await imported(target, file)
        assert parts.vectors.list_collections() == [] and not list((target.home / "originals").iterdir())
        monkeypatch.setattr(parts.vectors, "upsert", write)
        assert len((await imported(target, file))["collections"]) == 2


async def test_what_a_kill_leaves_of_an_import_is_swept_at_the_next_start(
    source: KnowledgeEndpoint, tmp_path: Path
) -> None:
    file = await exported(source, tmp_path / "all.kb", "second")
    async with knowledge_endpoint(tmp_path / "home") as target:
        transfer: Any = target.service._transfer
        transfer._show = transfer._undo = lambda *_: None  # As a kill before the last step.
        await imported(target, file)
        assert len(target.service._parts.vectors.list_collections()) == 1
        assert await target.service.list_collections(target.owner_id) == []
    async with knowledge_endpoint(tmp_path / "home") as target:
        assert target.service._parts.vectors.list_collections() == []
        assert (await imported(target, file))["collections"][0]["name"] == "second"
