"""A deletion takes everything with it and proves it: rows, points, words, uploads, answers in conversations; also after
a crash, during a new embedding and while others search."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from rag.errors import StoreError
from services.accounts import Actor
from services.conversations import Conversations
from services.database import DeletionReceipt, Job, JournalEntry, Message, User
from services.errors import ApiError
from services.message_sources import WITHDRAWN
from services.people import People
from services.reconciler import reconcile
from services.sharing import ReaderChange, ReaderNames, Sharing
from tests.services.filling import add_document
from tests.services.ingesting import OWNER, Running, running
from tests.services.reading import found_by

SECRET = "The vault code is zebra seven."


@pytest.fixture
async def windfarm(tmp_path: Path) -> AsyncIterator[Running]:
    async with running(tmp_path) as made:
        made.create()
        yield made


def add(windfarm: Running, name: str = "vault.txt", text: str = SECRET, collection: str = "handbook") -> str:
    known = windfarm.knowledge.collection(collection, OWNER)
    return add_document(
        windfarm.database, windfarm.store, windfarm.journal, known, name, text, windfarm.embedder.dimension
    )


def actor(user_id: str = OWNER) -> Actor:
    return Actor(user_id, user_id, "owner", "key_1")


def everything_stored(windfarm: Running) -> bytes:
    """All bytes that any table holds, the stored texts unpacked."""
    import zlib

    from services.database import Base

    with windfarm.database.read() as session:
        values = [
            zlib.decompress(value) if isinstance(value, bytes) else str(value).encode()
            for table in Base.metadata.sorted_tables
            for row in session.execute(select(table))
            for value in row
        ]
    return b"\n".join(values)


async def test_the_receipt_lists_what_went_and_that_nothing_is_left(windfarm: Running) -> None:
    document = add(windfarm)
    kept = add(windfarm, "other.txt", "The harbour opens at nine.")
    index_id = windfarm.knowledge.collection("handbook", OWNER).index_id
    receipt = await windfarm.service.delete_document("handbook", document, OWNER)
    removed, check = receipt["removed"], receipt["self_check"]
    assert (receipt["object"], receipt["name"], receipt["deleted"]) == ("document.deleted", "vault.txt", True)
    assert removed["document_ids"] == [document] and len(removed["version_ids"]) == receipt["num_versions"] == 1
    assert removed["points"] == receipt["num_passages"] == 1
    assert removed["words"] == removed["word_entries"] > 3
    assert removed["jobs"] == 1 and removed["answers"] == removed["uploads"] == 0
    assert check["is_clean"] and check["num_searches"] >= 1
    assert [check[name] for name in ("points", "rows", "answers", "uploads", "search_hits")] == [0] * 5
    assert "zebra" not in str(receipt) and b"zebra" not in everything_stored(windfarm)
    assert found_by(windfarm, OWNER, "zebra vault harbour") == {"other.txt"}
    assert windfarm.store.count(index_id) == 1 and windfarm.store.count(index_id, document_id=kept) == 1
    windfarm.check_agreement()


async def test_a_collection_goes_with_all_its_documents(windfarm: Running) -> None:
    for number in range(3):
        add(windfarm, f"{number}.txt", f"{SECRET} It is number {number}.")
    receipt = await windfarm.service.delete_collection("handbook", OWNER)
    assert (receipt["object"], receipt["num_documents"], receipt["num_passages"]) == ("collection.deleted", 3, 3)
    assert receipt["removed"]["indexes"] == 1 and receipt["self_check"]["is_clean"]
    assert receipt["self_check"]["num_searches"] >= 3
    assert b"zebra" not in everything_stored(windfarm)
    assert windfarm.store.list_collections() == []


async def test_an_empty_collection_is_searched_and_deleted_like_any_other(windfarm: Running) -> None:
    assert found_by(windfarm, OWNER, "anything") == set()
    document = add(windfarm)
    await windfarm.service.delete_document("handbook", document, OWNER)
    assert found_by(windfarm, OWNER, "zebra") == set()
    receipt = await windfarm.service.delete_collection("handbook", OWNER)
    assert (receipt["num_documents"], receipt["num_passages"]) == (0, 0) and receipt["self_check"]["is_clean"]


async def test_what_is_deleted_does_not_exist_any_more(windfarm: Running) -> None:
    document = add(windfarm)
    await windfarm.service.delete_document("handbook", document, OWNER)
    for again in (
        lambda: windfarm.service.delete_document("handbook", document, OWNER),
        lambda: windfarm.service.delete_document("handbook", "doc_unknown", OWNER),
    ):
        with pytest.raises(ApiError) as refused:
            await again()
        assert (refused.value.status, refused.value.code) == (404, "unknown_document")


async def test_answers_that_could_use_a_document_lose_their_text_with_it(windfarm: Running) -> None:
    document, other = add(windfarm), add(windfarm, "other.txt", "The harbour opens at nine.")
    conversations = Conversations(windfarm.database)
    chat = conversations.create(actor())["id"]
    citation = {"document_id": document, "text": SECRET}
    conversations.add_message(actor(), chat, "user", "What is the code?")
    conversations.add_message(
        actor(), chat, "assistant", "It is zebra seven [1].", citations=[citation], document_ids=[document, other]
    )
    conversations.add_message(actor(), chat, "user", "And once more?")
    conversations.add_message(actor(), chat, "assistant", "As I said: zebra seven.")  # from the history alone
    unrelated = conversations.create(actor())["id"]
    conversations.add_message(actor(), unrelated, "assistant", "It opens at nine.", document_ids=[other])

    receipt = await windfarm.service.delete_document("handbook", document, OWNER)
    assert receipt["removed"]["answers"] == 2 and receipt["self_check"]["answers"] == 0
    shown = conversations.get(actor(), chat)["messages"]
    assert [message["content"] for message in shown] == ["What is the code?", WITHDRAWN, "And once more?", WITHDRAWN]
    assert all(message["citations"] == message["steps"] == [] for message in shown)
    assert b"zebra" not in everything_stored(windfarm)
    assert conversations.get(actor(), unrelated)["messages"][0]["content"] == "It opens at nine."
    # The conversation goes on: what is said from now on rests on nothing that is gone.
    conversations.add_message(actor(), chat, "assistant", "At nine.", document_ids=[other])
    assert conversations.get(actor(), chat)["messages"][-1]["content"] == "At nine."


async def test_an_answer_that_ends_after_the_deletion_is_not_kept(windfarm: Running) -> None:
    document = add(windfarm)
    conversations = Conversations(windfarm.database)
    chat = conversations.create(actor())["id"]
    await windfarm.service.delete_document("handbook", document, OWNER)
    conversations.add_message(actor(), chat, "assistant", "It is zebra seven.", document_ids=[document])
    assert conversations.get(actor(), chat)["messages"][0]["content"] == WITHDRAWN
    assert b"zebra" not in everything_stored(windfarm)


async def test_an_answer_is_hidden_while_its_reader_may_not_read_its_documents(windfarm: Running) -> None:
    document = add(windfarm)
    with windfarm.database.write() as session:
        session.add(User(id="user_anna", name="anna"))
    People(windfarm.database).create_group("hr", None, OWNER)
    People(windfarm.database).add_member("hr", "anna", OWNER)
    sharing = Sharing(windfarm.database, windfarm.journal)
    sharing.share("handbook", None, ReaderChange(only=ReaderNames(groups=("hr",))), OWNER)
    conversations, anna = Conversations(windfarm.database), actor("user_anna")
    chat = conversations.create(anna)["id"]
    conversations.add_message(anna, chat, "assistant", "Zebra seven.", document_ids=[document])

    def shown() -> str:
        return str(conversations.get(anna, chat)["messages"][0]["content"])

    assert shown() == "Zebra seven."
    People(windfarm.database).remove_member("hr", "anna", OWNER)
    assert shown() == WITHDRAWN and not conversations.may_read(anna, [document])
    conversations.add_message(anna, chat, "assistant", "Hello.")
    assert conversations.get(anna, chat)["messages"][1]["content"] == "Hello."
    People(windfarm.database).add_member("hr", "anna", OWNER)
    assert shown() == "Zebra seven." and conversations.may_read(anna, [document])


async def test_receipts_are_kept_and_shown_to_those_who_managed_what_is_gone(windfarm: Running) -> None:
    with windfarm.database.write() as session:
        session.add(User(id="user_anna", name="anna"))
        session.add(User(id="user_far", name="far", role="administrator", tenant="other"))
    document = add(windfarm)
    receipt = await windfarm.service.delete_document("handbook", document, OWNER)
    deletions = windfarm.service._deletions
    assert deletions.receipts(OWNER) == [receipt] and deletions.receipt(receipt["receipt_id"], OWNER) == receipt
    for stranger in ("user_anna", "user_far"):
        assert deletions.receipts(stranger) == []
        with pytest.raises(ApiError) as refused:
            deletions.receipt(receipt["receipt_id"], stranger)
        assert refused.value.status == 404


async def test_a_deletion_that_a_crash_interrupted_is_carried_out_and_checked_at_the_next_start(
    windfarm: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = add(windfarm)

    def crash(*_: object) -> None:
        raise SystemError("power is gone")

    with monkeypatch.context() as patched:
        patched.setattr(type(windfarm.store), "delete_document", crash)
        with pytest.raises(SystemError):
            await windfarm.service.delete_document("handbook", document, OWNER)
    # From the decision on nobody sees it, whatever the store still holds.
    assert found_by(windfarm, OWNER, "zebra") == set()
    assert windfarm.service._deletions.receipts(OWNER)[0]["self_check"] is None
    reconcile(windfarm.database, windfarm.store, windfarm.journal, windfarm.blobs)
    assert windfarm.service._deletions.finish_interrupted() == 1
    (receipt,) = windfarm.service._deletions.receipts(OWNER)
    assert receipt["self_check"]["is_clean"] and receipt["num_passages"] == 1
    assert windfarm.service._deletions.finish_interrupted() == 0


@pytest.mark.parametrize("what", ["points", "rows"])
async def test_what_is_left_is_found_and_said(windfarm: Running, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """A self-check that could not fail would prove nothing."""
    document = add(windfarm)
    if what == "points":
        monkeypatch.setattr(type(windfarm.store), "delete_document", lambda *_: None)
    else:
        # A job that leads back to the document.
        finish = windfarm.journal._finish_document_deletion

        def leave_a_row(payload: dict[str, Any]) -> None:
            finish(payload)
            collection = windfarm.knowledge.collection("handbook", OWNER)
            with windfarm.database.write() as session:
                job = Job(collection_id=collection.id, owner_id=OWNER, filename="x", document_id=document, state="done")
                session.add(job)

        monkeypatch.setitem(windfarm.journal._operations, "delete_document", leave_a_row)
    with pytest.raises(ApiError, match="still there in part") as failed:
        await windfarm.service.delete_document("handbook", document, OWNER)
    assert failed.value.code == "deletion_incomplete"
    (receipt,) = windfarm.service._deletions.receipts(OWNER)
    assert not receipt["self_check"]["is_clean"] and receipt["self_check"][what] == 1
    assert (
        receipt["self_check"]["search_hits"] == (1 if what == "points" else 0) * receipt["self_check"]["num_searches"]
    )


async def test_a_store_that_cannot_delete_is_said_and_shows_nothing(
    windfarm: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = add(windfarm)

    def refuse(*_: object) -> None:
        raise StoreError("a node still holds it")

    with monkeypatch.context() as patched:
        patched.setattr(type(windfarm.store), "delete_document", refuse)
        with pytest.raises(StoreError):
            await windfarm.service.delete_document("handbook", document, OWNER)
        assert found_by(windfarm, OWNER, "zebra") == set()
        with pytest.raises(ApiError, match="no document"):
            windfarm.knowledge.document(document, OWNER)
    windfarm.journal.replay()
    with windfarm.database.read() as session:
        assert session.scalars(select(JournalEntry)).all() == []
    windfarm.check_agreement()


async def test_a_new_embedding_under_way_keeps_nothing_of_a_deleted_document(windfarm: Running) -> None:
    document = add(windfarm)
    add(windfarm, "other.txt", "The harbour opens at nine.")
    windfarm.embedder.gate.clear()
    job = await windfarm.service.reembed("handbook", OWNER)
    receipt = await windfarm.service.delete_document("handbook", document, OWNER)
    assert receipt["self_check"]["is_clean"]
    windfarm.embedder.gate.set()
    ended = await windfarm.service.wait_for_job(job["id"], OWNER, timeout_s=60)
    assert ended["state"] == "done"
    assert found_by(windfarm, OWNER, "zebra harbour") == {"other.txt"}
    windfarm.check_agreement()


async def test_searches_during_a_deletion_find_it_whole_or_not_at_all(windfarm: Running) -> None:
    """And never fail for another reason than that the collection is gone."""
    for number in range(8):
        add(windfarm, f"{number}.txt", f"{SECRET} It is number {number}.")
    outcomes: list[int | str] = []
    is_deleted, is_busy = asyncio.Event(), asyncio.Event()

    async def search() -> None:
        while not is_deleted.is_set():
            try:
                outcomes.append(len(await asyncio.to_thread(found_by, windfarm, OWNER, "zebra")))
            except ApiError as error:
                outcomes.append(str(error.code))
            if len(outcomes) > 10:
                is_busy.set()

    searches = [asyncio.create_task(search()) for _ in range(3)]
    await is_busy.wait()
    await windfarm.service.delete_collection("handbook", OWNER)
    is_deleted.set()
    await asyncio.gather(*searches)
    assert set(outcomes) <= {8, "unknown_collection"} and 8 in outcomes
    with pytest.raises(ApiError, match="no collection"):
        found_by(windfarm, OWNER, "zebra")


async def test_receipts_hold_no_text(windfarm: Running) -> None:
    document = add(windfarm)
    await windfarm.service.delete_document("handbook", document, OWNER)
    with windfarm.database.read() as session:
        (row,) = session.scalars(select(DeletionReceipt)).all()
        assert session.scalars(select(Message)).all() == []
    assert "zebra" not in str(row.removed) + str(row.self_check)
