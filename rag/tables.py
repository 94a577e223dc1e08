"""Tables in parsed text, and their headers: a passage that holds later rows of a table is only understood with them.

Parsers write a row as one line with its cells between bars; CSV files are one table as they are. The header is the
first row, with the second one where the first is only a title.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

MAX_HEADER_CHARACTERS = 600

_MIN_ROWS = 3
"""A header and two rows; less always fits into one passage or says nothing."""
_SEPARATED = frozenset({"text/csv", "text/tab-separated-values"})
# In these a bar is data, code or part of a picture made of letters.
_WITHOUT_TABLES = frozenset(
    {
        "application/json",
        "application/xml",
        "application/yaml",
        "application/x-subrip",
        "message/rfc822",
        "text/plain",
        "text/vtt",
    }
)


@dataclass(frozen=True, slots=True)
class Table:
    """Characters `start` to `end` of a text. `body` is where the rows below the header begin."""

    start: int
    body: int
    end: int
    header: str


class Tables:
    """The tables of one text, in order."""

    def __init__(self, tables: Sequence[Table]) -> None:
        self.tables = tables
        self._starts = [table.start for table in tables]

    def header_at(self, position: int) -> str | None:
        """The header that a passage lacks which begins at a character; none outside of tables and in the header."""
        index = bisect_right(self._starts, position)
        if not index:
            return None
        table = self.tables[index - 1]
        return table.header if table.body <= position < table.end else None


def find_tables(text: str, mime_type: str) -> Tables:
    """Linear in the length of the text, also where it is one line."""
    if mime_type in _WITHOUT_TABLES:
        return Tables([])
    if mime_type in _SEPARATED:
        return Tables(list(_separated(text)))
    if "|" not in text:
        return Tables([])
    return Tables(list(_barred(text)))


def _separated(text: str) -> Iterator[Table]:
    first = re.match(r"\s*", text)
    start = first.end() if first else 0
    end = text.find("\n", start)
    header = text[start : end if end >= 0 else len(text)].rstrip()
    # An odd number of quotes: the first record goes on in the next line, so there is no header of one line.
    is_header = re.search(r"[,;|\t]", header) and header.count('"') % 2 == 0
    if end >= 0 and is_header:
        yield Table(start, end + 1, len(text), header[:MAX_HEADER_CHARACTERS])


def _barred(text: str) -> Iterator[Table]:
    rows: list[tuple[int, int]] = []
    is_code = False
    for start, end in _lines(text):
        line = text[start:end] if end - start <= 10 * MAX_HEADER_CHARACTERS else ""
        if line.startswith(("```", "~~~")):
            is_code = not is_code
        if not is_code and line and (_is_row(line) or (rows and _is_rule(line))):
            rows.append((start, end))
            continue
        yield from _table(text, rows)
        rows = []
    yield from _table(text, rows)


def _lines(text: str) -> Iterator[tuple[int, int]]:
    start = 0
    while start < len(text):
        end = text.find("\n", start)
        end = len(text) if end < 0 else end
        yield start, end
        start = end + 1


def _table(text: str, rows: list[tuple[int, int]]) -> Iterator[Table]:
    written = [row for row in rows if not _is_rule(text[row[0] : row[1]])]
    if len(written) < _MIN_ROWS:
        return
    num_header = 2 if _is_title(text[written[0][0] : written[0][1]]) else 1
    header = "\n".join(text[start:end].strip() for start, end in written[:num_header])
    if header:
        yield Table(rows[0][0], written[num_header][0], rows[-1][1], header[:MAX_HEADER_CHARACTERS])


def _is_row(line: str) -> bool:
    """`| a | b |`, or cells with spaces around the bars between them."""
    stripped = line.strip()
    return " | " in stripped or (len(stripped) > 2 and stripped[0] == stripped[-1] == "|")


def _is_rule(line: str) -> bool:
    """The line of dashes that Markdown puts below a header."""
    return "--" in line and not set(line) - set("|-: \t")


def _is_title(row: str) -> bool:
    """Whether only one cell of a row says anything."""
    cells = row.strip().strip("|").split("|")
    return len(cells) > 1 and sum(bool(cell.strip()) for cell in cells) == 1
