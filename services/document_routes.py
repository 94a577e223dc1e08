"""Routes that open a document where it is cited: its text around the span, and its pages as pictures."""

from __future__ import annotations

from rag.page_rendering import MAX_WIDTH, MIN_WIDTH
from services.calls import Calls
from services.document_view import Span
from services.errors import invalid
from services.routing import Answer, Call, Route, flag, json_answer

_DEFAULT_WIDTH = 1000
_KNOWN = {"version_id", "start", "end", "width", "image"}
_HEADERS = {"cache-control": "private, no-store", "x-content-type-options": "nosniff"}


class DocumentRoutes:
    def __init__(self, store: Calls) -> None:
        self._store = store

    def routes(self) -> list[Route]:
        document = "/v1/collections/{name}/documents/{id}"
        return [
            Route("GET", f"{document}/view", self.view),
            Route("GET", f"{document}/pages/{{page}}", self.page),
        ]

    async def view(self, call: Call) -> Answer:
        """`?start=&end=&version_id=`: where the span stands; `&image=true&width=`: with its page as a picture."""
        span, width = _span(call), _number(call, "width", _DEFAULT_WIDTH, MIN_WIDTH, MAX_WIDTH)
        name, document_id = call.parameters["name"], call.parameters["id"]
        wanted = width if flag(call, "image") else None
        return json_answer(
            await self._store.call("view_document", name, document_id, span, call.actor.user_id, wanted),
            headers=_HEADERS,
        )

    async def page(self, call: Call) -> Answer:
        """PNG of one page, with the span of the query string marked."""
        span, width = _span(call), _number(call, "width", _DEFAULT_WIDTH, MIN_WIDTH, MAX_WIDTH)
        number = _as_number(call.parameters["page"], "page", 1, 1_000_000)
        name, document_id = call.parameters["name"], call.parameters["id"]
        png = await self._store.call("page_image", name, document_id, number, span, call.actor.user_id, width)
        return Answer(png, content_type="image/png", headers=_HEADERS)


def _span(call: Call) -> Span:
    for name in call.query:
        if name not in _KNOWN:
            known = ", ".join(sorted(_KNOWN))
            raise invalid(f"'{name}' is not known here. Known are: {known}.", param=name, code="unknown_parameter")
    start = _number(call, "start", 0, 0, 1 << 31)
    return Span(start, _number(call, "end", start, 0, 1 << 31), call.query.get("version_id"))


def _number(call: Call, name: str, default: int, low: int, high: int) -> int:
    return _as_number(call.query[name], name, low, high) if name in call.query else default


def _as_number(text: str, name: str, low: int, high: int) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 12 and low <= int(text) <= high):
        raise invalid(f"'{name}' is '{text[:40]}', but a number from {low} to {high} is expected.", param=name)
    return int(text)
