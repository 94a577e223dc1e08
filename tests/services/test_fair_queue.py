"""The waiting room: bounded, fair between keys whatever they do, ordered by priority, and nobody is forgotten."""

import random
from collections import Counter

import pytest

from services.fair_queue import FairQueue, RoomFull, Ticket

NORMAL, LATER = 0, 1


class Room:
    """A queue whose requests take turns: what began, in order."""

    def __init__(self, *limits: int, places: int = 1) -> None:
        self.queue = FairQueue(limits or (4, 4), places)
        self.begun: list[str] = []
        self.sent_away: list[str] = []
        self.running: list[Ticket] = []

    def ask(self, key: str, cost: float = 10, *, priority: int = NORMAL) -> Ticket:
        def called(may_begin: bool) -> None:
            (self.begun if may_begin else self.sent_away).append(key)
            if may_begin:
                self.running.append(ticket)

        ticket = Ticket(key, cost, called)
        self.queue.enter(ticket, priority)
        return ticket

    def end(self, cost: float | None = None) -> None:
        ticket = self.running.pop(0)
        self.queue.finish(ticket, ticket.cost if cost is None else cost)


def test_requests_begin_at_once_while_there_is_a_place() -> None:
    room = Room(places=2)
    room.ask("a")
    room.ask("a")
    room.ask("a")
    assert (room.begun, room.queue.num_waiting) == (["a", "a"], 1)
    room.end()
    assert room.begun == ["a", "a", "a"]


def test_a_key_that_asks_a_lot_does_not_go_before_one_that_asks_once() -> None:
    room = Room(8, 8)
    for _ in range(6):
        room.ask("heavy")
    room.ask("light")
    for _ in range(4):
        room.end()
    assert room.begun[:4] == ["heavy", "heavy", "light", "heavy"]


def test_keys_share_by_tokens_not_by_requests() -> None:
    room = Room(100, 100)
    for _ in range(40):
        room.ask("long", cost=40)
        room.ask("short", cost=10)
    while sum(ticket == "short" for ticket in room.begun) < 32:
        room.end()
    shares = Counter(room.begun)
    assert 3.5 <= shares["short"] / shares["long"] <= 4.5


def test_what_a_request_took_in_the_end_is_what_counts() -> None:
    room = Room(20, 20)
    room.ask("first")
    for _ in range(5):
        room.ask("thrifty", cost=100)
        room.ask("spender", cost=100)
    room.end()
    for _ in range(6):
        room.end(cost=10 if room.running[0].key == "thrifty" else 100)
    assert Counter(room.begun[1:])["thrifty"] > Counter(room.begun[1:])["spender"]


def test_nobody_saves_up_while_away() -> None:
    room = Room(50, 50)
    for _ in range(20):
        room.ask("always")
    for _ in range(10):
        room.end()
    for _ in range(10):
        room.ask("back")
    begun = len(room.begun)
    for _ in range(8):
        room.end()
    assert Counter(room.begun[begun:]) == {"always": 4, "back": 4}


def test_lower_priorities_wait_for_higher_ones() -> None:
    room = Room()
    room.ask("a")
    room.ask("batch", priority=LATER)
    room.ask("b")
    room.end()
    room.end()
    assert room.begun == ["a", "b", "batch"]


def test_a_full_room_refuses_at_once_and_says_whose_doing_it_is() -> None:
    room = Room(2, 1)
    for key in ("a", "a", "b"):
        room.ask(key)
    with pytest.raises(RoomFull) as refused:
        room.ask("c")
    assert not refused.value.is_own_doing
    assert refused.value.num_waiting == 2
    with pytest.raises(RoomFull):
        room.ask("a")
    room.ask("z", priority=LATER)
    with pytest.raises(RoomFull) as own:
        room.ask("z", priority=LATER)
    assert own.value.is_own_doing


def test_whoever_fills_the_room_alone_gives_way_to_others() -> None:
    room = Room(4, 4)
    for _ in range(5):
        room.ask("heavy")
    with pytest.raises(RoomFull) as refused:
        room.ask("heavy")
    assert refused.value.is_own_doing
    room.ask("light")
    assert room.sent_away == ["heavy"]
    room.ask("other")
    assert room.sent_away == ["heavy", "heavy"]
    with pytest.raises(RoomFull):
        room.ask("light")  # now everybody has a fair share of the room
    for _ in range(3):
        room.end()
    assert set(room.begun) == {"heavy", "light", "other"}


def test_a_request_that_is_not_wanted_any_more_leaves_its_place_to_others() -> None:
    room = Room(1, 1)
    room.ask("a")
    waiting = room.ask("b")
    room.queue.leave(waiting, NORMAL)
    room.ask("c")
    room.end()
    assert room.begun == ["a", "c"]


def test_more_places_are_taken_when_they_appear() -> None:
    room = Room(4, 4)
    for key in "abc":
        room.ask(key)
    room.queue.num_places = 3
    room.queue.call_next()
    assert room.begun == ["a", "b", "c"]
    room.queue.num_places = 1
    room.ask("d")
    room.end()
    room.end()
    assert room.begun == ["a", "b", "c"]
    room.end()
    assert room.begun[-1] == "d"


@pytest.mark.parametrize("seed", range(5))
def test_whatever_happens_places_are_kept_and_nobody_who_waits_is_forgotten(seed: int) -> None:
    draw, room, waiting = random.Random(seed), Room(6, 3, places=3), []
    asked = refused = left = 0
    for _ in range(3000):
        step = draw.random()
        if step < 0.5:
            asked += 1
            priority = draw.choice((NORMAL, LATER))
            try:
                waiting.append((room.ask(draw.choice("abcd"), draw.uniform(1, 50), priority=priority), priority))
            except RoomFull:
                refused += 1
        elif step < 0.9 and room.running:
            room.end(draw.uniform(1, 50))
        elif waiting:
            ticket, priority = draw.choice(waiting)
            if ticket in room.queue._rooms[priority].waiting.get(ticket.key, ()):
                room.queue.leave(ticket, priority)
                left += 1
        assert room.queue.num_running == len(room.running) <= 3
        assert room.queue.num_running == 3 or room.queue.num_waiting == 0
    while room.running:
        room.end()
    assert room.queue.num_waiting == 0
    assert asked == len(room.begun) + len(room.sent_away) + refused + left
    assert not room.queue._num_present
