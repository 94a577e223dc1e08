"""Announces a replica that is not one of windfarm's own processes, as its model servers announce themselves.

`python -m tests.bench.announce MODEL URL NUM_SLOTS` in the environment that `windfarm env` prints, until its standard
input is closed.
"""

from __future__ import annotations

import asyncio
import os
import sys
from dataclasses import asdict

from cluster.engine import ModelInfo
from services.discovery import Beacon, RayBeatStore, ReplicaEndpoint


def endpoint_of(model: str, url: str, num_slots: int) -> ReplicaEndpoint:
    info = ModelInfo(model, "noop", max_context=4096, max_concurrency=num_slots, continues_answers=True)
    return ReplicaEndpoint(f"{model}-0", f"llm-{model}", url, os.getpid(), model, info=asdict(info))


async def announce(model: str, url: str, num_slots: int) -> None:
    beacon = Beacon(RayBeatStore(), endpoint_of(model, url, num_slots))
    await beacon.start()
    print("announced", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await beacon.stop()


if __name__ == "__main__":
    import ray

    ray.init(address=os.environ["RAY_ADDRESS"], namespace="bench", log_to_driver=False, logging_level="warning")
    asyncio.run(announce(sys.argv[1], sys.argv[2], int(sys.argv[3])))
