"""The parts of `make bench-answers` that need no model: what is measured in pieces, and how pieces are put together."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from rag.judged_set import JudgedQuery, JudgedSet
from services.answer_command import AnswerOptions
from services.answer_evaluation import AnsweredQuestion, AnswerMeasurement
from tests.bench import answers

RIGHT = AnsweredQuestion("?", "Yes. No.", "found", True, 1.0, True, 2, 0, 1, 1, 1, True, True, 0.5)
WRONG = replace(RIGHT, holds_answer=False, num_claims=4, num_unsupported=3, first_holds_answer=False)
UNCITED = replace(RIGHT, num_claims=0, num_citations=0, num_exact_spans=0, first_holds_answer=None)
REFUSED = replace(UNCITED, evidence="none", holds_answer=False)


def measured(*answered: AnsweredQuestion, far: tuple[bool, ...] = (), model: str = "tiny") -> AnswerMeasurement:
    return AnswerMeasurement(model, "e5", 80, answered, (False,) * len(answered), far)


def test_pieces_of_several_languages_are_put_together_answer_by_answer() -> None:
    wanted = [
        answers.Piece("en", 0, 2),
        answers.Piece("en", 2, 2),
        answers.Piece("fr", 0, 1),
        answers.Piece("de", 0, 1),
    ]
    known = {
        "en 0+2": measured(RIGHT, WRONG, far=(True, False)),
        "en 2+2": measured(REFUSED, UNCITED),
        "fr 0+1": measured(RIGHT),
    }
    stored = json.loads(json.dumps({name: asdict(each) for name, each in known.items()}))
    found = answers.summary(wanted, stored)
    assert (found["num_pieces"], found["num_pieces_left"], list(found["languages"])) == (3, 1, ["en", "fr"])
    english, pooled = found["languages"]["en"], found["pooled"]
    assert (english["num_questions"], english["num_passages"]) == (4, 80)
    assert (pooled["num_questions"], pooled["num_passages"], pooled["refusals"]["num_far"]) == (5, 160, 2)
    shares = pooled["shares"]
    assert (shares["first_span_holds_answer"]["share"], shares["first_span_holds_answer"]["of"]) == (0.6667, 3)
    assert (shares["unsupported_sentences"]["share"], shares["unsupported_sentences"]["of"]) == (0.375, 8)
    assert (shares["right_of_all"]["share"], shares["wrong_refusals"]["share"]) == (0.6, 0.2)
    assert (shares["wrong_answers_far"]["share"], shares["wrong_answers_near"]["of"]) == (0.5, 5)
    assert shares["unsupported_sentences"]["interval_95"] == [0.0, 0.75], "all answers right, or all like the worst"
    assert found["languages"]["fr"]["shares"]["wrong_answers_far"] is None
    assert pooled["all_spans_exist"]


def test_a_span_that_does_not_exist_is_seen_in_all() -> None:
    lost = replace(RIGHT, num_exact_spans=0)
    assert not answers.figures([("en", measured(RIGHT)), ("fr", measured(lost))])["all_spans_exist"]


def test_answers_of_different_models_are_not_added_up() -> None:
    with pytest.raises(ValueError, match="Different models"):
        answers.figures([("en", measured(RIGHT)), ("fr", measured(RIGHT, model="large"))])


def test_a_run_in_pieces_asks_what_is_missing_and_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[AnswerOptions] = []

    async def measure_answers(options: AnswerOptions, report: object) -> tuple[JudgedSet, AnswerMeasurement]:
        asked.append(options)
        return JudgedSet(options.folder, (), (JudgedQuery("q", "?", {}),), 0), measured(RIGHT)

    monkeypatch.setattr(answers, "measure_answers", measure_answers)
    file = tmp_path / "so-far.json"
    arguments = ["answers", "--languages", "de", "fr", "--limit", "50", "--results", str(file), "--pieces", "2"]
    monkeypatch.setattr(sys, "argv", arguments)
    answers.main()
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["num_pieces_left"] == 2
    answers.main()
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (last["num_pieces_left"], last["pooled"]["num_questions"]) == (0, 4)
    names = [(each.folder.name, each.skip, each.only, each.far and each.far.name) for each in asked]
    assert names == [("de", 0, 35, "fr"), ("de", 35, 15, None), ("fr", 0, 35, "en"), ("fr", 35, 15, None)]
    assert {each.limit for each in asked} == {50}
