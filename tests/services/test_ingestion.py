"""Files become documents, completely or not at all."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from sqlalchemy import select

from rag.errors import EmbeddingMismatch, StoreError
from services.database import Document, JournalEntry, Version
from services.errors import ApiError
from tests.seen import seen
from tests.services.ingesting import OWNER, HashEmbedder, Running, running

DOCUMENTS = Path(__file__).parents[1] / "data" / "documents"
TEXT = "# Holidays\n\n" + "\n\n".join(
    f"Rule {n}: everybody who works for the company gets {n} free days in the month {n}." for n in range(40)
)


async def test_a_file_becomes_a_document_that_is_found(tmp_path: Path) -> None:
    async with running(tmp_path) as windfarm:
        windfarm.create()
        job = await windfarm.ingest("handbook", "rules.md", TEXT)
        assert (job["state"], job["progress"], job["unchanged"], job["error"]) == ("done", 1.0, False, None)
        (document,) = windfarm.knowledge.list_documents("handbook", OWNER)
        assert document["id"] == job["document_id"] and document["num_chunks"] == job["num_chunks"] > 5
        assert document["title"] == "Holidays" and document["language"] == "en"
        full = windfarm.knowledge.document(document["id"], OWNER)
        assert full["text"] == TEXT
        assert any("Rule 33" in text for text in windfarm.found("handbook", "rule 33"))
        below = windfarm.found("handbook", "holidays")
        assert len(below) == job["num_chunks"] and sum("Holidays" in text for text in below) == 1, "by their heading"
        assert not list((tmp_path / "blobs").iterdir())
        windfarm.check_agreement()


async def test_passages_are_found_by_a_title_that_the_text_does_not_show(tmp_path: Path) -> None:
    async with running(tmp_path) as windfarm:
        windfarm.create()
        for name, title in (("a", "Zanzibar"), ("b", "Oslo")):
            page = f"<html><head><title>{title}</title></head><body><h1>Rules</h1><p>The desk opens at nine.</p></body>"
            assert (await windfarm.ingest("handbook", f"{name}.html", page))["num_chunks"] == 1
        index_id = windfarm.knowledge.collection("handbook", OWNER).index_id
        (hit,) = seen(windfarm.store, index_id).search([index_id], vector=None, text="zanzibar", limit=9)
        assert hit.chunk.document_name == "a.html" and "Zanzibar" not in hit.chunk.text
        question = windfarm.embedder.vectors(["oslo"])[0]
        by_meaning = seen(windfarm.store, index_id).search([index_id], vector=question, text=None, limit=9)
        assert max(by_meaning, key=lambda each: each.dense or 0).chunk.document_name == "b.html"


async def test_the_same_content_again_changes_nothing(tmp_path: Path) -> None:
    async with running(tmp_path) as windfarm:
        windfarm.create()
        first = await windfarm.ingest("handbook", "rules.md", TEXT)
        num_texts = windfarm.embedder.num_texts
        second = await windfarm.ingest("handbook", "rules.md", TEXT)
        assert second["state"] == "done" and second["unchanged"]
        assert (second["document_id"], second["version_id"]) == (first["document_id"], first["version_id"])
        assert windfarm.embedder.num_texts == num_texts
        windfarm.check_agreement()


async def test_a_changed_file_replaces_its_old_version(tmp_path: Path) -> None:
    async with running(tmp_path) as windfarm:
        windfarm.create()
        first = await windfarm.ingest("handbook", "rules.md", TEXT)
        second = await windfarm.ingest("handbook", "rules.md", TEXT.replace("free days", "working weekends"))
        assert second["document_id"] == first["document_id"] and second["version_id"] != first["version_id"]
        assert windfarm.found("handbook", "weekends") and not windfarm.found("handbook", "free")
        with windfarm.database.read() as session:
            assert session.scalars(select(Version.id)).all() == [second["version_id"]]
            assert not session.scalars(select(JournalEntry)).all()
        windfarm.check_agreement()


@pytest.mark.integration
@pytest.mark.requires("postgres")
async def test_ingestion_journal_jobs_and_reconciler_work_on_postgresql(tmp_path: Path, postgres_url: str) -> None:
    """A document comes, is changed, is replaced over a restart of the service, and goes."""
    async with running(tmp_path, url=postgres_url) as windfarm:
        windfarm.create()
        first = await windfarm.ingest("handbook", "rules.md", TEXT)
        assert (first["state"], first["error"]) == ("done", None)
        assert (await windfarm.ingest("handbook", "rules.md", TEXT))["unchanged"]
        bad = await windfarm.ingest("handbook", "nothing.txt", "")
        assert (bad["state"], bad["error"]["code"]) == ("failed", "empty_file")
        several = [await windfarm.service.submit("handbook", f"{n}.txt", b"Apples are red.", OWNER) for n in range(3)]
    async with running(tmp_path, url=postgres_url) as windfarm:
        assert windfarm.report.agreed
        for job in several:
            assert (await windfarm.service.wait_for_job(job["id"], OWNER, timeout_s=30))["state"] == "done"
        second = await windfarm.ingest("handbook", "rules.md", TEXT.replace("free days", "working weekends"))
        assert second["document_id"] == first["document_id"]
        assert windfarm.found("handbook", "weekends") and not windfarm.found("handbook", "free")
        windfarm.check_agreement()
        names = [document["name"] for document in windfarm.knowledge.list_documents("handbook", OWNER)]
        assert names == ["0.txt", "1.txt", "2.txt", "rules.md"]
        receipt = await windfarm.service.delete_collection("handbook", OWNER)
        assert receipt["deleted"] and not windfarm.store.list_versions()
        windfarm.check_agreement()
    assert not (tmp_path / "windfarm.db").exists()


async def test_files_of_one_name_in_two_collections_are_two_documents(tmp_path: Path) -> None:
    async with running(tmp_path) as windfarm:
        windfarm.create("one")
        windfarm.create("two")
        first = await windfarm.ingest("one", "a.txt", "Apples are red.")
        second = await windfarm.ingest("two", "a.txt", "Pears are green.")
        assert first["document_id"] != second["document_id"]
        assert windfarm.found("one", "apples") and not windfarm.found("two", "apples")


async def test_deleting_a_document_removes_all_of_it(tmp_path: Path) -> None:
    async with running(tmp_path) as windfarm:
        windfarm.create()
        job = await windfarm.ingest("handbook", "rules.md", TEXT)
        receipt = await windfarm.service.delete_document("handbook", job["document_id"], OWNER)
        assert receipt["deleted"] and receipt["name"] == "rules.md" and receipt["num_passages"] == job["num_chunks"]
        assert not windfarm.store.list_versions() and not windfarm.found("handbook", "rule")
        with windfarm.database.read() as session:
            assert not session.scalars(select(Document)).all() and not session.scalars(select(Version)).all()
        with pytest.raises(ApiError, match="no document"):
            windfarm.knowledge.document(job["document_id"], OWNER)
        again = await windfarm.ingest("handbook", "rules.md", TEXT)
        assert again["state"] == "done" and not again["unchanged"]
        windfarm.check_agreement()


async def test_deleting_a_collection_cancels_its_running_job(tmp_path: Path) -> None:
    embedder = HashEmbedder()
    async with running(tmp_path, embedder=embedder) as windfarm:
        windfarm.create()
        windfarm.create("other")
        embedder.gate.clear()
        await windfarm.service.submit("handbook", "rules.md", TEXT.encode(), OWNER)
        waiting = await windfarm.service.submit("other", "a.txt", b"Apples are red.", OWNER)
        receipt = await windfarm.service.delete_collection("handbook", OWNER)
        assert receipt["deleted"]
        embedder.gate.set()
        job = await windfarm.service.wait_for_job(waiting["id"], OWNER, timeout_s=30)
        assert job["state"] == "done"
        assert not list((tmp_path / "blobs").iterdir())
        windfarm.check_agreement()


async def test_deleting_a_document_cancels_its_replacement(tmp_path: Path) -> None:
    embedder = HashEmbedder()
    async with running(tmp_path, embedder=embedder) as windfarm:
        windfarm.create()
        first = await windfarm.ingest("handbook", "rules.md", TEXT)
        embedder.gate.clear()
        job = await windfarm.service.submit("handbook", "rules.md", (TEXT + " More.").encode(), OWNER)
        await windfarm.service.delete_document("handbook", first["document_id"], OWNER)
        embedder.gate.set()
        ended = await windfarm.service.wait_for_job(job["id"], OWNER, timeout_s=30)
        assert ended["state"] == "cancelled"
        # The worker cleans up behind a cancelled job; the next job has its turn after that.
        await windfarm.ingest("handbook", "other.txt", "Something else.")
        assert windfarm.found("handbook", "rule") == []
        windfarm.check_agreement()


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [
        ("nothing.txt", b"", "empty_file"),
        ("picture.pdf", b"\x89PNG\r\n\x1a\n" + bytes(100), "type_mismatch"),
        ("program.bin", b"\x7fELF" + bytes(100), "unknown_type"),
        ("broken.docx", b"PK\x03\x04" + bytes(100), "damaged"),
    ],
)
async def test_a_bad_file_fails_with_its_reason_and_stops_no_other(
    tmp_path: Path, name: str, content: bytes, code: str
) -> None:
    async with running(tmp_path) as windfarm:
        windfarm.create()
        job = await windfarm.ingest("handbook", name, content)
        assert job["state"] == "failed" and job["error"]["code"] == code and name in job["error"]["message"]
        good = await windfarm.ingest("handbook", "good.txt", "A good file.")
        assert good["state"] == "done"
        assert [each["name"] for each in windfarm.knowledge.list_documents("handbook", OWNER)] == ["good.txt"]
        windfarm.check_agreement()


async def test_a_bad_new_version_leaves_the_old_one_in_place(tmp_path: Path) -> None:
    async with running(tmp_path) as windfarm:
        windfarm.create()
        await windfarm.ingest("handbook", "rules.md", TEXT)
        job = await windfarm.ingest("handbook", "rules.md", b"\x00\x01\x02" * 100)
        assert job["state"] == "failed"
        assert windfarm.found("handbook", "rule 7")
        windfarm.check_agreement()


async def test_a_path_in_a_file_name_is_only_a_label(tmp_path: Path) -> None:
    async with running(tmp_path) as windfarm:
        windfarm.create()
        job = await windfarm.ingest("handbook", "../../etc/passwd.txt", "Not a password file.")
        assert job["filename"] == "passwd.txt" and job["state"] == "done"
        with pytest.raises(ApiError, match="not a file name"):
            await windfarm.ingest("handbook", "..", "x")


async def test_a_scanned_file_is_taken_with_a_warning(tmp_path: Path) -> None:
    async with running(tmp_path) as windfarm:
        windfarm.create()
        job = await windfarm.ingest("handbook", "scan.pdf", (DOCUMENTS / "non_text_searchable.pdf").read_bytes())
        assert job["state"] == "done" and job["num_chunks"] == 0 and "no text layer" in job["warnings"][0]
        windfarm.check_agreement()


async def test_too_large_files_are_refused_before_they_are_kept(tmp_path: Path) -> None:
    async with running(tmp_path) as windfarm:
        windfarm.create()
        with pytest.raises(ApiError) as refused:
            await windfarm.ingest("handbook", "big.txt", bytes(65 << 20))
        assert (refused.value.status, refused.value.code) == (413, "too_large")
        assert not (tmp_path / "blobs").exists() or not list((tmp_path / "blobs").iterdir())


async def test_an_unknown_collection_names_the_nearest(tmp_path: Path) -> None:
    async with running(tmp_path) as windfarm:
        windfarm.create("handbook")
        with pytest.raises(ApiError, match="Did you mean 'handbook'"):
            await windfarm.ingest("handbok", "a.txt", "x")


async def test_another_embedding_model_is_refused_until_everything_is_embedded_anew(tmp_path: Path) -> None:
    async with running(tmp_path) as windfarm:
        windfarm.create()
        await windfarm.ingest("handbook", "rules.md", TEXT)
        old_index = windfarm.knowledge.collection("handbook", OWNER).index_id
    async with running(tmp_path, embedder=HashEmbedder("wide", 48)) as windfarm:
        with pytest.raises(ApiError, match="windfarm reembed handbook"):
            await windfarm.ingest("handbook", "more.txt", "More.")
        with pytest.raises(EmbeddingMismatch):
            windfarm.service.check_embedding(windfarm.knowledge.collection("handbook", OWNER))
        job = await windfarm.service.reembed("handbook", OWNER)
        job = await windfarm.service.wait_for_job(job["id"], OWNER, timeout_s=60)
        assert job["state"] == "done" and job["num_chunks"] > 5
        collection = windfarm.knowledge.collection("handbook", OWNER)
        assert (collection.embedding_model, collection.embedding_dimension) == ("wide", 48)
        assert windfarm.store.list_collections() == [collection.index_id] != [old_index]
        assert windfarm.found("handbook", "rule 33")
        more = await windfarm.ingest("handbook", "more.txt", "More.")
        assert more["state"] == "done"
        windfarm.check_agreement()


async def test_waiting_jobs_survive_a_restart(tmp_path: Path) -> None:
    embedder = HashEmbedder()
    embedder.gate.clear()
    async with running(tmp_path, embedder=embedder) as windfarm:
        windfarm.create()
        jobs = [
            await windfarm.service.submit("handbook", f"{n}.txt", f"File number {n}.".encode(), OWNER) for n in range(4)
        ]
        await asyncio.sleep(0)
    async with running(tmp_path) as windfarm:
        ended = [await windfarm.service.wait_for_job(job["id"], OWNER, timeout_s=60) for job in jobs]
        assert [job["state"] for job in ended] == ["done"] * 4
        windfarm.check_agreement()


async def test_lost_passages_are_written_again_from_the_stored_text(tmp_path: Path) -> None:
    async with running(tmp_path) as windfarm:
        windfarm.create()
        job = await windfarm.ingest("handbook", "rules.md", TEXT)
        index_id = windfarm.knowledge.collection("handbook", OWNER).index_id
        windfarm.store.delete_version(index_id, job["version_id"])
    async with running(tmp_path) as windfarm:
        assert windfarm.report.num_repairs == 1
        (repair, _) = await windfarm.service.jobs("handbook", OWNER)
        ended = await windfarm.service.wait_for_job(repair["id"], OWNER, timeout_s=60)
        assert ended["state"] == "done" and ended["kind"] == "repair"
        assert windfarm.found("handbook", "rule 33")
        windfarm.check_agreement()


@pytest.mark.parametrize("step", ["activate_version", "delete_version"])
async def test_a_decided_change_that_the_store_could_not_carry_out_is_finished_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    async with running(tmp_path) as windfarm:
        windfarm.create()
        await windfarm.ingest("handbook", "rules.md", "Old rules hold.")

        def fail(*_: object, **__: object) -> None:
            raise StoreError("The disk broke.")

        monkeypatch.setattr(windfarm.store, step, fail)
        job = await windfarm.ingest("handbook", "rules.md", "New rules hold.")
        assert job["state"] == ("failed" if step == "activate_version" else "done")
    monkeypatch.undo()
    async with running(tmp_path) as windfarm:
        assert windfarm.report.num_replayed >= 1
        assert windfarm.found("handbook", "rules") == ["New rules hold."]
        assert (await windfarm.service.job(job["id"], OWNER))["state"] == "done"
        windfarm.check_agreement()


async def test_an_interrupted_reembedding_leaves_the_old_vectors_in_use(tmp_path: Path) -> None:
    async with running(tmp_path) as windfarm:
        windfarm.create()
        await windfarm.ingest("handbook", "rules.md", TEXT)
    slow = HashEmbedder("wide", 48)
    slow.gate.clear()
    async with running(tmp_path, embedder=slow) as windfarm:
        job = await windfarm.service.reembed("handbook", OWNER)
    async with running(tmp_path, embedder=HashEmbedder("wide", 48)) as windfarm:
        ended = await windfarm.service.wait_for_job(job["id"], OWNER, timeout_s=60)
        assert ended["state"] == "done"
        assert len(windfarm.store.list_collections()) == 1
        windfarm.check_agreement()


async def test_deleting_while_everything_is_embedded_anew_deletes_there_too(tmp_path: Path) -> None:
    embedder = HashEmbedder()
    async with running(tmp_path, embedder=embedder) as windfarm:
        windfarm.create()
        first = await windfarm.ingest("handbook", "a.txt", "Apples are red.")
        await windfarm.ingest("handbook", "b.txt", "Pears are green.")
        embedder.gate.clear()
        job = await windfarm.service.reembed("handbook", OWNER)
        await windfarm.service.delete_document("handbook", first["document_id"], OWNER)
        embedder.gate.set()
        ended = await windfarm.service.wait_for_job(job["id"], OWNER, timeout_s=60)
        assert ended["state"] == "done" and ended["num_chunks"] == 1
        assert not windfarm.found("handbook", "apples") and windfarm.found("handbook", "pears")
        windfarm.check_agreement()


async def test_members_see_their_own_collections_only(tmp_path: Path) -> None:
    async with running(tmp_path) as windfarm:
        _add_member(windfarm)
        windfarm.create("private")
        with pytest.raises(ApiError) as refused:
            await windfarm.service.submit("private", "a.txt", b"x", "user_member")
        assert refused.value.status == 404
        assert windfarm.knowledge.list_collections("user_member") == []


def _add_member(windfarm: Running) -> None:
    from services.database import User

    with windfarm.database.write() as session:
        session.add(User(id="user_member", name="member", role="member"))
