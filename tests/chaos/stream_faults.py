"""Faults of model replicas, clients and load, on replicas with a hash engine: each answer has to be, byte for byte, the
one that nothing disturbs, or to end with an error."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import httpx

from cluster.engine import GenerationRequest, SamplingParams
from services.config import PlatformConfig, QueuesConfig, StreamsConfig
from services.model_status import ApplicationState
from tests.chaos.faults import Fault, Heard, LossWatch, Outcome, hear, until
from tests.chaos.hash_engine import whole_answer
from tests.chaos.replicas import HANGS_S, Fleet
from tests.chaos.streams import read_events
from tests.services.harness import Running, running_endpoint

STATES = {"llm-tiny": ApplicationState("llm-tiny", "DEPLOYING")}
NUM_STREAMS, NUM_TOKENS = 8, 150
NUM_SLOTS = 4
LONG = 3000
"""More than a client that stops to read leaves in the buffers."""
STALL_S = StreamsConfig().stall_s
NEVER_S = 3600.0


def faults(quick: bool) -> list[Fault]:
    """`quick`: with a short `stall_s`, for what waits for it."""
    stall_s = 0.5 if quick else STALL_S
    return [
        Fault("engine crash", 10, partial(lose_a_replica, fault="die")),
        Fault("engine hang", stall_s + 10, partial(lose_a_replica, fault="hang", stall_s=stall_s), run_together=True),
        Fault("replica killed", 10, partial(lose_a_replica, fault="kill")),
        Fault("replica drained", 10, partial(lose_a_replica, fault="drain")),
        Fault("model changed under a stream", 10, change_the_model),
        Fault("last replica killed", 20, lose_the_last_replica),
        Fault("slow node", 10, slow_down_a_replica),
        Fault("clock jump", 1, disturb_the_clock),
        Fault("client reads slowly", 10, read_slowly),
        Fault("client vanishes", 5, leave),
        Fault("10x load", 5, overload),
    ]


@asynccontextmanager
async def fleet_of(
    folder: Path,
    size: int = 2,
    *,
    pace_s: float = 0.01,
    num_slots: int = 1000,
    hangs_s: float = HANGS_S,
    config: PlatformConfig | None = None,
    **streams: Any,
) -> AsyncIterator[tuple[Running, Fleet]]:
    config = config or PlatformConfig(streams=StreamsConfig(**streams))
    async with running_endpoint(folder, config=config, states=STATES) as running:
        fleet = Fleet(running, pace_s=pace_s, num_slots=num_slots, hangs_s=hangs_s)
        try:
            for _ in range(size):
                await fleet.grow()
            yield running, fleet
        finally:
            await fleet.close()


class Streams:
    """Answers that run at once, each with what it has to be."""

    def __init__(
        self,
        running: Running,
        number: int = NUM_STREAMS,
        num_tokens: int = NUM_TOKENS,
        http: httpx.AsyncClient | None = None,
    ) -> None:
        self._asked = [
            [{"role": "user", "content": f"Question {n}: {time.monotonic_ns()}"}]  # no answer is known before
            for n in range(number)
        ]
        self._num_tokens = num_tokens
        self.heard = [Heard() for _ in self._asked]
        self._tasks = [
            asyncio.create_task(hear(http or running.http, self._body(messages), heard))
            for messages, heard in zip(self._asked, self.heard, strict=True)
        ]

    def _body(self, messages: Any) -> dict[str, Any]:
        body = {"model": "tiny", "messages": messages, "max_tokens": self._num_tokens, "temperature": 0}
        return body | {"stream": True, "stream_options": {"include_usage": True}}

    async def end(self) -> None:
        await asyncio.gather(*self._tasks)

    @property
    def longest_silence_s(self) -> float:
        return max(heard.longest_silence_s for heard in self.heard)

    def wrong(self, but: Sequence[Heard] = ()) -> list[str]:
        """What is not as if nothing had happened, in all answers `but` these."""
        return [why for n, heard in enumerate(self.heard) if heard not in but and (why := self._why_wrong(n, heard))]

    def _why_wrong(self, number: int, heard: Heard) -> str | None:
        if not heard.is_complete:
            return f"answer {number}: status {heard.status}, ends with {heard.body[-300:]!r}"
        sampling = SamplingParams(max_tokens=self._num_tokens, temperature=0)
        text, _, last = whole_answer(GenerationRequest("", messages=self._asked[number], sampling=sampling))
        assert last.usage is not None
        said = read_events(heard.body)
        if said.text != text or said.usage["completion_tokens"] != last.usage.num_completion_tokens:
            return f"answer {number} is another one: {said.text[-100:]!r} is not {text[-100:]!r}"
        return None


def judged(streams: Streams, *, seconds: float | None = None) -> Outcome:
    wrong = streams.wrong()
    seconds = streams.longest_silence_s if seconds is None else seconds
    return Outcome(seconds, "the whole answer" if not wrong else "something else", "; ".join(wrong[:2]) or None)


@cache
def long_question() -> list[dict[str, str]]:
    """Its answer goes on to the limit."""
    for number in range(1000):
        messages = [{"role": "user", "content": f"Question {number}"}]
        sampling = SamplingParams(max_tokens=LONG, temperature=0)
        if whole_answer(GenerationRequest("", messages=messages, sampling=sampling))[2].finish_reason == "length":
            return messages
    raise AssertionError("no answer is long")


async def lose_a_replica(folder: Path, *, fault: str, stall_s: float = STALL_S) -> Outcome:
    """One that hangs does so until the trial is over, so that nothing but its silence tells of it."""
    async with fleet_of(folder, stall_s=stall_s, hangs_s=NEVER_S) as (running, fleet):
        watch, streams = LossWatch(running.directory), Streams(running)
        await fleet.answers(NUM_STREAMS * 5)
        fault_at = time.monotonic()
        await fleet.lose(fleet.answering[0], fault)
        await streams.end()
        moved = (await running.http.get("/metrics")).text
    outcome = replace(judged(streams), noticed_s=watch.seconds_after(fault_at))
    if outcome.problem is None and fault != "drain" and 'streams_moved_total{model="tiny"}' not in moved:
        return replace(outcome, problem="no stream was on the lost replica")
    return outcome


async def lose_the_last_replica(folder: Path) -> Outcome:
    """Serve starts another one, here after a second; the streams wait for it."""
    async with fleet_of(folder, size=1) as (running, fleet):
        watch, streams = LossWatch(running.directory), Streams(running)
        await fleet.answers(NUM_STREAMS * 5)
        fault_at = time.monotonic()
        await fleet.lose(fleet.alive[0], "kill")
        await asyncio.sleep(1)
        await fleet.grow()
        await streams.end()
    return replace(judged(streams), noticed_s=watch.seconds_after(fault_at))


async def change_the_model(folder: Path) -> Outcome:
    """Of two replicas with the old weights one is killed, then the other, while a third one has new weights."""
    async with fleet_of(folder, size=0) as (running, fleet):
        first = await fleet.grow(identity="old")
        streams = Streams(running)
        await fleet.answers(NUM_STREAMS * 5)
        new, other = await fleet.grow(identity="new"), await fleet.grow(identity="old")
        await fleet.lose(first, "kill")
        await until(lambda: other.engine.num_tokens > NUM_STREAMS * 5)
        num_new_tokens = new.engine.num_tokens
        watch, fault_at = LossWatch(running.directory), time.monotonic()
        await fleet.lose(other, "kill")
        await streams.end()
        later = Streams(running)
        await later.end()
    told = [heard for heard in streams.heard if "other weights" in heard.error.get("message", "")]
    wrong = [
        why for n, heard in enumerate(streams.heard) if heard not in told and (why := streams._why_wrong(n, heard))
    ]
    if num_new_tokens:
        wrong.append("a stream went on at other weights")
    if not told or any("[DONE]" in heard.body for heard in told):
        wrong.append(f"{len(told)} streams were told that the model was changed, or one also that it is complete")
    seen = "the stream goes on at another old replica, then an error event"
    outcome = Outcome(streams.longest_silence_s, seen, "; ".join(wrong[:2]) or None, watch.seconds_after(fault_at))
    return outcome if (after := judged(later)).problem is None else after


async def slow_down_a_replica(folder: Path) -> Outcome:
    """Ten times slower than the other one. Slow is no fault: nothing is moved, and new requests go elsewhere."""
    async with fleet_of(folder, size=1, pace_s=0.005) as (running, fleet):
        slow = await fleet.grow(pace_s=0.05)
        streams = Streams(running, num_tokens=60)
        await streams.end()
        moved = (await running.http.get("/metrics")).text
        later = Streams(running, num_tokens=60)
        await later.end()
    outcome = judged(streams)
    if 'streams_moved_total{model="tiny"}' in moved:
        return replace(outcome, problem="a stream was moved although its replica was only slow")
    if not slow.engine.num_tokens:
        return replace(outcome, problem="no stream was on the slow replica")
    return outcome if (later_one := judged(later)).problem is None else later_one


async def disturb_the_clock(folder: Path) -> Outcome:
    """The wall clock jumps a day ahead, then a week back, while answers come. (Of this process alone: there is one
    clock for all who work on a machine.)"""
    real, shift = time.time, 0.0
    async with fleet_of(folder) as (running, fleet):
        streams = Streams(running)
        await fleet.answers(NUM_STREAMS * 5)
        try:
            time.time = lambda: real() + shift  # type: ignore[assignment]
            for jump in (86_400.0, -7 * 86_400.0):
                shift = jump
                await fleet.answers(NUM_STREAMS * 5)
            during = Streams(running, number=2)
            await asyncio.gather(streams.end(), during.end())
        finally:
            time.time = real  # type: ignore[assignment]
        metrics = (await running.http.get("/metrics")).text
    if "streams_moved_total{" in metrics:
        return Outcome(streams.longest_silence_s, "-", "a jump of the clock moved streams")
    return judged(streams) if (other := judged(during)).problem is None else other


async def read_slowly(folder: Path) -> Outcome:
    """One client takes 64 bytes and then nothing for longer than `stall_s`; the others must not notice."""
    async with fleet_of(folder, stall_s=0.2) as (running, fleet):
        body = {"model": "tiny", "messages": long_question(), "stream": True, "max_tokens": LONG, "temperature": 0}
        body |= {"logprobs": True, "top_logprobs": 20}
        for replica in fleet.alive:
            replica.engine.pace_s = 0.0
        async with running.http.stream("POST", "/v1/chat/completions", json=body) as answer:
            parts = answer.aiter_raw(64)
            text = await anext(parts)
            others = Streams(running)
            await asyncio.sleep(1)
            await others.end()
            text += b"".join([part async for part in parts])
        metrics = (await running.http.get("/metrics")).text
    if not text.endswith(b"data: [DONE]\n\n"):
        return Outcome(0, "-", f"the slow client's answer ends with {text[-100:]!r}")
    if "streams_moved_total{" in metrics:
        return Outcome(0, "-", "a slow client made a replica suspect")
    return judged(others)


async def leave(folder: Path) -> Outcome:
    """The time until the replica has stopped to compute for a client that is gone."""
    async with fleet_of(folder, size=1) as (running, fleet):
        body = {"model": "tiny", "messages": long_question(), "max_tokens": LONG, "temperature": 0, "stream": True}
        asked = asyncio.create_task(hear(running.http, body))
        await fleet.answers(20)
        asked.cancel()
        left_at = time.monotonic()
        engine = fleet.alive[0].engine
        await until(lambda: engine.load[:2] == (0, 0))
        return Outcome(time.monotonic() - left_at, "nothing: it is gone; its slot is free")


async def overload(folder: Path) -> Outcome:
    """Ten times as many requests at once as there are slots; the time until a refusal."""
    config = PlatformConfig(queues=QueuesConfig(max_waiting=2 * NUM_SLOTS))
    async with fleet_of(folder, config=config, pace_s=0.002, num_slots=NUM_SLOTS) as (running, fleet):
        num_slots = len(fleet.alive) * NUM_SLOTS
        places = num_slots * 5 // 4 + 2 * NUM_SLOTS
        async with httpx.AsyncClient(
            base_url=running.url, headers=running.http.headers, timeout=60, trust_env=False, limits=httpx.Limits()
        ) as many:
            streams = Streams(running, number=10 * num_slots, num_tokens=40, http=many)
            await streams.end()
    refused = [heard for heard in streams.heard if heard.status in (429, 503)]
    served = [number for number, heard in enumerate(streams.heard) if heard.status == 200]
    wrong = [why for number in served if (why := streams._why_wrong(number, streams.heard[number]))]
    if len(refused) + len(served) != len(streams.heard):
        wrong.append(f"statuses {sorted({heard.status for heard in streams.heard})}")
    if not refused or any(int(heard.headers.get("retry-after", 0)) < 1 for heard in refused):
        wrong.append("a refusal without Retry-After, or none at all")
    if len(served) < places:
        wrong.append(f"only {len(served)} were served where {places} have a place")
    slowest = max((heard.seconds for heard in refused), default=0.0)
    return Outcome(slowest, f"{len(served)} answers, {len(refused)} refusals", "; ".join(wrong[:3]) or None)
