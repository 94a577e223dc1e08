from __future__ import annotations

import pytest

from services.rewrite import refers_back, search_queries


def said(*texts: str) -> list[dict[str, str]]:
    return [{"role": "user" if index % 2 == 0 else "assistant", "content": text} for index, text in enumerate(texts)]


def test_a_first_question_is_searched_as_it_stands() -> None:
    assert search_queries(said("How long is parental leave?")) == ["How long is parental leave?"]


def test_a_follow_up_with_a_pronoun_is_searched_together_with_the_question_before() -> None:
    queries = search_queries(said("How long is parental leave?", "Twelve weeks.", "Is it paid?"))
    assert queries == ["How long is parental leave?\nIs it paid?", "Is it paid?"]


@pytest.mark.parametrize(
    ("before", "follow_up", "searched"),
    [
        ("How long is parental leave?", "And for fathers?", "How long is parental leave for fathers?"),
        ("How long is parental leave in Germany?", "and in Italy?", "How long is parental leave in Italy?"),
        ("Who plays in Berlin for Hertha?", "And for Union?", "Who plays in Berlin for Union?"),
        ("How long is leave in the United States for staff?", "In Spain?", "How long is leave in Spain for staff?"),
        ("What does a hotel cost in Italy?", "What about France?", "What does a hotel cost in France?"),
        ("How many days do trainees get?", "And employees?", "How many days do trainees get employees?"),
        ("Wie lang ist die Elternzeit in Deutschland?", "Und in Italien?", "Wie lang ist die Elternzeit in Italien?"),
        ("Was darf ein Hotel in Spanien kosten?", "und in Frankreich", "Was darf ein Hotel in Frankreich kosten?"),
        ("Combien coûte un hôtel en Espagne ?", "Et en Belgique ?", "Combien coûte un hôtel en Belgique ?"),
        ("Quanto costa un albergo in Francia?", "E l'Austria?", "Quanto costa un albergo in Austria?"),
        ("¿Cuánto dura el permiso en Francia?", "¿Y en Italia?", "¿Cuánto dura el permiso en Italia?"),
    ],
)  # fmt: skip
def test_what_a_follow_up_names_takes_its_place_in_the_question_before(
    before: str, follow_up: str, searched: str
) -> None:
    assert search_queries(said(before, "Somehow.", follow_up)) == [searched, follow_up]


def test_a_follow_up_to_a_follow_up_goes_back_to_the_whole_question() -> None:
    talk = said("How long is leave in Germany?", "12 weeks.", "And in Italy?", "10 weeks.", "And in Spain?")
    assert search_queries(talk)[0] == "How long is leave in Spain?"


@pytest.mark.parametrize("follow_up", ["And?", "Why?", "?", "and the?", "¿Y?", "Und?", "a" * 5000, "And " * 2000])
def test_odd_follow_ups_are_searched_somehow(follow_up: str) -> None:
    assert all(query.strip() for query in search_queries(said("How long is leave in Germany?", "12 weeks.", follow_up)))


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
