"""How many replicas of a deployment run, as of some seconds ago: asking never blocks."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

_log = logging.getLogger(__name__)

REFRESH_S = 5.0


class ReplicaCount:
    """`count` blocks and may fail. At least 1, because work that waits for a replica must be begun."""

    def __init__(self, count: Callable[[], int], clock: Callable[[], float] = time.monotonic) -> None:
        self._count = count
        self._clock = clock
        self._known = 1
        self._asked_at = float("-inf")
        self._asking: asyncio.Task[None] | None = None

    def __call__(self) -> int:
        if self._clock() - self._asked_at >= REFRESH_S and (self._asking is None or self._asking.done()):
            self._asked_at = self._clock()
            self._asking = asyncio.ensure_future(self._refresh())
        return self._known

    async def _refresh(self) -> None:
        try:
            self._known = max(1, await asyncio.to_thread(self._count))
        except Exception as error:  # noqa: BLE001  # Serve's controller fails in many ways while it restarts
            _log.warning("The number of replicas is not known anew: %s", error)
