"""The threshold below which the documents do not say: fitted on questions that they answer and questions that they do
not, and judged on other questions than it was fitted on.

Scores are those of `rag.refusal.score_evidence`. Two ways to be wrong: a wrong refusal (the answer was there) and a
wrong answer (it was not). Far negatives ask about another topic; near negatives have their passage taken out and its
neighbours left in. Pure functions.
"""

from __future__ import annotations

import zlib
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

MOST_WRONG_REFUSALS = 0.10
"""More than this share of answerable questions is never refused in exchange for fewer wrong answers."""
MOST_WRONG_ANSWERS = 0.05
"""What is wanted of far negatives, where that can be had."""
SMALL_RISK = 0.03
"""That a limit is broken by other questions than the fitted ones: below it, fewer errors count more than less risk."""
PRIOR_QUESTIONS = 40
"""What the threshold of the configuration weighs beside that of the questions, as if so many had chosen it."""
_PLAUSIBLE = 2
"""A configured threshold that errs more often than so many times what is allowed was not made for such scores."""
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


def fit_threshold(fitting: ScoredQuestions, judging: ScoredQuestions, prior: float | None = None) -> FittedThreshold:
    """The threshold that most likely keeps both limits above on other questions than `fitting`. Where that is nearly
    sure, the one with the fewest errors: wrong refusals against the mean of both kinds of wrong answers.

    Some dozens of questions move such a threshold by chance, so it is drawn towards `prior`, the one of the
    configuration: the less, the more questions there are, and not at all where that one is of another scale. Raises
    `ValueError` where there are too few questions of a kind.
    """
    if len(fitting.answerable) < LEAST_QUESTIONS or len(fitting.far) + len(fitting.near) < LEAST_QUESTIONS:
        raise ValueError(
            f"{len(fitting.answerable)} answerable and {len(fitting.far) + len(fitting.near)} unanswerable questions "
            f"are too few to fit a threshold; at least {LEAST_QUESTIONS} of each are needed in one half of them."
        )
    threshold = _towards(prior, _safest(fitting), fitting)
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


def limit_risks(limit: float, num_questions: int) -> list[float]:
    """The risk that more than `limit` (a share) of all questions come out wrong, by how many of `num_questions` did.

    The share is not known beforehand (uniform), so after k of n it has a beta distribution, whose part above the limit
    is a sum of binomial probabilities: P(share > limit) = P(Binomial(n + 1, limit) <= k). Up to 5000 questions.
    """
    num_draws = num_questions + 1
    probability = (1 - limit) ** num_draws
    total, risks = 0.0, []
    for num_wrong in range(num_questions + 1):
        total += probability
        risks.append(total)
        probability *= (num_draws - num_wrong) / (num_wrong + 1) * limit / (1 - limit)
    return risks


def _safest(scores: ScoredQuestions) -> float:
    """Compared in this order: too many wrong refusals, the greater of both risks, errors in all (wrong refusals count
    twice: people notice them)."""
    answerable, far = sorted(scores.answerable), sorted(scores.far)
    refusal_risks = limit_risks(MOST_WRONG_REFUSALS, len(answerable))
    answer_risks = limit_risks(MOST_WRONG_ANSWERS, len(far))

    def cost(threshold: float) -> tuple[bool, float, float]:
        num_refused, num_answered = bisect_left(answerable, threshold), len(far) - bisect_left(far, threshold)
        refusals = num_refused / len(answerable)
        risk = max(refusal_risks[num_refused], answer_risks[num_answered] if far else 0.0)
        rates = error_rates(threshold, scores)
        answers = [rate for rate in (rates.wrong_answers_far, rates.wrong_answers_near) if rate is not None]
        return refusals > MOST_WRONG_REFUSALS, max(risk, SMALL_RISK), 2 * refusals + sum(answers) / len(answers)

    return min(_candidates(scores), key=cost)


def _towards(prior: float | None, fitted: float, scores: ScoredQuestions) -> float:
    if prior is None:
        return fitted
    rates = error_rates(prior, scores)
    is_plausible = (rates.wrong_refusals or 0.0) <= _PLAUSIBLE * MOST_WRONG_REFUSALS and (
        rates.wrong_answers_far or 0.0
    ) <= _PLAUSIBLE * MOST_WRONG_ANSWERS
    if not is_plausible:
        return fitted
    num_questions = min(len(scores.answerable), len(scores.far) or len(scores.near))
    return (num_questions * fitted + PRIOR_QUESTIONS * prior) / (num_questions + PRIOR_QUESTIONS)


def _candidates(scores: ScoredQuestions) -> list[float]:
    """Halfway between neighbouring scores."""
    every = sorted({*scores.answerable, *scores.far, *scores.near})
    return [every[0], *((low + high) / 2 for low, high in pairwise(every))]


def _count(scores: ScoredQuestions) -> int:
    return len(scores.answerable) + len(scores.far) + len(scores.near)


def _share(wrong: Iterable[bool]) -> float | None:
    values = list(wrong)
    return sum(values) / len(values) if values else None
