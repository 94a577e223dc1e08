"""URLs become documents like files do, through the guarded client, and say why where they do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from services.config import IngestionConfig, WebConfig
from services.errors import ApiError
from services.web.pages import parser_name
from tests.services.harness import error_of, running_endpoint
from tests.services.ingesting import CONFIG, OWNER, Running, running
from tests.services.web_server import page, redirect, web_server

OPEN = CONFIG.model_copy(update={"web": WebConfig(allowed=["127.0.0.1"])})
PAGE = b"<html><head><title>Holidays</title></head><body><h1>Rules</h1><p>Rule 33 gives free days.</p></body></html>"


async def add(windfarm: Running, url: str) -> dict[str, Any]:
    job = await windfarm.service.submit_url("handbook", url, OWNER)
    return await windfarm.service.wait_for_job(job["id"], OWNER, timeout_s=30)


async def test_a_page_becomes_a_document_with_its_origin(tmp_path: Path) -> None:
    async with web_server() as server, running(tmp_path, config=OPEN) as windfarm:
        windfarm.create()
        server.answers = {
            "/rules": redirect("/rules.html"),
            "/rules.html": page(PAGE),
            "/raw.md": page(b"# A\n\nB", "text/plain"),
        }
        job = await add(windfarm, server.url("/rules#top"))
        assert job["state"] == "done" and job["kind"] == "url" and job["num_bytes"] == len(PAGE), job
        (document,) = windfarm.knowledge.list_documents("handbook", OWNER)
        assert document["name"] == "127.0.0.1 › rules" and document["origin"] == server.url("/rules")
        assert (document["title"], document["mime_type"]) == ("Holidays", "text/html")
        assert windfarm.found("handbook", "free days")
        assert (await add(windfarm, server.url("/rules")))["unchanged"]
        server.answers["/rules.html"] = page(PAGE.replace(b"free days", b"long weekends"))
        changed = await add(windfarm, server.url("/rules"))
        assert not changed["unchanged"] and changed["document_id"] == job["document_id"]
        assert windfarm.found("handbook", "weekends") and not windfarm.found("handbook", "free")
        raw = await add(windfarm, server.url("/raw.md"))
        assert raw["state"] == "done"
        kinds = {each["name"]: each["mime_type"] for each in windfarm.knowledge.list_documents("handbook", OWNER)}
        assert kinds["127.0.0.1 › raw.md"] == "text/markdown"
        assert not list((tmp_path / "blobs").iterdir())
        windfarm.check_agreement()


@pytest.mark.parametrize(
    ("path", "code"),
    [("/video", "type_refused"), ("/gone", "http_status"), ("/big", "too_large"), ("/fake.pdf", "damaged")],
)
async def test_what_cannot_be_fetched_fails_with_its_reason(tmp_path: Path, path: str, code: str) -> None:
    small = IngestionConfig(max_file_mib=0.01, web=OPEN.web)
    async with web_server() as server, running(tmp_path, config=small) as windfarm:
        windfarm.create()
        server.answers = {
            "/video": page(b"x", "video/mp4"),
            "/big": page(b"x" * 20_000, "text/plain"),
            "/fake.pdf": page(b"%PDF-1.7\nnothing", "application/pdf"),
        }
        job = await add(windfarm, server.url(path))
        assert (job["state"], job["error"]["code"]) == ("failed", code)
        assert windfarm.knowledge.list_documents("handbook", OWNER) == []
        assert not list((tmp_path / "blobs").iterdir())


async def test_addresses_that_are_not_listed_are_refused(tmp_path: Path) -> None:
    async with web_server() as server, running(tmp_path) as windfarm:
        windfarm.create()
        job = await add(windfarm, server.url("/"))
        assert (job["state"], job["error"]["code"]) == ("failed", "address_refused")
        assert "ingestion.web.allowed" in job["error"]["message"]
        assert server.asked == []
        with pytest.raises(ApiError) as refused:
            await add(windfarm, "file:///etc/passwd")
        assert (refused.value.status, refused.value.code, refused.value.param) == (400, "bad_url", "url")


async def test_the_route_hands_urls_to_the_store(tmp_path: Path) -> None:
    async with running_endpoint(tmp_path) as endpoint:
        endpoint.store.answers["submit_url"] = lambda name, url, actor, **about: {"id": "job_1", "origin": url} | about
        answer = await endpoint.http.post("/v1/collections/x/urls", json={"url": "https://example.org/", "batch": "b"})
        assert answer.status_code == 202
        assert answer.json()["job"] == {"id": "job_1", "origin": "https://example.org/", "batch": "b", "source": None}
        wrong = await endpoint.http.post("/v1/collections/x/urls", json={"uri": "https://example.org/"})
        assert (wrong.status_code, error_of(wrong)["param"]) == (400, "uri")


@pytest.mark.parametrize(
    ("url", "content_type", "name"),
    [
        ("https://example.org/", "text/html", "index.html"),
        ("https://example.org/page.php?x=1", "text/html", "page.php.html"),
        ("https://example.org/a/report.pdf", "application/pdf", "report.pdf"),
        ("https://example.org/feed", "application/rss+xml", "feed.xml"),
        ("https://example.org/feed.atom", "application/atom+xml", "feed.atom"),
        ("https://example.org/README.md", "text/plain", "README.md"),
        ("https://example.org/x.bin", "application/octet-stream", "x.bin"),
    ],
)
def test_the_parser_knows_the_type_by_the_answer(url: str, content_type: str, name: str) -> None:
    assert parser_name(httpx.URL(url), content_type) == name
