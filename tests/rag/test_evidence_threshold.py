from __future__ import annotations

import pytest

from rag.evidence_threshold import (
    LEAST_QUESTIONS,
    ErrorRates,
    ScoredQuestions,
    error_curve,
    error_rates,
    fit_threshold,
    is_for_fitting,
)


def scores(answerable: list[float], far: list[float], near: list[float] | None = None) -> ScoredQuestions:
    return ScoredQuestions(tuple(answerable), tuple(far), tuple(near or []))


def spread(low: float, high: float, number: int = 100) -> list[float]:
    return [low + (high - low) * step / (number - 1) for step in range(number)]


def test_rates_count_both_kinds_of_errors() -> None:
    rates = error_rates(0.5, scores([0.4, 0.6, 0.7, 0.8], [0.1, 0.5], [0.6]))
    assert rates == ErrorRates(wrong_refusals=0.25, wrong_answers_far=0.5, wrong_answers_near=1.0)
    assert error_rates(0.5, scores([], [0.1])).wrong_refusals is None


def test_questions_that_can_be_told_apart_are() -> None:
    fitted = fit_threshold(scores(spread(0.8, 0.9), spread(0.5, 0.7)), scores(spread(0.8, 0.9), spread(0.5, 0.7)))
    assert 0.7 < fitted.threshold <= 0.8
    assert fitted.judged == ErrorRates(0.0, 0.0, None)
    assert (fitted.num_fitted, fitted.num_judged) == (200, 200)


def test_more_than_a_tenth_is_never_refused_for_fewer_wrong_answers() -> None:
    alike = scores(spread(0.5, 0.9), spread(0.5, 0.9), spread(0.6, 0.95))
    fitted = fit_threshold(alike, alike)
    assert fitted.fitted.wrong_refusals is not None and fitted.fitted.wrong_refusals <= 0.10


def test_far_negatives_are_kept_under_their_limit_where_that_can_be_had() -> None:
    overlapping = scores(spread(0.70, 0.90), spread(0.50, 0.72), spread(0.60, 0.90))
    rates = fit_threshold(overlapping, overlapping).fitted
    assert rates.wrong_answers_far is not None and rates.wrong_answers_far <= 0.05
    assert rates.wrong_refusals is not None and rates.wrong_refusals <= 0.10


def test_errors_are_those_of_the_other_half() -> None:
    fitted = fit_threshold(scores(spread(0.8, 0.9), spread(0.5, 0.7)), scores(spread(0.6, 0.7), spread(0.8, 0.9)))
    assert fitted.judged == ErrorRates(1.0, 1.0, None)


@pytest.mark.parametrize(("num_answerable", "num_far"), [(LEAST_QUESTIONS - 1, 50), (50, LEAST_QUESTIONS - 1), (0, 0)])
def test_too_few_questions_are_refused(num_answerable: int, num_far: int) -> None:
    few = scores([0.8] * num_answerable, [0.5] * num_far)
    with pytest.raises(ValueError, match=f"{num_answerable} answerable and {num_far} unanswerable .* too few"):
        fit_threshold(few, few)


def test_the_curve_goes_from_nothing_refused_to_nearly_everything() -> None:
    curve = error_curve(scores(spread(0.6, 0.9), spread(0.5, 0.7), spread(0.55, 0.85)))
    assert [threshold for threshold, _ in curve] == sorted(threshold for threshold, _ in curve)
    first, last = curve[0][1], curve[-1][1]
    assert (first.wrong_refusals, first.wrong_answers_far) == (0.0, 1.0)
    assert last.wrong_answers_far == last.wrong_answers_near == 0.0
    assert error_curve(scores([], [])) == []


def test_halves_are_stable_and_about_equal() -> None:
    questions = [f"What is number {number}?" for number in range(1000)]
    halves = [is_for_fitting(question) for question in questions]
    assert halves == [is_for_fitting(f" {question} ") for question in questions]
    assert 400 < sum(halves) < 600
