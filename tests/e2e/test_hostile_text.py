"""Everything that models, documents and people write is hostile here; the page in a real browser runs none of it."""

import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn
from playwright.sync_api import Playwright, expect, sync_playwright
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

from tests.e2e.visitor import visitor
from ui.app import create_app

pytestmark = [pytest.mark.e2e, pytest.mark.requires("chromium")]

EVIL = (
    "<script>window.pwned = 1</script><img src=x onerror='window.pwned = 2'>"
    '"><svg onload="window.pwned = 3"> ![x](http://foreign.example/a.png) <img src=http://foreign.example/b.png>'
    " [x](javascript:window.pwned=4) ${window.pwned = 5} {{value}} <style>body{display:none}</style>"
    "<iframe src=http://foreign.example></iframe>"
)
ANSWER = f"{EVIL} [1]\n\n```html\n{EVIL}\n```\n\n```mermaid\ngraph TD; A-->B\nclick A href 'javascript:1'\n```\n"
CITATION = {
    "number": 1,
    "document_id": "doc_1",
    "document": EVIL,
    "collection": EVIL,
    "page": 1,
    "start": 0,
    "end": len(EVIL),
    "text": EVIL,
    "score": 0.9,
}
STEPS = [
    {"event": "tool_call", "id": "a", "name": EVIL, "arguments": EVIL},
    {"event": "tool_result", "id": "a", "name": EVIL, "content": EVIL},
    {"event": "context", "omitted": {"messages": 1, "passages": 0}, "reason": EVIL},
]
CONVERSATION = {
    "id": "conv_1",
    "title": EVIL,
    "model": "tiny",
    "collections": [EVIL],
    "messages": [
        {"id": "msg_1", "role": "user", "content": EVIL},
        {"id": "msg_2", "role": "assistant", "content": ANSWER, "citations": [CITATION], "steps": STEPS},
    ],
}


LIVE_ELEMENTS = """
[...document.querySelectorAll("script, iframe, img[src*=foreign], [onerror], [onload]")]
    .filter((element) => element.closest("#wf-shell")).map((element) => element.outerHTML)
"""


def hostile_api() -> Starlette:
    answers: dict[str, Any] = {
        "/v1/me": {"name": EVIL},
        "/v1/models": {"data": [{"id": "tiny", "kind": "chat"}, {"id": EVIL, "kind": "chat"}]},
        "/v1/collections": {"data": [{"name": EVIL}]},
        "/v1/collections/{name:path}/documents/doc_1/view": {
            "name": EVIL,
            "is_current": True,
            "text": {"before": "", "marked": EVIL, "after": EVIL, "is_beginning": True, "is_end": True},
        },
        "/v1/collections/{name:path}/documents": {"data": [{"id": EVIL, "name": EVIL, "num_chunks": 1}]},
        "/v1/conversations": {"data": [{"id": "conv_1", "title": EVIL}]},
        "/v1/conversations/conv_1": CONVERSATION,
    }
    return Starlette(routes=[Route(path, lambda _, body=body: JSONResponse(body)) for path, body in answers.items()])


@pytest.fixture
def address() -> Iterator[str]:
    with serving(hostile_api()) as api, serving(create_app(api)) as page:
        yield page


class serving:  # used like a function
    def __init__(self, app: Any) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]})

    def __enter__(self) -> str:
        self._thread.start()
        return f"http://127.0.0.1:{self._socket.getsockname()[1]}"

    def __exit__(self, *error: object) -> None:
        self._server.should_exit = True
        self._thread.join()


@pytest.fixture(scope="module")
def playwright() -> Iterator[Playwright]:
    with sync_playwright() as running:
        yield running


def test_nothing_that_is_shown_runs_or_is_fetched(playwright: Playwright, address: str) -> None:
    with visitor(playwright, f"{address}/?c=conv_1") as person:
        person.sign_in("any")
        expect(person.answers.last).to_contain_text("<script>")
        for step in person.page.locator("#wf-chat .thought-group button").all():
            step.click()
        person.page.locator('#wf-chat a[href="#cite-msg_2-1"]').click()
        expect(person.page.locator(".wf-source.is-open mark")).to_contain_text("<script>")
        person.panel("documents")
        expect(person.page.locator("#wf-documents .wf-file")).to_contain_text("<script>")
        person.page.locator("#wf-collections input").click()
        person.picture("hostile")
        assert person.page.evaluate("window.pwned") is None
        assert person.page.evaluate(LIVE_ELEMENTS) == []
        assert person.foreign == []
