"""The number of replicas is learnt beside the work, and kept where it cannot be learnt."""

from __future__ import annotations

import asyncio

from services.ray_status import count_running
from services.replica_count import REFRESH_S, ReplicaCount


async def test_the_number_follows_within_seconds_and_survives_a_controller_that_is_away() -> None:
    now, answers = [0.0], [3, 0, 2]
    asked = asyncio.Event()
    loop = asyncio.get_running_loop()

    def count() -> int:
        loop.call_soon_threadsafe(asked.set)
        if not answers:
            raise RuntimeError("the controller restarts")
        return answers.pop(0)

    running = ReplicaCount(count, clock=lambda: now[0])

    async def number_after(seconds: float) -> int:
        now[0] += seconds
        asked.clear()
        running()
        await asked.wait()
        assert running._asking is not None
        await running._asking
        return running()

    assert running() == 1, "nothing is known yet, and nobody waited"
    await asked.wait()
    assert running._asking is not None
    await running._asking
    assert running() == 3
    now[0] += REFRESH_S / 2
    running()
    assert answers == [0, 2], "not asked again so soon"
    assert [await number_after(REFRESH_S) for _ in range(4)] == [1, 2, 2, 2]


def test_replicas_that_run_are_counted() -> None:
    replicas = [{"state": state} for state in ("RUNNING", "STARTING", "RUNNING", "STOPPING")]
    details = {"applications": {"embed": {"deployments": {"Embedding": {"replicas": replicas}}}}}
    assert count_running(details, "embed", "Embedding") == 2
    assert count_running(details, "embed", "Other") == count_running({}, "embed", "Embedding") == 0
