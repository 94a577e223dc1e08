"""A gang: the replicas that hold the ranks of one copy of a model. How they meet, and how each sees that one is lost.

Ranks meet through Ray's key-value store, under the id that Serve gives a gang anew at each of its starts, so that no
record of an earlier start can be taken for one of this. Afterwards every rank keeps a connection to every other: the
kernel closes it when a process ends, which is seen at once, while a rank that waits in a collective sees nothing.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import aiohttp

from cluster.errors import EngineDead
from services.beats import BeatStore
from services.discovery import BEATS_PREFIX, ReplicaEndpoint, decode_beat
from services.relay import INTERNAL_HEADER

MEETINGS_PREFIX = "gang-meeting/"
WATCH_PATH = "/gang/watch"
# The first start of a model may convert or fetch its files on each node.
MEET_WITHIN_S = 900.0
_LOOK_EVERY_S = 0.2
_BEAT_S = 1.0
# A busy rank may be late; a node that is gone sends nothing at all.
_SILENCE_S = 15.0
_GOODBYE = b"bye\n"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class GangSeat:
    """Which rank of which gang this replica is."""

    gang: str
    rank: int
    size: int


@dataclass(frozen=True, slots=True)
class Meeting:
    """What all ranks of a gang know after they met. `address` and `port` are where rank 0 waits for the others."""

    address: str
    port: int
    hosts: tuple[str, ...]
    """Address of each rank's node."""

    def num_ranks_on(self, host: str) -> int:
        return self.hosts.count(host)


async def meet(store: BeatStore, seat: GangSeat, host: str, timeout_s: float = MEET_WITHIN_S) -> Meeting:
    """Wait until all ranks are here. `host` is the address of this rank's node. Raises `EngineDead` after the time."""
    prefix = f"{MEETINGS_PREFIX}{seat.gang}/"
    mine = {"host": host, "port": _free_port(host) if seat.rank == 0 else 0}
    await asyncio.to_thread(store.put, f"{prefix}{seat.rank}", json.dumps(mine).encode())
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        found = await asyncio.to_thread(store.read_all, prefix)
        if len(found) == seat.size:
            records = [json.loads(found[f"{prefix}{rank}"]) for rank in range(seat.size)]
            return Meeting(records[0]["host"], records[0]["port"], tuple(record["host"] for record in records))
        await asyncio.sleep(_LOOK_EVERY_S)
    raise EngineDead(
        f"Only {len(found)} of the {seat.size} ranks of gang {seat.gang} came within {timeout_s:.0f} s. `windfarm "
        "status` says where the others are, their logs why they do not start."
    )


async def part(store: BeatStore, seat: GangSeat) -> None:
    """Take this rank's record away; it is not needed once all have met and started."""
    await asyncio.to_thread(store.delete, f"{MEETINGS_PREFIX}{seat.gang}/{seat.rank}")


class WatchPoint:
    """The side of a rank that is watched: holds the connections of the others open until it stops or dies."""

    def __init__(self) -> None:
        self._stopping = asyncio.Event()

    def say_goodbye(self) -> None:
        """From now on the end of a connection is no loss."""
        self._stopping.set()

    async def beats(self) -> AsyncIterator[bytes]:
        """What goes over one connection."""
        while not self._stopping.is_set():
            yield b".\n"
            try:
                await asyncio.wait_for(self._stopping.wait(), _BEAT_S)
            except TimeoutError:
                continue
        yield _GOODBYE


class GangWatch:
    """The watching side: calls `on_lost` once, with rank and reason, when any other rank of the gang is gone."""

    def __init__(
        self, store: BeatStore, app: str, seat: GangSeat, secret: str, on_lost: Callable[[int, str], None]
    ) -> None:
        self._store = store
        self._app = app
        self._seat = seat
        self._secret = secret
        self._on_lost = on_lost
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._watch_all(), name=f"gang {self._seat.gang}")

    def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            self._task = None

    async def _watch_all(self) -> None:
        others = [other for other in await self._members() if other.rank != self._seat.rank]
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_SILENCE_S, sock_read=_SILENCE_S)
        headers = {INTERNAL_HEADER: self._secret}
        async with aiohttp.ClientSession(timeout=timeout, headers=headers, trust_env=False) as session:
            watches = [asyncio.create_task(self._watch(session, other)) for other in others]
            try:
                while watches:
                    done, pending = await asyncio.wait(watches, return_when=asyncio.FIRST_COMPLETED)
                    for watch in done:
                        if (lost := watch.result()) is not None:
                            self._on_lost(*lost)
                            return
                    watches = list(pending)
            finally:
                for watch in watches:
                    watch.cancel()

    async def _members(self) -> list[ReplicaEndpoint]:
        """All ranks, once all have announced themselves. Serve ends the gang if one never does."""
        while True:
            values = await asyncio.to_thread(self._store.read_all, f"{BEATS_PREFIX}{self._app}/")
            members = [member for member in map(decode_beat, values.values()) if member.gang == self._seat.gang]
            if len(members) == self._seat.size:
                return members
            await asyncio.sleep(_LOOK_EVERY_S)

    async def _watch(self, session: aiohttp.ClientSession, other: ReplicaEndpoint) -> tuple[int, str] | None:
        """Rank and reason where it is lost; none where it stopped in order."""
        last = b""
        try:
            async with session.get(other.url + WATCH_PATH) as response:
                response.raise_for_status()
                async for data in response.content.iter_any():
                    last = data
        except TimeoutError:
            return other.rank, f"nothing was heard of it for {_SILENCE_S:.0f} s"
        except (aiohttp.ClientError, OSError) as error:
            _log.info("The connection to rank %d broke: %r", other.rank, error)
        return None if last.endswith(_GOODBYE) else (other.rank, "its process ended")


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
    return port
