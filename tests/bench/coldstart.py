"""`make bench-coldstart`: seconds to the first token for a stopped windfarm, for a model that was scaled to zero, and
of an additional replica. The small chat model, 2 slots and 1 thread a replica. The last line is one JSON object.

- Stopped: from `windfarm up` to the first token of the first answer, with all models on the disk.
- Scaled to zero: from the request to its first token; the model had no replica, everything else runs.
- Additional replica: from the moment when all slots of the only replica are taken to the first token of a request that
  is sent when the second replica takes requests. Scaling waits 1 s before it acts (`upscale_delay_s`).

    ARGS="--starts 5 --wakes 10 --replicas 10"    more of it
"""

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from tests.bench.laptop import MODEL, run_python, tell
from tests.bench.scaled import NUM_SLOTS, Scaled, running, write_config
from tests.bench.streaming import stream_chat

UP_DELAY_S, DOWN_DELAY_S, ZERO_DELAY_S = 1.0, 1.0, 1.0
SCALING = {
    "min_replicas": 0,
    "max_replicas": 2,
    "initial_replicas": 1,
    "upscale_delay_s": UP_DELAY_S,
    "downscale_delay_s": DOWN_DELAY_S,
    "downscale_to_zero_delay_s": ZERO_DELAY_S,
}


def main() -> None:
    options = read_options()
    stopped, asleep, additional = [], [], []
    with tempfile.TemporaryDirectory(prefix="windfarm-bench-") as folder:
        home = Path(folder, "home")
        run_python(["-m", "cluster.weights", "prepare", "--home", str(home)])
        config = write_config(Path(folder), SCALING, {})
        for number in range(options.starts):
            started = time.perf_counter()
            with running(home, config) as windfarm:
                up_s = time.perf_counter() - started
                stopped.append(up_s + first_token_s(windfarm))
                tell(f"stopped: {stopped[-1]:.1f} s, of which `up` {up_s:.1f}")
                if number == options.starts - 1:
                    asleep = [wake(windfarm) for _ in range(options.wakes)]
                    additional = [add_replica(windfarm) for _ in range(options.replicas)]
    result: dict[str, object] = {"cpus": os.cpu_count(), "upscale_delay_s": UP_DELAY_S}
    for name, seconds in (("stopped", stopped), ("scaled_to_zero", asleep), ("additional_replica", additional)):
        result |= summary(name, seconds)
    print(json.dumps(result))


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=3, help="starts of windfarm")
    parser.add_argument("--wakes", type=int, default=5, help="requests for the model that was scaled to zero")
    parser.add_argument("--replicas", type=int, default=5, help="additional replicas")
    options = parser.parse_args()
    if min(options.starts, options.wakes, options.replicas) < 1:
        parser.error("each of them is measured once at least")
    return options


def summary(name: str, seconds: Sequence[float]) -> dict[str, object]:
    return {
        f"{name}_s": round(statistics.median(seconds), 2),
        f"{name}_s_each": [round(each, 2) for each in seconds],
    }


def first_token_s(windfarm: Scaled) -> float:
    return stream_chat(windfarm.api, windfarm.key, MODEL, "Say hello.", max_tokens=4).first_token_s


def wake(windfarm: Scaled) -> float:
    windfarm.wait_for(0)
    seconds = first_token_s(windfarm)
    tell(f"scaled to zero: {seconds:.2f} s")
    return seconds


def add_replica(windfarm: Scaled) -> float:
    """All slots of one replica are taken by long answers until the second one has given a token."""
    first_token_s(windfarm)
    windfarm.wait_for(1)
    is_over = threading.Event()
    load = [threading.Thread(target=keep_asking, args=(windfarm, number, is_over)) for number in range(NUM_SLOTS)]
    started = time.perf_counter()
    for thread in load:
        thread.start()
    try:
        windfarm.wait_for(2)
        first_token_s(windfarm)
        seconds = time.perf_counter() - started
    finally:
        is_over.set()
        for thread in load:
            thread.join()
    tell(f"additional replica: {seconds:.2f} s")
    return seconds


def keep_asking(windfarm: Scaled, number: int, is_over: threading.Event) -> None:
    while not is_over.is_set():
        prompt = f"Reader {number}: tell me a long story about a lighthouse."
        stream_chat(windfarm.api, windfarm.key, MODEL, prompt, max_tokens=64)


if __name__ == "__main__":
    main()
