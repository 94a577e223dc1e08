"""Backup and restore while questions are answered: one moment, everything back, and the key that asks stays valid."""

from __future__ import annotations

import asyncio
import sqlite3
import zipfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from services.api_client import ApiClient, ApiFailed
from services.backup import drop_free_pages
from services.cli.commands import app
from services.reconciler import reconcile
from services.setup_errors import ConfigError
from tests.services.harness import wait_until
from tests.services.knowledge_endpoint import KnowledgeEndpoint, knowledge_endpoint
from tests.services.test_knowledge_transfer import on_a_server

DOCUMENTS = Path(__file__).parents[1] / "data" / "documents"


async def call(running: KnowledgeEndpoint, work: Callable[[ApiClient], Any], key: str | None = None) -> Any:
    def run() -> Any:
        with ApiClient(running.url, key or running.key) as client:
            return work(client)

    return await asyncio.to_thread(run)


async def found(running: KnowledgeEndpoint, words: str) -> list[str]:
    answer = await running.http.post("/v1/collections/house/search", json={"query": words, "top_k": 20})
    assert answer.status_code == 200, answer.text
    return [passage["text"] for passage in answer.json()["passages"]]


async def is_known(running: KnowledgeEndpoint) -> bool:
    """A key that belongs to another user now is known as that within two seconds."""
    return (await running.http.get("/v1/collections")).status_code == 200


async def filled(running: KnowledgeEndpoint) -> None:
    await running.service.create_collection("house", "", running.owner_id)
    await running.ingest("house", "rule.txt", "The old rule holds.")
    await running.ingest("house", "memo.pdf", (DOCUMENTS / "fake-memo.pdf").read_bytes())
    made = await running.http.post("/v1/conversations", json={"title": "Before the backup"})
    assert made.status_code == 201
    upload = await running.http.post("/v1/files", files={"file": ("a.txt", b"A file.")}, data={"purpose": "assistants"})
    assert upload.status_code == 200


async def test_a_restore_brings_back_the_moment_of_the_backup_while_searches_go_on(tmp_path: Path) -> None:
    async with knowledge_endpoint(tmp_path / "home") as running:
        await filled(running)
        stop = asyncio.Event()
        seen: set[tuple[str, ...]] = set()

        async def search_all_the_time() -> None:
            while not stop.is_set():
                seen.add(tuple(sorted(text for text in await found(running, "Which rule holds?") if "rule" in text)))

        searching = asyncio.create_task(search_all_the_time())
        file = tmp_path / "b.backup"
        await call(running, lambda client: client.download("/v1/backup", file))
        await running.ingest("house", "rule.txt", "The new rule holds.")
        deleted = next(
            d for d in await running.service.list_documents("house", running.owner_id) if ".pdf" in d["name"]
        )
        await running.service.delete_document("house", deleted["id"], running.owner_id)
        await running.service.create_collection("later", "", running.owner_id)
        await running.ingest("later", "later.txt", "Came later.")
        await running.http.post("/v1/conversations", json={"title": "After the backup"})
        late_key = await call(running, lambda _: running.running.accounts.create_key(running.owner_id, "late"))
        answer = await call(running, lambda client: client.send_file("/v1/restore", file), late_key)
        stop.set()
        await searching
        assert seen <= {("The old rule holds.",), ("The new rule holds.",)}, "never both, never none"
        assert (answer["num_collections"], answer["num_documents"]) == (1, 2)
        assert answer["reconciled"]["num_repairs"] == 0

        assert await found(running, "Which rule holds?") == (await found(running, "Which rule holds?"))
        assert "The old rule holds." in await found(running, "Which rule holds?")
        names = [c["name"] for c in await running.service.list_collections(running.owner_id)]
        assert names == ["house"]
        page = await running.http.get(f"/v1/collections/house/documents/{deleted['id']}/pages/1")
        assert page.content.startswith(b"\x89PNG")
        titles = [c["title"] for c in (await running.http.get("/v1/conversations")).json()["data"]]
        assert titles == ["Before the backup"]
        for key in (late_key, running.key):
            assert (await running.http.get("/v1/files", headers={"authorization": f"Bearer {key}"})).status_code == 200
        parts = running.service._parts
        report = reconcile(parts.database, parts.vectors, parts.journal, parts.blobs)
        assert report.agreed and len(parts.vectors.list_collections()) == 1
        embedder: Any = running.service._embedder
        num_texts = embedder.num_texts
        await running.ingest("house", "again.txt", "It goes on.")
        assert embedder.num_texts == num_texts + 1, "only the new text was embedded"


async def test_what_was_deleted_is_in_no_backup_and_no_export(tmp_path: Path) -> None:
    """Words in the database file, which keeps them in its free space, are looked for byte by byte."""
    async with knowledge_endpoint(tmp_path / "home") as running:
        await running.service.create_collection("house", "", running.owner_id)
        await running.ingest("house", "rule.txt", "The old rule holds.")
        await running.http.post("/v1/conversations", json={"title": "Before the backup"})
        gone = await running.ingest("house", "vault.txt", "The vault code is zebra seven.")
        for name in "abcd":  # together they leave whole pages of the database behind
            await running.service.create_collection(name, "About the zebra. " * 110, running.owner_id)
        for name in "abcd":
            await running.service.delete_collection(name, running.owner_id)
        await running.service.delete_document("house", gone, running.owner_id)
        export, backup = tmp_path / "all.kb", tmp_path / "b.backup"
        await call(running, lambda client: client.download("/v1/kb/export", export, collections="house"))
        await call(running, lambda client: client.download("/v1/backup", backup))
        in_use = b"".join(path.read_bytes() for path in running.home.glob("windfarm.db*"))
        assert b"About the zebra" in in_use, "else the look at the backup would say nothing"
    exported, saved = _contents(export), _contents(backup)
    assert b"zebra" not in saved and b"Before the backup" in saved
    for word in (b"zebra", b"vault.txt", gone.encode()):
        assert word not in exported
    assert b"rule.txt" in exported


def _contents(archive: Path) -> bytes:
    """Everything in it, names included, unpacked as far as the archive packed it."""
    with zipfile.ZipFile(archive) as packed:
        return b"\n".join(name.encode() + b"\n" + packed.read(name) for name in packed.namelist())


def test_a_copy_is_written_anew_without_what_its_free_pages_hold(tmp_path: Path) -> None:
    """Some builds of SQLite overwrite what is deleted, most do not."""
    path = tmp_path / "copy.sqlite"
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA secure_delete = OFF")
        database.execute("CREATE TABLE notes (text)")
        database.execute("INSERT INTO notes VALUES (?), ('kept')", ("zebra " * 2000,))
        database.commit()
        database.execute("DELETE FROM notes WHERE text != 'kept'")
        database.commit()
    assert b"zebra zebra" in path.read_bytes()
    drop_free_pages(path)
    assert b"zebra" not in path.read_bytes() and b"kept" in path.read_bytes()


async def test_another_machine_takes_a_backup_over(tmp_path: Path) -> None:
    file = tmp_path / "b.backup"
    async with knowledge_endpoint(tmp_path / "old") as old:
        await filled(old)
        old_key = old.key
        await call(old, lambda client: client.download("/v1/backup", file))
    async with knowledge_endpoint(tmp_path / "new") as new:
        await call(new, lambda client: client.send_file("/v1/restore", file))
        await wait_until(lambda: is_known(new))
        assert "The old rule holds." in await found(new, "Which rule holds?")
        with_old_key = {"authorization": f"Bearer {old_key}"}
        (listed,) = (await new.http.get("/v1/files", headers=with_old_key)).json()["data"]
        content = await new.http.get(f"/v1/files/{listed['id']}/content", headers=with_old_key)
        assert content.content == b"A file."
    async with knowledge_endpoint(tmp_path / "new") as again:
        assert again.service._parts.report.agreed


async def test_vectors_on_a_qdrant_server_come_back_from_the_backup(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, question = tmp_path / "b.backup", "Which rule holds?"
    async with on_a_server(tmp_path / "home", monkeypatch) as running:
        backups: Any = running.service._backups
        backups._owns_all = False  # as where the configuration names a server
        await filled(running)
        before = await found(running, question)
        await call(running, lambda client: client.download("/v1/backup", file))
        await running.ingest("house", "rule.txt", "The new rule holds.")
        embedder: Any = running.service._embedder
        num_texts = embedder.num_texts
        await call(running, lambda client: client.send_file("/v1/restore", file))
        assert await found(running, question) == before and "The old rule holds." in before
        parts = running.service._parts
        report = reconcile(parts.database, parts.vectors, parts.journal, parts.blobs, owns_all=False)
        assert report.agreed and report.num_repairs == 0
        assert len(parts.vectors.list_collections()) == 1, "the former index is gone from the server"
        assert embedder.num_texts == num_texts, "nothing was embedded again"
    monkeypatch.undo()
    async with knowledge_endpoint(tmp_path / "embedded") as other:
        await call(other, lambda client: client.send_file("/v1/restore", file))
        await wait_until(lambda: is_known(other))
        assert await found(other, question) == before, "an embedded store takes it over"


async def test_a_job_that_waited_goes_on_after_the_restore(tmp_path: Path) -> None:
    file = tmp_path / "b.backup"
    async with knowledge_endpoint(tmp_path / "old") as old:
        await old.service.create_collection("house", "", old.owner_id)
        embedder: Any = old.service._embedder
        embedder.gate.clear()
        job = await old.service.submit_document("house", "late.txt", b"The guest comes late.", old.owner_id)
        await call(old, lambda client: client.download("/v1/backup", file))
        embedder.gate.set()
        assert (await old.service.wait_for_job(job["id"], old.owner_id))["state"] == "done"
    async with knowledge_endpoint(tmp_path / "new") as new:
        await call(new, lambda client: client.send_file("/v1/restore", file))
        await wait_until(lambda: is_known(new))
        owner = new.running.accounts.owner_id()
        assert owner is not None
        assert (await new.service.wait_for_job(job["id"], owner))["state"] == "done"
        assert await found(new, "Who comes late?") == ["The guest comes late."]


async def test_only_the_owner_and_only_a_whole_backup(tmp_path: Path) -> None:
    async with knowledge_endpoint(tmp_path / "home") as running:
        await filled(running)
        file = tmp_path / "b.backup"
        await call(running, lambda client: client.download("/v1/backup", file))
        member = await running.member_key("member")
        for work in (
            lambda client: client.download("/v1/backup", tmp_path / "stolen"),
            lambda client: client.send_file("/v1/restore", file),
        ):
            with pytest.raises(ApiFailed) as refused:
                await call(running, work, member)
            assert refused.value.status == 403
        exported = tmp_path / "house.kb"
        await call(running, lambda client: client.download("/v1/kb/export", exported))
        with pytest.raises(ApiFailed, match="'windfarm-backup' is expected"):
            await call(running, lambda client: client.send_file("/v1/restore", exported))
        data = file.read_bytes()
        file.write_bytes(data[:-100])
        with pytest.raises(ApiFailed, match="damaged"):
            await call(running, lambda client: client.send_file("/v1/restore", file))
        assert "The old rule holds." in await found(running, "Which rule holds?")
        leftovers = [p.name for p in running.home.iterdir() if p.name.startswith(("backup-", "restore-", "import-"))]
        assert not leftovers and not list((running.home / "uploads").iterdir())


async def test_the_commands_write_and_read_the_files(tmp_path: Path) -> None:
    def windfarm(running: KnowledgeEndpoint, *words: str) -> Any:
        there = ("--home", str(running.home), "--api", running.url, "--key", running.key)
        return CliRunner().invoke(app, [*words, *there])

    async with knowledge_endpoint(tmp_path / "home") as running:
        await filled(running)
        kb, backup = str(tmp_path / "house.kb"), str(tmp_path / "all.backup")
        for words, said in (
            (("kb", "export", kb, "--collection", "house"), "house.kb: 0."),
            (("backup", backup), "all.backup: "),
        ):
            done = await asyncio.to_thread(windfarm, running, *words)
            assert done.exit_code == 0 and said in done.output, done.output
        again = await asyncio.to_thread(windfarm, running, "backup", backup)
        assert isinstance(again.exception, ConfigError) and "there already" in str(again.exception)
        await running.service.delete_collection("house", running.owner_id)
        done = await asyncio.to_thread(windfarm, running, "kb", "import", kb)
        assert (done.exit_code, done.output) == (0, "house: 2 documents, 2 passages\n"), done.output
        unsure = await asyncio.to_thread(windfarm, running, "restore", backup)
        assert unsure.exit_code == 1 and "will be gone" in unsure.output
        done = await asyncio.to_thread(windfarm, running, "restore", backup, "--yes")
        assert done.exit_code == 0 and "Restored: 1 collections, 2 documents." in done.output
        (running.home / "backup-left").mkdir()
    async with knowledge_endpoint(tmp_path / "home") as running:
        assert not (running.home / "backup-left").exists()
