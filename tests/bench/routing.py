"""`make bench-routing`: chats that share system prompts and documents, on local replicas, sent to where their beginning
is cached or round robin. A ladder of clients from idle to beyond saturation; the last line printed is one JSON object.

Three llama.cpp replicas of two slots and one thread each share the cores, so more clients than cores add no capacity:
what is compared is how much has to be computed.

    ARGS="--rungs 2 6 12 --turns 4"    more of it
"""

import argparse
import asyncio
import itertools
import json
import os
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from services.prompt_prefix import BLOCK_BYTES, fingerprint
from services.relay import ModelPool
from services.replica_choice import Candidate, ReplicaChoice
from tests.chaos.engines import replicas_of

NUM_REPLICAS = 3
NUM_DOCUMENTS = 3
ANSWER_TOKENS = 16
WORDS = ("harbour", "mill", "river", "winter", "clock", "letter", "bridge", "market", "stone", "lantern", "orchard")


class RoundRobin(ReplicaChoice):
    """What a plain load balancer does."""

    def __init__(self) -> None:
        super().__init__()
        self._turns = itertools.count()

    def choose(self, candidates: Sequence[Candidate], prompt: object) -> Candidate:
        return sorted(candidates, key=lambda each: each.replica_id)[next(self._turns) % len(candidates)]


@dataclass
class Rung:
    """What one ladder step came to."""

    first_token_s: list[float] = field(default_factory=list)
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    seconds: float = 0.0


async def main() -> None:
    options = read_options()
    result: dict[str, object] = {"cpus": os.cpu_count(), "hash_ms_per_mib": round(time_hashing(), 2)}
    async with replicas_of("llamacpp", NUM_REPLICAS, num_slots=2) as (_, pool):
        for number, (rung, repeat) in enumerate(itertools.product(options.rungs, range(options.repeats))):
            for name in ("prefix", "round_robin") if repeat % 2 == 0 else ("round_robin", "prefix"):
                pool.picker.choice = ReplicaChoice(random.Random(number)) if name == "prefix" else RoundRobin()
                # Documents of its own, so that neither finds what the other has computed.
                step = await climb(pool, rung, options.turns, seed=f"{name}{number}")
                ladder = result.setdefault(f"clients_{rung}", {})
                ladder.setdefault(name, []).append(step)  # type: ignore[attr-defined]
    for key in [key for key in result if key.startswith("clients_")]:
        result[key] = {name: summary(steps) for name, steps in result[key].items()}  # type: ignore[attr-defined]
    print(json.dumps(result))


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rungs", type=int, nargs="+", default=[1, 3, 6, 12], help="clients that ask at once")
    parser.add_argument("--turns", type=int, default=3, help="questions of each chat")
    parser.add_argument("--repeats", type=int, default=2)
    return parser.parse_args()


async def climb(pool: ModelPool, num_clients: int, num_turns: int, seed: str) -> Rung:
    """Each client holds one chat about one of a few documents after the other chats of that document began."""
    rung, draw = Rung(), random.Random(seed)
    documents = [" ".join(draw.choices(WORDS, k=350)) for _ in range(NUM_DOCUMENTS)]

    async def chat(number: int) -> None:
        system = f"You answer from this document.\n{documents[number % NUM_DOCUMENTS]}"
        messages = [{"role": "system", "content": system}]
        for turn in range(num_turns):
            messages.append({"role": "user", "content": f"Reader {number}, question {turn}: what of the mill?"})
            messages.append({"role": "assistant", "content": await ask(pool, messages, rung)})

    waiting = list(range(max(num_clients, 2 * NUM_DOCUMENTS)))

    async def client() -> None:
        while waiting:
            await chat(waiting.pop(0))

    started = time.monotonic()
    await asyncio.gather(*(client() for _ in range(num_clients)))
    rung.seconds = time.monotonic() - started
    return rung


async def ask(pool: ModelPool, messages: Sequence[dict[str, str]], rung: Rung) -> str:
    body = {
        "request_id": "routing",
        "messages": list(messages),
        "sampling": {"max_tokens": ANSWER_TOKENS, "temperature": 0},
        "render": {"kind": "events"},
    }
    started, text = time.monotonic(), ""
    stream = await pool.generate("tiny", body)
    try:
        async for frame in stream:
            if frame.num_token_ids and not text:
                rung.first_token_s.append(time.monotonic() - started)
            text += frame.json().get("text", "") if frame.payload else ""
    finally:
        await stream.close()
    assert stream.end is not None
    rung.num_prompt_tokens += stream.end["usage"]["num_prompt_tokens"]
    rung.num_cached_tokens += stream.end["usage"]["num_cached_tokens"]
    return text


def summary(steps: Sequence[Rung]) -> dict[str, float]:
    waits = sorted(wait for step in steps for wait in step.first_token_s)
    return {
        "first_token_ms_p50": round(1000 * statistics.median(waits)),
        "first_token_ms_p95": round(1000 * waits[int(0.95 * len(waits))]),
        "cached_share": round(sum(s.num_cached_tokens for s in steps) / sum(s.num_prompt_tokens for s in steps), 3),
        "seconds": round(sum(step.seconds for step in steps), 1),
    }


def time_hashing() -> float:
    """Milliseconds for a fingerprint of as much text as is looked at, scaled to one MiB."""
    body = {"prompt_text": "x" * (256 * BLOCK_BYTES)}
    times = []
    for _ in range(20):
        started = time.perf_counter()
        fingerprint(body)
        times.append(time.perf_counter() - started)
    return 1000 * statistics.median(times) * (1 << 20) / (256 * BLOCK_BYTES)


if __name__ == "__main__":
    asyncio.run(main())
