"""The threshold below which the documents do not say: fitted on questions that they answer and questions that they do
not, and judged on other questions than it was fitted on.

Scores are those of `rag.refusal.score_evidence`. Two ways to be wrong: a wrong refusal (the answer was there) and a
wrong answer (it was not). Far negatives ask about another topic; near negatives have their passage taken out and its
neighbours left in. Pure functions.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

MOST_WRONG_REFUSALS = 0.10
"""More than this share of answerable questions is never refused in exchange for fewer wrong answers."""
MOST_WRONG_ANSWERS = 0.05
"""What is wanted of far negatives, where that can be had."""
LEAST_QUESTIONS = 20
"""Of each kind that are needed to fit anything."""


@dataclass(frozen=True, slots=True)
class ScoredQuestions:
    """Evidence scores of questions by what is known about them."""

    answerable: tuple[float, ...]
    far: tuple[float, ...]
    near: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class ErrorRates:
    """Shares from 0 to 1; none where there were no such questions."""

    wrong_refusals: float | None
    wrong_answers_far: float | None
    wrong_answers_near: float | None


@dataclass(frozen=True, slots=True)
class FittedThreshold:
    """`fitted` are the error rates on the questions that chose the threshold, `judged` on the others."""

    threshold: float
    fitted: ErrorRates
    judged: ErrorRates
    num_fitted: int
    num_judged: int


def is_for_fitting(question: str) -> bool:
    """One half of all questions, by their text: the same question is always in the same half."""
    return zlib.crc32(question.strip().encode()) % 2 == 0


def error_rates(threshold: float, scores: ScoredQuestions) -> ErrorRates:
    return ErrorRates(
        _share(score < threshold for score in scores.answerable),
        _share(score >= threshold for score in scores.far),
        _share(score >= threshold for score in scores.near),
    )


def fit_threshold(fitting: ScoredQuestions, judging: ScoredQuestions) -> FittedThreshold:
    """The threshold with the fewest errors on `fitting`: wrong refusals against the mean of both kinds of wrong
    answers, the limits above kept first. Raises `ValueError` where there are too few questions of a kind."""
    if len(fitting.answerable) < LEAST_QUESTIONS or len(fitting.far) + len(fitting.near) < LEAST_QUESTIONS:
        raise ValueError(
            f"{len(fitting.answerable)} answerable and {len(fitting.far) + len(fitting.near)} unanswerable questions "
            f"are too few to fit a threshold; at least {LEAST_QUESTIONS} of each are needed in one half of them."
        )
    threshold = min(_candidates(fitting), key=lambda value: _cost(error_rates(value, fitting)))
    return FittedThreshold(
        threshold,
        error_rates(threshold, fitting),
        error_rates(threshold, judging),
        _count(fitting),
        _count(judging),
    )


def error_curve(scores: ScoredQuestions, num_points: int = 21) -> list[tuple[float, ErrorRates]]:
    """(threshold, error rates) from the threshold that refuses nothing to the one that refuses everything."""
    every = sorted({*scores.answerable, *scores.far, *scores.near})
    if not every:
        return []
    places = [round(step * (len(every) - 1) / (num_points - 1)) for step in range(num_points)]
    return [(every[place], error_rates(every[place], scores)) for place in dict.fromkeys(places)]


def _cost(rates: ErrorRates) -> tuple[bool, bool, float]:
    """Compared in this order: too many wrong refusals, too many wrong answers of the far kind, errors in all."""
    refusals = rates.wrong_refusals or 0.0
    answers = [rate for rate in (rates.wrong_answers_far, rates.wrong_answers_near) if rate is not None]
    far = rates.wrong_answers_far or 0.0
    mean = sum(answers) / len(answers) if answers else 0.0
    return refusals > MOST_WRONG_REFUSALS, far > MOST_WRONG_ANSWERS, refusals + mean


def _candidates(scores: ScoredQuestions) -> list[float]:
    """Halfway between neighbouring scores."""
    every = sorted({*scores.answerable, *scores.far, *scores.near})
    return [every[0], *((low + high) / 2 for low, high in pairwise(every))]


def _count(scores: ScoredQuestions) -> int:
    return len(scores.answerable) + len(scores.far) + len(scores.near)


def _share(wrong: Iterable[bool]) -> float | None:
    values = list(wrong)
    return sum(values) / len(values) if values else None
