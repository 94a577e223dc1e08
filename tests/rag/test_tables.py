"""Rows of a long table keep its header, and their spans stay those of their own text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rag.chunking import chunk_document
from rag.extraction import extract
from rag.tables import find_tables
from rag.types import ParsedDocument, StoredChunk, TextChunk
from rag.vector_store import chunk_from_payload, chunk_to_payload, searchable_text
from services.passage_writer import embedded_text
from tests.rag.test_chunking import check, word_spans
from tests.seen import LABELS

DOCUMENTS = Path(__file__).parents[1] / "data" / "documents"
HEADER = "| Country | Capital | Inhabitants |"


def chunks_of(text: str, mime_type: str = "text/markdown", limit: int = 40) -> list[TextChunk]:
    chunks = chunk_document(ParsedDocument(text, mime_type), word_spans, limit, 8)
    check(text, chunks, limit)
    for chunk in chunks:
        header = word_spans(chunk.table_header or "")
        assert len(header) + chunk.num_tokens <= limit, "header and rows fit together"
    return chunks


def rows(num_rows: int) -> str:
    return "\n".join(f"| Country {n} | Capital {n} | {n} |" for n in range(num_rows))


def test_later_rows_of_a_long_table_name_its_header() -> None:
    text = f"# Atlas\n\nBefore the table.\n\n{HEADER}\n|---|---|---|\n{rows(60)}\n\nAfter the table, there are words."
    chunks = chunks_of(text)
    with_rows = [chunk for chunk in chunks if "| Country " in chunk.text]
    assert len(with_rows) > 10
    for chunk in with_rows:
        assert (HEADER in chunk.text) != (chunk.table_header == HEADER)
        assert all(
            line.startswith("|") and line.endswith("|") for line in chunk.text.splitlines() if "Country " in line
        )
    assert "After the table" in chunks[-1].text
    assert next(chunk for chunk in chunks if "Before" in chunk.text).table_header is None


def test_the_headings_above_a_passage_are_embedded_and_searched() -> None:
    chunk = TextChunk(0, "By day it is open.", 40, 58, 6, headings=("Harbour", "Access"))
    assert embedded_text(chunk) == "Harbour > Access\nBy day it is open."
    stored = StoredChunk("c", "col", "doc", "ver", "a.md", chunk.text, 40, 58, 0, headings=chunk.headings)
    assert searchable_text(stored) == "Harbour\nAccess\nBy day it is open."


def test_the_header_is_embedded_searched_and_kept_but_no_part_of_the_span() -> None:
    chunk = chunks_of(f"{HEADER}\n{rows(60)}")[3]
    assert embedded_text(chunk).startswith(HEADER)
    stored = StoredChunk(
        "c", "col", "doc", "ver", "atlas.md", chunk.text, chunk.start, chunk.end, 3, table_header=chunk.table_header
    )
    assert searchable_text(stored) == f"{HEADER}\n{chunk.text}"
    assert chunk_from_payload(chunk_to_payload(stored, active=True, labels=LABELS)) == stored
    assert HEADER not in stored.text


@pytest.mark.parametrize(
    ("text", "mime_type", "header"),
    [
        ("a,b\n1,2\n3,4\n", "text/csv", "a,b"),
        ("a;b\n1;2\n", "text/csv", "a;b"),
        ("a\tb\n1\t2\n", "text/tab-separated-values", "a\tb"),
        ("\n\na,b\n1,2", "text/csv", "a,b"),
        ('"a\nb",c\n1,2\n', "text/csv", None),
        ("one column\n1\n2\n", "text/csv", None),
        ("a | b\n---|---\n1 | 2\n3 | 4", "text/markdown", "a | b"),
        ("| T |  |\n| a | b |\n| 1 | 2 |\n| 3 | 4 |", "text/html", "| T |  |\n| a | b |"),
        ("a | b\n1 | 2", "text/html", None),
        ("a | b\n1 | 2\n3 | 4", "text/plain", None),
        ("```\na | b\n1 | 2\n3 | 4\n```", "text/markdown", None),
        ("no bars at all\nnone\nnone", "text/markdown", None),
    ],
)
def test_headers_are_found_where_there_are_tables(text: str, mime_type: str, header: str | None) -> None:
    assert find_tables(text, mime_type).header_at(len(text.rstrip()) - 1) == header


def test_a_header_that_is_too_long_is_cut() -> None:
    header = "| " + " | ".join(f"column{n}" for n in range(100)) + " |"
    chunks = chunks_of(f"{header}\n{rows(60)}")
    cut = chunks[-1].table_header
    assert cut is not None and header.startswith(cut) and 10 < len(cut) < len(header)


@pytest.mark.parametrize(
    ("name", "header"),
    [
        ("test.xls", "| Alpha | Beta | Gamma | Delta |"),
        ("csv-comma.csv", "Index,Customer Id,First Name"),
        ("docx-tables.docx", "| a | b | c |"),
        ("simple-table.md", "Item | Price | # In stock"),
    ],
)
def test_tables_of_real_files_stay_tables(name: str, header: str) -> None:
    document = extract((DOCUMENTS / name).read_bytes(), name)
    tables = find_tables(document.text, document.mime_type)
    assert any(table.header.startswith(header) for table in tables.tables), json.dumps(
        [table.header for table in tables.tables]
    )


@pytest.mark.parametrize(
    ("mime_type", "mark", "num_rows"), [("text/csv", ",", 1_000_000), ("text/html", " | ", 100_000)]
)
def test_very_many_rows_are_cut_in_linear_time_each_passage_with_its_header(
    mime_type: str, mark: str, num_rows: int
) -> None:
    text = f"number{mark}name{mark}value\n" + "".join(f"{n}{mark}name {n}{mark}{n % 97}\n" for n in range(num_rows))
    chunks = chunk_document(ParsedDocument(text, mime_type), lambda piece: _lines(piece), 200, 32)
    assert chunks[0].table_header is None and chunks[-1].end == len(text.rstrip())
    assert {chunk.table_header for chunk in chunks[1:]} == {f"number{mark}name{mark}value"}
    assert all(text[chunk.start : chunk.end] == chunk.text for chunk in chunks)


def _lines(text: str) -> list[tuple[int, int]]:
    """A line is a token here: what is tested is not the tokenizer."""
    spans, start = [], 0
    for line in text.splitlines(keepends=True):
        spans.append((start, start + len(line.rstrip("\n"))))
        start += len(line)
    return [span for span in spans if span[1] > span[0]]
