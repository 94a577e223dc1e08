"""Endpoints announce what waits at them; readers add it up and forget endpoints that fell silent."""

import asyncio

import pytest

from services.answer_pace import AnswerPace
from services.demand import (
    DEMAND_PREFIX,
    DemandBeacon,
    DemandReader,
    ModelDemand,
    add_up,
    decode_demand,
    encode_demand,
)
from tests.services.harness import Beats, wait_until

EVER = 1e9


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_record_comes_back_as_it_was() -> None:
    demand = ModelDemand(3, 410.5, 2, 80.0, 0.02, [(1.0, 0.3)])
    beat, models = decode_demand(encode_demand(7, {"tiny": demand}))
    assert beat == 7
    assert models["tiny"].num_waiting == 3
    assert [tuple(pair) for pair in models["tiny"].first_tokens] == [(1.0, 0.3)]


@pytest.mark.parametrize("value", [b"", b"[]", b"{}", b'{"beat": 1}', b'{"beat": 1, "models": {"tiny": {"new": 1}}}'])
def test_what_is_no_record_is_refused(value: bytes) -> None:
    with pytest.raises(ValueError):
        decode_demand(value)


def test_endpoints_are_added_up() -> None:
    found = add_up(
        [ModelDemand(3, 300, 2, 50, 0.02, [(1, 0.3)]), ModelDemand(1, 100, 1, 25, 0.04), ModelDemand(1)],
        within_s=10,
        begun_within_s=EVER,
    )
    assert (found.num_requests, found.num_tokens, found.num_begun, found.begun_tokens) == (5, 400, 3, 75)
    assert found.seconds_per_token == pytest.approx(0.03)
    assert found.first_token_s == [0.3]


def test_first_tokens_of_long_ago_and_of_other_replicas_do_not_count() -> None:
    times = [(1.0, 0.3), (8.0, 0.5), (4.0, 30.0), (12.0, 0.2)]
    assert add_up([ModelDemand(first_tokens=times)], within_s=10, begun_within_s=9).first_token_s == [0.3, 0.5]


async def test_an_endpoint_is_heard_while_it_announces_and_five_seconds_after() -> None:
    store, clock = Beats(), Clock()
    reader = DemandReader(clock)
    beacon = DemandBeacon(store, "g1", lambda: {"tiny": ModelDemand(num_waiting=2)})
    await beacon.start()
    reader.take(store)
    assert reader.has_endpoint
    assert reader.of("tiny", within_s=1, begun_within_s=1).num_requests == 2
    assert reader.of("other", within_s=1, begun_within_s=1).num_requests == 0
    clock.now = 5.0
    reader.take(store)
    assert not reader.has_endpoint
    assert reader.of("tiny", within_s=1, begun_within_s=1).num_requests == 0
    clock.now = 61.0
    assert reader.take(store) == [f"{DEMAND_PREFIX}g1"]
    await beacon.stop()
    assert not store
    reader.take(store)
    await beacon.stop()  # twice does no harm


async def test_a_request_for_a_sleeping_model_is_announced_at_once() -> None:
    store, waiting = Beats(), 0
    beacon = DemandBeacon(store, "g1", lambda: {"tiny": ModelDemand(num_waiting=waiting)})
    await beacon.start()
    waiting = 1
    started = asyncio.get_running_loop().time()
    beacon.hurry()

    def number() -> int:
        return decode_demand(store[f"{DEMAND_PREFIX}g1"])[1]["tiny"].num_waiting

    await wait_until(lambda: number() == 1)
    assert asyncio.get_running_loop().time() - started < 1.0, "sooner than the next second's record"
    await beacon.stop()


def test_a_record_of_somebody_else_is_left_out() -> None:
    reader = DemandReader(Clock())
    reader.take({"a": b"?", "b": encode_demand(1, {"tiny": ModelDemand(1)})})
    assert reader.of("tiny", within_s=1, begun_within_s=1).num_requests == 1


def test_the_pace_is_that_of_the_latest_answers() -> None:
    clock = Clock()
    pace = AnswerPace(clock)
    assert (pace.seconds_per_token, pace.answer_tokens) == (None, 0.0)
    pace.note_answer(50, 0, 3.0)  # cut before its first token: it says nothing of tokens
    assert pace.seconds_per_token is None
    pace.note_answer(50, 150, 4.0)
    assert (pace.seconds_per_token, pace.answer_tokens) == (pytest.approx(0.02), 150)
    for _ in range(200):
        pace.note_answer(50, 50, 4.0)
    assert pace.seconds_per_token == pytest.approx(0.04)
    assert pace.answer_tokens == pytest.approx(50)
    pace.note_first_token(0.5)
    clock.now = 3.0
    assert list(pace.first_tokens()) == [(3.0, 0.5)]
