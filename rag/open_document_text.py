"""OpenDocument text (.odt, .odp, .ods) to text: headings as `#` lines, list items, table rows, paragraphs.

The general parser loses words that stand in nested spans of these files, hence a reader of our own.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

_NAMES = "{urn:oasis:names:tc:opendocument:xmlns:"
_TEXT, _TABLE = _NAMES + "text:1.0}", _NAMES + "table:1.0}"
_OFFICE, _DRAW = _NAMES + "office:1.0}", _NAMES + "drawing:1.0}"
_MAX_CONTENT_BYTES = 256 << 20
_MAX_REPEATED_SPACES = 100


def open_document_to_text(data: bytes) -> str:
    """Text of a file. Raises `ValueError` where it is damaged."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if archive.getinfo("content.xml").file_size > _MAX_CONTENT_BYTES:
                raise ValueError("content.xml unpacks to more than 256 MiB")
            root = ElementTree.fromstring(archive.read("content.xml"))
    except (KeyError, zipfile.BadZipFile, ElementTree.ParseError, EOFError) as error:
        raise ValueError(f"content.xml cannot be read: {error}") from error
    body = root.find(_OFFICE + "body")
    return "\n\n".join(_blocks(body)) if body is not None else ""


def _blocks(parent: Element) -> Iterator[str]:
    for child in parent:
        if child.tag == _TEXT + "h":
            level = int(child.get(_TEXT + "outline-level", "1"))
            yield from _non_empty("#" * min(max(level, 1), 6) + " ", _inline(child))
        elif child.tag == _TEXT + "p":
            yield from _non_empty("", _inline(child))
        elif child.tag == _TEXT + "list":
            yield "\n".join(_list_lines(child, depth=0))
        elif child.tag == _TABLE + "table":
            yield from _non_empty("", "\n".join(_table_lines(child)))
        elif child.tag != _TEXT + "tracked-changes":
            yield from _blocks(child)


def _non_empty(prefix: str, text: str) -> Iterator[str]:
    if text.strip():
        yield prefix + text.strip()


def _list_lines(parent: Element, depth: int) -> Iterator[str]:
    for item in parent:
        for child in item:
            if child.tag == _TEXT + "list":
                yield from _list_lines(child, depth + 1)
            else:
                yield from _non_empty("  " * depth + "- ", _inline(child))


def _table_lines(table: Element) -> Iterator[str]:
    for row in table.iter(_TABLE + "table-row"):
        cells = [" ".join(_blocks(cell)) for cell in row if cell.tag.endswith("table-cell")]
        if any(cells):
            yield " | ".join(cells).rstrip(" |")


def _inline(element: Element) -> str:
    """Text of a paragraph with its spans; spaces, tabs and line breaks are elements in this format."""
    parts = [element.text or ""]
    for child in element:
        if child.tag == _TEXT + "s":
            parts.append(" " * min(int(child.get(_TEXT + "c", "1")), _MAX_REPEATED_SPACES))
        elif child.tag == _TEXT + "tab":
            parts.append("\t")
        elif child.tag == _TEXT + "line-break":
            parts.append("\n")
        elif child.tag in (_DRAW + "frame", _TEXT + "note"):
            parts.append(" " + " ".join(_blocks(child)))
        elif not child.tag.startswith(_OFFICE):
            parts.append(_inline(child))
        parts.append(child.tail or "")
    return "".join(parts)
