"""`python -m tests.bench.long_prompt`: what a long prompt costs those beside it in llama.cpp, with turns and without.

With prompts of random tokens, nothing of which is cached: a short prompt 0.1 s after a long one, in either
slot; two long ones 0.1 s apart; an answer that runs beside a long one; and a long one alone. Each is tried with
turns and without them in turn, for each size of a batch. The last line is one JSON object, medians in seconds.

    --rounds 3 --long 1000 --short 20    more rounds, other lengths (tokens)
    --batches 512 128                    sizes of a batch (tokens)
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import statistics
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from unittest import mock

from cluster.engine import Engine, GenerationRequest, SamplingParams
from cluster.engines.choice import EngineChoice, make_engine
from cluster.engines.llamacpp_turns import Turns
from cluster.engines.settings import EngineSettings
from cluster.home import open_home
from cluster.weights.prepare import prepare
from tests.bench.laptop import tell

CONTEXT = 2048
HEAD_START_S = 0.1
ANSWER_TOKENS = 200
_random = random.Random(7)
_numbers = itertools.count()


@dataclass(frozen=True)
class Sizes:
    long: int
    short: int


@dataclass
class Seen:
    """Seconds of each round."""

    by_name: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, seconds: float) -> None:
        self.by_name.setdefault(name, []).append(seconds)

    def medians(self) -> dict[str, float]:
        return {name: round(statistics.median(values), 2) for name, values in self.by_name.items()}


def main() -> None:
    options = read_options()
    sizes = Sizes(options.long, options.short)
    print(json.dumps(asyncio.run(measure(options.rounds, sizes, options.batches))))


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--long", type=int, default=1000)
    parser.add_argument("--short", type=int, default=20)
    parser.add_argument("--batches", type=int, nargs="+", default=[512, 128])
    return parser.parse_args()


async def measure(rounds: int, sizes: Sizes, batches: Sequence[int]) -> dict[str, object]:
    seen = {(batch, takes_turns): Seen() for batch in batches for takes_turns in (True, False)}
    for number in range(rounds):
        for (batch, takes_turns), each in seen.items():
            with turns(takes_turns):
                await try_beside_short(batch, sizes, each)
                await try_others(batch, sizes, each)
        tell(f"round {number + 1} of {rounds}")
    found = {f"batch_{batch}_{'turns' if turns else 'none'}": each.medians() for (batch, turns), each in seen.items()}
    for name, figures in found.items():
        tell(f"{name}: {figures}")
    return found | {"long": sizes.long, "short": sizes.short, "rounds": rounds, "cpus": os.cpu_count()}


@asynccontextmanager
async def started(batch: int) -> AsyncIterator[Engine]:
    location = prepare("tiny", "gguf", open_home())
    options = {"n_batch": batch}
    settings = EngineSettings("tiny", location, max_context=CONTEXT, parallel_requests=2, options=options)
    engine = make_engine(EngineChoice("llamacpp", "gguf", uses_gpu=False), settings)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


@contextmanager
def turns(takes_turns: bool) -> Iterator[None]:
    if takes_turns:
        yield
        return
    with mock.patch.object(Turns, "note", lambda *_: False):
        yield


async def try_beside_short(batch: int, sizes: Sizes, seen: Seen) -> None:
    """The slot that was not used for longest is taken first: the two prompts change places after one request more."""
    for place, num_before in {"one_slot": 1, "other_slot": 2}.items():
        async with started(batch) as engine:
            for _ in range(num_before):
                await ask(engine, sizes.short)
            long, short = await asyncio.gather(ask(engine, sizes.long), ask(engine, sizes.short, HEAD_START_S))
            seen.add(f"short_in_{place}", short)
            seen.add(f"long_beside_short_in_{place}", long)


async def try_others(batch: int, sizes: Sizes, seen: Seen) -> None:
    async with started(batch) as engine:
        await ask(engine, sizes.short)  # the first one warms up
        seen.add("long_alone", await ask(engine, sizes.long))
        first, second = await asyncio.gather(ask(engine, sizes.long), ask(engine, sizes.long, HEAD_START_S))
        seen.add("first_of_two_long", first)
        seen.add("second_of_two_long", second)
        gap, _ = await asyncio.gather(longest_gap(engine, sizes.short), ask(engine, sizes.long, 5 * HEAD_START_S))
        seen.add("longest_gap_of_an_answer", gap)


async def ask(engine: Engine, length: int, wait_s: float = 0.0) -> float:
    """Seconds to the first token."""
    await asyncio.sleep(wait_s)
    began = time.perf_counter()
    async with aclosing(engine.generate(request(length, 1))) as chunks:
        async for _ in chunks:
            return time.perf_counter() - began
    raise AssertionError("no token came")


async def longest_gap(engine: Engine, length: int) -> float:
    times = []
    async with aclosing(engine.generate(request(length, ANSWER_TOKENS))) as chunks:
        async for _ in chunks:
            times.append(time.perf_counter())
    return max(later - earlier for earlier, later in itertools.pairwise(times))


def request(length: int, max_tokens: int) -> GenerationRequest:
    ids = [_random.randrange(1000, 40_000) for _ in range(length)]
    sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True, temperature=0.0)
    return GenerationRequest(f"r{next(_numbers)}", prompt_token_ids=ids, sampling=sampling)


if __name__ == "__main__":
    main()
