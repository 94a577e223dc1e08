"""Parsed text to passages of a bounded number of tokens, each with its exact span, page and headings.

The text is tokenised once, in pieces, and cut where the token positions allow: at every page, best before a heading,
then between paragraphs, lines, sentences, words. So time grows linearly, also for ten megabytes on one line. (Splitters
that search their pieces again in the text, as langchain's do, lose half of the positions when lengths are tokens.)
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from rag.headings import Outline, find_headings
from rag.tables import Tables, find_tables
from rag.types import PageSpan, ParsedDocument, TextChunk

TokenSpans = Callable[[str], Sequence[tuple[int, int]]]
"""Character spans (start, end) of a text's tokens in order, without special tokens."""

_PIECE_CHARACTERS = 16_384
_SHARE_OF_HEADER = 3
_MIN_FILL = 0.5
"""A chunk ends at the best break between this share of its tokens and all of them."""
_BREAKS = (
    re.compile(r"\n[ \t]*\n\s*"),
    re.compile(r"\n\s*"),
    re.compile(r"(?:[.!?…]+[\"'”’»)\]]*\s+|[。！？]+)"),
    re.compile(r"\s+"),
)


def chunk_document(
    document: ParsedDocument, token_spans: TokenSpans, max_tokens: int, overlap_tokens: int
) -> list[TextChunk]:
    """Passages of `document` with at most `max_tokens` tokens, following ones sharing up to `overlap_tokens`.

    A passage lies on one page, and following ones do not overlap across a heading. Space around a passage is not part
    of it. A passage that begins below the header of a table names that header, whose tokens count too; its span is that
    of its own text alone. The outermost heading is the document's title, where the text does not show it there.
    """
    if not 0 <= overlap_tokens <= max_tokens // 2:
        raise ValueError(f"overlap_tokens must lie between 0 and {max_tokens // 2} (half of max_tokens)")
    text = document.text
    outline = find_headings(text, document.mime_type)
    cuts = _Cuts.of(text, outline, document.pages)
    tables = _Headers(find_tables(text, document.mime_type), token_spans, max_tokens)
    chunker = _Chunker(text, token_spans, cuts, tables, max_tokens, overlap_tokens)
    page_starts = [page.start for page in document.pages]
    title = _title_above(document, outline)
    return [
        TextChunk(
            index=index,
            text=text[start:end],
            start=start,
            end=end,
            num_tokens=num_tokens,
            page=_page_at(document.pages, page_starts, start),
            headings=_path(title, outline.path_at(start), text[start:end]),
            table_header=tables.at(start)[0],
        )
        for index, (start, end, num_tokens) in enumerate(chunker.spans())
    ]


def _title_above(document: ParsedDocument, outline: Outline) -> str | None:
    """A title that a file declares beside its text (metadata of a PDF, `<title>` of a page) says what every passage is
    about. One that is a heading of the text stands above its passages already."""
    title = document.title
    if not title or any(heading.text == title for heading in outline.headings):
        return None
    # Where nothing is declared, the title is a line of this form, also in texts whose `#` lines are no headings.
    return None if f"# {title}" in document.text else title


def _path(title: str | None, headings: tuple[str, ...], passage: str) -> tuple[str, ...]:
    """With the title, unless the passage says it itself, as the first page of many documents does."""
    if title is None or title.casefold() in " ".join(passage.split()).casefold():
        return headings
    return (title, *headings)


def _page_at(pages: Sequence[PageSpan], page_starts: list[int], position: int) -> int | None:
    index = bisect_right(page_starts, position)
    return pages[index - 1].number if index else None


@dataclass(frozen=True, slots=True)
class _Cuts:
    """Where passages may begin, by rank: headings, paragraphs, lines, sentences, words; and the pages' beginnings."""

    ranks: tuple[npt.NDArray[np.int64], ...]
    page_starts: tuple[int, ...]

    @classmethod
    def of(cls, text: str, outline: Outline, pages: Sequence[PageSpan]) -> _Cuts:
        headings = [heading.start for heading in outline.headings]
        others = [[found.end() for found in pattern.finditer(text)] for pattern in _BREAKS]
        ranks = tuple(np.asarray(cuts, dtype=np.int64) for cuts in (headings, *others))
        return cls(ranks, tuple(page.start for page in pages))

    def regions(self, num_characters: int) -> Iterator[tuple[int, int]]:
        """Spans that no passage leaves: the pages, or everything where there are none."""
        bounds = sorted({0, num_characters, *self.page_starts})
        yield from pairwise(bounds)

    def last_between(self, low: int, high: int) -> int | None:
        """The last cut of the best rank in [low, high]."""
        for cuts in self.ranks:
            index = int(np.searchsorted(cuts, high, side="right"))
            if index and cuts[index - 1] >= low:
                return int(cuts[index - 1])
        return None

    def first_between(self, low: int, high: int, *, only_lines: bool) -> int | None:
        """The first cut of the best rank below headings in [low, high); with `only_lines` none inside of a line."""
        for cuts in self.ranks[1 : 3 if only_lines else None]:
            index = int(np.searchsorted(cuts, low, side="left"))
            if index < len(cuts) and cuts[index] < high:
                return int(cuts[index])
        return None

    def is_heading(self, position: int) -> bool:
        index = int(np.searchsorted(self.ranks[0], position))
        return index < len(self.ranks[0]) and int(self.ranks[0][index]) == position


class _Headers:
    """Headers of tables, cut to a share of a passage, with their number of tokens."""

    def __init__(self, tables: Tables, token_spans: TokenSpans, max_tokens: int) -> None:
        self._tables = tables
        self._cut = {header: _cut(header, token_spans, max_tokens) for header in {t.header for t in tables.tables}}

    def at(self, position: int) -> tuple[str | None, int]:
        header = self._tables.header_at(position)
        return (None, 0) if header is None else self._cut[header]


def _cut(header: str, token_spans: TokenSpans, max_tokens: int) -> tuple[str | None, int]:
    """At most a third of a passage, so that there is room for rows."""
    spans = token_spans(header)
    most = max_tokens // _SHARE_OF_HEADER
    if len(spans) <= most:
        return header, len(spans)
    # A cut may end inside of a word that has several tokens; its beginning says something too.
    return (header[: spans[most - 1][1]].rstrip(" |,;") or None, most) if most else (None, 0)


class _Chunker:
    def __init__(
        self,
        text: str,
        token_spans: TokenSpans,
        cuts: _Cuts,
        headers: _Headers,
        max_tokens: int,
        overlap_tokens: int,
    ) -> None:
        self._text = text
        self._token_spans = token_spans
        self._cuts = cuts
        self._headers = headers
        self._max_tokens = max_tokens
        self._overlap_tokens = overlap_tokens
        self._starts, self._ends = _token_bounds(text, token_spans)

    def spans(self) -> Iterator[tuple[int, int, int]]:
        """(start, end, number of tokens) of each passage."""
        for start, stop in self._cuts.regions(len(self._text)):
            yield from self._spans_of_region(start, stop)

    def _spans_of_region(self, position: int, stop: int) -> Iterator[tuple[int, int, int]]:
        last_end = -1
        while (start := self._skip_space(position, stop)) < stop:
            cut, num_tokens = self._fitting_cut(start, stop)
            end = start + len(self._text[start:cut].rstrip())
            if end > last_end:
                yield start, end, num_tokens
            last_end = max(last_end, end)
            position = self._next_start(start, cut, stop)

    def _skip_space(self, position: int, stop: int) -> int:
        while position < stop and self._text[position].isspace():
            position += 1
        return position

    def _fitting_cut(self, start: int, stop: int) -> tuple[int, int]:
        """Where the passage from `start` ends. Tokens of a passage alone can be a few more than inside the whole text:
        they are counted, and the passage shrinks until it fits."""
        max_tokens = budget = self._max_tokens - self._headers.at(start)[1]
        while True:
            cut = self._cut_after(start, stop, budget)
            num_tokens = len(self._token_spans(self._text[start:cut].rstrip()))
            if num_tokens <= max_tokens or cut == start + 1:
                return cut, num_tokens
            budget = max(0, budget - (num_tokens - max_tokens))

    def _cut_after(self, start: int, stop: int, budget: int) -> int:
        first = int(np.searchsorted(self._ends, start, side="right"))
        beyond = first + budget
        if beyond >= len(self._starts) or self._starts[beyond] >= stop:
            return stop
        high = max(int(self._starts[beyond]), start + 1)
        low = max(int(self._starts[first + int(budget * _MIN_FILL)]), start + 1)
        return self._cuts.last_between(low, high) or high

    def _next_start(self, start: int, cut: int, stop: int) -> int:
        if cut >= stop or not self._overlap_tokens or self._cuts.is_heading(cut):
            return cut
        after = int(np.searchsorted(self._starts, cut, side="left"))
        low = int(self._starts[max(0, after - self._overlap_tokens)])
        # A row of a table is never shared in part: half of it would say something else.
        is_row = self._headers.at(cut)[0] is not None
        overlap = self._cuts.first_between(max(low, start + 1), cut, only_lines=is_row)
        return overlap if overlap is not None else cut


def _token_bounds(text: str, token_spans: TokenSpans) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    bounds = [np.empty((0, 2), dtype=np.int64)]
    for start, end in _pieces(text):
        spans = token_spans(text[start:end])
        bounds.append(np.asarray(spans, dtype=np.int64).reshape(-1, 2) + start)
    joined = np.concatenate(bounds)
    # Search needs rising numbers; tokenisers may give several tokens for one character the same span.
    return np.maximum.accumulate(joined[:, 0]), np.maximum.accumulate(joined[:, 1])


def _pieces(text: str) -> Iterator[tuple[int, int]]:
    """Spans that end after white space where there is any, so that tokenising piece by piece changes no word."""
    start = 0
    while start < len(text):
        end = min(start + _PIECE_CHARACTERS, len(text))
        if end < len(text):
            space = max(text.rfind(" ", start, end), text.rfind("\n", start, end))
            end = space + 1 if space > start else end
        yield start, end
        start = end
