"""Which sentence of the found passages is quoted where no passage confirms an answer."""

from __future__ import annotations

import pytest

from rag.quoting import choose_quote, introduce, list_quotes
from rag.types import Passage, StoredChunk

QUESTION = "Who is responsible for getting reviews for a pull request?"
SAYS = "It is your responsibility to make sure that you get reviews for your pull requests and merge them."


def passages(*texts: str) -> list[Passage]:
    chunks = [StoredChunk(f"c{n}", "col", "doc", "v", "d.md", text, 0, len(text), n) for n, text in enumerate(texts)]
    return [Passage(chunk, 1.0) for chunk in chunks]


def quoted(*texts: str) -> str:
    quote = choose_quote(list_quotes(QUESTION, passages(*texts)))
    return quote.text if quote else ""


def test_the_sentence_with_most_words_of_the_question_is_quoted_letter_by_letter() -> None:
    given = passages("Trains are booked in second class on all days.", f"Be kind to all of them. {SAYS}")
    quote = choose_quote(list_quotes(QUESTION, given))
    assert quote is not None
    assert (quote.number, quote.text) == (2, SAYS)
    assert given[1].chunk.text[quote.span.start : quote.span.end] == SAYS
    assert introduce(QUESTION, quote) == f"The documents say: \u201c{SAYS}\u201d [2]"


@pytest.mark.parametrize(
    "markup",
    [
        "# Responsible for getting reviews for a pull request",
        "title: responsible for getting reviews for a pull request",
        "[reviews]: https://example.org/who-is-responsible-for-getting-reviews-for-a-pull-request",
        "See https://example.org/who/is/responsible/for/getting/reviews/for/a/pull/request/of/changes today please.",
        "| responsible | getting | reviews | pull | request |",
    ],
)
def test_headings_tables_and_lists_of_links_are_not_quoted(markup: str) -> None:
    assert quoted(f"{markup}\n\n{SAYS}") == SAYS
    assert quoted(markup) == ""
