"""A citation opens its document at its page: over HTTP, with the real store, parser and PDFium."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.services.knowledge_endpoint import KnowledgeEndpoint, knowledge_endpoint

pytestmark = pytest.mark.asyncio(loop_scope="module")

DOCUMENTS = Path(__file__).parents[1] / "data" / "documents"
EVIL = '<script>alert(1)</script> & "quotes" ]]>'


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[KnowledgeEndpoint]:
    async with knowledge_endpoint(tmp_path_factory.mktemp("home")) as endpoint:
        await endpoint.service.create_collection("papers", "", endpoint.owner_id)
        yield endpoint


async def cited(running: KnowledgeEndpoint, name: str, words: str) -> dict[str, Any]:
    """A passage of the collection as an answer would cite it."""
    found = await running.http.post("/v1/collections/papers/search", json={"query": words, "top_k": 20})
    return next(p for p in found.json()["passages"] if p["document"] == name)


def view_path(passage: dict[str, Any]) -> str:
    return f"/v1/collections/papers/documents/{passage['document_id']}/view"


def span(passage: dict[str, Any], **other: Any) -> dict[str, Any]:
    return {"start": passage["start"], "end": passage["end"], "version_id": passage["version_id"]} | other


async def test_a_cited_pdf_opens_at_its_page_with_the_span_marked(running: KnowledgeEndpoint) -> None:
    name = "multi_page.pdf"
    await running.ingest("papers", name, (DOCUMENTS / name).read_bytes())
    passages = (await running.http.post("/v1/collections/papers/search", json={"query": "page", "top_k": 50})).json()
    last = max((p for p in passages["passages"] if p["document"] == name), key=lambda p: p["page"])
    assert last["page"] > 1
    view = (await running.http.get(view_path(last), params=span(last, image="true", width=700))).json()
    assert (view["kind"], view["page"], view["is_current"]) == ("page", last["page"], True)
    assert view["text"]["marked"] == last["text"]
    image = view["image"]
    assert image["boxes"] and image["width"] == 700 and base64.b64decode(image["png_base64"]).startswith(b"\x89PNG")
    png = await running.http.get(
        f"/v1/collections/papers/documents/{last['document_id']}/pages/{last['page']}", params=span(last, width=700)
    )
    assert png.headers["content-type"] == "image/png" and png.headers["cache-control"] == "private, no-store"
    assert png.content == base64.b64decode(image["png_base64"])
    missing = await running.http.get(f"/v1/collections/papers/documents/{last['document_id']}/pages/4000")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "no_such_page")


async def test_a_text_is_shown_as_text_around_its_span(running: KnowledgeEndpoint) -> None:
    await running.ingest("papers", "note.md", f"# Rent\n\nThe rent is due on Monday. {EVIL}\n\nNothing else.")
    passage = await cited(running, "note.md", "When is the rent due?")
    view = (await running.http.get(view_path(passage), params=span(passage))).json()
    text = view["text"]
    assert (view["kind"], view["image"], text["is_beginning"], text["is_end"]) == ("text", None, True, True)
    assert text["marked"] == passage["text"] and EVIL in text["before"] + text["marked"] + text["after"]
    pages = await running.http.get(view_path(passage).replace("/view", "/pages/1"))
    assert pages.status_code == 404


async def test_a_span_of_a_replaced_version_marks_nothing(running: KnowledgeEndpoint) -> None:
    await running.ingest("papers", "rule.txt", "The first rule of the house.")
    passage = await cited(running, "rule.txt", "first rule of the house")
    await running.ingest("papers", "rule.txt", "Quite another text.")
    view = (await running.http.get(view_path(passage), params=span(passage))).json()
    assert view["is_current"] is False and view["text"]["marked"] == ""


async def test_a_document_whose_file_was_not_kept_is_shown_as_text(running: KnowledgeEndpoint) -> None:
    name = "fake-memo.pdf"
    document_id = await running.ingest("papers", name, (DOCUMENTS / name).read_bytes())
    document = await running.service.document(document_id, running.owner_id)
    running.service._parts.blobs.originals.remove([document["version_id"]])
    path = f"/v1/collections/papers/documents/{document_id}"
    view = (await running.http.get(f"{path}/view", params={"start": 0, "end": 5, "image": "true"})).json()
    assert (view["kind"], view["image"], view["page"]) == ("text", None, 1)
    page = await running.http.get(f"{path}/pages/1")
    assert (page.status_code, page.json()["error"]["code"]) == (404, "no_page_image")


async def test_strangers_and_wrong_collections_get_404_and_wrong_numbers_400(running: KnowledgeEndpoint) -> None:
    document_id = await running.ingest("papers", "secret.txt", "The secret number is 7.")
    path = f"/v1/collections/papers/documents/{document_id}/view"
    stranger = {"authorization": f"Bearer {await running.member_key('stranger')}"}
    for refused in (
        await running.http.get(path, headers=stranger),
        await running.http.get(path.replace("/view", "/pages/1"), headers=stranger),
        await running.http.get(path.replace("papers", "others")),
        await running.http.get(path.replace(document_id, "doc_unknown")),
    ):
        assert refused.status_code == 404 and "secret number" not in refused.text
    for wrong in (
        {"start": "x"},
        {"start": 5, "end": 2},
        {"end": 10**6},
        {"width": 5},
        {"colour": "red"},
        {"start": "９"},
    ):
        answer = await running.http.get(path, params=wrong)
        assert answer.status_code == 400, wrong


async def test_originals_go_with_their_versions(running: KnowledgeEndpoint) -> None:
    originals = running.home / "originals"
    await running.service.create_collection("short", "", running.owner_id)
    first = await running.ingest("short", "a.txt", "One text.")
    version = (await running.service.document(first, running.owner_id))["version_id"]
    assert (originals / version).read_text() == "One text."
    await running.ingest("short", "a.txt", "Another text.")
    replaced = (await running.service.document(first, running.owner_id))["version_id"]
    assert not (originals / version).exists() and (originals / replaced).read_text() == "Another text."
    await running.service.delete_document("short", first, running.owner_id)
    assert not (originals / replaced).exists()
    second = await running.ingest("short", "b.txt", "Third text.")
    version = (await running.service.document(second, running.owner_id))["version_id"]
    await running.service.delete_collection("short", running.owner_id)
    assert not (originals / version).exists()
