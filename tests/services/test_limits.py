"""Limits of one key: exact over any 60 seconds, told beforehand, corrected at the end."""

import math
import random
from dataclasses import dataclass

import pytest

from services.limits import NO_LIMIT, WINDOW_S, KeyUsage, Lease, Limits, Refusal


def admit(usage: KeyUsage, now: float, tokens: int = 0, **limits: int) -> Refusal | None:
    return usage.admit(f"lease at {now} {random.random()}", Limits(**limits), tokens, now)


def test_requests_slide_over_single_leases_and_not_over_minutes() -> None:
    usage = KeyUsage()
    for now in (0.0, 50.0, 59.0):
        assert admit(usage, now, requests_per_minute=3) is None
    refusal = admit(usage, 59.5, requests_per_minute=3)
    assert refusal == Refusal("requests", limit=3, used=3, requested=1, retry_after_s=0.5)
    assert admit(usage, 60.0, requests_per_minute=3) is None
    refusal = admit(usage, 60.0, requests_per_minute=3)
    assert refusal is not None and refusal.retry_after_s == 50.0


def test_tokens_are_reserved_while_a_request_runs_and_used_for_a_minute_from_its_end() -> None:
    usage, limits = KeyUsage(), Limits(tokens_per_minute=100)
    assert usage.admit("a", limits, 60, 0.0) is None
    refusal = usage.admit("b", limits, 41, 200.0)  # a stream of more than a minute still holds what it may use
    assert refusal is not None and (refusal.reason, refusal.used) == ("tokens", 60)
    usage.put("a", Lease(0.0, 30, ended_at=200.0), 200.0)
    assert usage.standing(limits, 200.0).remaining_tokens == 70
    assert usage.admit("b", limits, 71, 201.0) == Refusal("tokens", 100, 30, 71, retry_after_s=59.0)
    assert usage.admit("b", limits, 71, 260.0) is None


def test_a_reservation_that_was_too_small_keeps_later_requests_out() -> None:
    usage, limits = KeyUsage(), Limits(tokens_per_minute=100)
    assert usage.admit("a", limits, 10, 0.0) is None
    usage.put("a", Lease(0.0, 500, ended_at=1.0), 1.0)
    assert usage.standing(limits, 1.0).remaining_tokens == 0
    refusal = usage.admit("b", limits, 1, 2.0)
    assert refusal is not None and refusal.retry_after_s == 59.0


def test_a_request_that_can_never_fit_is_told_that_waiting_does_not_help() -> None:
    assert admit(KeyUsage(), 0.0, 101, tokens_per_minute=100) == Refusal("request_too_large", 100, 0, 101, None)


def test_places_are_free_when_answers_end() -> None:
    usage, limits = KeyUsage(), Limits(concurrent_streams=2)
    assert usage.admit("a", limits, 0, 0.0) is None
    assert usage.admit("b", limits, 0, 0.0) is None
    refusal = usage.admit("c", limits, 0, 0.0)
    assert refusal is not None and (refusal.reason, refusal.used, refusal.limit) == ("concurrent_streams", 2, 2)
    usage.put("a", Lease(0.0, 0, ended_at=1.0), 1.0)
    assert usage.admit("c", limits, 0, 1.0) is None


def test_of_several_refusals_the_one_with_the_longest_wait_is_told() -> None:
    usage, limits = KeyUsage(), Limits(1, 100, 1)
    assert usage.admit("a", limits, 60, 0.0) is None
    refusal = usage.admit("b", limits, 50, 10.0)
    assert refusal is not None and (refusal.reason, refusal.retry_after_s) == ("requests", 50.0)
    refusal = usage.admit("b", limits, 500, 10.0)
    assert refusal is not None and refusal.reason == "request_too_large"


def test_what_was_refused_is_not_counted_and_the_same_id_is_the_same_request() -> None:
    usage, limits = KeyUsage(), Limits(requests_per_minute=1)
    assert usage.admit("a", limits, 5, 0.0) is None
    assert usage.admit("a", limits, 5, 0.0) is None
    for now in range(1, 60):
        assert usage.admit(f"b{now}", limits, 5, float(now)) is not None
    assert usage.admit("c", limits, 5, 60.0) is None


def test_a_dropped_request_was_never_there() -> None:
    usage, limits = KeyUsage(), Limits(1, 10, 1)
    usage.admit("a", limits, 10, 0.0)
    usage.drop("a")
    assert usage.is_idle(0.0)
    assert usage.admit("b", limits, 10, 0.0) is None


def test_own_values_win_over_defaults_and_nought_lifts_them() -> None:
    defaults = Limits(10, 1000, None)
    assert Limits().over(defaults) == defaults
    assert Limits(5, NO_LIMIT, 2).over(defaults) == Limits(5, None, 2)
    assert Limits(NO_LIMIT, NO_LIMIT, NO_LIMIT).over(defaults).is_unlimited


@dataclass
class _Request:
    """What the test itself remembers of a request."""

    admitted_at: float
    tokens: int
    ended_at: float | None = None


@pytest.mark.parametrize("seed", range(40))
def test_every_decision_is_that_of_counting_everything_anew(seed: int) -> None:
    """Random admissions, ends and waits, beside a list of all requests that is counted through for each decision."""
    chance = random.Random(seed)
    limits = Limits(
        requests_per_minute=chance.choice([None, 1, 4, 9]),
        tokens_per_minute=chance.choice([None, 50, 300]),
        concurrent_streams=chance.choice([None, 1, 3]),
    )
    usage, all_requests = KeyUsage(), dict[str, _Request]()
    now, num_refused = 0.0, 0
    for step in range(600):
        now += chance.choice([0.0, 0.25, 0.25, 1.0, 1.0, 5.0, 30.0])  # exact in binary: the border itself is tested
        running = [name for name, request in all_requests.items() if request.ended_at is None]
        if running and chance.random() < 0.4:
            name = chance.choice(running)
            request = all_requests[name]
            request.tokens, request.ended_at = chance.randrange(request.tokens + 5), now
            usage.put(name, Lease(request.admitted_at, request.tokens, now), now)
            continue
        tokens = chance.randrange(60)
        num_requests = sum(request.admitted_at > now - WINDOW_S for request in all_requests.values())
        num_tokens = sum(
            request.tokens
            for request in all_requests.values()
            if request.ended_at is None or request.ended_at > now - WINDOW_S
        )
        fits = (
            (limits.requests_per_minute is None or num_requests + 1 <= limits.requests_per_minute)
            and (limits.tokens_per_minute is None or num_tokens + tokens <= limits.tokens_per_minute)
            and (limits.concurrent_streams is None or len(running) + 1 <= limits.concurrent_streams)
        )
        refusal = usage.admit(f"r{step}", limits, tokens, now)
        assert (refusal is None) == fits
        if refusal is None:
            all_requests[f"r{step}"] = _Request(now, tokens)
        else:
            num_refused += 1
            assert refusal.retry_after_s is None or 0 < refusal.retry_after_s <= WINDOW_S
    assert num_refused or limits.is_unlimited
    for name in usage.running():
        usage.put(name, Lease(0.0, 1, now), now)
    assert not usage.is_idle(now)
    assert usage.is_idle(now + WINDOW_S)


def test_who_waits_as_long_as_told_is_let_in() -> None:
    chance = random.Random(7)
    usage, limits, now = KeyUsage(), Limits(requests_per_minute=5, tokens_per_minute=200), 0.0
    for step in range(300):
        now += chance.random() * 20
        tokens = chance.randrange(1, 120)
        refusal = usage.admit(f"r{step}", limits, tokens, now)
        if refusal is not None:
            assert refusal.retry_after_s is not None
            now += math.ceil(refusal.retry_after_s * 1000) / 1000
            assert usage.admit(f"r{step}", limits, tokens, now) is None
        usage.put(f"r{step}", Lease(now, tokens, now), now)
