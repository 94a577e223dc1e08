"""Folders, repositories and websites are listed as they are, and nothing outside of them is."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import os
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import pytest

from services.sync.connector import Connector, ConnectorError
from services.sync.folder import FolderConnector
from services.sync.git import GitConnector
from services.sync.ignore import Ignore
from services.sync.sitemap import SitemapConnector
from services.web.addresses import Allowed
from services.web.client import GuardedClient
from tests.services.web_server import WebServer, page, redirect, web_server


def names_of(connector: Connector) -> list[str]:
    return [item.name for item in connector.list_items().items]


def skipped_in(connector: Connector) -> dict[str, str]:
    return {each.name: each.reason for each in connector.list_items().skipped}


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


# Patterns


@pytest.mark.parametrize(
    ("pattern", "path", "is_left_out"),
    [
        ("*.tmp", "a/b/x.tmp", True),
        ("*.tmp", "x.tmpl", False),
        ("build/", "src/build/x.txt", True),
        ("build/", "src/build", False),
        ("/docs/*.md", "docs/a.md", True),
        ("/docs/*.md", "docs/sub/a.md", False),
        ("docs/**/draft.md", "docs/draft.md", True),
        ("docs/**/draft.md", "docs/a/b/draft.md", True),
        ("docs/**/draft.md", "other/draft.md", False),
        ("v[0-9].txt", "v7.txt", True),
        ("v[!0-9].txt", "v7.txt", False),
        ("a.b", "axb", False),
        ("# remark", "# remark", False),
        ("x[", "x[", True),
    ],
)
def test_patterns_leave_out_what_they_name(pattern: str, path: str, is_left_out: bool) -> None:
    assert Ignore([pattern]).matches(PurePosixPath(path), is_folder=False) is is_left_out


# Folders


def test_a_folder_is_listed_without_hidden_and_ignored_files(tmp_path: Path) -> None:
    write(tmp_path, a_md="A", sub__b_txt="B", sub__c_tmp="C", _hidden="H", build__d_md="D")
    (tmp_path / ".windfarmignore").write_text("*.tmp\n")
    with FolderConnector(tmp_path, ["build/"]) as folder:
        assert names_of(folder) == ["a.md", "sub › b.txt"]


def test_links_that_lead_out_of_the_folder_are_refused(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    write(inside, a_md="A", sub__b_md="B")
    write(outside, secret_md="S")
    (inside / "file.md").symlink_to(outside / "secret.md")
    (inside / "fine.md").symlink_to(inside / "a.md")
    (inside / "folder").symlink_to(outside)
    (inside / "loop").symlink_to(inside)
    (inside / "nothing.md").symlink_to(inside / "gone.md")
    os.mkfifo(inside / "pipe.md")
    with FolderConnector(inside) as folder:
        assert names_of(folder) == ["a.md", "fine.md", "sub › b.md"]
        assert set(skipped_in(folder)) == {"file.md", "folder", "loop", "nothing.md", "pipe.md"}
        assert "leads out" in skipped_in(folder)["file.md"]
        (item,) = [item for item in folder.list_items().items if item.name == "a.md"]
        (inside / "a.md").unlink()
        (inside / "a.md").symlink_to(outside / "secret.md")
        with pytest.raises(ConnectorError, match="leads out"):
            folder.content(item)


def test_a_file_is_read_again_only_where_it_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, a_md="A", b_md="B")
    read: list[str] = []
    digest = hashlib.file_digest
    monkeypatch.setattr(
        hashlib, "file_digest", lambda file, kind: read.append(Path(file.name).name) or digest(file, kind)
    )
    with FolderConnector(tmp_path) as folder:
        first = {item.name: item.content_sha256 for item in folder.list_items().items}
        write(tmp_path, b_md="B is longer now")
        second = {item.name: item.content_sha256 for item in folder.list_items().items}
    assert read == ["a.md", "b.md", "b.md"]
    assert first["a.md"] == second["a.md"] and first["b.md"] != second["b.md"]


def test_a_missing_folder_is_an_error_and_not_an_empty_one(tmp_path: Path) -> None:
    with FolderConnector(tmp_path / "gone") as folder, pytest.raises(ConnectorError, match="mounted"):
        folder.list_items()


def test_odd_names_stay_apart_and_show_nothing_odd(tmp_path: Path) -> None:
    for name in ("evil\u202efdp.md", "evilfdp.md", "two\nlines.md", "two lines.md", "a › b.md", "x" * 240 + ".md"):
        (tmp_path / name).write_text(name)
    write(tmp_path, a__b_md="B")
    with FolderConnector(tmp_path) as folder:
        names = names_of(folder)
    assert len(set(names)) == 7
    assert all(name.isprintable() and name.endswith(".md") and len(name) <= 200 for name in names)


# Repositories


def git(folder: Path, *arguments: str) -> str:
    settings = ("-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgsign=false")
    answer = subprocess.run(["git", *settings, *arguments], cwd=folder, check=True, capture_output=True, text=True)
    return answer.stdout


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "repository"
    write(folder, README_md="# Read me", docs__a_md="A", docs__b_tmp="B", _hidden="H")
    (folder / "link.md").symlink_to("/etc/passwd")
    git(folder, "init", "--quiet", "--initial-branch=main")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message=First")
    return folder


@pytest.mark.requires("git")
def test_a_repository_is_read_without_a_checkout(repository: Path) -> None:
    hook = repository / ".git" / "hooks" / "post-checkout"
    hook.write_text("#!/bin/sh\ntouch ran\n")
    hook.chmod(0o755)
    with GitConnector(str(repository), ["file"], patterns=["*.tmp"]) as connector:
        items = {item.name: item for item in connector.list_items().items}
        assert set(items) == {"README.md", "docs › a.md"}
        assert connector.content(items["docs › a.md"]).data == b"A"
        assert "link" in skipped_in(connector)["link.md"]
        before = items["README.md"].origin
        write(repository, README_md="# Changed", new_md="N")
        git(repository, "add", "--all")
        git(repository, "commit", "--quiet", "--message=Second")
        items = {item.name: item for item in connector.list_items().items}
        assert set(items) == {"README.md", "docs › a.md", "new.md"} and items["README.md"].origin != before
        assert connector.content(items["README.md"]).data == b"# Changed"
        assert not (repository / "ran").exists()


@pytest.mark.requires("git")
def test_a_branch_of_a_repository_is_read(repository: Path) -> None:
    git(repository, "checkout", "--quiet", "-b", "other")
    write(repository, other_md="O")
    git(repository, "add", "--all")
    git(repository, "commit", "--quiet", "--message=Other")
    git(repository, "checkout", "--quiet", "main")
    with GitConnector(str(repository), ["file"], branch="other") as connector:
        assert "other.md" in names_of(connector)
    with GitConnector(str(repository), ["file"]) as connector:
        assert "other.md" not in names_of(connector)
    with (
        GitConnector(str(repository), ["file"], branch="gone") as connector,
        pytest.raises(ConnectorError, match="branch"),
    ):
        connector.list_items()


@pytest.mark.parametrize(
    "location",
    [
        *(
            "file:///etc",
            "/etc",
            "ssh://example.org/x.git",
            "git@example.org:x.git",
            "git://example.org/x",
            "http://x/y",
        ),
        *("ext::sh -c touch% /tmp/x", "--upload-pack=touch /tmp/x", "https://user:secret@example.org/x.git", "a\nb"),
    ],
)
def test_only_what_the_operator_permits_is_read_by_git(location: str) -> None:
    with pytest.raises(ConnectorError):
        GitConnector(location, ["https"])


def test_a_branch_that_is_an_option_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConnectorError, match="no name of a branch"):
        GitConnector(str(tmp_path), ["file"], branch="--upload-pack=x")


# Websites


@contextmanager
def website(
    answers: dict[str, bytes], path: str = "/", patterns: Sequence[str] = ()
) -> Iterator[tuple[WebServer, SitemapConnector]]:
    """A server in a thread, because connectors block. `{site}` in an answer is its address."""

    started, stopping, server = threading.Event(), threading.Event(), WebServer()

    async def serve() -> None:
        nonlocal server
        async with web_server() as running:
            server = running
            started.set()
            await asyncio.to_thread(stopping.wait)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        assert started.wait(10)
        site = server.url("").encode()
        server.answers = {at: _filled(answer, site) for at, answer in answers.items()}
        allowed = Allowed.of(["127.0.0.1"])
        with SitemapConnector(server.url(path), lambda: GuardedClient(allowed), patterns=patterns) as connector:
            yield server, connector
    finally:
        stopping.set()
        thread.join()


def _filled(answer: bytes, site: bytes) -> bytes:
    head, _, body = answer.partition(b"\r\n\r\n")
    body, head = body.replace(b"{site}", site), head.replace(b"{site}", site)
    lines = [line for line in head.split(b"\r\n") if not line.startswith(b"Content-Length")]
    return b"\r\n".join([*lines, b"Content-Length: %d" % len(body)]) + b"\r\n\r\n" + body


def sitemap(*entries: str, kind: str = "urlset", entry: str = "url") -> bytes:
    rows = "".join(f"<{entry}>{each}</{entry}>" for each in entries)
    return page(f'<?xml version="1.0"?><{kind} xmlns="http://x/0.9">{rows}</{kind}>'.encode(), "application/xml")


def test_a_website_is_read_by_its_sitemaps_as_robots_txt_permits() -> None:
    answers = {
        "/robots.txt": page(
            b"User-agent: *\nDisallow: /private/\nAllow: /\n\nSitemap: {site}/index.xml\n", "text/plain"
        ),
        "/index.xml": sitemap(
            "<loc>{site}/one.xml</loc>", "<loc>{site}/two.txt</loc>", kind="sitemapindex", entry="sitemap"
        ),
        "/one.xml": sitemap(
            "<loc>{site}/a.html</loc><lastmod>2026-11-20T10:00:00Z</lastmod>",
            "<loc> {site}/private/b.html </loc>",
            "<loc>http://127.0.0.2/c.html</loc>",
            "<loc>{site}/d.html</loc><lastmod>2026-11-20</lastmod>",
            "<loc>{site}/skip/e.html</loc>",
            "<loc>file:///etc/passwd</loc>",
        ),
        "/two.txt": page(b"{site}/f\n{site}/a.html\n", "text/plain"),
        "/a.html": page(b"<p>A"),
        "/f": page(b"<p>F", "application/xhtml+xml"),
        "/d.html": redirect("http://127.0.0.2/d.html"),
    }
    with website(answers, patterns=["skip/"]) as (server, connector):
        listing = connector.list_items()
        items = {item.name: item for item in listing.items}
        assert set(items) == {"127.0.0.1 › a.html", "127.0.0.1 › d.html", "127.0.0.1 › f"}
        assert items["127.0.0.1 › a.html"].modified_at == 1795168800.0
        assert items["127.0.0.1 › d.html"].modified_at is None, "a day alone does not say enough"
        reasons = {each.name: each.reason for each in listing.skipped}
        assert "robots.txt" in reasons[server.url("/private/b.html")]
        assert "another host" in reasons["http://127.0.0.2/c.html"] and "file:///etc/passwd" in reasons
        content = connector.content(items["127.0.0.1 › f"])
        assert (content.data, content.parse_as) == (b"<p>F", "f.html")
        with pytest.raises(ConnectorError, match="not to be fetched here"):
            connector.content(items["127.0.0.1 › d.html"])
        assert not any("private" in head or "skip" in head for head in server.asked)


def test_a_packed_sitemap_is_read_and_one_that_is_none_refused() -> None:
    packed = gzip.compress(b"<urlset><url><loc>http://127.0.0.1/x</loc></url></urlset>")
    answers = {
        "/sitemap.xml.gz": page(packed, "application/gzip"),
        "/bomb.xml.gz": page(gzip.compress(bytes(60 << 20)), "application/gzip"),
        "/page.xml": page(b"<html><body>No sitemap</body></html>"),
        "/broken.xml": page(b"<urlset><url>"),
        "/evil.xml": page(b'<!DOCTYPE x [<!ENTITY a "aaaa">]><urlset>&a;</urlset>'),
    }
    with website(answers, "/sitemap.xml.gz") as (_, connector):
        assert "another host" in next(iter(skipped_in(connector).values())), "it has another port"
    for path, says in (("/page.xml", "is a <html>"), ("/broken.xml", "can be read"), ("/evil.xml", "document type")):
        with website(answers, path) as (_, connector), pytest.raises(ConnectorError, match=says):
            connector.list_items()
    with website(answers, "/bomb.xml.gz") as (_, connector), pytest.raises(ConnectorError, match="unpacks to more"):
        connector.list_items()


def test_a_website_whose_robots_txt_does_not_answer_is_left_alone() -> None:
    answers = {"/robots.txt": page(b"", status="503 Busy"), "/sitemap.xml": sitemap("<loc>{site}/a.html</loc>")}
    with website(answers) as (server, connector):
        with pytest.raises(ConnectorError, match="503"):
            connector.list_items()
        assert len(server.asked) == 1
        del server.answers["/robots.txt"]
        assert names_of(connector) == ["127.0.0.1 › a.html"], "no robots.txt: everything is allowed"
