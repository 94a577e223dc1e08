"""What a citation opens: the document at its page with the cited span marked, or the text around the span.

PDFs are shown as drawn pages, everything else as text. Who may not read the document gets what a stranger gets: 404.
"""

from __future__ import annotations

import asyncio
import base64
from dataclasses import dataclass
from typing import Any

from rag.filetypes import PDF
from rag.page_rendering import PageImage, PageRenderer
from services.errors import invalid, not_found
from services.knowledge import Knowledge
from services.originals import Originals

# Characters of a text document shown on each side of a span; more would only slow the reader down.
_AROUND = 6000


@dataclass(frozen=True, slots=True)
class Span:
    """Characters `start` to `end` (exclusive) of the text of one document version; none given: nothing is marked."""

    start: int = 0
    end: int = 0
    version_id: str | None = None


class DocumentViews:
    def __init__(self, knowledge: Knowledge, originals: Originals, renderer: PageRenderer) -> None:
        self._knowledge = knowledge
        self._originals = originals
        self._renderer = renderer
        # Waiting requests hold no thread.
        self._turn = asyncio.Lock()

    async def view(self, document_id: str, span: Span, actor: str, width: int | None = None) -> dict[str, Any]:
        """`kind` "page" or "text", page number, the text before, in and after the span, and with `width` the drawn
        page (`image`). `is_current` is false where the span belongs to a version that was replaced: nothing is marked
        then."""
        document = await asyncio.to_thread(self._knowledge.document, document_id, actor)
        is_current = span.version_id in (None, document["version_id"])
        start, end = _checked(span, document) if is_current else (0, 0)
        page = _page_at(document, start)
        is_drawn = self._is_drawn(document) and page is not None
        answer = {
            "object": "document.view",
            "document_id": document_id,
            "version_id": document["version_id"],
            "collection": document["collection"],
            "collection_id": document["collection_id"],
            "name": document["name"],
            "is_current": is_current,
            "kind": "page" if is_drawn else "text",
            "page": page["number"] if page else None,
            "num_pages": len(document["pages"]),
            "text": _text_around(document["text"], start, end, page),
            "image": None,
        }
        if width is not None and is_drawn and page is not None:
            answer["image"] = _image_json(await self._draw(document, page, start, end, width))
        return answer

    async def page(self, document_id: str, number: int, span: Span, actor: str, width: int) -> bytes:
        """PNG of one page of a PDF; the span is marked where it lies on that page."""
        document = await asyncio.to_thread(self._knowledge.document, document_id, actor)
        page = next((page for page in document["pages"] if page["number"] == number), None)
        if page is None:
            raise not_found(
                f"{document['name']} has no page {number}; it has {len(document['pages'])} pages with text.",
                code="no_such_page",
            )
        if not self._is_drawn(document):
            raise not_found(
                f"{document['name']} has no pages that can be drawn: its pages are text, or it was added before files "
                "were kept (upload it again). `view` shows its text.",
                code="no_page_image",
            )
        is_current = span.version_id in (None, document["version_id"])
        start, end = _checked(span, document) if is_current else (0, 0)
        return (await self._draw(document, page, start, end, width)).png

    def close(self) -> None:
        self._renderer.close()

    def _is_drawn(self, document: dict[str, Any]) -> bool:
        return document["mime_type"] == PDF.mime_type and self._originals.path(document["version_id"]) is not None

    async def _draw(
        self, document: dict[str, Any], page: dict[str, int], start: int, end: int, width: int
    ) -> PageImage:
        path = self._originals.path(document["version_id"])
        if path is None:
            raise not_found(f"{document['name']} was deleted meanwhile.", code="unknown_document")
        first, last = page["start"], page["end"]
        async with self._turn:
            return await asyncio.to_thread(
                self._renderer.render,
                path,
                document["name"],
                page["number"],
                page_text=document["text"][first:last],
                start=max(0, start - first),
                end=max(0, min(end, last) - first),
                width=width,
            )


def _checked(span: Span, document: dict[str, Any]) -> tuple[int, int]:
    if not 0 <= span.start <= span.end <= len(document["text"]):
        raise invalid(
            f"Characters {span.start} to {span.end} do not lie in {document['name']}, which has "
            f"{len(document['text'])} characters.",
            param="start",
            code="span_outside",
        )
    return span.start, span.end


def _page_at(document: dict[str, Any], position: int) -> dict[str, int] | None:
    pages = [page for page in document["pages"] if page["start"] <= position]
    return pages[-1] if pages else (document["pages"] or [None])[0]


def _text_around(text: str, start: int, end: int, page: dict[str, int] | None) -> dict[str, Any]:
    first, last = (page["start"], max(page["end"], end)) if page else (0, len(text))
    first, last = max(first, start - _AROUND), min(last, end + _AROUND)
    return {
        "start": first,
        "before": text[first:start],
        "marked": text[start:end],
        "after": text[end:last],
        "is_beginning": first == 0,
        "is_end": last == len(text),
    }


def _image_json(image: PageImage) -> dict[str, Any]:
    return {
        "png_base64": base64.b64encode(image.png).decode(),
        "width": image.width,
        "height": image.height,
        "boxes": [list(box) for box in image.boxes],
    }
