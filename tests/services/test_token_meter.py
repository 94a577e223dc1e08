"""Tokens of a request while it runs: as estimated, as they come, and as they were in the end."""

from cluster.engine import Usage
from services.token_meter import Estimate, TokenMeter


def test_an_estimate_is_prompt_and_longest_answer() -> None:
    assert Estimate(3, 4).total == 7


def test_a_request_that_no_model_took_costs_nothing() -> None:
    assert TokenMeter(50).total() == 0


def test_a_cut_generation_costs_its_estimated_prompt_and_what_came() -> None:
    meter = TokenMeter(50)
    meter.begin()
    assert meter.total() == 50
    meter.add(2)
    meter.add(1)
    assert (meter.total(), meter.total(has_failed=True)) == (53, 53)


def test_what_failed_before_its_first_token_costs_nothing() -> None:
    meter = TokenMeter(50)
    meter.begin()
    assert meter.total(has_failed=True) == 0


def test_usage_replaces_what_was_counted_and_generations_add_up() -> None:
    meter = TokenMeter(50)
    meter.begin()
    meter.add(2)
    meter.finish(Usage(40, 2))
    assert meter.total() == 42
    meter.begin()
    meter.add(3)
    assert meter.total() == 42 + 53
    meter.finish(Usage(45, 5))
    assert meter.total(has_failed=True) == 42 + 50
