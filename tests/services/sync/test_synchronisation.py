"""A collection follows its source: interrupted passes are repeated, and what belongs to others is spared."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from services.cli.commands import app
from services.cli.sync import kind_of
from services.errors import ApiError
from services.sync.connector import ConnectorError, Item
from services.sync.engine import Synchronisation, SyncReport
from services.sync.folder import FolderConnector
from services.sync.plan import make_plan
from tests.services.ingesting import OWNER, Running, running


@dataclass
class ServiceClient:
    """The API as a blocking client sees it, straight to the ingestion."""

    windfarm: Running
    loop: asyncio.AbstractEventLoop
    uploads: list[str] = field(default_factory=list)

    def documents(self, collection: str) -> list[dict[str, Any]]:
        return self.windfarm.knowledge.list_documents(collection, OWNER)

    def upload(self, collection: str, content: Any, name: str, **about: str | None) -> dict[str, Any]:
        self.uploads.append(name)
        data = content.read_bytes() if isinstance(content, Path) else content
        return self._wait(self.windfarm.service.submit(collection, name, data, OWNER, **about))

    def job(self, job_id: str) -> dict[str, Any]:
        return self._wait(self.windfarm.service.wait_for_job(job_id, OWNER, timeout_s=30))

    def delete_document(self, collection: str, document_id: str) -> None:
        self._wait(self.windfarm.service.delete_document(collection, document_id, OWNER))

    def _wait(self, work: Coroutine[Any, Any, dict[str, Any]]) -> dict[str, Any]:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(60)


def at_work(windfarm: Running, connector: Any) -> tuple[Synchronisation, ServiceClient]:
    client = ServiceClient(windfarm, asyncio.get_running_loop())
    return Synchronisation(client, connector, "handbook", failed_error=ApiError), client


async def one_pass(synchronisation: Synchronisation, **options: Any) -> SyncReport:
    return await asyncio.to_thread(synchronisation.run_once, "sync_1", **options)


def names_in(windfarm: Running) -> set[str]:
    return {document["name"] for document in windfarm.knowledge.list_documents("handbook", OWNER)}


async def test_a_collection_follows_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "files"
    (folder / "sub").mkdir(parents=True)
    for name, text in (("a.md", "Apples."), ("sub/b.md", "Pears."), ("c.md", "Plums.")):
        (folder / name).write_text(text)
    async with running(tmp_path) as windfarm:
        windfarm.create()
        await windfarm.ingest("handbook", "mine.md", "Brought by hand.")
        synchronisation, client = at_work(windfarm, FolderConnector(folder))
        first = await one_pass(synchronisation)
        assert sorted(first.new) == ["a.md", "c.md", "sub › b.md"] and not first.problems
        assert (await one_pass(synchronisation)).num_unchanged == 3
        assert len(client.uploads) == 3, "what is unchanged is not sent"
        (folder / "a.md").write_text("Apricots.")
        (folder / "c.md").rename(folder / "d.md")
        (folder / "sub" / "b.md").unlink()
        second = await one_pass(synchronisation)
        assert (second.new, second.changed, sorted(second.removed)) == (["d.md"], ["a.md"], ["c.md", "sub › b.md"])
        assert names_in(windfarm) == {"a.md", "d.md", "mine.md"}
        assert windfarm.found("handbook", "apricots") and not windfarm.found("handbook", "apples pears")
        windfarm.check_agreement()


async def test_an_empty_source_deletes_nothing_unless_that_is_meant(tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "a.md").write_text("Apples.")
    async with running(tmp_path) as windfarm:
        windfarm.create()
        synchronisation, _ = at_work(windfarm, FolderConnector(folder))
        await one_pass(synchronisation)
        (folder / "a.md").unlink()
        with pytest.raises(ConnectorError, match="--allow-empty"):
            await one_pass(synchronisation)
        assert names_in(windfarm) == {"a.md"}
        folder.rename(tmp_path / "elsewhere")
        with pytest.raises(ConnectorError, match="no folder"):
            await one_pass(synchronisation, may_empty=True)
        folder.mkdir()
        assert (await one_pass(synchronisation, may_empty=True)).removed == ["a.md"]


async def test_a_bad_file_stops_no_other_and_is_sent_again_only_when_it_changed(tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "bad.pdf").write_bytes(b"%PDF-1.7\nnothing")
    (folder / "good.md").write_text("Apples.")
    async with running(tmp_path) as windfarm:
        windfarm.create()
        synchronisation, client = at_work(windfarm, FolderConnector(folder))
        report = await one_pass(synchronisation)
        assert report.new == ["good.md"] and [each.name for each in report.problems] == ["bad.pdf"]
        assert "damaged" in report.problems[0].reason
        await one_pass(synchronisation)
        assert client.uploads.count("bad.pdf") == 1
        (folder / "bad.pdf").write_bytes(b"%PDF-1.7\nnothing else")
        await one_pass(synchronisation)
        assert client.uploads.count("bad.pdf") == 2


async def test_documents_brought_by_hand_are_taken_over_and_those_of_other_sources_spared(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
        (folder / "a.md").write_text("Apples.")
    async with running(tmp_path) as windfarm:
        windfarm.create()
        await windfarm.ingest("handbook", "a.md", "Apples.")
        synchronisation, _ = at_work(windfarm, FolderConnector(first))
        await one_pass(synchronisation)
        (document,) = windfarm.knowledge.list_documents("handbook", OWNER)
        assert document["source"] == FolderConnector(first).source
        other, client = at_work(windfarm, FolderConnector(second))
        report = await one_pass(other)
        assert client.uploads == [] and "belongs to" in report.skipped[0].reason
        (second / "a.md").unlink()
        assert (await one_pass(other)).removed == []
        assert names_in(windfarm) == {"a.md"}


async def test_a_pass_that_was_cut_off_is_repeated(tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    for number in range(20):
        (folder / f"{number:02}.md").write_text(f"File number {number}.")
    async with running(tmp_path) as windfarm:
        windfarm.create()
        synchronisation, client = at_work(windfarm, FolderConnector(folder))
        stopped = threading.Event()
        upload = client.upload

        def upload_five(*arguments: Any, **about: Any) -> dict[str, Any]:
            if len(client.uploads) == 5:
                stopped.set()
                raise KeyboardInterrupt
            return upload(*arguments, **about)

        client.upload = upload_five  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            await one_pass(synchronisation)
        client.upload = upload  # type: ignore[method-assign]
        await one_pass(synchronisation)
        assert len(names_in(windfarm)) == 20
        windfarm.check_agreement()


def test_the_plan_uses_what_is_known_of_an_item() -> None:
    at = 1_795_000_000
    documents = [
        {"id": name, "name": name, "source": "s", "content_sha256": "1", "origin": "x@1", "updated_at": at}
        for name in ("hash", "hash2", "origin", "origin2", "older", "newer", "unknown", "gone")
    ]
    items = [
        Item("hash", "", content_sha256="1"),
        Item("hash2", "", content_sha256="2"),
        Item("origin", "x@1", origin_is_exact=True),
        Item("origin2", "x@2", origin_is_exact=True),
        Item("older", "", modified_at=at - 10),
        Item("newer", "", modified_at=at + 10),
        Item("unknown", ""),
        Item("new", ""),
    ]
    plan = make_plan(items, documents, "s")
    assert [item.name for item in plan.new] == ["new"]
    assert [item.name for item in plan.changed] == ["hash2", "origin2", "newer", "unknown"]
    assert [item.name for item in plan.unchanged] == ["hash", "origin", "older"]
    assert [document["name"] for document in plan.removed] == ["gone"]


def test_the_kind_of_a_place_is_seen() -> None:
    kinds = {
        place: kind_of(place) for place in ("docs", "/x.d", "https://x.org/", "https://x.org/y.git", "git@x.org:y")
    }
    assert list(kinds.values()) == ["folder", "folder", "sitemap", "git", "git"]


def test_a_watched_folder_is_looked_at_again_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command itself, with a client that only notes: passes come until somebody stops it."""
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "a.md").write_text("Apples.")
    passes: list[str] = []

    class Noting:
        def __enter__(self) -> Noting:
            return self

        def __exit__(self, *_: object) -> None: ...

        def create_collection(self, name: str) -> None: ...

        def documents(self, collection: str) -> list[dict[str, Any]]:
            passes.append(collection)
            if len(passes) == 3:
                raise KeyboardInterrupt
            return []

        def upload(self, *_: Any, **about: Any) -> dict[str, Any]:
            return {"id": "job_1", "state": "done"}

    monkeypatch.setattr("services.cli.client.open_client", lambda *_: Noting())
    command = ["sync", str(folder), "--collection", "x", "--watch", "--interval", "0.1", "--json"]
    answer = CliRunner().invoke(app, command)
    assert len(passes) == 3
    assert answer.stdout.count('"new": ["a.md"]') == 2
