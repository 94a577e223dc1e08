"""Pages of PDFs as pictures, drawn in the killable parser process: no file can stop, block or eat who asks.

Blocks: async code calls it in a thread. One process, started at the first page, takes the pages in turn.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path

from rag.parsing import DocumentParser, ParseLimits

MIN_WIDTH, MAX_WIDTH = 200, 2000


@dataclass(frozen=True, slots=True)
class PageImage:
    """A drawn page. `boxes` are the marked rectangles (left, top, right, bottom, in pixels from the top left corner);
    none where the span does not stand on the page as text (a scan, or a text that the parser read otherwise)."""

    png: bytes
    width: int
    height: int
    boxes: tuple[tuple[float, ...], ...]


class PageRenderer:
    def __init__(self, limits: ParseLimits) -> None:
        self._parser = DocumentParser(limits)

    def render(
        self, path: Path, name: str, page: int, *, page_text: str = "", start: int = 0, end: int = 0, width: int = 1000
    ) -> PageImage:
        """Page `page` (from 1) of the PDF at `path`, `width` pixels wide, with characters `start` to `end` of its
        parsed text `page_text` marked. Raises `ParseError` as `rag.parsing.parse_file`, and `no_such_page`."""
        task = {"page": page, "page_text": page_text, "start": start, "end": end, "width": width}
        drawn = self._parser.ask(path, name, task)["image"]
        return PageImage(
            png=base64.b64decode(drawn["png"]),
            width=drawn["width"],
            height=drawn["height"],
            boxes=tuple(tuple(box) for box in drawn["boxes"]),
        )

    def close(self) -> None:
        self._parser.close()
