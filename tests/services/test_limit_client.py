"""A relay and the book: messages are shared, lost ones repaired, and nobody who asks waits for ever."""

import asyncio
import random
from typing import Any

import pytest

from services.errors import ApiError
from services.limit_client import LimitClient
from services.limits import Limits, Refusal
from tests.services.harness import BookCalls, wait_until

ONE = Limits(concurrent_streams=1)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


async def ask(client: LimitClient, limits: Limits, tokens: int = 0) -> str | Refusal:
    """The lease, or the refusal."""
    lease_id, verdict = await client.ask("key", limits, tokens)
    return verdict.refusal or lease_id


async def test_relays_that_ask_at_once_get_exactly_the_limit_in_few_messages() -> None:
    limiter = BookCalls()
    clients = [LimitClient(limiter) for _ in range(3)]
    limits = Limits(requests_per_minute=70, concurrent_streams=70)
    answers = await asyncio.gather(*(ask(clients[number % 3], limits) for number in range(300)))
    assert sum(isinstance(answer, str) for answer in answers) == 70
    assert limiter.num_calls <= 6
    for client in clients:
        await client.stop()


async def test_a_relay_without_limited_requests_says_nothing() -> None:
    limiter = BookCalls()
    client = LimitClient(limiter, sync_s=0.001)
    await asyncio.sleep(0.01)
    await client.stop()
    assert limiter.num_calls == 0


async def test_when_nobody_answers_those_who_ask_hear_it_and_are_not_counted() -> None:
    limiter = BookCalls()
    client = LimitClient(limiter, sync_s=0.01)
    limiter.is_away = True
    with pytest.raises(ApiError) as refused:
        await ask(client, ONE)
    assert (refused.value.status, refused.value.code, refused.value.retry_after_s) == (503, "limits_unavailable", 2)
    limiter.is_away = False
    assert isinstance(await ask(client, ONE), str)
    await client.stop()


class LosesAnswers(BookCalls):
    """Does what it is told, but the answer never arrives; `hangs`: it does not even fail."""

    def __init__(self) -> None:
        super().__init__()
        self.loses = False
        self.hangs = False

    async def call(self, method: str, /, *args: Any, **kwargs: Any) -> Any:
        answer = await super().call(method, *args, **kwargs)
        if self.hangs:
            await asyncio.Event().wait()
        if self.loses:
            raise TimeoutError
        return answer


async def test_what_was_admitted_in_a_lost_answer_is_given_back() -> None:
    limiter = LosesAnswers()
    client, other = LimitClient(limiter, sync_s=0.01), LimitClient(limiter)
    limits = Limits(2, 100, 1)
    limiter.loses = True
    with pytest.raises(ApiError):
        await ask(client, limits, 90)
    limiter.loses = False
    num_calls = limiter.num_calls
    await wait_until(lambda: limiter.num_calls > num_calls)  # the client tells by itself what it really has
    lease = await ask(other, limits, 90)
    assert isinstance(lease, str)
    await client.stop()
    await other.stop()


async def test_a_limiter_that_hangs_holds_nobody_for_long() -> None:
    limiter = LosesAnswers()
    client = LimitClient(limiter, answer_within_s=0.05)
    limiter.hangs = True
    with pytest.raises(ApiError) as refused:
        await ask(client, ONE)
    assert refused.value.code == "limits_unavailable"
    limiter.hangs = False
    await client.stop()


async def test_a_client_that_leaves_while_it_asks_gives_its_place_back() -> None:
    class Slow(BookCalls):
        go_on = asyncio.Event()

        async def call(self, method: str, /, *args: Any, **kwargs: Any) -> Any:
            answer = await super().call(method, *args, **kwargs)
            await self.go_on.wait()
            return answer

    limiter = Slow()
    client = LimitClient(limiter)
    asking = asyncio.create_task(ask(client, ONE))
    await wait_until(lambda: limiter.num_calls == 1)
    asking.cancel()
    await asyncio.wait([asking])
    limiter.go_on.set()
    assert isinstance(await ask(client, ONE), str)
    await client.stop()


async def test_a_new_book_learns_what_runs_and_what_was_used() -> None:
    clock = Clock()
    limiter = BookCalls(clock=clock)
    clients = [LimitClient(limiter, sync_s=0.01, clock=clock) for _ in range(2)]
    limits = Limits(10, 100, 2)
    first, second = await ask(clients[0], limits, 30), await ask(clients[1], limits, 30)
    assert isinstance(first, str) and isinstance(second, str)
    await clients[1].end(second, 20).wait()
    clock.now += 10
    limiter.restart(recovery_s=3)
    with pytest.raises(ApiError) as refused:
        await ask(clients[0], limits)
    assert (refused.value.code, refused.value.retry_after_s) == ("limits_unavailable", 3)
    num_calls = limiter.num_calls
    await wait_until(lambda: limiter.num_calls > num_calls + 8)  # both have said something by themselves
    clock.now += 3
    refusal = await ask(clients[0], limits, 51)
    assert isinstance(refusal, Refusal) and (refusal.reason, refusal.used) == ("tokens", 50)
    assert isinstance(await ask(clients[1], limits, 50), str)
    for client in clients:
        await client.stop()


async def test_what_began_unasked_is_counted_as_soon_as_there_is_a_book() -> None:
    limiter = BookCalls()
    client, other = LimitClient(limiter, sync_s=0.01), LimitClient(limiter)
    limiter.is_away = True
    lease = client.begin_unasked("key", 5)
    await wait_until(lambda: limiter.num_calls > 1)
    limiter.is_away = False
    num_calls = limiter.num_calls
    await wait_until(lambda: limiter.num_calls > num_calls)
    assert isinstance(await ask(other, ONE), Refusal)
    await client.end(lease, 5).wait()
    assert isinstance(await ask(other, ONE), str)
    await client.stop()
    await other.stop()


async def test_a_relay_that_stops_tells_what_ended() -> None:
    limiter = BookCalls()
    client, other = LimitClient(limiter), LimitClient(limiter)
    lease = await ask(client, ONE)
    assert isinstance(lease, str)
    client.end(lease, 0)
    await client.stop()
    assert isinstance(await ask(other, ONE), str)
    await other.stop()


async def test_the_journal_keeps_a_minute_and_then_the_relay_is_silent_again() -> None:
    clock = Clock()
    limiter = BookCalls(clock=clock)
    client = LimitClient(limiter, sync_s=0.001, clock=clock)
    lease = await ask(client, ONE)
    assert isinstance(lease, str)
    await client.end(lease, 3).wait()
    clock.now += 61

    async def is_silent() -> bool:
        num_calls = limiter.num_calls
        await asyncio.sleep(0.05)
        return limiter.num_calls == num_calls

    await wait_until(is_silent)
    await client.stop()


class Unreliable(BookCalls):
    """Loses messages, loses answers, and is restarted, all by chance."""

    def __init__(self, chance: random.Random, clock: Clock) -> None:
        super().__init__(clock=clock)
        self.chance = chance
        self.share_lost = 0.0

    async def call(self, method: str, /, *args: Any, **kwargs: Any) -> Any:
        if self.chance.random() < self.share_lost:
            raise TimeoutError
        answer = await super().call(method, *args, **kwargs)
        if self.chance.random() < self.share_lost:
            raise TimeoutError
        return answer


@pytest.mark.parametrize("seed", range(6))
async def test_never_more_than_the_limit_runs_whatever_is_lost_and_in_the_end_all_agree(seed: int) -> None:
    chance, clock = random.Random(seed), Clock()
    limiter = Unreliable(chance, clock)
    clients = [LimitClient(limiter, sync_s=0.002, clock=clock) for _ in range(3)]
    limit = Limits(concurrent_streams=5)
    held: list[tuple[LimitClient, str]] = []
    num_failed = num_refused = 0

    async def all_have_told() -> bool:
        """Each relay has exchanged two messages since: what it has to tell has arrived."""
        limiter.share_lost = 0.0
        await asyncio.gather(*(client.end(client.begin_unasked("other", 0), 0).wait() for client in clients))
        await asyncio.gather(*(client.end(client.begin_unasked("other", 0), 0).wait() for client in clients))
        return all(client._epoch == limiter.book.epoch for client in clients)

    for _ in range(60):
        limiter.share_lost = chance.choice([0.0, 0.0, 0.3, 0.8])
        clock.now += chance.random()
        if chance.random() < 0.1:
            limiter.restart(recovery_s=1.0)
            await wait_until(all_have_told)
            clock.now += 1.0
        askers = [chance.choice(clients) for _ in range(chance.randrange(4))]
        answers = await asyncio.gather(*(ask(client, limit) for client in askers), return_exceptions=True)
        for client, answer in zip(askers, answers, strict=True):
            if isinstance(answer, str):
                held.append((client, answer))
            num_failed += isinstance(answer, ApiError)
            num_refused += isinstance(answer, Refusal)
        assert len(held) <= 5
        chance.shuffle(held)
        while held and chance.random() < 0.4:
            client, lease_id = held.pop()
            client.end(lease_id, 1)
    assert num_failed and num_refused
    await wait_until(all_have_told)
    running = {lease_id for usage in limiter.book._keys.values() for lease_id in usage.running()}
    assert running == {lease_id for _, lease_id in held}
    for client in clients:
        await client.stop()
