"""Documents that contradict what an answer cites are cited too: how often that is right, on labelled pairs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from rag.citations import cite
from rag.contradiction import contradicting_quote, find_contradictions, with_contradictions
from rag.support import ReadPassage, ReadSentence
from tests.rag.test_citations import passage
from tests.support_pairs import as_passage, read_made, read_written

PAIRS = Path(__file__).parents[1] / "data" / "contradictions"

OLD = "Parental leave lasts ten weeks and is fully paid."
NEW = "Parental leave lasts twelve weeks and is fully paid."
TRAVEL = "Trains are booked in second class."


def test_a_document_that_says_another_number_is_cited_too() -> None:
    passages = [passage(NEW), passage(TRAVEL, number=2), passage(OLD, number=3, offset=50)]
    cited = cite("Parental leave lasts twelve weeks and is fully paid.", passages)
    both = with_contradictions(cited, "How long is parental leave?", passages, {"col_1": "Handbook"})
    assert [each.citation.number for each in both.citations] == [1, 3]
    assert both.text.endswith(f"Another document says otherwise: “{OLD}” [3]")
    added = both.citations[1]
    assert (added.citation.quote, added.citation.start, added.citation.collection) == (OLD, 50, "Handbook")
    ((start, end),) = added.answer_spans
    assert both.text[start:end].startswith("Another document") and both.text[start:end].endswith("[3]")


def test_a_denial_contradicts_and_speaks_the_language_of_the_question() -> None:
    passages = [passage("Hunde sind im Büro erlaubt."), passage("Hunde sind im Büro nicht erlaubt.", number=2)]
    cited = cite("Hunde sind im Büro erlaubt.", passages)
    both = with_contradictions(cited, "Sind Hunde im Büro erlaubt?", passages, {})
    assert "Ein anderes Dokument sagt etwas anderes: “Hunde sind im Büro nicht erlaubt.” [2]" in both.text


def test_documents_that_agree_or_speak_of_something_else_are_left_alone() -> None:
    agrees = passage(NEW, number=2)
    other = passage("Military leave lasts ten weeks in this country and is paid by the state.", number=3)
    passages = [passage(NEW), agrees, other, passage(TRAVEL, number=4)]
    cited = cite("Parental leave lasts twelve weeks and is fully paid.", passages)
    assert find_contradictions(cited, passages) == []
    assert with_contradictions(cited, "How long?", passages, {}) == cited


def test_a_passage_that_cannot_be_used_is_not_quoted() -> None:
    passages = [passage(NEW), passage(OLD, number=2)]
    cited = cite("Parental leave lasts twelve weeks and is fully paid.", passages)
    assert find_contradictions(cited, passages, unusable={2}) == []


def is_contradicted(cited: str, other: str, language: str = "en") -> bool:
    written = passage(other)
    written = replace(written, chunk=replace(written.chunk, language=language))
    return contradicting_quote(ReadSentence(cited), ReadPassage(written)) is not None


@pytest.mark.parametrize(("name", "least_recall"), [("pairs", 1.0), ("held-out", 0.86)])
def test_contradicting_sentences_are_found_without_a_false_alarm(name: str, least_recall: float) -> None:
    pairs = [line.split("\t") for line in (PAIRS / f"{name}.tsv").read_text("utf-8").splitlines()[1:]]
    assert len(pairs) >= 40 and {language for language, *_ in pairs} == {"en", "de", "fr", "it", "es"}
    found = [(label, (cited, other), is_contradicted(cited, other, of)) for of, _, label, cited, other in pairs]
    assert [pair for label, pair, is_found in found if is_found and label == "0"] == []
    contradicting = [is_found for label, _, is_found in found if label == "1"]
    assert sum(contradicting) / len(contradicting) >= least_recall


def test_no_passage_contradicts_what_it_says_or_does_not_speak_of() -> None:
    pairs = [*read_written("written.tsv"), *read_written("held-out.tsv"), *read_made()]
    quiet = [
        (pair, text)
        for pair, text in pairs
        if (pair.supported and pair.kind != "translated") or pair.kind in ("off-topic", "generic", "added")
    ]
    assert len(quiet) > 200
    judged = [(ReadSentence(pair.sentence), ReadPassage(as_passage(pair, text)), pair) for pair, text in quiet]
    assert [pair for sentence, written, pair in judged if contradicting_quote(sentence, written)] == []


def test_a_passage_that_also_says_it_does_not_contradict() -> None:
    both = "Dogs are allowed in the office. Until last year it was said that dogs are forbidden in the office."
    assert not is_contradicted("Dogs are allowed in the office.", both)
    only = "The kitchen is new. Dogs are forbidden in the office."
    assert is_contradicted("Dogs are allowed in the office.", only)
    quote = contradicting_quote(ReadSentence("Dogs are allowed in the office."), ReadPassage(passage(only)))
    assert quote is not None and only[quote.start : quote.end] == "Dogs are forbidden in the office."


def test_another_name_in_the_place_of_the_only_one_is_cited_too() -> None:
    weber, haddad = (f"The head of the sales department is {name}." for name in ("Anna Weber", "Omar Haddad"))
    passages = [passage(weber), passage(haddad, number=2)]
    both = with_contradictions(cite(weber, passages), "Who is the head of sales?", passages, {})
    assert both.text.endswith(f"Another document says otherwise: “{haddad}” [2]")
