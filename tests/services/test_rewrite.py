from __future__ import annotations

import pytest

from services.rewrite import refers_back, search_queries


def said(*texts: str) -> list[dict[str, str]]:
    return [{"role": "user" if index % 2 == 0 else "assistant", "content": text} for index, text in enumerate(texts)]


def test_a_first_question_is_searched_as_it_stands() -> None:
    assert search_queries(said("How long is parental leave?")) == ["How long is parental leave?"]


def test_a_follow_up_is_searched_together_with_the_question_before() -> None:
    queries = search_queries(said("How long is parental leave?", "Twelve weeks.", "And for fathers?"))
    assert queries == ["How long is parental leave?\nAnd for fathers?", "And for fathers?"]


def test_a_question_that_stands_alone_is_searched_alone_first() -> None:
    second = "Which hotel budget applies to business trips in Berlin?"
    queries = search_queries(said("How long is parental leave?", "Twelve weeks.", second))
    assert queries == [second, f"How long is parental leave?\n{second}"]


@pytest.mark.parametrize(
    "question", ["And for fathers?", "How long is it?", "Why?", "Et pour les pères ?", "Und für Väter?"]
)
def test_what_leans_on_the_turn_before_refers_back(question: str) -> None:
    assert refers_back(question)


def test_content_in_parts_is_read() -> None:
    assert search_queries([{"role": "user", "content": [{"type": "text", "text": "Leave policy"}]}]) == ["Leave policy"]


def test_without_a_question_there_is_nothing_to_search() -> None:
    assert search_queries([{"role": "user", "content": " "}]) == []


@pytest.mark.parametrize("question", ["Parental leave?", "Welche Hotels darf ich buchen?", "Quels hôtels réserver ?"])
def test_what_names_its_own_subject_does_not_refer_back(question: str) -> None:
    assert not refers_back(question)
