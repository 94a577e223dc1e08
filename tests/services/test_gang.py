"""Ranks of a gang meet under its id, and a rank whose process ends is missed at once by the others."""

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cluster.errors import EngineDead
from services.discovery import Directory, ReplicaEndpoint, encode_beat
from services.gang import GangSeat, GangWatch, meet, part
from services.gang_loss import GangLost, Loss, read_losses, record_loss
from services.model_service import ModelService
from tests.services.harness import SECRET, Beats, ScriptedEngine, running_endpoint, wait_until, words

ROOT = Path(__file__).resolve().parents[2]
APP = "llm-tiny"

OTHER_RANK = """
import asyncio, json, sys
from cluster.engine import ModelInfo
from services.gang import GangSeat
from services.model_service import ModelService
from tests.services.harness import SECRET, Beats, ScriptedEngine

async def main():
    beats = Beats()
    seat = GangSeat("g1", int(sys.argv[1]), 2)
    service = ModelService(ScriptedEngine(), SECRET, app="llm-tiny", replica_id="other", beats=beats, seat=seat)
    await service.start()
    print(next(iter(beats.values())).decode(), flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
    await service.stop(drain_s=0)

asyncio.run(main())
"""


class Store(Beats):
    """The harness's store, with prefixes."""

    def read_all(self, prefix: str) -> dict[str, bytes]:
        return {key: value for key, value in self.items() if key.startswith(prefix)}


@contextmanager
def other_rank(store: Store) -> Iterator["subprocess.Popen[str]"]:
    """Rank 1 of gang g1 in a process of its own, announced in `store`. A line on its input stops it in order."""
    process = subprocess.Popen(
        [sys.executable, "-c", OTHER_RANK, "1"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        beat = process.stdout.readline()
        assert beat, "the other rank did not start"
        store.put(f"windfarm/{APP}/other", beat.strip().encode())
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def store() -> Store:
    store = Store()
    mine = ReplicaEndpoint("mine", APP, "http://127.0.0.1:1", 1, model="tiny", gang="g1", rank=0, gang_size=2)
    store.put(mine.key, encode_beat(mine))
    return store


async def test_all_ranks_learn_where_rank_0_waits(store: Store) -> None:
    seats = [GangSeat("g1", rank, 3) for rank in range(3)]
    hosts = ["127.0.0.2", "127.0.0.2", "127.0.0.3"]
    meetings = await asyncio.gather(*(meet(store, seat, host) for seat, host in zip(seats, hosts, strict=True)))
    assert len({(meeting.address, meeting.port) for meeting in meetings}) == 1
    assert meetings[1].address == "127.0.0.2"
    assert 0 < meetings[1].port < 65536
    assert meetings[2].num_ranks_on("127.0.0.2") == 2
    for seat in seats:
        await part(store, seat)
    assert not store.read_all("gang-meeting/")


async def test_a_restarted_gang_meets_anew_although_records_of_the_old_one_are_left(store: Store) -> None:
    await asyncio.gather(*(meet(store, GangSeat("old", rank, 2), "127.0.0.1") for rank in range(2)))
    with pytest.raises(EngineDead, match="Only 1 of the 2 ranks of gang new came"):
        await meet(store, GangSeat("new", 1, 2), "127.0.0.1", timeout_s=0.5)


async def test_a_killed_rank_is_missed_at_once(store: Store) -> None:
    lost: asyncio.Queue[tuple[int, str]] = asyncio.Queue()
    watch = GangWatch(store, APP, GangSeat("g1", 0, 2), SECRET, lambda *what: lost.put_nowait(what))
    with other_rank(store) as process:
        watch.start()
        await asyncio.sleep(0.5)
        assert lost.empty()
        process.kill()
        assert await asyncio.wait_for(lost.get(), 10) == (1, "its process ended")
    watch.stop()


async def test_a_rank_that_hangs_is_missed_when_nothing_is_heard_of_it(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.gang._SILENCE_S", 3.0)
    lost: asyncio.Queue[tuple[int, str]] = asyncio.Queue()
    watch = GangWatch(store, APP, GangSeat("g1", 0, 2), SECRET, lambda *what: lost.put_nowait(what))
    with other_rank(store) as process:
        watch.start()
        await asyncio.sleep(0.5)
        process.send_signal(signal.SIGSTOP)
        assert await asyncio.wait_for(lost.get(), 20) == (1, "nothing was heard of it for 3 s")
    watch.stop()


async def test_a_rank_that_stops_in_order_is_not_lost(store: Store) -> None:
    lost: list[tuple[int, str]] = []
    watch = GangWatch(store, APP, GangSeat("g1", 0, 2), SECRET, lambda *what: lost.append(what))
    with other_rank(store) as process:
        watch.start()
        await asyncio.sleep(0.5)
        assert process.stdin is not None
        process.stdin.write("stop\n")
        process.stdin.flush()
        await asyncio.to_thread(process.wait, 20)
        assert watch._task is not None
        await asyncio.wait_for(asyncio.shield(watch._task), 10)
    assert lost == []


async def test_the_word_of_a_loss_is_left_for_the_report(store: Store) -> None:
    loss = Loss(APP, "g1", 1, "its process ended", 12.5)
    await record_loss(store, loss)
    assert read_losses(store) == [loss]


@pytest.fixture
async def endpoint(tmp_path: Path) -> AsyncIterator[object]:
    async with running_endpoint(tmp_path) as running:
        yield running


async def add_rank(running: object, engine: ScriptedEngine, gang: str, rank: int) -> ModelService:
    service = ModelService(
        engine,
        SECRET,
        app=APP,
        replica_id=f"{gang}{rank}",
        beats=running.beats,  # type: ignore[attr-defined]
        seat=GangSeat(gang, rank, 2),
    )
    await service.start()
    running.services.append(service)  # type: ignore[attr-defined]
    await running.directory.refresh()  # type: ignore[attr-defined]
    return service


async def test_a_gang_answers_only_when_it_is_whole(endpoint) -> None:
    await add_rank(endpoint, ScriptedEngine(*words("a")), "g1", 0)
    assert (await endpoint.chat()).status_code == 404
    await add_rank(endpoint, ScriptedEngine(*words("a")), "g1", 1)
    assert (await endpoint.chat()).status_code == 200


async def test_a_stream_of_a_lost_gang_ends_with_an_error_that_says_so(endpoint) -> None:
    engines = [ScriptedEngine(*words("a", "b")[:2], asyncio.Event()) for _ in range(2)]
    first, second = [await add_rank(endpoint, engine, "g1", rank) for rank, engine in enumerate(engines)]
    body = {"model": "tiny", "stream": True, "messages": [{"role": "user", "content": "Hello"}]}
    events = []
    async with endpoint.http.stream("POST", "/v1/chat/completions", json=body) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: "):
                events.append(line.removeprefix("data: "))
                if len(events) == 2:
                    loss = Loss(APP, "g1", 1, "its process ended", time.time())
                    await asyncio.gather(
                        first.give_up(GangLost(loss.sentence)), second.give_up(GangLost(loss.sentence))
                    )
    assert "[DONE]" not in events
    error = json.loads(events[-1])["error"]
    assert error["code"] == "gang_lost"
    assert "lost rank 1 of its gang g1" in error["message"]
    assert "ask again" in error["message"]


async def test_new_requests_go_to_another_gang_while_one_is_lost(endpoint) -> None:
    for rank in range(2):
        lost = await add_rank(endpoint, ScriptedEngine(*words("old")), "g1", rank)
        await add_rank(endpoint, ScriptedEngine(*words("new")), "g2", rank)
    await lost.give_up(GangLost("rank 1 is gone"))
    answers = await asyncio.gather(*(endpoint.chat() for _ in range(8)))
    assert [answer.status_code for answer in answers] == 8 * [200]
    await wait_until(lambda: len(endpoint.directory.replicas("tiny")) == 2)
    answers = [(await endpoint.chat()).json()["choices"][0]["message"]["content"] for _ in range(4)]
    assert answers == 4 * ["new"]


async def test_a_rank_whose_engine_dies_reports_the_gang_as_lost(endpoint) -> None:
    engine = ScriptedEngine(words("a")[0], EngineDead("vLLM's engine process has ended."))
    await add_rank(endpoint, engine, "g1", 0)
    await add_rank(endpoint, ScriptedEngine(words("a")[0], EngineDead("gone")), "g1", 1)
    body = {"model": "tiny", "stream": True, "messages": [{"role": "user", "content": "Hello"}]}
    async with endpoint.http.stream("POST", "/v1/chat/completions", json=body) as response:
        text = (await response.aread()).decode()
    assert '"gang_lost"' in text
    assert "[DONE]" not in text


async def test_the_loss_of_one_rank_takes_its_whole_gang_out_of_the_directory() -> None:
    store = Store()
    for gang in ("g1", "g2"):
        for rank in range(2):
            end = ReplicaEndpoint(
                f"{gang}{rank}", APP, "http://127.0.0.1:1", 1, model="tiny", gang=gang, rank=rank, gang_size=2
            )
            store.put(end.key, encode_beat(end))
    directory = Directory(store)
    await directory.refresh()
    assert len(directory.replicas("tiny")) == 4
    directory.report_failure("g11")
    assert {end.gang for end in directory.replicas("tiny")} == {"g2"}
