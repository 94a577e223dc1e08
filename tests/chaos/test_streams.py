"""The short form of the chaos of streams: two trials of the campaign, and every fault by itself in processes."""

import asyncio
from pathlib import Path

import aiohttp
import pytest

from services.config import PlatformConfig, StreamsConfig
from tests.chaos.replica_process import FolderBeats, ReplicaProcess
from tests.chaos.streams import KINDS, STATES, ask, fleet_behind_endpoint, run_trial
from tests.services.harness import SECRET, running_endpoint

# Four processes beside other tests on two cores are now and then silent for longer than the trials' limit.
PROCESSES = PlatformConfig(streams=StreamsConfig(stall_s=3, max_moves=20, move_wait_s=30))


@pytest.mark.parametrize("seed", [1, 2])
async def test_answers_are_byte_for_byte_those_that_nothing_disturbs(tmp_path: Path, seed: int) -> None:
    async with fleet_behind_endpoint(tmp_path) as (running, fleet):
        outcome = await run_trial(running, fleet, seed)
    assert not outcome.wrong, "\n".join(outcome.wrong[:5])
    assert outcome.num_moves >= 10


@pytest.mark.integration
async def test_processes_that_are_killed_frozen_and_stopped_lose_no_token(tmp_path: Path) -> None:
    beats = tmp_path / "beats"
    beats.mkdir()
    replicas = [ReplicaProcess(beats, f"process-{number}", "hash", SECRET) for number in range(4)]
    try:
        async with running_endpoint(tmp_path, config=PROCESSES, states=STATES, beats=FolderBeats(beats)) as running:
            async with asyncio.timeout(120):
                while len(running.directory.replicas("tiny")) < 4:  # noqa: ASYNC110
                    await asyncio.sleep(0.1)
            async with aiohttp.ClientSession(
                running.url, headers={"authorization": f"Bearer {running.key}"}, connector=aiohttp.TCPConnector(limit=0)
            ) as client:
                asked = [asyncio.create_task(ask(client, KINDS[n % len(KINDS)], n)) for n in range(32)]
                for end in (replicas[0].kill, replicas[1].freeze, replicas[2].stop):
                    await asyncio.sleep(0.2)
                    end()
                wrong = [problem for problem in await asyncio.gather(*asked) if problem]
            moved = (await running.http.get("/metrics")).text
    finally:
        for replica in replicas:
            replica.close()
    assert not wrong, "\n".join(wrong[:5])
    assert 'windfarm_streams_moved_total{model="tiny"}' in moved
