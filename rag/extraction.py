"""Bytes of one file to text, pages and title, in this process and without limits: only the parser process calls this.

PDF text keeps its pages; presentations count slides as pages. Plain text formats are decoded and otherwise unchanged,
so that character offsets point into the file as people see it. Scanned pages without a text layer give a warning; text
recognition (OCR) is an option of the parser process.
"""

from __future__ import annotations

import dataclasses
import re
import secrets
from collections.abc import Sequence

from kreuzberg import (
    ConcurrencyConfig,
    ContentFilterConfig,
    ExtractionConfig,
    ExtractionResult,
    KreuzbergError,
    PageConfig,
    extract_bytes_sync,
)

from rag import filetypes
from rag.email_text import email_to_text
from rag.errors import ParseError
from rag.filetypes import FileType, detect_type
from rag.html_text import html_to_text
from rag.language import detect_language
from rag.open_document_text import open_document_to_text
from rag.text_decoding import clean_text, decode_text
from rag.types import PageSpan, ParsedDocument
from rag.xml_text import xml_to_text

_MAX_TITLE_CHARACTERS = 300
_HEADING = re.compile(r"^#{1,2} +(.+?)[ #]*$", re.MULTILINE)
_PICTURE = re.compile(r"\\?!\[([^\[\]]{0,1000})\]\([^()\s]{0,1000}\)")
_TABLE_RULE = re.compile(r"^\|(?: *:?-{3,}:? *\|)+\n?", re.MULTILINE)
_TITLES_THAT_SAY_NOTHING = frozenset({"untitled", "unknown", "title", "document", "microsoft word"})


def extract(data: bytes, name: str) -> ParsedDocument:
    """Text of a file called `name`. Raises `ParseError`."""
    kind = detect_type(data, name)
    text, pages, title, warnings = _read(data, name, kind)
    if not text.strip():
        warnings += (_no_text_warning(name, kind),)
        text, pages = "", ()
    return ParsedDocument(
        text=text,
        mime_type=kind.mime_type,
        title=_title(title, text),
        pages=pages,
        language=detect_language(text),
        warnings=warnings,
    )


def with_recognised_text(document: ParsedDocument, pages: Sequence[str], name: str) -> ParsedDocument:
    """A scanned document with the text that was recognised on its pages; unchanged where there was none."""
    text, spans = _join_pages(list(enumerate(pages, start=1)))
    if not text.strip():
        return document
    warning = f"The text of {name} was recognised in pictures (OCR), so it may hold mistakes."
    return dataclasses.replace(
        document,
        text=text,
        pages=spans,
        language=detect_language(text),
        title=_title(document.title, text),
        warnings=(warning,),
    )


_Content = tuple[str, tuple[PageSpan, ...], str | None, tuple[str, ...]]


def _read(data: bytes, name: str, kind: FileType) -> _Content:
    try:
        if kind is filetypes.EMAIL:
            text, title, warnings = email_to_text(data)
            return clean_text(text), (), title, warnings
        if kind in (filetypes.ODT, filetypes.ODP, filetypes.ODS):
            return clean_text(open_document_to_text(data)), (), None, ()
        if kind is filetypes.XML:
            return clean_text(xml_to_text(data)), (), None, ()
    except ValueError as error:
        raise filetypes.damaged(name, str(error)) from error
    if kind is filetypes.NOTEBOOK or not kind.is_text:
        return _read_with_kreuzberg(data, name, kind)
    text, warnings = decode_text(data)
    if kind is not filetypes.HTML:
        return text, (), None, warnings
    text, title = html_to_text(text)
    return text, (), title, warnings


def _read_with_kreuzberg(data: bytes, name: str, kind: FileType) -> _Content:
    # A marker that no document can contain, because it is drawn anew for each file.
    marker = secrets.token_hex(12)
    config = ExtractionConfig(
        use_cache=False,
        enable_quality_processing=False,
        output_format="plain" if kind is filetypes.PDF else "markdown",
        pages=PageConfig(extract_pages=True, insert_page_markers=True, marker_format=f"\n\n{marker}{{page_num}};\n\n"),
        content_filter=ContentFilterConfig(include_headers=True, include_footers=True, strip_repeating_text=False),
        concurrency=ConcurrencyConfig(max_threads=1),
    )
    try:
        result = extract_bytes_sync(data, kind.mime_type, config=config)
    except (KreuzbergError, RuntimeError, OSError, ValueError) as error:
        raise _as_parse_error(name, error) from error
    text, pages = _join_pages(_split_pages(result, kind, marker))
    warnings = tuple(f"{warning.source}: {warning.message}" for warning in result.processing_warnings)
    return text, pages, result.metadata.get("title") or result.metadata.get("subject"), warnings


def _split_pages(result: ExtractionResult, kind: FileType, marker: str) -> list[tuple[int | None, str]]:
    """(page number, text) in order. The page texts of a PDF are used as they are (its joined text may double a page of
    right-to-left script); other formats are cut at the markers."""
    if kind is filetypes.PDF and result.pages:
        return [(page["page_number"], page["content"]) for page in result.pages]
    first, *rest = re.split(f"{marker}(\\d+);", result.content)
    numbered = [(int(number), content) for number, content in zip(rest[0::2], rest[1::2], strict=True)]
    return [(None, first), *numbered]


def _join_pages(parts: list[tuple[int | None, str]]) -> tuple[str, tuple[PageSpan, ...]]:
    texts: list[str] = []
    pages: list[PageSpan] = []
    position = 0
    for number, content in parts:
        text = _tidy(content)
        if not text and number is None:
            continue
        if number is not None:
            pages.append(PageSpan(number, position, position + len(text)))
        texts.append(text)
        position += len(text) + 2
    return "\n\n".join(texts), tuple(pages)


def _tidy(content: str) -> str:
    """Without pictures and table rules, which no reader needs; PDF's mark for a hyphen at a line end becomes one."""
    text = clean_text(content).replace("\ufffe", "-").replace("\u0002", "-")
    return _TABLE_RULE.sub("", _PICTURE.sub(r"\1", text)).strip()


def _as_parse_error(name: str, error: Exception) -> ParseError:
    detail = re.sub(r"\s+", " ", str(error))[:200]
    if "Pdfium initialization failed" in detail:
        return ParseError(
            f"{name} could not be read: no PDF can be read here ({detail}). See that there is room in the folder for "
            "temporary files, restart windfarm and try again.",
            code="parser_failed",
        )
    if re.search(r"password|encrypt", detail, re.IGNORECASE):
        return filetypes.encrypted(name)
    if re.search(r"too large|limit|bomb|exceed", detail, re.IGNORECASE):
        return ParseError(
            f"{name} unpacks to more than can be read ({detail}). Split it into smaller files.", code="too_large"
        )
    return filetypes.damaged(name, detail)


def _no_text_warning(name: str, kind: FileType) -> str:
    if kind is filetypes.PDF:
        return (
            f"{name} has no text layer (it may be scanned), so nothing in it can be found. "
            "Run text recognition (OCR) over it first."
        )
    return f"{name} holds no text, so nothing in it can be found."


def _title(declared: str | None, text: str) -> str | None:
    title = " ".join((declared or "").split())
    if not title or title.lower() in _TITLES_THAT_SAY_NOTHING:
        heading = _HEADING.search(text[:5000])
        title = heading.group(1) if heading else ""
    return clean_text(title)[:_MAX_TITLE_CHARACTERS] or None
