from __future__ import annotations

import json
from pathlib import Path

import pytest

from rag.answer_metrics import exact_match, holds_answer, read_references, token_f1
from rag.errors import EvaluationError


def test_case_punctuation_and_articles_do_not_count() -> None:
    assert exact_match("The Eiffel Tower.", ["eiffel tower"])
    assert exact_match("l'ottobre 1973", ["Ottobre 1973"])
    assert not exact_match("The Eiffel Tower in Paris", ["Eiffel Tower"])


def test_f1_is_that_of_squad() -> None:
    assert token_f1("in October 1973", ["October 1973"]) == pytest.approx(0.8)
    assert token_f1("October", ["May", "October 1973"]) == pytest.approx(2 / 3), "the best reference counts"
    assert token_f1("June", ["October 1973"]) == token_f1("", ["June"]) == token_f1("June", []) == 0.0


def test_an_answer_holds_a_reference_word_for_word() -> None:
    assert holds_answer("It gave up just 308 points.", ["308"])
    assert not holds_answer("It gave up just 1308 points.", ["308"])
    assert holds_answer("There were 100 000 of them", ["100,000"])
    assert not holds_answer("Anything", ["", "..."])


def write(folder: Path, *lines: str) -> Path:
    (folder / "answers.jsonl").write_text("\n".join(lines), "utf-8")
    return folder


def test_references_of_the_known_questions_are_read(tmp_path: Path) -> None:
    folder = write(tmp_path, json.dumps({"_id": "q1", "answers": ["a", " "]}), "", '{"_id": "q2", "answers": ["b"]}')
    assert read_references(folder, {"q1"}) == {"q1": ["a"]}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{"], "line 1 is no object"),
        (['{"_id": "q1"}'], "line 1 is no object"),
        (['{"_id": "q1", "answers": "a"}'], "line 1: `answers` is no list"),
        (['{"_id": "q9", "answers": ["a"]}'], "answers none of the questions"),
    ],
)
def test_unsound_references_name_their_place(tmp_path: Path, lines: list[str], message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        read_references(write(tmp_path, *lines), {"q1"})


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"answers\.jsonl cannot be read"):
        read_references(tmp_path, {"q1"})
