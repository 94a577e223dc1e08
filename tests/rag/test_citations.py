from __future__ import annotations

import numpy as np
import pytest

from rag.citations import answer_sentences, cite, take_out_marks
from rag.types import Passage, StoredChunk

LEAVE = (
    "Employees get 25 days of holiday a year. Parental leave lasts twelve weeks and is fully paid. "
    "Ask your manager, Dr. Weber, before you book."
)
TRAVEL = "Trains are booked in second class. A hotel may cost up to 120 euros a night in Berlin."


def passage(text: str, *, offset: int = 0, number: int = 1, headings: tuple[str, ...] = ()) -> Passage:
    chunk = StoredChunk(
        chunk_id=f"c{number}",
        collection_id="col_1",
        document_id=f"doc{number}",
        version_id=f"ver{number}",
        document_name=f"handbook{number}.md",
        text=text,
        start=offset,
        end=offset + len(text),
        index=0,
        page=number,
        headings=headings,
        language="en",
    )
    return Passage(chunk, 0.5, {"dense": 0.86})


PASSAGES = [passage(LEAVE, offset=1000), passage(TRAVEL, offset=7, number=2)]


def test_a_missing_mark_is_attached_to_the_passage_that_says_it() -> None:
    cited = cite("Parental leave lasts twelve weeks.", PASSAGES)
    assert cited.text == "Parental leave lasts twelve weeks [1]."
    (only,) = cited.citations
    assert only.citation.number == 1
    assert only.answer_spans == ((0, len(cited.text)),)


def test_the_quote_stands_letter_by_letter_in_the_document() -> None:
    document = "x" * 1000 + LEAVE
    cited = cite("Parental leave lasts twelve weeks.", PASSAGES, collection_names={"col_1": "Handbook"})
    citation = cited.citations[0].citation
    assert citation.quote == "Parental leave lasts twelve weeks and is fully paid."
    assert document[citation.start : citation.end] == citation.quote
    assert (citation.collection, citation.page, citation.document_name) == ("Handbook", 1, "handbook1.md")


def test_a_mark_to_a_passage_that_does_not_exist_is_dropped() -> None:
    cited = cite("The moon is made of cheese [7].", PASSAGES)
    assert cited.text == "The moon is made of cheese."
    assert cited.citations == ()
    assert cited.num_dropped_marks == 1


def test_a_wrong_mark_is_moved_to_the_passage_that_says_it() -> None:
    cited = cite("Parental leave lasts twelve weeks [2].", PASSAGES)
    assert cited.text == "Parental leave lasts twelve weeks [1]."


def test_a_mark_of_the_model_that_holds_stays() -> None:
    cited = cite("You may spend 120 euros for a hotel [2]. Holiday is 25 days [1].", PASSAGES)
    assert cited.text == "You may spend 120 euros for a hotel [2]. Holiday is 25 days [1]."
    assert [each.citation.number for each in cited.citations] == [1, 2]


@pytest.mark.parametrize("mark", ["[0]", "[3]", "[99]", "【3】", "[3, 4]"])
def test_no_mark_of_an_unknown_passage_survives(mark: str) -> None:
    cited = cite(f"Something else entirely happens here {mark}.", PASSAGES)
    assert cited.citations == ()
    assert "[" not in cited.text and "【" not in cited.text


def test_a_wrong_number_is_not_cited() -> None:
    assert cite("Parental leave lasts 14 weeks.", PASSAGES).citations == ()
    assert cite("Employees get 30 days of holiday a year [1].", PASSAGES).citations == ()


def test_the_same_number_in_another_spelling_is_cited() -> None:
    cited = cite("The budget is 1,200 euros.", [passage("The budget is 1200 euros for everyone.")])
    assert len(cited.citations) == 1


def test_an_unknown_name_is_not_cited() -> None:
    assert cite("Ask your manager, Dr. Smith, before you book.", PASSAGES).citations == ()
    assert len(cite("Ask your manager, Dr. Weber, before you book.", PASSAGES).citations) == 1


def test_sentences_without_support_stay_uncited_among_supported_ones() -> None:
    cited = cite("I am glad to help. Trains are booked in second class. Elephants like mangos.", PASSAGES)
    assert cited.text == "I am glad to help. Trains are booked in second class [2]. Elephants like mangos."
    assert len(cited.unsupported) == 2


def test_a_short_answer_is_judged_with_its_question() -> None:
    both = [passage("The trial lasts twelve weeks for cars."), passage(LEAVE, number=2)]
    cited = cite("Twelve weeks.", both, question="How long does parental leave last?")
    assert cited.text == "Twelve weeks [2]."
    assert cited.citations[0].citation.quote.startswith("Parental leave")


def test_several_sentences_from_one_passage_make_one_citation_with_both_places() -> None:
    cited = cite("Employees get 25 days of holiday. Parental leave lasts twelve weeks.", PASSAGES)
    (only,) = cited.citations
    assert len(only.answer_spans) == 2
    for start, end in only.answer_spans:
        assert cited.text[start:end].endswith("[1].")
    assert only.citation.quote in LEAVE


def test_meaning_helps_over_translation_but_not_over_a_wrong_number() -> None:
    answer = "Der Zug nach Berlin kostet laut Dr. Weber 90 Euro."
    passages = [passage("The train to Berlin costs 90 euros. Dr. Weber pays for it."), passage(LEAVE, number=2)]
    cosines = np.array([[0.92, 0.92]], dtype=np.float32)
    assert cite(answer, passages).citations == ()
    assert [each.citation.number for each in cite(answer, passages, cosines=cosines).citations] == [1]
    assert cite(answer, passages, cosines=cosines - 0.05).citations == ()
    assert cite(answer.replace("90", "95"), passages, cosines=cosines).citations == ()


PULLS = "Pull requests (PRs) let you tell others about changes that you pushed to a branch in a repository on GitHub."
PRAISE = "Pull requests (PRs) are a powerful tool for transparency and collaboration"


@pytest.mark.parametrize("mark", ["", " [1]"])
def test_praise_of_what_a_passage_is_about_is_not_cited_however_near_it_is(mark: str) -> None:
    cited = cite(f"{PRAISE}{mark}.", [passage(PULLS)], cosines=np.array([[0.99]], dtype=np.float32))
    assert cited.text == f"{PRAISE}."
    assert cited.citations == ()
    assert len(cited.unsupported) == 1


def test_a_mark_of_the_model_may_rest_on_words_from_all_over_the_passage() -> None:
    filler = "Something else is told here. "
    scattered = "Trains are fast. " + filler * 3 + "Hotels are booked. " + filler * 3 + "The second class is full."
    cited = cite("Trains are booked in second class [1].", [passage(scattered)])
    assert [each.citation.number for each in cited.citations] == [1]
    assert cite("Trains are a comfortable way to travel [1].", [passage(scattered)]).citations == ()


def test_marks_may_stand_after_the_full_stop() -> None:
    cited = cite("Trains are booked in second class. [2] Parental leave lasts twelve weeks. [1]", PASSAGES)
    assert cited.text == "Trains are booked in second class [2]. Parental leave lasts twelve weeks [1]."


def test_brackets_in_code_and_links_are_no_marks() -> None:
    text = "Use `items[1]` and\n```\nx[2] = y[3]\n```\nor [1](https://example.org)."
    plain, marks = take_out_marks(text)
    assert plain == text
    assert marks == []


def test_headings_count_as_part_of_the_passage() -> None:
    under = passage("It lasts twelve weeks.", headings=("Parental leave",))
    assert len(cite("Parental leave lasts twelve weeks.", [under]).citations) == 1


def test_list_items_are_cited_each() -> None:
    cited = cite("- Trains are booked in second class\n- Parental leave lasts twelve weeks\n", PASSAGES)
    assert cited.text == "- Trains are booked in second class [2]\n- Parental leave lasts twelve weeks [1]\n"


@pytest.mark.parametrize("answer", ["", "   ", "[1]", "[1][2][3]", "!!!", "…", "\n\n[9]\n", "[1] [1] [1] x"])
def test_odd_answers_are_no_error(answer: str) -> None:
    cited = cite(answer, PASSAGES)
    assert all(each.citation.number in (1, 2) for each in cited.citations)


def test_without_passages_there_are_no_citations() -> None:
    assert cite("Parental leave lasts twelve weeks [1].", []).text == "Parental leave lasts twelve weeks."


def test_every_span_and_quote_is_exact_whatever_the_answer() -> None:
    answer = "Yes! Holiday: 25 days a year [2][1]. See: hotel up to 120 euros in Berlin [1]; ok?\n\n1. twelve weeks [5]"
    cited = cite(answer, PASSAGES, question="What about leave?")
    for each in cited.citations:
        found = PASSAGES[each.citation.number - 1].chunk
        assert found.text[each.citation.start - found.start : each.citation.end - found.start] == each.citation.quote
        for start, end in each.answer_spans:
            assert f"[{each.citation.number}]" in cited.text[start:end]


def test_answer_sentences_fit_the_rows_of_cosines() -> None:
    assert answer_sentences("One thing [1]. Another one! [2]") == ["One thing.", "Another one!"]


def test_words_scattered_over_a_passage_are_no_support() -> None:
    filler = "Something else is told here. "
    scattered = "Trains are fast. " + filler * 3 + "Hotels are booked. " + filler * 3 + "The second class is full."
    assert cite("Trains are booked in second class.", [passage(scattered)]).citations == ()


def test_a_mark_that_has_a_line_for_itself_takes_the_line_along() -> None:
    assert cite("Cows fly.\n[1]\n[7]\nHigh.", PASSAGES).text == "Cows fly.\nHigh."


@pytest.mark.parametrize(
    "text", ["## Parental leave\n", "**Parental leave lasts twelve weeks**\n", "Does parental leave last twelve weeks?"]
)
def test_headings_and_questions_state_nothing_and_get_no_mark(text: str) -> None:
    assert cite(text, PASSAGES).text == text
