from __future__ import annotations

import pytest

from rag.sentences import split_sentences


def pieces(text: str) -> list[str]:
    return [text[span.start : span.end] for span in split_sentences(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ("Dr. Weber, e.g. on page 3, agrees. Yes.", ["Dr. Weber, e.g. on page 3, agrees.", "Yes."]),
        ("It costs 3.5 euros. Buy two.", ["It costs 3.5 euros.", "Buy two."]),
        ("Born in 1999. Then he left.", ["Born in 1999.", "Then he left."]),
        ("See J. Smith. He knows.", ["See J. Smith.", "He knows."]),
        ("Ende. [1] Anfang.", ["Ende. [1]", "Anfang."]),
        ("Title\n\nBody text.", ["Title", "Body text."]),
        ("Items:\n- one\n- two", ["Items:", "- one", "- two"]),
        ("A line\nthat goes on. Next.", ["A line\nthat goes on.", "Next."]),
        ("", []),
        ("   \n ", []),
    ],
)
def test_splits_where_sentences_end(text: str, expected: list[str]) -> None:
    assert pieces(text) == expected


def test_code_stays_whole() -> None:
    code = "```python\na = 1. \nb. \n\nc\n```"
    assert pieces(f"See.\n\n{code}") == ["See.", code]


def test_nothing_but_blanks_is_lost() -> None:
    text = "Hm… well?! (Really.) 3. Okt. 2024 – «Ja.» Then\n\n| a | b |\n1) x"
    assert "".join("".join(pieces(text)).split()) == "".join(text.split())
