"""Requests go where their prompt was computed before, and nowhere into a crowd."""

import asyncio
import itertools
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from services.discovery import ReplicaEndpoint
from services.prompt_prefix import BLOCK_BYTES, MAX_BLOCKS, blake2b, fingerprint
from services.replica_choice import BLOCKS_PER_REPLICA, Candidate, ReplicaChoice
from services.replica_picker import ReplicaPicker

SYSTEM = {"role": "system", "content": "You are the help desk of a shipyard. " * 40}


def chat(*texts: str) -> dict[str, object]:
    roles = itertools.cycle(("user", "assistant"))
    return {"messages": [SYSTEM, *({"role": next(roles), "content": text} for text in texts)]}


def idle(*replica_ids: str, load: int = 0) -> list[Candidate]:
    return [Candidate(replica_id, load, 4) for replica_id in replica_ids]


def test_prompts_share_as_many_hashes_as_they_share_blocks() -> None:
    first, second = fingerprint(chat("a" * 2000)), fingerprint(chat("a" * 1000 + "b" * 1000))
    common = [a for a, b in zip(first, second, strict=True) if a == b]
    assert sum(block.num_bytes for block in common) == len(f"system\n{SYSTEM['content']}\n") + BLOCK_BYTES
    assert fingerprint(chat("a", "b", "c"))[: len(fingerprint(chat("a")))] == fingerprint(chat("a"))
    assert fingerprint({"messages": [{"role": "user", "content": "a"}]}) != fingerprint({"prompt_text": "a"})


def test_a_later_block_is_told_apart_by_what_came_before_it() -> None:
    same = "x" * BLOCK_BYTES
    first = fingerprint({"prompt_text": "a" * BLOCK_BYTES + same})
    second = fingerprint({"prompt_text": "b" * BLOCK_BYTES + same})
    assert first[1].hash != second[1].hash


def test_all_kinds_of_prompts_have_fingerprints_of_bounded_length() -> None:
    assert len(fingerprint({"prompt_text": "x" * 10_000_000})) == MAX_BLOCKS
    assert len(fingerprint({"prompt_token_ids": list(range(1000))})) == -(-4000 // BLOCK_BYTES)
    parts = {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, {"role": "a", "content": None}]
    }
    assert len(fingerprint(parts)) == 2
    assert fingerprint(parts | {"tools": [{"type": "function"}]})[0] != fingerprint(parts)[0]
    assert fingerprint({"prompt_text": "\ud800"})


def test_a_conversation_stays_where_it_was() -> None:
    choice = ReplicaChoice(random.Random(1))
    homes: dict[int, str] = {}
    talks = {number: [f"Question {number}? " * 30] for number in range(12)}
    for turn in range(4):
        for number, texts in talks.items():
            prompt = fingerprint(chat(*texts))
            chosen = choice.choose(idle("a", "b", "c"), prompt).replica_id
            choice.note(chosen, prompt)
            assert homes.setdefault(number, chosen) == chosen, (turn, number)
            texts += [f"Answer {number}.{turn} " * 30, f"And {number}.{turn}? " * 30]


def test_an_overloaded_replica_is_left_and_the_next_also_has_the_beginning_then() -> None:
    choice, prompt = ReplicaChoice(random.Random(1)), fingerprint(chat("Hello" * 100))
    choice.note("a", prompt)
    assert choice.choose([Candidate("a", 3, 4), Candidate("b", 0, 4)], prompt).replica_id == "a"
    assert choice.choose([Candidate("a", 4, 4), Candidate("b", 0, 4)], prompt).replica_id == "b"
    # All are full: a little longer a queue is worth it, a much longer one is not.
    assert choice.choose([Candidate("a", 7, 4), Candidate("b", 4, 4)], prompt).replica_id == "a"
    assert choice.choose([Candidate("a", 9, 4), Candidate("b", 4, 4)], prompt).replica_id == "b"


def test_without_a_common_beginning_the_less_busy_of_two_is_taken() -> None:
    choice = ReplicaChoice(random.Random(1))
    loads = {"a": 3, "b": 1, "c": 0}
    candidates = [Candidate(name, load, 4) for name, load in loads.items()]
    counts = Counter(choice.choose(candidates, ()).replica_id for _ in range(600))
    assert counts["a"] == 0  # it is never the less busy one
    assert 300 < counts["c"] < 500
    assert counts["b"] > 100


def test_what_was_sent_long_ago_and_where_nobody_is_any_more_is_forgotten() -> None:
    choice, first = ReplicaChoice(), fingerprint({"prompt_text": "first" * 1000})
    choice.note("a", first)
    for number in range(BLOCKS_PER_REPLICA // 8 + 1):
        choice.note("a", fingerprint({"prompt_text": f"{number:04}" * BLOCK_BYTES * 2}))
    assert choice.num_cached_bytes("a", first) == 0
    choice.forget(lambda replica_id: replica_id == "a")
    assert choice._seen == {}


def replica(replica_id: str, *, running: int = 0) -> ReplicaEndpoint:
    return ReplicaEndpoint(
        replica_id, "llm-tiny", "http://127.0.0.1:1", 1, running=running, info={"max_concurrency": 4}
    )


async def test_prompts_are_hashed_only_where_there_is_a_choice_and_long_ones_alike() -> None:
    picker = ReplicaPicker(lambda _: True)
    for text in ("short " * 100, "long " * 10_000):
        body = {"prompt_text": text}
        assert await picker.fingerprint(body, 1) == ()
        assert await picker.fingerprint(body, 2) == fingerprint(body)


@pytest.mark.parametrize(
    "body",
    [
        {"prompt_text": "x" * 2_000_000},
        {"prompt_token_ids": list(range(200_000))},
        chat("y" * 1_000_000),
        chat(*map(str, range(600))),
    ],
)
async def test_others_have_their_turn_after_each_short_piece_of_a_long_prompt(
    body: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    num_hashed, before, in_a_turn = 0, 0, []

    def hashed(*args: object, **fields: object) -> object:
        nonlocal num_hashed
        num_hashed += 1
        return blake2b(*args, **fields)  # type: ignore[arg-type]

    async def others() -> None:
        nonlocal before
        while True:
            in_a_turn.append(num_hashed - before)
            before = num_hashed
            await asyncio.sleep(0)

    monkeypatch.setattr("services.prompt_prefix.blake2b", hashed)
    beside = asyncio.create_task(others())
    await asyncio.sleep(0)
    await ReplicaPicker(lambda _: True).fingerprint(body, 2)
    beside.cancel()
    assert num_hashed == MAX_BLOCKS
    assert max(in_a_turn) <= 32
    assert sum(in_a_turn) == num_hashed


def test_a_replica_that_hung_is_a_last_resort() -> None:
    picker, both = ReplicaPicker(lambda _: True), [replica("a"), replica("b", running=3)]
    picker.shun("a")
    assert {picker.pick(both, ()).replica_id for _ in range(20)} == {"b"}
    assert picker.pick(both[:1], ()).replica_id == "a"


def test_requests_on_their_way_count_before_the_replica_tells_of_them() -> None:
    picker, both = ReplicaPicker(lambda _: True), [replica("a"), replica("b", running=1)]
    for _ in range(2):
        picker.enter("a", ())
    assert picker.pick(both, ()).replica_id == "b"
    picker.leave("a")
    picker.leave("a")
    assert picker.pick(both, ()).replica_id == "a"


# A ladder: replicas that compute prompts and answers, requests that come faster and faster.


@dataclass
class _Replica:
    """`num_slots` requests at once; a byte of prompt that is not cached takes a unit of time, so does an answer."""

    num_slots: int = 4
    seen: set[bytes] = field(default_factory=set)
    ends: list[float] = field(default_factory=list)

    def load(self, now: float) -> int:
        self.ends = [end for end in self.ends if end > now]
        return len(self.ends)

    def take(self, now: float, prompt: tuple, answer: float) -> tuple[float, int]:
        """Time of the first token, and how many bytes had to be computed."""
        missing = sum(block.num_bytes for block in prompt if block.hash not in self.seen)
        self.seen |= {block.hash for block in prompt}
        running = sorted(end for end in self.ends if end > now)
        begins = running[-self.num_slots] if len(running) >= self.num_slots else now
        self.ends.append(begins + missing + answer)
        return begins + missing - now, missing


def simulate(gap: float, pick: Callable[[list[Candidate], tuple], str], *, seed: int = 3) -> tuple[float, int]:
    """Mean time to the first token and bytes computed, for 40 chats of 5 turns that share system prompts."""
    draw = random.Random(seed)
    replicas = {name: _Replica() for name in "abc"}
    talks = [[f"{number % 4}" * 3000, f"{number} asks " * 40] for number in range(40)]
    waits, computed, now = [], 0, 0.0
    for turn in range(5):
        draw.shuffle(talks)
        for texts in talks:
            now += draw.expovariate(1 / gap)
            prompt = fingerprint({"messages": [{"role": "x", "content": text} for text in texts]})
            candidates = [Candidate(name, replica.load(now), 4) for name, replica in replicas.items()]
            wait, missing = replicas[pick(candidates, prompt)].take(now, prompt, 1000)
            waits.append(wait)
            computed += missing
            texts += [f"answer {turn} " * 40, f"more {turn} " * 40]
    return sum(waits) / len(waits), computed


def round_robin() -> Callable[[list[Candidate], tuple], str]:
    turns = itertools.count()
    return lambda candidates, _prompt: candidates[next(turns) % len(candidates)].replica_id


def by_prefix() -> Callable[[list[Candidate], tuple], str]:
    choice = ReplicaChoice(random.Random(5))

    def pick(candidates: list[Candidate], prompt: tuple) -> str:
        chosen = choice.choose(candidates, prompt).replica_id
        choice.note(chosen, prompt)
        return chosen

    return pick


@pytest.mark.parametrize("gap", [2000.0, 800.0, 400.0, 200.0, 100.0])
def test_on_every_rung_of_a_ladder_the_first_token_comes_earlier_than_with_round_robin(gap: float) -> None:
    """From an idle fleet to three times what it can do."""
    turn_wait, turn_computed = simulate(gap, round_robin())
    wait, computed = simulate(gap, by_prefix())
    assert computed < 0.8 * turn_computed
    assert wait < turn_wait
