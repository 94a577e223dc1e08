"""The store as its callers see it: search while documents change, restarts, lost folders, other models."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from rag.errors import EmbedderUnavailable, StoreLocked, StoreMissing
from rag.types import Vectors
from services.config import Environment, IngestionConfig, StoreConfig
from services.database import Database, User
from services.embedding_result import EmbeddingResult
from services.errors import ApiError
from services.retrieval import HandleEmbedder
from services.schema import upgrade
from services.store_opening import REBUILD_FILE, open_store
from services.store_service import ConnectedEmbedder, StoreService
from tests.services.ingesting import OWNER, HashEmbedder, word_spans

CONFIG = StoreConfig(ingestion=IngestionConfig(chunk_tokens=64, chunk_overlap_tokens=8))


class RemoteHashEmbedder(HashEmbedder):
    """Reached through `connect`, as the deployment's embedder is."""

    max_tokens = 512

    def __init__(self, num_failures: int = 0) -> None:
        super().__init__(dimension=512)
        self.num_failures = num_failures

    async def connect(self) -> None:
        self._fail()

    def token_spans(self, text: str) -> list[tuple[int, int]]:
        return word_spans(text)

    async def embed_passages(self, texts: list[str]) -> Vectors:  # type: ignore[override]
        self._fail()
        return await super().embed_passages(texts)

    def _fail(self) -> None:
        if self.num_failures > 0:
            self.num_failures -= 1
            raise EmbedderUnavailable("It restarts.")


class ModelHandle:
    """The embedding deployment's handle; `model` may become another one, as after `windfarm apply`."""

    def __init__(self, folder: Path) -> None:
        self.model = HashEmbedder("first@1111", 64)
        self._tokenizer_file = folder / "tokenizer.json"
        tokenizer = Tokenizer(WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = Whitespace()
        tokenizer.save(str(self._tokenizer_file))

    @property
    def describe(self) -> RemoteMethod:
        return RemoteMethod(self._describe)

    @property
    def embed(self) -> RemoteMethod:
        return RemoteMethod(self._embed)

    async def _describe(self) -> dict[str, Any]:
        model, file = self.model, str(self._tokenizer_file)
        return {"model": model.model_name, "dimension": model.dimension, "max_tokens": 512, "tokenizer_file": file}

    async def _embed(self, texts: list[str], kind: str) -> EmbeddingResult:
        vectors = await self.model.embed_queries(texts)
        return EmbeddingResult(vectors, [1] * len(texts), [False] * len(texts), self.model.model_name)


@dataclass
class RemoteMethod:
    remote: Callable[..., Any]


def environment(home: Path, database_url: str | None = None) -> Environment:
    """`database_url`: a file in `home` where it is None."""
    url = database_url or f"sqlite:///{home / 'windfarm.db'}"
    return Environment(home=home, database_url=url, internal_secret="secret")


@asynccontextmanager
async def opened(home: Path, embedder: ConnectedEmbedder | None = None) -> AsyncIterator[StoreService]:
    around = environment(home)
    upgrade(around.database_url)
    database = Database(around.database_url)
    with database.write() as session:
        if session.get(User, OWNER) is None:
            session.add(User(id=OWNER, name="owner", role="owner"))
    database.close()
    parts = await asyncio.to_thread(open_store, CONFIG, around)
    service = StoreService(parts, embedder or RemoteHashEmbedder())
    await service.start()
    try:
        yield service
    finally:
        await service.close()


async def ingest(service: StoreService, collection: str, name: str, text: str) -> str:
    job = await service.submit_document(collection, name, text.encode(), OWNER)
    job = await service.wait_for_job(job["id"], OWNER)
    assert job["state"] == "done", job
    return str(job["document_id"])


async def test_a_question_finds_the_passage_with_its_collections_name(tmp_path: Path) -> None:
    async with opened(tmp_path) as service:
        await service.create_collection("birds", "", OWNER)
        await service.create_collection("ships", "", OWNER)
        await ingest(service, "birds", "a.md", "# Gulls\n\nThe gull eats fish at the coast.")
        await ingest(service, "ships", "b.txt", "The frigate has three masts.")
        found = await service.search(["birds", "ships"], "What does the gull eat?", 5, OWNER)
        best = found.passages[0].chunk
        assert best.text.endswith("fish at the coast.") and best.headings == ("Gulls",)
        assert found.collection_names[best.collection_id] == "birds"
        assert {passage.chunk.document_name for passage in found.passages} == {"a.md", "b.txt"}
        only = await service.search(["ships"], "What does the gull eat?", 5, OWNER)
        assert {passage.chunk.document_name for passage in only.passages} == {"b.txt"}


async def test_searches_see_exactly_one_version_while_it_is_replaced(tmp_path: Path) -> None:
    async with opened(tmp_path) as service:
        await service.create_collection("rules", "", OWNER)
        await ingest(service, "rules", "rule.txt", "The rule number 0 holds.")
        stop = asyncio.Event()
        counts: list[int] = []

        async def search_all_the_time() -> None:
            while not stop.is_set():
                found = await service.search(["rules"], "Which rule number holds?", 10, OWNER)
                counts.append(len(found.passages))

        searching = asyncio.create_task(search_all_the_time())
        for number in range(1, 8):
            await ingest(service, "rules", "rule.txt", f"The rule number {number} holds.")
        stop.set()
        await searching
        assert len(counts) > 5 and set(counts) == {1}


async def test_a_successor_waits_for_the_folder_and_goes_on(tmp_path: Path) -> None:
    async with opened(tmp_path) as service:
        await service.create_collection("rules", "", OWNER)
        await ingest(service, "rules", "rule.txt", "The rule holds.")
        successor = asyncio.create_task(asyncio.to_thread(open_store, CONFIG, environment(tmp_path)))
        await asyncio.sleep(0)
        assert (await service.search(["rules"], "Which rule?", 5, OWNER)).passages
    parts = await asyncio.wait_for(successor, 30)
    try:
        assert parts.report.agreed and parts.report.num_passages == 1
    finally:
        parts.vectors.close()
        parts.database.close()


async def test_a_folder_that_stays_taken_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.store_opening._LOCK_TIMEOUT_S", 0.2)
    async with opened(tmp_path):
        with pytest.raises(StoreLocked):
            await asyncio.to_thread(open_store, CONFIG, environment(tmp_path))


async def test_a_lost_vector_folder_is_refused_until_somebody_asks_for_new_vectors(tmp_path: Path) -> None:
    async with opened(tmp_path) as service:
        await service.create_collection("rules", "", OWNER)
        await ingest(service, "rules", "rule.txt", "The rule holds.")
    shutil.rmtree(tmp_path / "qdrant")
    (tmp_path / "qdrant").mkdir()
    with pytest.raises(StoreMissing, match="Restore that folder"):
        await asyncio.to_thread(open_store, CONFIG, environment(tmp_path))
    assert not list((tmp_path / "qdrant").iterdir()), "nothing was made"
    (tmp_path / "qdrant" / REBUILD_FILE).touch()
    async with opened(tmp_path) as service:
        (repair, _) = await service.jobs("rules", OWNER)
        assert (await service.wait_for_job(repair["id"], OWNER))["state"] == "done"
        assert (await service.search(["rules"], "Which rule holds?", 5, OWNER)).passages


async def test_a_collection_remembers_its_embedding_model_and_only_reembed_changes_it(tmp_path: Path) -> None:
    """The model is exchanged while the store goes on, as `windfarm apply` does it."""
    handle = ModelHandle(tmp_path)
    async with opened(tmp_path, HandleEmbedder(handle)) as service:
        made = await service.create_collection("rules", "", OWNER)
        await service.create_collection("empty", "", OWNER)
        assert made["embedding_model"] == "first@1111"
        await ingest(service, "rules", "rule.txt", "The rule holds.")
        handle.model = HashEmbedder("second@2222", 48)
        for _ in range(2):
            with pytest.raises(ApiError, match=r"first@1111 .*second@2222 .*windfarm reembed rules") as refused:
                await service.search(["rules"], "Which rule holds?", 5, OWNER)
            assert (refused.value.status, refused.value.code) == (409, "embedding_mismatch")
        with pytest.raises(ApiError, match="windfarm reembed rules"):
            await service.submit_document("rules", "more.txt", b"More.", OWNER)
        for name in ("rules", "empty"):
            job = await service.reembed(name, OWNER)
            assert (await service.wait_for_job(job["id"], OWNER))["state"] == "done"
            assert (await service.collection(name, OWNER))["embedding_model"] == "second@2222"
        assert (await service.search(["rules"], "Which rule holds?", 5, OWNER)).passages
        await ingest(service, "empty", "more.txt", "More.")


async def test_a_changed_model_is_known_before_a_collection_remembers_it(tmp_path: Path) -> None:
    handle = ModelHandle(tmp_path)
    async with opened(tmp_path, HandleEmbedder(handle)) as service:
        await service.create_collection("rules", "", OWNER)
        handle.model = HashEmbedder("second@2222", 48)
        made = await service.create_collection("new", "", OWNER)
        assert made["embedding_model"] == "second@2222"
        job = await service.reembed("rules", OWNER)
        assert (await service.wait_for_job(job["id"], OWNER))["state"] == "done"
        await ingest(service, "rules", "rule.txt", "The rule holds.")


async def test_a_file_that_was_sent_while_the_model_changed_fails_with_the_next_step(tmp_path: Path) -> None:
    handle = ModelHandle(tmp_path)
    async with opened(tmp_path, HandleEmbedder(handle)) as service:
        await service.create_collection("rules", "", OWNER)
        handle.model = HashEmbedder("second@2222", 48)
        job = await service.submit_document("rules", "rule.txt", b"The rule holds.", OWNER)
        ended = await service.wait_for_job(job["id"], OWNER)
        assert (ended["state"], ended["error"]["code"]) == ("failed", "embedding_mismatch")
        assert "windfarm reembed" in ended["error"]["message"]


async def test_an_embedding_model_that_restarts_only_delays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.passage_writer._RETRY_S", 0.01)
    async with opened(tmp_path, RemoteHashEmbedder(num_failures=1)) as service:
        await service.create_collection("rules", "", OWNER)
        service._embedder.num_failures = 3  # type: ignore[attr-defined]
        await ingest(service, "rules", "rule.txt", "The rule holds.")


async def test_uploads_in_the_data_folder_are_taken_over_and_others_copied(tmp_path: Path) -> None:
    home = tmp_path / "home"
    inside, outside = home / "uploads" / "upload-1", tmp_path / "mine.txt"
    inside.parent.mkdir(parents=True)
    inside.write_text("From inside.")
    outside.write_text("From outside.")
    embedder = RemoteHashEmbedder()
    embedder.gate.clear()
    async with opened(home, embedder) as service:
        await service.create_collection("rules", "", OWNER)
        jobs = [await service.submit_document("rules", path.name, path, OWNER) for path in (inside, outside)]
        blobs = [home / "blobs" / job["id"] for job in jobs]
        assert os.stat(blobs[0]).st_ino == os.stat(inside).st_ino
        assert os.stat(blobs[1]).st_ino != os.stat(outside).st_ino
        inside.unlink()
        embedder.gate.set()
        ended = [await service.wait_for_job(job["id"], OWNER) for job in jobs]
        assert [job["state"] for job in ended] == ["done", "done"]
        assert outside.exists() and not any(blob.exists() for blob in blobs)


async def test_a_search_in_no_or_an_unknown_collection_is_refused(tmp_path: Path) -> None:
    async with opened(tmp_path) as service:
        await service.create_collection("rules", "", OWNER)
        with pytest.raises(ApiError, match="Name 1 to"):
            await service.search([], "x", 5, OWNER)
        with pytest.raises(ApiError, match="Did you mean 'rules'"):
            await service.search(["rule"], "x", 5, OWNER)
        with pytest.raises(ApiError, match="exists already"):
            await service.create_collection("rules", "", OWNER)
        with pytest.raises(ApiError, match="cannot name a collection"):
            await service.create_collection("../x", "", OWNER)


async def test_a_quote_holds_letter_by_letter_for_those_who_may_read_it_and_while_it_is_there(tmp_path: Path) -> None:
    async with opened(tmp_path) as service:
        await service.create_collection("handbook", "", OWNER)
        identity = await ingest(service, "handbook", "leave.md", "Parental leave lasts twelve weeks.")
        (passage,) = (await service.search(["handbook"], "parental leave", 1, OWNER)).passages
        chunk = passage.chunk
        right = (chunk.version_id, chunk.start, chunk.end, chunk.text)
        wrong = (chunk.version_id, chunk.start, chunk.end, chunk.text.replace("twelve", "Twelve"))
        moved = (chunk.version_id, chunk.start + 1, chunk.end + 1, chunk.text)
        empty, unknown = (chunk.version_id, 0, 0, ""), ("ver_x", 0, 5, "Paren")
        quotes = [right, wrong, moved, empty, unknown]
        assert await service.check_quotes(quotes, OWNER) == [True, False, False, False, False]
        with service._parts.database.write() as session:
            session.add(User(id="user_other", name="other", role="member"))
        assert await service.check_quotes([right], "user_other") == [False]
        await ingest(service, "handbook", "leave.md", "Parental leave lasts ten weeks.")
        assert await service.check_quotes([right], OWNER) == [False], "the document says something else now"
        await service.delete_document("handbook", identity, OWNER)
        assert await service.check_quotes([right], OWNER) == [False]
