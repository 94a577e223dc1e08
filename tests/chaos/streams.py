"""Trials of streams that outlive their replicas: 64 answers of up to 200 tokens while replicas are killed, die, hang
and are drained. Each answer must be byte for byte the one that nothing disturbs.

    python -m tests.chaos.streams --trials 50 --seed 7
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import random
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from cluster.engine import GenerationRequest, SamplingParams
from services.config import PlatformConfig, StreamsConfig
from services.model_status import ApplicationState
from services.openai_stream import chat_logprobs, completion_logprobs
from tests.chaos.hash_engine import whole_answer
from tests.chaos.replicas import FAULTS, Fleet
from tests.services.harness import Running, running_endpoint

NUM_STREAMS = 64
NUM_TOKENS = 200
NUM_REPLICAS = 4
NUM_FAULTS = 12
"""At most; on a slow machine an answer would otherwise be moved for ever."""
STALL_S = 0.6
CONFIG = PlatformConfig(streams=StreamsConfig(stall_s=STALL_S, max_moves=20, move_wait_s=30))
STATES = {"llm-tiny": ApplicationState("llm-tiny", "DEPLOYING")}
KINDS = (
    "chat",
    "chat, stops",
    "chat, logprobs",
    "completion",
    "whole chat",
    "whole completion",
    "story",
    "whole story",
)


@dataclass
class Outcome:
    """Of one trial. `wrong` says which answers differ and how."""

    num_moves: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def has_passed(self) -> bool:
        """A trial in which no answer moved shows nothing."""
        return self.num_moves > 0 and not self.wrong


@asynccontextmanager
async def fleet_behind_endpoint(folder: Path, *, pace_s: float = 0.01) -> AsyncIterator[tuple[Running, Fleet]]:
    """An endpoint with four replicas."""
    async with running_endpoint(folder, config=CONFIG, states=STATES) as running:
        fleet = Fleet(running, pace_s=pace_s)
        try:
            for _ in range(NUM_REPLICAS):
                await fleet.grow()
            yield running, fleet
        finally:
            await fleet.close()


async def run_trial(running: Running, fleet: Fleet, seed: int, *, num_streams: int = NUM_STREAMS) -> Outcome:
    """All answers at once, with faults among them until they have ended."""
    outcome, draw, started = Outcome(), random.Random(seed), time.monotonic()
    moved_before = await num_moves(running)
    connector = aiohttp.TCPConnector(limit=0)
    headers = {"authorization": f"Bearer {running.key}"}
    async with aiohttp.ClientSession(running.url, connector=connector, headers=headers) as client:
        asked = [
            asyncio.create_task(ask(client, KINDS[number % len(KINDS)], seed * 1000 + number))
            for number in range(num_streams)
        ]
        disturbing = asyncio.create_task(disturb(fleet, draw, outcome.faults))
        try:
            found = await asyncio.gather(*asked)
        finally:
            disturbing.cancel()
            await asyncio.gather(disturbing, *asked, return_exceptions=True)
    outcome.wrong = [problem for problem in found if problem]
    outcome.num_moves = await num_moves(running) - moved_before
    outcome.seconds = time.monotonic() - started
    return outcome


async def num_moves(running: Running) -> int:
    """Of all answers since the endpoint started."""
    metrics = (await running.http.get("/metrics")).text
    _, _, number = metrics.partition('windfarm_streams_moved_total{model="tiny"} ')
    return int(float(number.split("\n")[0])) if number else 0


async def disturb(fleet: Fleet, draw: random.Random, faults: Counter[str]) -> None:
    """One fault after the other, each at a replica that is answering; each lost one is replaced a moment later."""
    for _ in range(NUM_FAULTS):
        # By what was answered and not by time: a fast machine's answers would have ended before the first fault.
        await fleet.answers(draw.randrange(200, 1600))
        fault = draw.choice(FAULTS)
        faults[fault] += 1
        await fleet.lose(draw.choice(fleet.answering), fault)
        await asyncio.sleep(draw.uniform(0.0, 0.2))
        await fleet.grow()


async def ask(client: aiohttp.ClientSession, kind: str, number: int) -> str | None:
    """What is wrong with one answer; none: it is the undisturbed one."""
    path, body, request = question(kind, number)
    text, logprobs, last = whole_answer(request)
    assert last.usage is not None
    expected = Said(
        text,
        last.finish_reason,
        {"prompt_tokens": last.usage.num_prompt_tokens, "completion_tokens": last.usage.num_completion_tokens},
        chat_logprobs(logprobs) if path.startswith("/v1/chat") else completion_logprobs(logprobs, 0),
    )
    async with client.post(path, json=body) as answer:
        received = await answer.text()
    if answer.status != 200:
        return f"{kind} {number}: status {answer.status}: {received[:300]}"
    if not body.get("stream"):
        said = read_whole(json.loads(received))
    elif received.endswith("data: [DONE]\n\n"):
        said = read_events(received)
    else:
        return f"{kind} {number}: no [DONE]: {received[-300:]!r}"
    if request.sampling.logprobs is None:
        expected.logprobs = said.logprobs = None
    elif path == "/v1/completions":
        # Where a token begins depends on how much text was held back when it came, which chunks decide.
        for each in (expected, said):
            each.logprobs.pop("text_offset")
    return None if said == expected else f"{kind} {number}: {difference(said, expected)}"


def question(kind: str, number: int) -> tuple[str, dict[str, Any], GenerationRequest]:
    """Path, body, and what the engine is asked."""
    draw = random.Random(number)
    fields: dict[str, Any] = {"max_tokens": NUM_TOKENS if draw.random() < 0.9 else draw.randint(1, NUM_TOKENS)}
    fields |= {"temperature": 0} if draw.random() < 0.5 else {"temperature": 1, "seed": number}
    sampling: dict[str, Any] = dict(fields)
    if kind == "chat, stops":
        fields["stop"] = draw.sample(["STOPSTOP", " the of a", "\n\n\n", "é.0", "字 a字", '😀\n"'], k=2)
        sampling["stop"] = tuple(fields["stop"])
    if kind == "chat, logprobs":
        fields |= {"logprobs": True, "top_logprobs": 3}
        sampling["logprobs"] = 3
    if kind == "whole completion":
        fields["logprobs"] = sampling["logprobs"] = 2
    if "story" in kind:
        fields["windfarm_tools"] = ["calculator"]  # makes it go through the story; the harness tells a plain one
    if not kind.startswith("whole"):
        fields |= {"stream": True, "stream_options": {"include_usage": True}}
    if "completion" in kind:
        prompt = f"Once upon a time {number}"
        body = {"model": "tiny", "prompt": prompt, **fields}
        return "/v1/completions", body, GenerationRequest("", prompt_text=prompt, sampling=SamplingParams(**sampling))
    messages = [{"role": "user", "content": f"Question {number}"}]
    body = {"model": "tiny", "messages": messages, **fields}
    return "/v1/chat/completions", body, GenerationRequest("", messages=messages, sampling=SamplingParams(**sampling))


@dataclass
class Said:
    text: str = ""
    finish_reason: str | None = None
    usage: dict[str, int] = field(default_factory=dict)
    logprobs: Any = None


def read_whole(answer: dict[str, Any]) -> Said:
    (choice,) = answer["choices"]
    text = choice["text"] if "text" in choice else choice["message"]["content"]
    logprobs = choice["logprobs"]
    return Said(text, choice["finish_reason"], short_usage(answer["usage"]), (logprobs or {}).get("content", logprobs))


def read_events(received: str) -> Said:
    """Joins the chunks as a client does. A second role, a second end or text after it is a fault as well."""
    said, num_roles = Said(logprobs=[]), 0
    for event in received.removesuffix("data: [DONE]\n\n").split("\n\n"):
        if not event.startswith("data: "):
            continue  # comments
        chunk = json.loads(event.removeprefix("data: "))
        if chunk.get("usage"):
            assert not said.usage, "usage came twice"
            said.usage = short_usage(chunk["usage"])
        for choice in chunk["choices"]:
            delta = choice.get("delta", choice)
            num_roles += "role" in delta
            assert said.finish_reason is None, "something came after the finish reason"
            said.text += delta.get("content") or delta.get("text") or ""
            said.finish_reason = choice["finish_reason"]
            if choice.get("logprobs"):
                said.logprobs += choice["logprobs"].get("content") or ()
    assert num_roles <= 1, "the role came twice"
    return said


def short_usage(usage: dict[str, Any]) -> dict[str, int]:
    return {name: usage[name] for name in ("prompt_tokens", "completion_tokens")}


def difference(said: Said, expected: Said) -> str:
    for name in ("text", "finish_reason", "usage", "logprobs"):
        got, wanted = getattr(said, name), getattr(expected, name)
        if got != wanted:
            at = next((n for n, (a, b) in enumerate(zip(got, wanted, strict=False)) if a != b), "the end")
            return f"{name} differs at {at}: {str(got)[-200:]!r} is not {str(wanted)[-200:]!r}"
    return "nothing differs"


async def campaign(num_trials: int, first_seed: int) -> tuple[int, int]:
    """Trials that passed and that failed."""
    num_passed = num_failed = num_moved = 0
    with tempfile.TemporaryDirectory(prefix="windfarm-chaos-") as folder:
        for number in range(num_trials):
            home = Path(folder, str(number))
            home.mkdir()
            async with fleet_behind_endpoint(home) as (running, fleet):
                outcome = await run_trial(running, fleet, first_seed + number)
            num_passed, num_failed = num_passed + outcome.has_passed, num_failed + (not outcome.has_passed)
            faults, wrong = dict(outcome.faults), len(outcome.wrong)
            num_moved += outcome.num_moves
            line = f"trial {number + 1}: {faults}, {outcome.num_moves} moves, {outcome.seconds:.1f} s, {wrong} wrong"
            print(line, flush=True)
            for problem in outcome.wrong[:3]:
                print("   ", problem)
    print(f"{num_moved} answers went on elsewhere")
    return num_passed, num_failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    logging.disable()  # lost connections by the hundred
    num_passed, num_failed = asyncio.run(campaign(options.trials, options.seed))
    print(f"{num_passed} passed, {num_failed} failed")


if __name__ == "__main__":
    main()
