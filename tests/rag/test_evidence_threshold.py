from __future__ import annotations

import numpy as np
import pytest

from rag.evidence_threshold import (
    LEAST_QUESTIONS,
    ErrorRates,
    ScoredQuestions,
    error_curve,
    error_rates,
    fit_threshold,
    is_for_fitting,
    limit_risks,
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


def test_the_risk_is_that_of_the_share_behind_what_was_counted() -> None:
    assert limit_risks(0.1, 20)[0] == pytest.approx(0.9**21)
    assert limit_risks(0.5, 10)[5] == pytest.approx(0.5), "as many wrong as right says nothing about one half"
    risks = limit_risks(0.1, 2000)
    assert risks == sorted(risks) and risks[150] < 0.001 and risks[250] > 0.999 and risks[-1] == pytest.approx(1)


def test_few_questions_are_drawn_to_the_configured_threshold_unless_it_is_of_another_scale() -> None:
    apart = scores(spread(0.80, 0.90, 40), spread(0.50, 0.70, 40))
    alone = fit_threshold(apart, apart).threshold
    assert fit_threshold(apart, apart, 0.79).threshold == pytest.approx((alone + 0.79) / 2)
    assert fit_threshold(apart, apart, 0.95).threshold == alone, "it would refuse everything"
    assert fit_threshold(apart, apart, 0.55).threshold == alone, "it would answer everything"
    many = scores(spread(0.80, 0.90, 400), spread(0.50, 0.70, 400))
    assert alone < fit_threshold(many, many, 0.79).threshold < alone + 0.01


def draw(rng: np.random.Generator, shift: float, number: int = 40) -> ScoredQuestions:
    """Scores as collections have them: some answerable questions use other words than their passage."""
    is_odd = rng.random(number) < 0.08
    answerable = np.where(is_odd, rng.normal(0.86, 0.03, number), rng.normal(0.93, 0.03, number)) + shift
    far, near = rng.normal(0.815, 0.02, number) + shift, rng.normal(0.875, 0.03, number) + shift
    return scores(answerable.tolist(), far.tolist(), near.tolist())


def test_a_threshold_of_few_questions_keeps_its_limits_on_others() -> None:
    """Eighty collections of 40 questions a kind in each half, none like the one for which 0.862 was found."""
    rng, num_kept = np.random.default_rng(5), 0
    for _ in range(80):
        shift = rng.normal(0, 0.008)
        rates = fit_threshold(draw(rng, shift), draw(rng, shift), 0.862).judged
        assert rates.wrong_refusals is not None and rates.wrong_answers_far is not None
        num_kept += rates.wrong_refusals <= 0.10 and rates.wrong_answers_far <= 0.05
    assert num_kept >= 68


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
