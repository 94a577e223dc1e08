"""`make bench-scaling`: 1 to 3 and back to 1 replicas while more and fewer clients ask.

The last line printed is one JSON object: failed requests, the share of requests within the target of the time to the
first token, and when replicas came and went. Engines have 2 slots and 1 thread each, so on two cores replicas add slots
and hardly any computing power.

    ARGS="--stage-s 30 --target-s 1.0"    longer stages, another target
"""

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.bench.laptop import MODEL, run_python, tell
from tests.bench.scaled import NUM_SLOTS, Scaled, running, write_config
from tests.bench.streaming import stream_chat

CLIENTS = (1, 2, 3, 5, 3, 1)
"""In turn; each asks again when it has its answer."""
MAX_REPLICAS = 3
UP_DELAY_S, DOWN_DELAY_S = 1.0, 5.0
_LOOK_S = 0.5


@dataclass(frozen=True)
class Asked:
    """One request: when, by how many clients at that time, and what came of it."""

    at_s: float
    num_clients: int
    first_token_s: float | None
    failure: str | None = None


class Ramp:
    """Clients that come and go, and how many replicas there are meanwhile."""

    def __init__(self, windfarm: Scaled, num_tokens: int) -> None:
        self._windfarm = windfarm
        self._num_tokens = num_tokens
        self._num_clients = 0
        self._is_over = threading.Event()
        self._threads: list[threading.Thread] = []
        self._started = time.perf_counter()
        self.asked: list[Asked] = []
        self.replicas: list[tuple[float, int]] = []
        """When their number changed."""

    def run(self, stage_s: float) -> None:
        """Every stage lasts so long, the last one until the first number of replicas is there again."""
        watch = threading.Thread(target=self._watch)
        watch.start()
        try:
            for number in CLIENTS:
                self._set_clients(number)
                time.sleep(stage_s)
            self._windfarm.wait_for(1)
        finally:
            self._is_over.set()
            for thread in [*self._threads, watch]:
                thread.join()

    def _set_clients(self, number: int) -> None:
        self._num_clients = number
        for index in range(len(self._threads), number):
            self._threads.append(threading.Thread(target=self._client, args=(index,)))
            self._threads[-1].start()
        tell(f"{self._now():.0f} s: {number} clients, replicas so far {[number for _, number in self.replicas]}")

    def _client(self, index: int) -> None:
        count = 0
        while not self._is_over.is_set():
            if index >= self._num_clients:
                time.sleep(_LOOK_S)
                continue
            count += 1
            at_s, num_clients = self._now(), self._num_clients
            prompt = f"Story {count} of reader {index}: tell me about a lighthouse."
            try:
                took = stream_chat(self._windfarm.api, self._windfarm.key, MODEL, prompt, self._num_tokens)
                self.asked.append(Asked(at_s, num_clients, took.first_token_s))
            except (RuntimeError, OSError) as error:
                self.asked.append(Asked(at_s, num_clients, None, str(error)))

    def _watch(self) -> None:
        while not self._is_over.is_set():
            number = self._windfarm.num_ready()
            if not self.replicas or self.replicas[-1][1] != number:
                self.replicas.append((self._now(), number))
            time.sleep(_LOOK_S)

    def _now(self) -> float:
        return time.perf_counter() - self._started


def main() -> None:
    options = read_options()
    scaling = {
        "min_replicas": 1,
        "max_replicas": MAX_REPLICAS,
        "upscale_delay_s": UP_DELAY_S,
        "downscale_delay_s": DOWN_DELAY_S,
    }
    with tempfile.TemporaryDirectory(prefix="windfarm-bench-") as folder:
        home = Path(folder, "home")
        run_python(["-m", "cluster.weights", "prepare", "--home", str(home)])
        config = write_config(Path(folder), scaling, {"first_token_target_s": options.target_s})
        with running(home, config) as windfarm:
            ramp = Ramp(windfarm, options.tokens)
            ramp.run(options.stage_s)
            moved = windfarm.num_moved()
    result = summarise(ramp.asked, ramp.replicas, options.target_s) | {"streams_moved": moved}
    print(json.dumps(result))
    if result["failed"] or max(number for _, number in ramp.replicas) < MAX_REPLICAS:
        raise SystemExit(1)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage-s", type=float, default=15.0, help="seconds of each number of clients")
    parser.add_argument("--tokens", type=int, default=48, help="tokens of one answer")
    parser.add_argument("--target-s", type=float, default=2.0, help="target of the time to the first token")
    return parser.parse_args()


def summarise(asked: Sequence[Asked], replicas: Sequence[tuple[float, int]], target_s: float) -> dict[str, object]:
    times = sorted(each.first_token_s for each in asked if each.first_token_s is not None)
    by_clients = {number: [each for each in asked if each.num_clients == number] for number in sorted(set(CLIENTS))}
    return {
        "cpus": os.cpu_count(),
        "slots_per_replica": NUM_SLOTS,
        "requests": len(asked),
        "failed": sum(each.failure is not None for each in asked),
        "failures": sorted({each.failure for each in asked if each.failure is not None}),
        "target_s": target_s,
        "within_target": round(sum(each <= target_s for each in times) / max(1, len(asked)), 4),
        "within_target_by_clients": {
            number: round(
                sum(each.first_token_s is not None and each.first_token_s <= target_s for each in some)
                / max(1, len(some)),
                4,
            )
            for number, some in by_clients.items()
        },
        "first_token_s_p50": round(statistics.median(times), 3) if times else None,
        "first_token_s_p95": round(times[int(0.95 * (len(times) - 1))], 3) if times else None,
        "first_token_s_max": round(times[-1], 3) if times else None,
        "replicas": [(round(at_s, 1), number) for at_s, number in replicas],
    }


if __name__ == "__main__":
    main()
