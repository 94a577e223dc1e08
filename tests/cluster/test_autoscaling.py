"""Copies follow slots, caches and the time to the first token; a load that stays the same asks for one change."""

from dataclasses import replace
from itertools import pairwise, product

import pytest

from cluster.autoscaling import CopyLoad, Decision, ScalingGoals, Waiting, decide

GOALS = ScalingGoals()
SLOTS = 2
TEN = 10


def copies(*requests: int, slots: int = SLOTS, tokens: int = 0, of: int = 0, leaving: int = 0) -> list[CopyLoad]:
    """One copy for each number of requests; the last `leaving` of them take nothing new."""
    first = len(requests) - leaving
    return [CopyLoad(number, slots, tokens, of, is_leaving=index >= first) for index, number in enumerate(requests)]


def wanted(*requests: int, target: int | None = None, max_copies: int = TEN, waiting: Waiting | None = None) -> int:
    found = copies(*requests)
    goal = len(found) if target is None else target
    return decide(GOALS, found, waiting or Waiting(), target=goal, max_copies=max_copies).num_copies


def test_nothing_to_do_wants_no_copy() -> None:
    assert wanted(0, 0, 0) == 0
    assert wanted(0, target=1) == 0
    assert wanted(target=0) == 0


@pytest.mark.parametrize(
    ("running", "num_copies"),
    [(1, 1), (2, 2), (3, 2), (4, 3), (5, 4), (6, 4), (8, 5)],
)
def test_slots_are_kept_below_their_share(running: int, num_copies: int) -> None:
    assert wanted(running, target=1) == num_copies


def test_what_waits_at_the_endpoint_counts_like_what_runs() -> None:
    assert wanted(2, target=1, waiting=Waiting(num_requests=4)) == wanted(6, target=1) == 4


def test_a_request_that_two_places_count_is_counted_once() -> None:
    assert wanted(2, 1, waiting=Waiting(num_begun=3)) == wanted(2, 1)
    assert wanted(0, target=1, waiting=Waiting(num_begun=3)) == 2, "the replica's own number is a second old"


def test_more_than_the_bound_is_not_asked_for() -> None:
    assert wanted(50, target=1, max_copies=3) == 3
    assert wanted(50, target=1, max_copies=1) == 1


def test_a_model_that_sleeps_is_started_for_one_request() -> None:
    decision = decide(GOALS, [], Waiting(num_requests=7), target=0, max_copies=TEN)
    assert decision == Decision(1, "requests wait for the first copy")


def test_a_model_whose_slots_are_known_starts_with_enough_copies() -> None:
    assert decide(GOALS, [], Waiting(num_requests=7), target=0, max_copies=TEN, slots_before=2).num_copies == 5


def test_copies_that_are_being_started_are_not_asked_for_again() -> None:
    assert wanted(4, target=3) == 3
    assert decide(GOALS, [], Waiting(num_requests=7), target=5, max_copies=TEN, slots_before=2).num_copies == 5
    assert decide(GOALS, [], Waiting(num_requests=7), target=1, max_copies=TEN).num_copies == 1


def test_a_copy_goes_only_where_the_others_stay_well_below_the_limit() -> None:
    assert wanted(3, 0, target=2) == 2
    assert wanted(2, 0, 0, target=3) == 2  # 2 of 4 slots: below 56 %
    assert wanted(1, 0, 0, target=3) == 1
    assert wanted(2, 0, target=2) == 2, "one copy would be full"


def test_a_copy_that_leaves_brings_no_slots_and_still_has_its_requests() -> None:
    found = copies(1, 2, leaving=1)
    assert decide(GOALS, found, Waiting(), target=1, max_copies=TEN).num_copies == 2


def test_where_all_leave_their_slots_are_the_best_guess() -> None:
    found = copies(1, 1, leaving=2)
    assert decide(GOALS, found, Waiting(), target=1, max_copies=TEN).num_copies == 2


def test_full_caches_want_a_copy_though_slots_are_free() -> None:
    found = copies(1, slots=100, tokens=900, of=1000)
    decision = decide(GOALS, found, Waiting(), target=1, max_copies=TEN)
    assert decision.num_copies == 2
    assert "KV cache" in decision.reason


def test_long_prompts_that_wait_fill_caches_before_they_run() -> None:
    found = copies(1, slots=100, tokens=100, of=1000)
    decision = decide(GOALS, found, Waiting(num_requests=1, num_tokens=2300), target=1, max_copies=TEN)
    assert decision.num_copies == 3


def test_a_cache_of_unknown_size_says_nothing() -> None:
    found = [CopyLoad(1, 100, 900, 1000), CopyLoad(1, 100)]
    assert decide(GOALS, found, Waiting(num_tokens=1e9), target=2, max_copies=TEN).num_copies == 1


LENIENT = ScalingGoals(slot_use=100.0)
"""Requests may queue: only the time to the first token counts."""


def queue(num: int, *, tokens_each: float = 100.0, token_s: float | None = 0.02, running: int = 2) -> Waiting:
    return Waiting(num, num * tokens_each, running, running * tokens_each / 2, token_s)


@pytest.mark.parametrize(
    ("waiting", "num_copies"),
    [
        (queue(0), 1),
        # A copy works off 2 tokens in 20 ms. 5 of 6 requests have to end before one more begins: 500 tokens, 4.2 s;
        # with two copies 3 of 6 and twice the slots: 1.3 s.
        (queue(4), 2),
        (queue(4, token_s=0.005), 1),
        (queue(4, token_s=0.08), 3),
        (queue(4, tokens_each=400), 3),
        (queue(4, token_s=None), 1),
    ],
)
def test_a_forecast_of_the_wait_beyond_the_target_wants_copies(waiting: Waiting, num_copies: int) -> None:
    found = copies(2)
    assert decide(LENIENT, found, waiting, target=1, max_copies=TEN).num_copies == num_copies


def test_more_copies_never_make_the_forecast_worse() -> None:
    for num, token_s, tokens in product((1, 3, 9, 40), (0.001, 0.02, 0.5), (10.0, 500.0)):
        numbers = [
            decide(
                replace(LENIENT, first_token_target_s=goal),
                copies(2),
                queue(num, token_s=token_s, tokens_each=tokens),
                target=1,
                max_copies=50,
            ).num_copies
            for goal in (0.1, 0.5, 2.0, 10.0, 60.0)
        ]
        assert numbers == sorted(numbers, reverse=True)


def test_first_tokens_that_come_late_want_one_copy_more() -> None:
    waiting = Waiting(first_token_s=(0.5, 0.4, 3.0, 0.6))
    decision = decide(LENIENT, copies(2), waiting, target=1, max_copies=TEN)
    assert decision == Decision(2, "25% of the first tokens came after more than 2 s")


@pytest.mark.parametrize(
    ("found", "first_token_s", "target", "why"),
    [
        (copies(2), (3.0, 3.0, 3.0), 1, "too few to say"),
        (copies(2), (3.0, *[0.1] * 19), 1, "one of twenty may"),
        (copies(1), (3.0,) * 8, 1, "a single request has its copy for itself"),
        (copies(2), (3.0,) * 8, 2, "another copy is on its way already"),
    ],
)
def test_late_first_tokens_change_nothing_where(
    found: list[CopyLoad], first_token_s: tuple[float, ...], target: int, why: str
) -> None:
    waiting = Waiting(first_token_s=first_token_s)
    assert decide(LENIENT, found, waiting, target=target, max_copies=TEN).num_copies == target, why


def test_no_copy_goes_while_first_tokens_come_late() -> None:
    waiting = Waiting(first_token_s=(3.0,) * 8)
    assert decide(GOALS, copies(1, 0, 0), waiting, target=3, max_copies=TEN).num_copies == 3
    assert decide(GOALS, copies(1, 0, 0), Waiting(), target=3, max_copies=TEN).num_copies == 1


def test_whatever_is_decided_is_kept_while_the_load_stays_the_same() -> None:
    """From any number of copies, whatever the load: one change, and none after it."""
    loads = product((0, 1, 2, 3, 5, 13), (0, 1, 4, 12), (None, 0.1), (0, 300, 5000))
    for running, num, token_s, tokens in loads:
        waiting = Waiting(num, num * 100.0, running, running * 50.0, token_s)
        for start in range(1, TEN + 1):
            seen, now = [start], start
            for _ in range(3):
                found = [CopyLoad(running // max(1, now), SLOTS, tokens // max(1, now), 1000) for _ in range(now)]
                now = decide(GOALS, found, waiting, target=now, max_copies=TEN, slots_before=SLOTS).num_copies
                seen.append(now)
            changes = sum(before != after for before, after in pairwise(seen))
            assert changes <= 1, (running, num, token_s, tokens, seen)


def test_more_requests_never_want_fewer_copies() -> None:
    for target in range(6):
        numbers = [wanted(*[0] * 3, target=target, waiting=Waiting(num_requests=num)) for num in range(60)]
        assert numbers == sorted(numbers)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"first_token_target_s": 0}, "first_token_target_s is 0, but a number above 0"),
        ({"slot_use": -1.0}, "slot_use"),
        ({"cache_use": 1.5}, "a share of at most 1"),
        ({"late_share": 2}, "a share of at most 1"),
        ({"down_share": 1.01}, "a share of at most 1"),
        ({"slot_use": True}, "number above 0"),
        ({"slot_use": float("nan")}, "number above 0"),
        ({"slot_use": "all"}, "number above 0"),
    ],
)
def test_goals_that_cannot_be_meant_are_refused(fields: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ScalingGoals(**fields)
