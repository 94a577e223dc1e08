from __future__ import annotations

from rag.citations import cite
from rag.contradiction import find_contradictions, with_contradictions
from tests.rag.test_citations import passage

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
