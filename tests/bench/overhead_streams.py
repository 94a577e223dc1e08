"""Streams of one model through different servers in turn: tokens per second, first token, processor time per token.

The load client is a process of its own: `python -m tests.bench.overhead_streams JSON`.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from tests.bench.laptop import MODEL, ROOT, tell
from tests.bench.overhead_servers import Server, cpu_times
from tests.bench.streaming import stream_chat

Sample = dict[str, Any]


@dataclass(frozen=True)
class Streams:
    """The load on one server. `number` makes prompts that no run before had."""

    api: str
    key: str | None
    num_streams: int
    num_tokens: int
    number: int


@dataclass(frozen=True)
class Run:
    """What it came to. Times in seconds; `client_cpu_s`: processor time of the process that asks."""

    tokens_per_s: float
    first_token_s: float
    client_cpu_s: float
    num_tokens: int


def measure_streams(
    servers: Mapping[str, Server], num_streams: int, num_tokens: int, rounds: int, keep: Callable[[Sample], None]
) -> None:
    """`keep` gets one sample for each round, in which every server has its turn; one round warms up."""
    for number in range(-1, rounds):
        names = list(servers) if number % 2 else list(servers)[::-1]
        sample = {name: measure(servers[name], num_streams, num_tokens, number) for name in names}
        rates = ", ".join(f"{name} {sample[name]['tokens_per_s']:.1f}" for name in servers)
        tell(f"{num_streams} streams, round {number + 1}: {rates} tokens/s")
        if number >= 0:
            keep(sample)


def measure(server: Server, num_streams: int, num_tokens: int, number: int) -> dict[str, float]:
    """A `Run`, and processor time per token in ms: outside of the engine, and of windfarm's public endpoint."""
    # Rounds of another call of this program must not find their prompts in a cache.
    load = Streams(server.api, server.key, num_streams, num_tokens, time.time_ns() + number)
    before = cpu_times(server)
    command = [sys.executable, "-m", "tests.bench.overhead_streams", json.dumps(asdict(load))]
    answer = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    after = cpu_times(server)
    run = Run(**json.loads(answer.stdout.splitlines()[-1]))
    return asdict(run) | {
        "outside_cpu_ms": 1000 * (after.outside_s - before.outside_s) / run.num_tokens,
        "endpoint_cpu_ms": 1000 * (after.endpoint_s - before.endpoint_s) / run.num_tokens,
    }


def run_streams(streams: Streams) -> Run:
    """All streams begin at once; the rate counts from there to the end of the last one."""

    def one(number: int):  # type: ignore[no-untyped-def]
        prompt = f"Story {streams.number} of reader {number}: tell me a long story about a lighthouse."
        return stream_chat(streams.api, streams.key, MODEL, prompt, streams.num_tokens)

    with ThreadPoolExecutor(streams.num_streams) as threads:
        cpu, started = time.process_time(), time.perf_counter()
        answers = list(threads.map(one, range(streams.num_streams)))
        seconds, cpu_s = time.perf_counter() - started, time.process_time() - cpu
    tokens = sum(answer.num_tokens for answer in answers)
    return Run(tokens / seconds, statistics.median(answer.first_token_s for answer in answers), cpu_s, tokens)


if __name__ == "__main__":
    print(json.dumps(asdict(run_streams(Streams(**json.loads(sys.argv[1]))))))
