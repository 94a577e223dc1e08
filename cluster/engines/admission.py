"""A bounded waiting room in front of an engine's slots. Used from one event loop only."""

from __future__ import annotations

import asyncio

from cluster.errors import EngineBusy


class Admission:
    """At most `num_slots` hold a slot, at most `max_queued` wait for one; everybody else is turned away at once."""

    def __init__(self, num_slots: int, max_queued: int) -> None:
        self._slots = asyncio.Semaphore(num_slots)
        self._num_slots = num_slots
        self._max_queued = max_queued
        self.num_running = 0
        self.num_queued = 0

    async def acquire(self) -> None:
        """Wait for a slot, first come first served. Raises `EngineBusy` when the waiting room is full."""
        if self._slots.locked() and self.num_queued >= self._max_queued:
            raise EngineBusy(
                f"All {self._num_slots} slots run and {self.num_queued} requests wait already. Try again in a moment."
            )
        self.num_queued += 1
        try:
            await self._slots.acquire()
        finally:
            self.num_queued -= 1
        self.num_running += 1

    def release(self) -> None:
        self.num_running -= 1
        self._slots.release()
