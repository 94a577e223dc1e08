"""Ready means proved: a real token and a real vector came out, from the very replicas that run now.

The proof runs in the background and again whenever a dependency changes, so that asking costs nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Hashable

from services.error_responses import is_expected, to_api_error

_LOOK_EVERY_S = 0.25
_RETRY_AFTER_S = 1.0
_PROOF_TIMEOUT_S = 120
_log = logging.getLogger(__name__)


class Readiness:
    """`dependencies` names what the proof rests on, `None` while something is missing; `prove` raises on failure."""

    def __init__(self, dependencies: Callable[[], Hashable | None], prove: Callable[[], Awaitable[None]]) -> None:
        self._dependencies = dependencies
        self._prove = prove
        self._proved: Hashable | None = None
        self._task: asyncio.Task[None] | None = None
        self.last_failure = "The proof has not run yet."

    @property
    def is_ready(self) -> bool:
        return self._proved is not None and self._proved == self._dependencies()

    def start(self) -> None:
        self._task = asyncio.create_task(self._watch(), name="readiness")

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _watch(self) -> None:
        while True:
            present = self._dependencies()
            if present is None:
                self._proved = None
            elif present != self._proved:
                await self._try_proof(present)
            await asyncio.sleep(_LOOK_EVERY_S if self.is_ready or present is None else _RETRY_AFTER_S)

    async def _try_proof(self, present: Hashable) -> None:
        try:
            async with asyncio.timeout(_PROOF_TIMEOUT_S):
                await self._prove()
        except Exception as error:  # noqa: BLE001  # whatever fails here means: not ready
            self.last_failure = to_api_error(error).message if is_expected(error) else repr(error)
            _log.warning("Not ready: %s", self.last_failure)
            return
        self._proved = present
