from __future__ import annotations

import pytest

from rag.refusal import DEFAULT_THRESHOLD, judge_evidence, no_evidence_answer, score_evidence, shared_words
from rag.types import Passage, StoredChunk


def passage(cosine: float | None, text: str = "Parental leave lasts twelve weeks.", language: str = "en") -> Passage:
    chunk = StoredChunk("c", "col", "doc", "ver", "d.md", text, 0, len(text), 0, language=language)
    return Passage(chunk, 1.0, {} if cosine is None else {"dense": cosine})


def test_a_near_passage_is_evidence_and_a_far_one_is_not() -> None:
    assert judge_evidence("Who mows the lawn?", [passage(0.7), passage(0.88)]).is_found
    assert not judge_evidence("Who mows the lawn?", [passage(0.78)]).is_found


def test_no_passages_are_no_evidence() -> None:
    assert not judge_evidence("Who?", []).is_found


def test_common_words_make_up_for_a_little_distance() -> None:
    cosine = DEFAULT_THRESHOLD - 0.03
    assert judge_evidence("How long does parental leave last?", [passage(cosine)]).is_found
    assert not judge_evidence("How high is the tower in Pisa?", [passage(cosine)]).is_found


def test_common_words_alone_are_not_enough() -> None:
    assert not judge_evidence("How long does parental leave last?", [passage(0.75)]).is_found


def test_a_question_in_another_language_gets_an_allowance() -> None:
    cosine = DEFAULT_THRESHOLD - 0.05
    assert judge_evidence("Wie lange dauert die Elternzeit?", [passage(cosine)]).is_found
    assert not judge_evidence("Wie lange dauert die Elternzeit?", [passage(cosine, language="de")]).is_found


def test_a_tuned_collection_has_its_own_threshold() -> None:
    found = [passage(0.8)]
    assert not judge_evidence("Who mows the lawn?", found).is_found
    assert judge_evidence("Who mows the lawn?", found, own_thresholds={"col": 0.78}).is_found
    assert not judge_evidence("Who mows the lawn?", [passage(0.9)], own_thresholds={"col": 0.95}).is_found
    assert judge_evidence("Who mows the lawn?", [passage(0.9)], own_thresholds={"another": 0.95}).is_found


def test_the_score_is_the_highest_threshold_that_still_finds() -> None:
    found, question = [passage(0.8), passage(0.77)], "How long does parental leave last?"
    score = score_evidence(question, found)
    assert judge_evidence(question, found, score).is_found
    assert not judge_evidence(question, found, score + 1e-6).is_found


def test_the_threshold_can_be_chosen() -> None:
    assert judge_evidence("Who mows the lawn?", [passage(0.3)], threshold=0.2).is_found
    assert not judge_evidence("Who mows the lawn?", [passage(0.95)], threshold=1.0).is_found


def test_a_passage_without_a_cosine_is_no_evidence() -> None:
    assert not judge_evidence("parental leave", [passage(None)]).is_found


def test_shared_words_see_through_inflection() -> None:
    assert shared_words("lasting weeks", passage(0.8)) == 1.0
    assert shared_words("???", passage(0.8)) == 0.0


@pytest.mark.parametrize(
    ("question", "beginning"),
    [
        ("Who mows the lawn?", "I could not find"),
        ("Wer mäht den Rasen?", "In den gewählten Dokumenten"),
        ("Qui tond la pelouse dans notre jardin ?", "Je n'ai pas trouvé"),
        ("Chi taglia l'erba del giardino?", "Non ho trovato"),
        ("¿Quién corta el césped?", "No he encontrado"),
        ("芝生", "I could not find"),
    ],
)
def test_the_refusal_speaks_the_language_of_the_question(question: str, beginning: str) -> None:
    assert no_evidence_answer(question).startswith(beginning)
