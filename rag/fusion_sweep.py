"""Which fusion suits a collection: every method and weight, tried on the hits of its own questions.

The hits of each question are searched once; joining them in another way is arithmetic. Another setting than the present
one is taken only where a paired test says that it is better, because a few questions favour something by chance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from rag.fusion import METHODS, FusionMethod
from rag.ranking import RetrievalSettings, rank
from rag.ranking_metrics import Judgements, ndcg, rank_documents
from rag.significance import compare_paired
from rag.vector_store import ScoredChunk

WEIGHTS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
DEPTH = 10
SURE = 0.05
LEAST_QUESTIONS = 20

Setting = tuple[FusionMethod, float]
"""Method and weight of the meaning leg."""
SETTINGS: tuple[Setting, ...] = tuple((method, weight) for method in METHODS for weight in WEIGHTS)


@dataclass(frozen=True, slots=True)
class JudgedHits:
    """What both legs found for one question, and which documents are right."""

    hits: Sequence[ScoredChunk]
    judgements: Judgements


@dataclass(frozen=True, slots=True)
class ChosenFusion:
    """`ndcg` of the chosen setting and of the present one; `p_value` of their difference where they differ."""

    setting: Setting
    ndcg: float
    ndcg_before: float
    p_value: float | None


def sweep(
    questions: Sequence[JudgedHits], retrieval: RetrievalSettings, settings: Sequence[Setting] = SETTINGS
) -> dict[Setting, list[float]]:
    """nDCG@10 of each question for each setting."""
    return {setting: [_ndcg(each, setting, retrieval) for each in questions] for setting in settings}


def leg_scores(questions: Sequence[JudgedHits], settings: RetrievalSettings) -> dict[str, list[float]]:
    """nDCG@10 of each question for each leg alone."""
    scores: dict[str, list[float]] = {"dense": [], "sparse": []}
    for each in questions:
        dense = [replace(hit, sparse=0.0) for hit in each.hits if hit.dense is not None]
        sparse = [replace(hit, dense=None) for hit in each.hits if hit.sparse > 0]
        for leg, hits in (("dense", dense), ("sparse", sparse)):
            scores[leg].append(_ndcg(JudgedHits(hits, each.judgements), ("minmax", 0.5), settings))
    return scores


def choose_fusion(scores: Mapping[Setting, Sequence[float]], present: Setting) -> ChosenFusion:
    """The best setting of a sweep, or the present one where the best is not surely better. `scores` holds the present
    one too. Raises `ValueError` for too few questions."""
    before = scores[present]
    if len(before) < LEAST_QUESTIONS:
        raise ValueError(
            f"{len(before)} questions are too few to choose a fusion; at least {LEAST_QUESTIONS} are needed."
        )
    best = max(scores, key=lambda setting: (fmean(scores[setting]), setting == present))
    if best == present:
        return ChosenFusion(present, fmean(before), fmean(before), None)
    p_value = compare_paired(scores[best], before).p_value
    chosen = best if p_value <= SURE else present
    return ChosenFusion(chosen, fmean(scores[chosen]), fmean(before), p_value)


def best_of_others(scores: Mapping[str, Mapping[Setting, Sequence[float]]], left_out: str) -> Setting:
    """The setting with the best mean over all sets but one: each set counts alike."""
    others = [each for name, each in scores.items() if name != left_out]
    return max(SETTINGS, key=lambda setting: fmean(fmean(each[setting]) for each in others))


def _ndcg(question: JudgedHits, setting: Setting, settings: RetrievalSettings) -> float:
    method, weight = setting
    wanted = replace(settings, top_k=max(settings.candidates, DEPTH), fusion=method, dense_weight=weight)
    return ndcg(rank_documents(rank(question.hits, wanted)), question.judgements, DEPTH)
