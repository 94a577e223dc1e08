"""One book for all relays: what survives a lost message, a dead relay, a new book, a paused machine."""

from dataclasses import replace

from services.limit_book import LEASE_S, Ask, LimitBook, Message, Record, Reply
from services.limits import Limits

TWO = Limits(concurrent_streams=2)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Relay:
    """Says what a relay says; what it keeps is in the hands of the test."""

    def __init__(self, name: str, book: LimitBook) -> None:
        self.name = name
        self.book = book
        self.number = 0
        self.epoch = ""

    def say(self, *records: Record, asks: tuple[Ask, ...] = (), is_whole: bool = False) -> Reply:
        self.number += 1
        message = Message(self.name, self.number, self.epoch, is_whole, records, asks)
        reply = self.book.exchange(message)
        self.epoch = reply.epoch
        return reply

    def ask(self, lease_id: str, limits: Limits = TWO, tokens: int = 0, key_id: str = "key") -> str | None:
        """None: admitted; else the reason of the refusal."""
        reply = self.say(asks=(Ask(lease_id, key_id, limits, tokens),))
        if reply.verdicts is None:
            reply = self.say(asks=(Ask(lease_id, key_id, limits, tokens),), is_whole=True)
        assert reply.verdicts is not None
        refusal = reply.verdicts[0].refusal
        return None if refusal is None else refusal.reason


def running(lease_id: str, tokens: int = 0, age_s: float = 0.0) -> Record:
    return Record(lease_id, "key", tokens, age_s, None)


def ended(lease_id: str, tokens: int = 0, age_s: float = 0.0, ended_age_s: float = 0.0) -> Record:
    return Record(lease_id, "key", tokens, age_s, ended_age_s)


def two_relays(clock: Clock) -> tuple[Relay, Relay]:
    book = LimitBook(clock=clock)
    return Relay("a", book), Relay("b", book)


def test_relays_share_one_count_and_keys_do_not() -> None:
    a, b = two_relays(Clock())
    assert a.ask("a1") is None
    assert b.ask("b1") is None
    assert a.ask("a2") == b.ask("b2") == "concurrent_streams"
    assert b.ask("b3", key_id="another key") is None
    a.say(ended("a1"))
    assert b.ask("b2") is None


def test_an_end_and_a_new_request_in_one_message_find_the_place_free() -> None:
    a, _ = two_relays(Clock())
    one = Limits(concurrent_streams=1)
    a.ask("a1", one)
    reply = a.say(ended("a1"), asks=(Ask("a2", "key", one, 0),))
    assert reply.verdicts is not None and reply.verdicts[0].refusal is None


def test_a_message_that_is_told_twice_or_late_changes_nothing() -> None:
    a, b = two_relays(Clock())
    a.ask("a1")
    late = Message("a", a.number + 1, a.epoch, False, (), (Ask("a2", "key", TWO, 0),))
    a.say(running("a1"), is_whole=True)  # the relay gave up on `late` and told everything
    assert a.book.exchange(late).verdicts is None
    assert b.ask("b1") is None
    assert a.book.exchange(replace(late, number=a.number)).verdicts is None


def test_an_admission_whose_answer_was_lost_is_taken_back_when_the_relay_tells_everything() -> None:
    a, b = two_relays(Clock())
    a.ask("a1")
    a.ask("lost", Limits(5, 100, 2), 90)
    a.say(running("a1"), is_whole=True)
    assert b.ask("b1", Limits(2, 100, 2), 90) is None


def test_a_silent_relay_gives_its_places_back_and_is_booked_with_what_it_reserved() -> None:
    clock = Clock()
    a, b = two_relays(clock)
    limits = Limits(None, 100, 1)
    assert a.ask("a1", limits, 60) is None
    for _ in range(int(LEASE_S)):
        assert b.ask("b1", limits, 10) == "concurrent_streams"
        clock.now += 1
    clock.now += 1
    assert b.ask("b1", limits, 50) == "tokens"
    assert b.ask("b1", limits, 40) is None


def test_a_relay_that_was_taken_for_dead_but_lives_has_its_streams_again() -> None:
    clock = Clock()
    a, b = two_relays(clock)
    limits = Limits(None, 100, 2)
    a.ask("a1", limits, 60)
    for _ in range(int(LEASE_S) + 2):
        b.say()
        if b.say().verdicts is None:
            b.say(is_whole=True)
        clock.now += 1
    assert a.say(ended("a1", 5)).verdicts is None  # "tell everything"
    a.say(running("a1", 60), is_whole=True)
    assert b.ask("b1", limits, 41) == "tokens"
    a.say(ended("a1", 5))
    assert b.ask("b1", limits, 95) is None


def test_a_paused_limiter_takes_no_relay_for_dead() -> None:
    clock = Clock()
    a, b = two_relays(clock)
    one = Limits(concurrent_streams=1)
    a.ask("a1", one)
    clock.now += 3600
    assert b.ask("b1", one) == "concurrent_streams"  # b is heard first; a was silent, but so was everybody
    assert a.say().verdicts == ()


def test_a_clock_that_goes_back_stands_still_instead() -> None:
    clock = Clock()
    a, _ = two_relays(clock)
    one = Limits(requests_per_minute=1)
    assert a.ask("a1", one) is None
    clock.now -= 500
    assert a.ask("a2", one) == "requests"
    clock.now += 560
    assert a.ask("a2", one) is None


def test_a_new_book_decides_nothing_until_the_relays_have_told_it_everything() -> None:
    clock = Clock()
    a, b = two_relays(clock)
    limits = Limits(3, 100, 2)
    a.ask("a1", limits, 30)
    b.ask("b1", limits, 30)
    b.say(ended("b1", 20))
    clock.now += 10
    new = LimitBook(recovery_s=3, clock=clock)
    a.book = b.book = new
    ask = Ask("a2", "key", limits, 1)
    assert a.say(asks=(ask,)).verdicts is None
    reply = a.say(running("a1", 30, age_s=10), asks=(ask,), is_whole=True)
    assert (reply.verdicts, reply.recovering_s) == ((), 3)
    assert b.say().verdicts is None
    b.say(ended("b1", 20, age_s=10, ended_age_s=10), is_whole=True)
    clock.now += 3
    assert a.ask("a2", limits, 51) == "tokens"
    assert a.ask("a2", limits, 50) is None
    assert b.ask("b2", limits, 0) == "requests"
    clock.now += 47
    assert b.say(ended("b1", 20)).verdicts == ()
    assert new.num_keys == 1


def test_keys_that_did_nothing_for_a_minute_are_forgotten() -> None:
    clock = Clock()
    a, _ = two_relays(clock)
    for number in range(100):
        a.ask(f"l{number}", key_id=f"key{number}")
        a.say(Record(f"l{number}", f"key{number}", 0, 0.0, 0.0))
    assert a.book.num_keys == 100
    clock.now += 61
    a.say(is_whole=True)
    assert a.book.num_keys == 0
