"""Answers measured with the real store and chat story, a model that says what it is told and an embedder of words."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator

import pytest
from rich.console import Console

from cluster.engine import GenerationChunk, GenerationRequest, ModelInfo, Usage
from rag.judged_set import JudgedSet
from services.answer_evaluation import AnswerMeasurement, evaluate_answers
from services.answer_view import answers_json, print_answers
from services.config import AppConfig
from tests.services.harness import ScriptedEngine
from tests.services.ingesting import HashEmbedder
from tests.services.test_retrieval_evaluation import judged_set, opener

WINDS = judged_set(
    {
        "mistral": "The mistral is a cold wind of southern France. It blows for 100 days.",
        "sirocco": "The sirocco is a hot wind from the Sahara.",
        "bora": "The bora blows down to the Adriatic coast in winter.",
    },
    {
        "q1": ("The mistral is a cold wind of which country?", {"mistral": 1}),
        "q2": ("The sirocco is a hot wind from where?", {"sirocco": 1}),
        "q3": ("The bora blows down to which coast?", {"bora": 1}),
    },
)
REFERENCES = {"q1": ["southern France", "France"], "q2": ["the Sahara"], "q3": ["Adriatic"]}
SAID = {
    "q1": "The mistral is a cold wind of southern France. The sirocco is a hot wind from the Sahara.",
    "q2": "The sirocco is a hot wind from the Sahara. Camels like it very much.",
    "q3": "Tuesday",
}
CONFIG = AppConfig.model_validate({"platform": {"retrieval": {"evidence_threshold": 0.4}}})


class Reciting(ScriptedEngine):
    """Answers each question of the set as it is told to."""

    def __init__(self, judged: JudgedSet) -> None:
        super().__init__()
        self.info = ModelInfo("reciting", "scripted", max_context=2000, max_concurrency=1)
        self._judged = judged

    async def generate(self, request: GenerationRequest) -> AsyncIterator[GenerationChunk]:
        asked = str((request.messages or [])[-1]["content"])
        query = next(query for query in self._judged.queries if query.text in asked)
        yield GenerationChunk((1,), SAID[query.id])
        yield GenerationChunk(finish_reason="stop", usage=Usage(7, 1))


async def measure(far: tuple[str, ...] = ()) -> AnswerMeasurement:
    return await evaluate_answers(
        WINDS,
        REFERENCES,
        far,
        CONFIG,
        Reciting(WINDS),
        max_tokens=16,
        open_model=opener(HashEmbedder(dimension=512)),
    )


async def test_right_grounded_cited_and_refused_are_counted() -> None:
    measured = await measure(far=("Who painted Guernica and why?",))
    found = answers_json(WINDS, measured)
    one, two, three = measured.answered
    assert (one.holds_answer, one.is_exact, one.cites_relevant, one.first_holds_answer) == (True, False, True, True)
    assert (two.num_claims, two.num_unsupported, two.first_holds_answer) == (2, 1, True)
    assert three.evidence == "quoted", "the model said nothing that is confirmed"
    assert three.holds_answer and not three.is_exact, "the quote holds it"
    assert found["num_questions"] == 3 and found["model"] == "reciting"
    f1 = (one.f1 + two.f1 + three.f1) / 3
    assert found["right"] == {
        "exact_match": 0.0,
        "token_f1": pytest.approx(f1, abs=1e-4),
        "holds_answer": 1.0,
        "right_of_all": 1.0,
    }
    assert two.f1 == pytest.approx(2 * 1 / (12 + 1)), "one word of twelve, without the article and the mark"
    assert found["grounded"] == {
        "answers_with_citation": 1.0,
        "unsupported_sentences": round(2 / 6, 4),
        "num_sentences": 6,
        "only_quoted": round(1 / 3, 4),
    }
    citations = found["citations"]
    assert (one.num_citations, one.num_right_citations) == (2, 1), "that of the other wind answers nothing"
    assert (citations["precision"], citations["recall"], citations["first_span_holds_answer"]) == (0.75, 1.0, 1.0)
    assert citations["num_spans_that_exist"] == citations["num_spans"] == 4
    assert found["refusals"] == {
        "wrong_refusals": 0.0,
        "wrong_answers_near": round(2 / 3, 4),
        "wrong_answers_far": 0.0,
        "num_far": 1,
    }


async def test_people_get_a_table() -> None:
    printed = io.StringIO()
    print_answers(Console(file=printed, width=100), WINDS, await measure())
    assert "first span holds answer" in printed.getvalue() and "nothing to count" in printed.getvalue()
