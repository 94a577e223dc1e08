"""Passages are exact spans, cover everything, stay under the limit, and know their page and headings."""

from __future__ import annotations

import random
import re
from itertools import pairwise

import pytest

from rag.chunking import chunk_document
from rag.headings import find_headings
from rag.types import PageSpan, ParsedDocument, TextChunk


def word_spans(text: str) -> list[tuple[int, int]]:
    return [found.span() for found in re.finditer(r"\w{1,8}|[^\w\s]", text)]


def chunks_of(text: str, limit: int = 40, overlap: int = 8, mime_type: str = "text/markdown") -> list[TextChunk]:
    document = ParsedDocument(text, mime_type)
    chunks = chunk_document(document, word_spans, limit, overlap)
    check(text, chunks, limit)
    return chunks


def check(text: str, chunks: list[TextChunk], limit: int) -> None:
    covered = bytearray(len(text))
    for index, chunk in enumerate(chunks):
        assert chunk.index == index
        assert chunk.text == text[chunk.start : chunk.end] == chunk.text.strip() != ""
        assert 0 < chunk.num_tokens == len(word_spans(chunk.text)) <= limit
        covered[chunk.start : chunk.end] = b"\x01" * (chunk.end - chunk.start)
    assert all(is_covered or character.isspace() for is_covered, character in zip(covered, text, strict=True))


def sentences(num_sentences: int) -> str:
    return " ".join(f"This is sentence number {n} of a text." for n in range(num_sentences))


@pytest.mark.parametrize("text", ["", "   \n\t ", "\n\n\n"])
def test_nothing_gives_no_passages(text: str) -> None:
    assert chunks_of(text) == []


def test_a_short_text_is_one_passage() -> None:
    (chunk,) = chunks_of("  Hello there.  \n")
    assert (chunk.text, chunk.start, chunk.end, chunk.page, chunk.headings) == ("Hello there.", 2, 14, None, ())


def headings_of(text: str, mime_type: str, title: str, *pages: PageSpan) -> list[tuple[str, ...]]:
    chunks = chunk_document(ParsedDocument(text, mime_type, title=title, pages=pages), word_spans, 40, 8)
    return [chunk.headings for chunk in chunks]


def test_a_title_that_the_text_does_not_show_is_the_first_heading() -> None:
    text = "HARBOUR   RULES\n\nShips wait.\n\nBoats may pass."
    pages = (PageSpan(1, 0, 28), PageSpan(2, 30, len(text)))
    found = headings_of(text, "application/pdf", "Harbour rules", *pages)
    assert found == [(), ("Harbour rules",)], "the first page says it itself"
    page = "# Access\n\n## By day\n\n" + sentences(9)
    assert headings_of(page, "text/html", "Harbour rules")[-1] == ("Harbour rules", "Access", "By day")
    assert headings_of(page, "text/html", "Access")[-1] == ("Access", "By day")
    assert headings_of(page, "text/html", "By day")[0] == ("Access",), "it stands below"
    remark = "# Opens the harbour\n\n" + sentences(9)
    assert set(headings_of(remark, "text/plain", "Opens the harbour")) == {()}, "no heading, so no title either"


def test_passages_end_with_sentences_where_they_can() -> None:
    chunks = chunks_of(sentences(60))
    assert len(chunks) > 10 and all(chunk.text.endswith(".") for chunk in chunks)


def test_neighbours_overlap_by_no_more_than_asked() -> None:
    text = sentences(60)
    for left, right in pairwise(chunks_of(text, limit=40, overlap=12)):
        assert right.start < left.end
        assert len(word_spans(text[right.start : left.end])) <= 12
    for left, right in pairwise(chunks_of(text, overlap=0)):
        assert right.start >= left.end


def test_passages_begin_at_headings_and_carry_their_path() -> None:
    text = (
        f"# Top\n\n{sentences(5)}\n\n## One\n\n{sentences(3)}\n\n### Deep\n\n{sentences(3)}\n\n## Two\n\n{sentences(9)}"
    )
    chunks = chunks_of(text, limit=60)
    by_first_line = {chunk.text.splitlines()[0]: chunk.headings for chunk in chunks}
    assert by_first_line["# Top"] == ("Top",)
    assert by_first_line["## One"] == ("Top", "One")
    assert by_first_line["## Two"] == ("Top", "Two")
    assert chunks[-1].headings == ("Top", "Two")


def test_no_passage_leaves_its_page() -> None:
    parts = [sentences(n) for n in (3, 12, 1)]
    text = "\n\n".join(parts)
    pages, position = [], 0
    for number, part in enumerate(parts, 1):
        pages.append(PageSpan(number, position, position + len(part)))
        position += len(part) + 2
    chunks = chunk_document(ParsedDocument(text, "application/pdf", pages=tuple(pages)), word_spans, 40, 8)
    check(text, chunks, 40)
    for chunk in chunks:
        page = pages[(chunk.page or 0) - 1]
        assert page.start <= chunk.start < chunk.end <= page.end
    assert {chunk.page for chunk in chunks} == {1, 2, 3}


def test_any_mixture_of_characters_is_covered_exactly() -> None:
    chance = random.Random(7)
    pieces = ["word", " ", "\n", "\n\n", ". ", "漢字。", "🙂", "a" * 100, "\t", "# x\n", "-", "e\u0301", "\u00a0"]
    for _ in range(200):
        text = "".join(chance.choice(pieces) for _ in range(chance.randint(0, 300)))
        chunks_of(text, limit=chance.choice([16, 20, 50]), overlap=chance.choice([0, 3, 8]))


@pytest.mark.parametrize("line", ["word " * 500_000, "x" * (10 << 20), " " * 1_000_000, "a\n" * 300_000])
def test_megabytes_without_structure_are_cut_in_linear_time(line: str) -> None:
    """Anything quadratic would take hours here."""
    chunks = chunk_document(ParsedDocument(line, "text/plain"), word_spans, 200, 32)
    assert all(chunk.num_tokens <= 200 for chunk in chunks)
    assert not line.strip() or chunks[-1].end == len(line.rstrip())


def test_a_tokenizer_that_counts_more_in_a_passage_alone_is_obeyed() -> None:
    """As some do: a word cut at the passage's border becomes more tokens."""

    def costly(text: str) -> list[tuple[int, int]]:
        spans = word_spans(text)
        return spans[:1] * 3 + spans

    chunks = chunk_document(ParsedDocument(sentences(50), "text/plain"), costly, 40, 8)
    assert chunks and all(chunk.num_tokens == len(costly(chunk.text)) <= 40 for chunk in chunks)


def test_an_overlap_over_half_of_a_passage_is_refused() -> None:
    with pytest.raises(ValueError, match="between 0 and 20"):
        chunk_document(ParsedDocument("x", "text/plain"), word_spans, 40, 21)


def test_headings_of_several_formats_are_known() -> None:
    markdown = "# A #\ntext\n```\n# no heading\n```\nB\n---\n| # no |\n"
    assert [(h.level, h.text) for h in find_headings(markdown, "text/markdown").headings] == [(1, "A"), (1, "B")]
    assert [h.text for h in find_headings("Title\n=====\n\nPart\n----\n", "text/x-rst").headings] == ["Title", "Part"]
    assert [(h.level, h.text) for h in find_headings("* One\n** Two\n", "text/x-org").headings] == [
        (1, "One"),
        (2, "Two"),
    ]
    assert find_headings("# a remark\n", "application/yaml").headings == []
