"""Nobody leaves files without a key, and the page may load nothing from elsewhere."""

from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from tests.ui.conftest import Serve
from ui.api_client import open_http
from ui.guard import Guard


def api() -> Starlette:
    def me(request: Request) -> Response:
        if request.headers["authorization"] == "Bearer right":
            return JSONResponse({"name": "owner"})
        return JSONResponse({"error": {"message": "no", "code": "invalid_api_key"}}, 401)

    return Starlette(routes=[Route("/v1/me", me)])


def page() -> Any:
    return Starlette(
        routes=[Route("/{path:path}", lambda request: PlainTextResponse("taken"), methods=["GET", "POST"])]
    )


@pytest.mark.parametrize("headers", [{}, {"authorization": "Bearer wrong"}, {"authorization": "right"}])
async def test_an_upload_without_a_valid_key_is_refused(serve: Serve, headers: dict[str, str]) -> None:
    async with open_http(serve(api())) as http:
        transport = httpx.ASGITransport(Guard(page(), http=http))
        async with httpx.AsyncClient(transport=transport, base_url="http://page") as browser:
            for path in ("/gradio_api/upload", "/gradio_api/upload/", "/upload"):
                assert (await browser.post(path, headers=headers)).status_code == 401


async def test_an_upload_with_a_key_passes(serve: Serve) -> None:
    async with open_http(serve(api())) as http:
        transport = httpx.ASGITransport(Guard(page(), http=http))
        async with httpx.AsyncClient(transport=transport, base_url="http://page") as browser:
            answer = await browser.post("/gradio_api/upload", headers={"authorization": "Bearer right"})
    assert answer.text == "taken"


async def test_every_answer_forbids_foreign_addresses() -> None:
    async with open_http("http://127.0.0.1:9") as http:
        transport = httpx.ASGITransport(Guard(page(), http=http))
        async with httpx.AsyncClient(transport=transport, base_url="http://page") as browser:
            policy = (await browser.get("/")).headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "http" not in policy
