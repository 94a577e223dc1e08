"""OpenAI's files, vector stores and file search with its own client, unchanged, on the real store in this process."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import pytest_asyncio

from services.config import PlatformConfig, RetrievalConfig
from tests.services.harness import error_of
from tests.services.knowledge_endpoint import KnowledgeEndpoint, knowledge_endpoint
from tests.services.rerank_server import rerank_server

pytestmark = pytest.mark.asyncio(loop_scope="module")

QUICK: Any = {"poll_interval_ms": 20}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[KnowledgeEndpoint]:
    async with knowledge_endpoint(tmp_path_factory.mktemp("home")) as endpoint:
        yield endpoint


@pytest.fixture
def client(running: KnowledgeEndpoint) -> openai.AsyncOpenAI:
    return running.running.openai


def client_of(running: KnowledgeEndpoint, key: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(
        base_url=f"{running.url}/v1", api_key=key, max_retries=0, http_client=httpx.AsyncClient(trust_env=False)
    )


async def upload(client: openai.AsyncOpenAI, name: str, text: str) -> Any:
    return await client.files.create(file=(name, text.encode()), purpose="assistants")


async def store_with(client: openai.AsyncOpenAI, name: str, **texts: str) -> Any:
    """A vector store with one file per text, all searchable."""
    store = await client.vector_stores.create(name=name)
    for stem, text in texts.items():
        file = await upload(client, f"{stem}.txt", text)
        added = await client.vector_stores.files.create_and_poll(
            file.id, vector_store_id=store.id, attributes={"stem": stem}, **QUICK
        )
        assert added.status == "completed", added
    return store


async def test_a_configured_reranker_ranks_unless_it_is_declined(tmp_path: Path) -> None:
    with rerank_server() as reranker:
        reranker.likes_last = True
        retrieval = RetrievalConfig(rerank=reranker.url, rerank_candidates=3)
        async with knowledge_endpoint(tmp_path, config=PlatformConfig(retrieval=retrieval)) as endpoint:
            client = endpoint.running.openai
            store = await store_with(client, "Winds", a="The wind is cold.", b="The wind is hot.", c="Some grain.")
            search = client.vector_stores.search
            plain = await search(store.id, query="cold wind", ranking_options={"ranker": "none"})
            assert plain.data[0].filename == "a.txt" and not reranker.seen
            one = await search(store.id, query="cold wind", max_num_results=1)
            assert [result.filename for result in one.data] == [plain.data[-1].filename] != ["a.txt"]
            both = await search(store.id, query=["cold wind", "hot wind"])
            assert [len(body["documents"]) for _, body in reranker.seen] == [3, 3, 3]
            assert both.data[0].filename == one.data[0].filename


async def test_files_are_uploaded_listed_read_and_deleted(client: openai.AsyncOpenAI) -> None:
    made = await upload(client, "../folder/übung 1.txt", "Zum Lesen.")
    assert (made.object, made.filename, made.bytes, made.purpose) == ("file", "übung 1.txt", 10, "assistants")
    assert made.id.startswith("file-") and (await client.files.retrieve(made.id)) == made
    assert (await client.files.content(made.id)).text == "Zum Lesen."
    other = await client.files.create(file=io.BytesIO(b"x"), purpose="user_data")
    assert [f.id async for f in client.files.list(order="asc", limit=1)][-2:] == [made.id, other.id]
    assert [f.id async for f in client.files.list(purpose="user_data")] == [other.id]
    deleted = await client.files.delete(other.id)
    assert (deleted.id, deleted.deleted) == (other.id, True)
    with pytest.raises(openai.NotFoundError):
        await client.files.retrieve(other.id)
    with pytest.raises(openai.NotFoundError):
        await client.files.content(other.id)


async def test_a_question_finds_the_file_that_answers_it(client: openai.AsyncOpenAI) -> None:
    store = await store_with(client, "Handbook 2026", rent="The rent is due on Monday.", dog="The dog is called Rex.")
    assert (store.object, store.name, store.status) == ("vector_store", "Handbook 2026", "completed")
    page = await client.vector_stores.search(store.id, query="When is the rent due?", max_num_results=2)
    best = page.data[0]
    assert (best.filename, best.attributes) == ("rent.txt", {"stem": "rent"})
    assert [part.text for part in best.content] == ["The rent is due on Monday."]
    assert 0 <= best.score <= 1 and page.data == sorted(page.data, key=lambda result: -result.score)
    both = await client.vector_stores.search(store.id, query=["the rent", "name of the dog"])
    assert {result.filename for result in both.data} == {"rent.txt", "dog.txt"}
    described = await client.vector_stores.retrieve(store.id)
    assert described.file_counts.completed == described.file_counts.total == 2 and described.usage_bytes == 48
    text = [part async for part in await _content(client, store.id, best.file_id)]
    assert [part.text for part in text] == ["The rent is due on Monday."]


async def _content(client: openai.AsyncOpenAI, store_id: str, file_id: str) -> Any:
    return await client.vector_stores.files.content(file_id, vector_store_id=store_id)


@pytest.mark.parametrize(
    ("filters", "found"),
    [
        ({"type": "eq", "key": "year", "value": 2024}, {"a"}),
        ({"type": "ne", "key": "year", "value": 2024}, {"b", "c"}),
        ({"type": "gte", "key": "year", "value": 2024}, {"a", "b"}),
        ({"type": "in", "key": "region", "value": ["eu", "us"]}, {"a", "b"}),
        ({"type": "nin", "key": "region", "value": ["us"]}, {"a", "c"}),
        (
            {
                "type": "or",
                "filters": [
                    {"type": "eq", "key": "is_draft", "value": True},
                    {
                        "type": "and",
                        "filters": [
                            {"type": "lt", "key": "year", "value": 2025},
                            {"type": "eq", "key": "region", "value": "eu"},
                        ],
                    },
                ],
            },
            {"a", "c"},
        ),
        ({"type": "eq", "key": "year", "value": "2024"}, set()),
    ],
)
async def test_attributes_filter_before_the_best_are_chosen(
    client: openai.AsyncOpenAI, filtered_store: str, filters: Any, found: set[str]
) -> None:
    page = await client.vector_stores.search(
        filtered_store, query="What does the law say?", filters=filters, max_num_results=max(1, len(found))
    )
    assert {result.filename.removesuffix(".txt") for result in page.data} == found


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def filtered_store(running: KnowledgeEndpoint) -> str:
    client = running.running.openai
    store = await client.vector_stores.create(name="laws")
    attributes: dict[str, Any] = {
        "a": {"year": 2024, "region": "eu"},
        "b": {"year": 2025, "region": "us"},
        "c": {"is_draft": True},
    }
    for stem, values in attributes.items():
        file = await upload(client, f"{stem}.txt", f"The law number {stem} says something.")
        await client.vector_stores.files.create_and_poll(file.id, vector_store_id=store.id, attributes=values, **QUICK)
    return store.id


@pytest.mark.parametrize(
    "filters",
    [
        {"type": "like", "key": "a", "value": "b"},
        {"type": "eq", "key": "a"},
        {"type": "eq", "key": "a", "value": 1, "more": 2},
        {"type": "and", "filters": []},
        {"type": "in", "key": "a", "value": "text"},
        {"key": "a", "value": 1},
    ],
)
async def test_wrong_filters_are_named(client: openai.AsyncOpenAI, filtered_store: str, filters: Any) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        await client.vector_stores.search(filtered_store, query="law", filters=filters)
    assert refused.value.code == "invalid_filter" and str(refused.value.param).startswith("filters")


async def test_results_below_the_threshold_are_left_out(client: openai.AsyncOpenAI, filtered_store: str) -> None:
    every = await client.vector_stores.search(filtered_store, query="law number a")
    threshold = every.data[0].score
    kept = await client.vector_stores.search(
        filtered_store, query="law number a", ranking_options={"score_threshold": threshold}
    )
    assert 1 <= len(kept.data) < len(every.data) or all(result.score >= threshold for result in every.data)
    assert all(result.score >= threshold for result in kept.data)


async def test_stores_are_listed_in_pages_changed_and_deleted(client: openai.AsyncOpenAI) -> None:
    made = [await client.vector_stores.create(name=f"page {i}", metadata={"number": str(i)}) for i in range(5)]
    ids = [store.id for store in made]
    listed = [store.id async for store in client.vector_stores.list(limit=2, order="asc")]
    assert [store_id for store_id in listed if store_id in ids] == ids and len(set(listed)) == len(listed)
    newest = await client.vector_stores.list(limit=3)
    assert [store.id for store in newest.data] == list(reversed(ids))[:3] and newest.has_more
    before = await client.vector_stores.list(limit=2, before=ids[1])
    assert [store.id for store in before.data] == [ids[3], ids[2]]
    changed = await client.vector_stores.update(ids[0], name="another name", metadata={"number": "7"})
    assert (changed.name, changed.metadata) == ("another name", {"number": "7"})
    assert (await client.vector_stores.delete(ids[0])).deleted
    with pytest.raises(openai.NotFoundError):
        await client.vector_stores.retrieve(ids[0])


async def test_names_need_not_be_unique_nor_given(client: openai.AsyncOpenAI) -> None:
    first, second = [await client.vector_stores.create(name="Twice: the same/name?") for _ in range(2)]
    nameless = await client.vector_stores.create()
    assert first.id != second.id and first.name == second.name == "Twice: the same/name?"
    collections = {store.to_dict()["windfarm"]["collection"] for store in (first, second, nameless)}  # type: ignore[index]
    assert len(collections) == 3 and "Twice the same name" in collections


async def test_files_of_a_store_are_listed_changed_and_removed(client: openai.AsyncOpenAI) -> None:
    store = await store_with(client, "files", one="First text here.", two="Second text here.")
    listed = [file async for file in client.vector_stores.files.list(store.id, order="asc", limit=1)]
    assert [file.attributes for file in listed] == [{"stem": "one"}, {"stem": "two"}]
    assert not (await client.vector_stores.files.list(store.id, filter="failed")).data
    one = await client.vector_stores.files.retrieve(listed[0].id, vector_store_id=store.id)
    assert (one.status, one.usage_bytes, one.vector_store_id) == ("completed", 16, store.id)
    changed = await client.vector_stores.files.update(
        one.id, vector_store_id=store.id, attributes={"a": 1.5, "b": True}
    )
    assert changed.attributes == {"a": 1.5, "b": True}
    assert (await client.vector_stores.files.delete(one.id, vector_store_id=store.id)).deleted
    found = await client.vector_stores.search(store.id, query="First text")
    assert {result.filename for result in found.data} == {"two.txt"}
    assert (await client.files.retrieve(one.id)).filename == "one.txt", "the file itself stays"
    assert (await client.vector_stores.retrieve(store.id)).file_counts.total == 1


async def test_the_receipt_of_a_document_names_the_upload_that_stays(
    running: KnowledgeEndpoint, client: openai.AsyncOpenAI
) -> None:
    store = await store_with(client, "kept", one="First text here.", two="Second text here.")
    name, owner = store.to_dict()["windfarm"]["collection"], running.owner_id
    by_stem = {
        file.attributes["stem"]: file.id
        async for file in client.vector_stores.files.list(store.id)  # type: ignore[index]
    }
    (document,) = [each["id"] for each in await running.service.list_documents(name, owner) if "one" in each["name"]]
    receipt = await running.service.delete_document(name, document, owner)
    assert receipt["removed"]["files_kept"] == [by_stem["one"]] and receipt["self_check"]["is_clean"]
    assert (await client.files.content(by_stem["one"])).text == "First text here."
    whole = await running.service.delete_collection(name, owner)
    assert whole["removed"]["files_kept"] == sorted(by_stem.values())


async def test_a_deleted_file_leaves_all_its_stores(client: openai.AsyncOpenAI) -> None:
    file = await upload(client, "shared.txt", "Shared by two stores.")
    stores = [await client.vector_stores.create(name=f"sharing {i}", file_ids=[file.id]) for i in range(2)]
    for store in stores:
        await client.vector_stores.files.poll(file.id, vector_store_id=store.id, poll_interval_ms=20)
    await client.files.delete(file.id)
    for store in stores:
        assert not (await client.vector_stores.search(store.id, query="Shared by two")).data
        assert not (await client.vector_stores.files.list(store.id)).data


async def test_files_of_one_name_stay_apart(client: openai.AsyncOpenAI) -> None:
    store = await client.vector_stores.create(name="twins")
    batch = await client.vector_stores.file_batches.create_and_poll(
        store.id,
        file_ids=[(await upload(client, "same.txt", text)).id for text in ("The cat sleeps.", "The dog barks.")],
        **QUICK,
    )
    assert (batch.status, batch.file_counts.completed) == ("completed", 2)
    files = [f.id async for f in client.vector_stores.file_batches.list_files(batch.id, vector_store_id=store.id)]
    found = await client.vector_stores.search(store.id, query="Who sleeps, who barks?")
    assert {result.file_id for result in found.data} == set(files) and len(files) == 2
    assert {result.filename for result in found.data} == {"same.txt"}


async def test_a_file_that_cannot_be_read_says_why(client: openai.AsyncOpenAI) -> None:
    store = await client.vector_stores.create(name="unreadable")
    file = await client.files.create(file=("picture.png", b"\x89PNG\r\n\x1a\n" + bytes(100)), purpose="assistants")
    failed = await client.vector_stores.files.create_and_poll(file.id, vector_store_id=store.id, **QUICK)
    assert failed.status == "failed" and failed.last_error is not None
    assert (failed.last_error.code, "PNG picture" in failed.last_error.message) == ("unsupported_file", True)
    assert (await client.vector_stores.retrieve(store.id)).file_counts.failed == 1
    assert (await client.vector_stores.files.delete(file.id, vector_store_id=store.id)).deleted


async def test_collections_are_vector_stores_too(running: KnowledgeEndpoint, client: openai.AsyncOpenAI) -> None:
    made = await running.service.create_collection("by hand", "", running.owner_id)
    document_id = await running.ingest("by hand", "note.md", "# Milk\n\nThe milk is in the fridge.")
    store = await client.vector_stores.retrieve(made["id"])
    assert (store.name, store.file_counts.completed) == ("by hand", 1)
    (result,) = (await client.vector_stores.search(store.id, query="Where is the milk?")).data
    assert (result.file_id, result.filename) == (document_id, "note.md")


async def test_other_peoples_files_and_stores_do_not_exist(
    running: KnowledgeEndpoint, client: openai.AsyncOpenAI
) -> None:
    file = await upload(client, "secret.txt", "The secret word is swordfish.")
    store = await client.vector_stores.create(name="secrets", file_ids=[file.id])
    await client.vector_stores.files.poll(file.id, vector_store_id=store.id, poll_interval_ms=20)
    stranger = client_of(running, await running.member_key("files stranger"))
    attempts: list[Any] = [
        lambda: stranger.files.retrieve(file.id),
        lambda: stranger.files.content(file.id),
        lambda: stranger.files.delete(file.id),
        lambda: stranger.vector_stores.retrieve(store.id),
        lambda: stranger.vector_stores.update(store.id, name="mine"),
        lambda: stranger.vector_stores.delete(store.id),
        lambda: stranger.vector_stores.search(store.id, query="secret word"),
        lambda: stranger.vector_stores.files.list(store.id),
        lambda: stranger.vector_stores.files.content(file.id, vector_store_id=store.id),
        lambda: stranger.vector_stores.files.create(store.id, file_id=file.id),
        lambda: stranger.vector_stores.create(name="stolen", file_ids=[file.id]),
    ]
    for attempt in attempts:
        with pytest.raises(openai.NotFoundError) as refused:
            await attempt()
        assert "swordfish" not in str(refused.value) and "secret.txt" not in str(refused.value)
    assert [f async for f in stranger.files.list()] == []
    assert [s async for s in stranger.vector_stores.list()] == []
    await stranger.close()


async def test_what_is_not_served_is_refused_by_name(running: KnowledgeEndpoint, client: openai.AsyncOpenAI) -> None:
    store = await client.vector_stores.create(name="refusals")
    refusals: list[tuple[Any, str]] = [
        (lambda: client.vector_stores.create(expires_after={"anchor": "last_active_at", "days": 1}), "expires_after"),
        (
            lambda: client.files.create(
                file=b"x", purpose="assistants", expires_after={"anchor": "created_at", "seconds": 3600}
            ),
            "expires_after",
        ),
        (lambda: client.files.create(file=b"x", purpose="odd"), "purpose"),  # type: ignore[arg-type]
        (lambda: client.vector_stores.search(store.id, query="x", rewrite_query=True), "rewrite_query"),
        (lambda: client.vector_stores.search(store.id, query="x", max_num_results=99), "max_num_results"),
        (lambda: client.vector_stores.list(limit=0), "limit"),
        (lambda: client.vector_stores.list(after="vs_none"), "after"),
        (lambda: client.vector_stores.create(metadata={"k" * 65: "v"}), "metadata"),
        (
            lambda: client.vector_stores.files.create(
                store.id,
                file_id="file-1",
                chunking_strategy={
                    "type": "static",
                    "static": {"max_chunk_size_tokens": 200, "chunk_overlap_tokens": 10},
                },
            ),
            "chunking_strategy",
        ),
    ]
    for attempt, param in refusals:
        with pytest.raises(openai.BadRequestError) as refused:
            await attempt()
        assert str(refused.value.param).startswith(param), refused.value
    missing = await running.http.post("/v1/files", files={"file": ("a.txt", b"x")})
    assert (missing.status_code, error_of(missing)["param"]) == (400, "purpose")
    unknown = await running.http.post("/v1/files", files={"file": ("a.txt", b"x")}, data={"owner": "me"})
    assert (unknown.status_code, error_of(unknown)["param"]) == (400, "owner")


async def test_files_that_a_kill_left_behind_are_swept(running: KnowledgeEndpoint, tmp_path: Path) -> None:
    from services.files import Files

    files = Files(running.database, running.home / "files")
    kept = {file.name for file in (running.home / "files").iterdir()}
    assert kept and files.remove_strays() == 0
    assert {file.name for file in (running.home / "files").iterdir()} == kept
