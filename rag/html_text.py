"""HTML to text: headings as `#` lines, list items as `- ` lines, table rows as `a | b | c` lines, paragraphs apart.

Links, pictures, scripts, styles and attributes are left out, so that every passage is what a reader sees.
"""

from __future__ import annotations

import re
from html.parser import HTMLParser

_HIDDEN = frozenset({"script", "style", "template", "noscript", "svg", "head", "object", "iframe", "canvas"})
_BLOCKS = frozenset(
    {"address", "article", "aside", "blockquote", "body", "caption", "center", "dd", "details", "div", "dl", "dt"}
    | {"fieldset", "figcaption", "figure", "footer", "form", "header", "hr", "legend", "main", "nav", "ol", "p", "pre"}
    | {"section", "summary", "table", "tbody", "tfoot", "thead", "ul"}
)
_CODE = frozenset({"code", "kbd"})
_HEADINGS = {f"h{level}": "#" * level for level in range(1, 7)}
_SPACES = re.compile(r"[ \t\f\v\u00a0]*\s[ \t\f\v\u00a0\n]*|[ \t\f\v\u00a0]+")


def html_to_text(html: str) -> tuple[str, str | None]:
    """Text and title of a page."""
    reader = _Reader()
    reader.feed(html)
    reader.close()
    return reader.text(), reader.title()


class _Reader(HTMLParser):
    """Collects finished lines; `None` stands for a gap between blocks."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._lines: list[str | None] = []
        self._pieces: list[str] = []
        self._title: list[str] = []
        self._prefix = ""
        self._hidden: list[str] = []
        self._in_title = False
        self._preformatted = 0
        self._row_depth = 0

    def text(self) -> str:
        self._end_line()
        lines: list[str] = []
        for line in self._lines:
            if line is not None:
                lines.append(line)
            elif lines and lines[-1]:
                lines.append("")
        return "\n".join(lines).strip()

    def title(self) -> str | None:
        return _collapse("".join(self._title)).strip() or None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "title" and not self._title:
            self._in_title = True
        elif tag == "body":
            self._hidden.clear()  # An unclosed <head> must not hide the page.
        elif tag in _HIDDEN:
            self._hidden.append(tag)
        elif not self._hidden:
            self._open(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag == "title":
            self._in_title = False
        elif tag in self._hidden:
            del self._hidden[self._hidden.index(tag) :]
        elif not self._hidden:
            self._close(tag)

    def handle_data(self, data: str) -> None:
        if self._in_title:
            self._title.append(data)
        elif self._hidden:
            return
        elif self._preformatted:
            self._add_preformatted(data)
        else:
            self._pieces.append(data)

    def _open(self, tag: str) -> None:
        if tag == "tr":
            self._end_line()
            self._row_depth += 1
        elif tag in ("td", "th"):
            if self._row_depth and any(piece.strip() for piece in self._pieces):
                self._pieces.append(" | ")
        elif tag in _HEADINGS:
            self._start_block(_HEADINGS[tag] + " ")
        elif tag == "li":
            self._end_line()
            self._prefix = "- "
        elif tag in _BLOCKS:
            self._start_block()
            self._preformatted += tag == "pre"
        elif tag in _CODE and not self._preformatted:
            self._pieces.append("`")
        elif tag == "br":
            self._pieces.append(" ") if self._row_depth or self._prefix.startswith("#") else self._end_line()

    def _close(self, tag: str) -> None:
        if tag == "tr":
            self._end_line()
            self._row_depth = max(0, self._row_depth - 1)
        elif tag == "li":
            self._end_line()
        elif tag in _CODE and not self._preformatted:
            self._pieces.append("`")
        elif tag in _HEADINGS or tag in _BLOCKS:
            self._start_block()
            self._preformatted = max(0, self._preformatted - (tag == "pre"))

    def _start_block(self, prefix: str = "") -> None:
        # A paragraph inside a list item or a table cell keeps their line.
        if not self._pieces and self._prefix and not prefix:
            return
        self._end_line()
        self._lines.append(None)
        self._prefix = prefix

    def _end_line(self) -> None:
        raw = "".join(self._pieces)
        line = raw.rstrip() if self._preformatted else _collapse(raw).strip()
        if self._row_depth:
            line = line.removesuffix("|").rstrip()
        if line:
            self._lines.append(self._prefix + line)
            self._prefix = ""
        self._pieces.clear()

    def _add_preformatted(self, data: str) -> None:
        first, *rest = data.split("\n")
        self._pieces.append(first)
        for line in rest:
            code = "".join(self._pieces).rstrip()
            self._lines.append(code)
            self._pieces.clear()
            self._pieces.append(line)


def _collapse(text: str) -> str:
    return _SPACES.sub(" ", text)
