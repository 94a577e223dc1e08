"""Asks a running engine whether it still works, with a time limit."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from time import monotonic
from typing import Any

from cluster.errors import EngineDead

ANSWER_LIMIT_S = 10.0
# A long prompt on a slow machine keeps an engine's loop busy between two signs of life.
STALL_LIMIT_S = 120.0


class HealthProbe:
    """`ask` sends a question through the engine's own loop. One question is out at a time.

    No answer in time is fine while the engine showed life (a token, an answer) not long ago.
    """

    def __init__(self, engine: str, ask: Callable[[], Awaitable[Any]]) -> None:
        self._engine = engine
        self._ask = ask
        self._question: asyncio.Future[Any] | None = None
        self._last_life = monotonic()

    def note_life(self) -> None:
        """Safe from any thread."""
        self._last_life = monotonic()

    async def check(self) -> None:
        """Raises `EngineDead`."""
        if self._question is None or self._question.done():
            self._question = asyncio.ensure_future(self._ask())
        done, _ = await asyncio.wait([self._question], timeout=ANSWER_LIMIT_S)
        if done:
            if error := self._question.exception():
                raise EngineDead(f"{self._engine} does not answer: {error}") from error
            self.note_life()
        elif (silence := monotonic() - self._last_life) > STALL_LIMIT_S:
            raise EngineDead(f"{self._engine} gave no sign of life for {silence:.0f} seconds.")

    def close(self) -> None:
        """Forget a question that nobody waits for any more."""
        if self._question is not None:
            self._question.cancel()
