"""A span of parsed text is found among drawn characters, however the two were written down."""

import pytest

from rag.span_matching import find_on_page


def shown(page_text: str, span: str, drawn: str, *, nth: int = 0) -> list[str]:
    start = -1
    for _ in range(nth + 1):
        start = page_text.index(span, start + 1)
    return [drawn[first:last] for first, last in find_on_page(page_text, start, start + len(span), drawn)]


@pytest.mark.parametrize(
    ("span", "drawn", "found"),
    [
        ("the quick brown fox", "A:the  quick\r\nbrown fox!", "the  quick\r\nbrown fox"),
        (
            "an example of hyphenation",
            "an exam-\r\nple of hyphen\ufffe\r\nation",
            "an exam-\r\nple of hyphen\ufffe\r\nation",
        ),
        ("the efficient office", "the eﬃcient oﬃce", "the eﬃcient oﬃce"),
        ("Größe und Café", "GRO\u0308SSE UND CAFE\u0301", "GRO\u0308SSE UND CAFE"),
        ("| Rent | 1,200 |", "Rent 1,200", "Rent 1,200"),
    ],
)
def test_spaces_hyphens_ligatures_case_and_accents_do_not_matter(span: str, drawn: str, found: str) -> None:
    assert shown(f"Before. {span} After.", span, f"Before. {drawn} After.") == [found]


def test_of_equal_places_the_one_of_the_same_rank_is_found() -> None:
    text = "Total 5. Rent 3. Total 5. Food 2. Total 5."
    drawn = text.replace(" ", "\r\n")
    for nth, start in enumerate(index for index in range(len(text)) if text.startswith("Total 5", index)):
        (place,) = find_on_page(text, start, start + 7, drawn)
        assert drawn[: place[0]].count("Total") == nth


def test_where_the_page_repeats_what_the_text_does_not_the_nearest_place_is_found() -> None:
    text = "x " * 100 + "Chapter one. " + "y " * 100
    drawn = "Chapter one. " + text
    start = text.index("Chapter one")
    assert find_on_page(text, start, start + 11, drawn) == [(start + 13, start + 24)]


def test_another_order_is_matched_by_runs_of_words() -> None:
    span = "alpha beta gamma delta epsilon zeta eta theta"
    drawn = "epsilon zeta eta theta | something else | alpha beta gamma delta"
    assert shown(span, span, drawn) == ["epsilon zeta eta theta", "alpha beta gamma delta"]
    assert shown(span, span, "alpha beta gamma delta epsilon || zeta, eta theta")[0].startswith("alpha beta")


@pytest.mark.parametrize("drawn", ["", "   ", "nothing of this kind is here", "—…•"])
def test_what_the_page_does_not_show_is_not_marked(drawn: str) -> None:
    assert shown("The rent is due on Monday.", "rent is due", drawn) == []


def test_a_span_without_letters_or_outside_the_page_is_not_marked() -> None:
    assert find_on_page("a — b", 2, 3, "a — b") == []
    assert find_on_page("abc", 5, 9, "abc") == []
    assert find_on_page("abc", -4, 2, "abc") == [(0, 2)]
