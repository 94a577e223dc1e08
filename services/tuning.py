"""Fits a collection to its own questions: the threshold of "the documents do not say", and the fusion of both legs.

Each question is searched once; what follows is arithmetic on the hits. A near negative is an answerable question whose
documents are taken out of its hits, a far one a question that names no document. The threshold is chosen on one half of
the questions and judged on the other, and what it got wrong there is stored with it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from typing import Any, Literal

from rag.evidence_threshold import (
    ErrorRates,
    FittedThreshold,
    ScoredQuestions,
    error_curve,
    fit_threshold,
    is_for_fitting,
)
from rag.fusion_sweep import ChosenFusion, JudgedHits, Setting, choose_fusion, sweep
from rag.ranking import RetrievalSettings, rank
from rag.refusal import score_evidence
from rag.reranking import Reranking
from rag.types import Passage
from rag.vector_store import ScoredChunk

MAX_QUESTIONS = 2000
_DIGITS = 4

Source = Literal["questions", "collection"]
FindHits = Callable[[str], Awaitable[Sequence[ScoredChunk]]]


@dataclass(frozen=True, slots=True)
class TuningQuestion:
    """`documents` are the ids of those that answer it; none: nothing in the collection does."""

    text: str
    documents: frozenset[str]


@dataclass(frozen=True, slots=True)
class _Searched:
    question: TuningQuestion
    hits: Sequence[ScoredChunk]


@dataclass(frozen=True, slots=True)
class Tuned:
    """`fusion` is None where the questions say nothing about it: too few, or made from the passages themselves."""

    threshold: FittedThreshold
    fusion: ChosenFusion | None
    curve: list[tuple[float, ErrorRates]]
    num_questions: int


async def tune(
    questions: Sequence[TuningQuestion],
    find: FindHits,
    settings: RetrievalSettings,
    *,
    source: Source,
    reranking: Reranking | None = None,
    prior: float | None = None,
) -> Tuned:
    """`settings` and the threshold `prior` are what is in force without it. The fusion is chosen by what it finds by
    itself, the threshold by what `reranking` makes of that, as answers see it. Raises `ValueError` where the questions
    are too few."""
    searched = [_Searched(question, await find(question.text)) for question in questions]
    fusion = _choose_fusion(searched, settings) if source == "questions" else None
    if fusion is not None:
        settings = replace(settings, fusion=fusion.setting[0], dense_weight=fusion.setting[1])
    fitting = [each for each in searched if is_for_fitting(each.question.text)]
    judging = [each for each in searched if not is_for_fitting(each.question.text)]
    judged_scores = await score_questions(judging, settings, reranking)
    fitted = fit_threshold(await score_questions(fitting, settings, reranking), judged_scores, prior)
    return Tuned(fitted, fusion, error_curve(judged_scores), len(questions))


async def score_questions(
    searched: Sequence[_Searched], settings: RetrievalSettings, reranking: Reranking | None = None
) -> ScoredQuestions:
    """Evidence scores: of answerable questions as they are and without their documents, of the others as they are."""
    answerable = [each for each in searched if each.question.documents]
    return ScoredQuestions(
        answerable=tuple([await _score(each, settings, reranking) for each in answerable]),
        far=tuple([await _score(each, settings, reranking) for each in searched if not each.question.documents]),
        near=tuple([await _score(_without_its_documents(each), settings, reranking) for each in answerable]),
    )


def tuning_json(
    tuned: Tuned, present: RetrievalSettings, *, source: Source, embedding_model: str, made_at: datetime
) -> dict[str, Any]:
    """What is stored with the collection, and shown."""
    method, weight = tuned.fusion.setting if tuned.fusion else (None, None)
    answer: dict[str, Any] = {
        "made_at": made_at.isoformat(timespec="seconds"),
        "embedding_model": embedding_model,
        "source": source,
        "num_questions": tuned.num_questions,
        "num_judged": tuned.threshold.num_judged,
        "evidence_threshold": round(tuned.threshold.threshold, _DIGITS),
        "errors": _rates_json(tuned.threshold.judged),
        "errors_fitted": _rates_json(tuned.threshold.fitted),
        "curve": [{"threshold": round(value, _DIGITS)} | _rates_json(rates) for value, rates in tuned.curve],
        "fusion": method,
        "dense_weight": weight,
    }
    if tuned.fusion is not None:
        answer |= {
            "ndcg@10": round(tuned.fusion.ndcg, _DIGITS),
            "ndcg@10_before": round(tuned.fusion.ndcg_before, _DIGITS),
            "p_value": None if tuned.fusion.p_value is None else round(tuned.fusion.p_value, _DIGITS),
        }
    return answer


def is_valid(tuning: Mapping[str, Any] | None, embedding_model: str) -> bool:
    """Cosines of another embedding model mean something else."""
    return tuning is not None and tuning["embedding_model"] == embedding_model


def tuned_fusion(tuning: Mapping[str, Any] | None, embedding_model: str) -> Setting | None:
    """The fusion that a collection was tuned to."""
    if tuning is None or not is_valid(tuning, embedding_model) or tuning["fusion"] is None:
        return None
    return tuning["fusion"], float(tuning["dense_weight"])


def _choose_fusion(searched: Sequence[_Searched], settings: RetrievalSettings) -> ChosenFusion | None:
    judged = [
        JudgedHits(each.hits, dict.fromkeys(each.question.documents, 1)) for each in searched if each.question.documents
    ]
    scores = sweep(judged, settings)
    present = (settings.fusion, settings.dense_weight)
    if present not in scores:
        scores |= sweep(judged, settings, settings=(present,))
    return choose_fusion(scores, present)


async def _score(searched: _Searched, settings: RetrievalSettings, reranking: Reranking | None) -> float:
    question = searched.question.text
    return score_evidence(question, await ranked(question, searched.hits, settings, reranking))


async def ranked(
    question: str, hits: Sequence[ScoredChunk], settings: RetrievalSettings, reranking: Reranking | None
) -> list[Passage]:
    """The passages that an answer would see of these hits."""
    if reranking is None:
        return rank(hits, settings)
    passages = rank(hits, replace(settings, top_k=reranking.depth(settings.top_k)))
    return await reranking.best(question, passages, settings.top_k)


def _without_its_documents(searched: _Searched) -> _Searched:
    kept = [hit for hit in searched.hits if hit.chunk.document_id not in searched.question.documents]
    return replace(searched, hits=kept)


def _rates_json(rates: ErrorRates) -> dict[str, float | None]:
    return {name: None if rate is None else round(rate, _DIGITS) for name, rate in asdict(rates).items()}
