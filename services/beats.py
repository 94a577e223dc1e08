"""Records that show who is alive: their owner renews them every second, readers miss what stands still.

A record (a beat) is a small JSON object with a number that grows. It lies in Ray's internal key-value store, and its
owner deletes it at the end. A reader treats a record whose number did not change for five seconds of its own clock as
dead, so no two clocks are ever compared. Ray's key-value store is private API: `RayBeatStore` alone touches it
(contract test on the pinned Ray).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

BEAT_S = 1.0
DEAD_AFTER_S = 5.0
FORGET_AFTER_S = 60.0

_log = logging.getLogger(__name__)
Told = TypeVar("Told")


class BeatStore(Protocol):
    """A shared key-value store. All methods block; they are called from threads."""

    def put(self, key: str, value: bytes) -> None: ...

    def delete(self, key: str) -> None: ...

    def read_all(self, prefix: str) -> dict[str, bytes]: ...


class RayBeatStore:
    """Ray's internal key-value store, from any process that is connected to Ray."""

    NAMESPACE = b"windfarm"

    def put(self, key: str, value: bytes) -> None:
        from ray.experimental import internal_kv

        internal_kv._internal_kv_put(key, value, overwrite=True, namespace=self.NAMESPACE)

    def delete(self, key: str) -> None:
        from ray.experimental import internal_kv

        internal_kv._internal_kv_del(key, namespace=self.NAMESPACE)

    def read_all(self, prefix: str) -> dict[str, bytes]:
        from ray.experimental import internal_kv

        if not (keys := internal_kv._internal_kv_list(prefix, namespace=self.NAMESPACE)):
            return {}
        client = internal_kv.internal_kv_get_gcs_client()
        values = client.internal_kv_multi_get(keys, self.NAMESPACE)  # one call for all of them; what has gone is absent
        return {key.decode(): value for key, value in values.items()}


class Announcer:
    """Renews one record until it is stopped. `write` makes it from the number of the beat."""

    def __init__(self, store: BeatStore, key: str, write: Callable[[int], bytes]) -> None:
        self._store = store
        self._key = key
        self._write = write
        self._num_beats = 0
        self._lock = asyncio.Lock()
        self._is_urgent = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Announce once, then every second in the background."""
        await self.announce()
        self._task = asyncio.create_task(self._announce_for_ever(), name=f"announces {self._key}")

    async def announce(self) -> None:
        """Write the record now. Raises what the store does."""
        async with self._lock:
            self._num_beats += 1
            await asyncio.to_thread(self._store.put, self._key, self._write(self._num_beats))

    def hurry(self) -> None:
        """Have it written as soon as may be, in the background."""
        self._is_urgent.set()

    async def stop(self) -> None:
        """Stop announcing and delete the record. Safe to call twice."""
        if await self.fall_silent():
            async with self._lock:
                await asyncio.to_thread(self._store.delete, self._key)

    async def fall_silent(self) -> bool:
        """Stop announcing and leave the record behind, as a killed process does. False where it had stopped before."""
        if self._task is None:
            return False
        task, self._task = self._task, None
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        return True

    async def _announce_for_ever(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._is_urgent.wait(), BEAT_S)
            self._is_urgent.clear()
            try:
                await self.announce()
            except Exception as error:  # noqa: BLE001  # Ray's store fails in many ways while its head is away
                _log.warning("Could not announce %s: %s. Trying again.", self._key, error)


@dataclass(slots=True)
class Record(Generic[Told]):
    """The latest that one owner told. `changed_at`: when it was first seen so, by the reader's clock."""

    told: Told
    beat: int
    changed_at: float


class Records(Generic[Told]):
    """What all owners told, by the reader's clock. `read` makes beat and content of a value, or raises `ValueError`."""

    def __init__(self, read: Callable[[bytes], tuple[int, Told]], clock: Callable[[], float] = time.monotonic) -> None:
        self._read = read
        self._clock = clock
        self.by_key: dict[str, Record[Told]] = {}
        """Of the living and of those whose record was left behind."""

    def take(self, values: Mapping[str, bytes]) -> list[str]:
        """Bring the picture up to date with what the store has now; returns the keys that nobody renews any more."""
        now = self._clock()
        for key in self.by_key.keys() - values.keys():
            del self.by_key[key]
        for key, value in values.items():
            try:
                beat, told = self._read(value)
            except ValueError as error:
                _log.warning("Ignoring %s: %s", key, error)
                continue
            before = self.by_key.get(key)
            if before is None or before.beat != beat:
                self.by_key[key] = Record(told, beat, now)
        return [key for key, record in self.by_key.items() if now - record.changed_at > FORGET_AFTER_S]

    def alive(self) -> Iterator[tuple[str, Record[Told]]]:
        """Those that were renewed lately, with their keys, in a stable order."""
        now = self._clock()
        for key, record in sorted(self.by_key.items(), key=lambda item: item[0]):
            if now - record.changed_at < DEAD_AFTER_S:
                yield key, record
