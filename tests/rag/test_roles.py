"""Who did what to whom: no sentence gives its own words to somebody else, whatever stands in it twice."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from rag.claim_tokens import read_tokens
from rag.language import Language
from rag.roles import are_roles_changed
from rag.sentences import split_sentences
from tests.support_pairs import read_made, read_written

PAIRS = Path(__file__).parents[1] / "data" / "contradictions"


def is_changed(said: str, written: str, language: str) -> bool:
    of = cast(Language, language)
    return are_roles_changed(read_tokens(said, of), read_tokens(written, of))


def labelled_sentences() -> set[tuple[str, str]]:
    """(language, sentence): of all committed pairs, and of the passages that they are held against."""
    found = set()
    for pair, text in [*read_written("written.tsv"), *read_written("held-out.tsv"), *read_made()]:
        written = [text[span.start : span.end] for span in split_sentences(text)]
        found |= {(pair.language, sentence) for sentence in (pair.sentence, *written)}
    for name in ("pairs", "held-out"):
        for line in (PAIRS / f"{name}.tsv").read_text("utf-8").splitlines()[1:]:
            language, _, _, cited, other = line.split("\t")
            found |= {(language, cited), (language, other)}
    return found


def test_no_sentence_changes_the_roles_of_itself() -> None:
    sentences = labelled_sentences()
    assert len(sentences) > 1000
    assert [each for each in sentences if is_changed(each[1], each[1], each[0])] == []


def test_a_word_that_stands_twice_has_no_side_but_others_have() -> None:
    said = "Oil sells when prices fall, and prices sell oil."
    assert not is_changed(said, said, "en")
    assert is_changed("Sergio bought the shares of Marta.", "Marta bought the shares of Sergio.", "en")
