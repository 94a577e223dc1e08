"""The waiting rooms of all models at the endpoint: who may begin, who waits, and who is refused at once.

As many requests begin as the model's replicas have slots, and a few more, so that a slot that becomes free finds its
next request there. All others wait here, where keys can be told apart; the replicas cannot. Each endpoint process has
rooms of its own.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Literal

from services.config import QueuesConfig
from services.errors import ApiError, unavailable
from services.fair_queue import FairQueue, RoomFull, Ticket

Priority = Literal["default", "flex"]
_ROOMS: dict[Priority, int] = {"default": 0, "flex": 1}
_LOOK_S = 1.0
_LONGEST_RETRY_S = 60
# Weight of the latest answer in the mean time of an answer.
_NEWS = 0.1


class Place:
    """A request that may run. `cost` is what its key is charged in the end, in tokens."""

    def __init__(self, num_prompt_tokens: int) -> None:
        # Charged at the beginning. The answer is charged when it is known: an estimate that is corrected downwards
        # later would give a key that was there before an advance over those that came meanwhile.
        self.first_cost = self.cost = 1 + num_prompt_tokens

    def note_answer(self, num_tokens: int) -> None:
        """The answer has ended or was cut after so many tokens."""
        self.cost = self.first_cost + num_tokens


class ModelQueues:
    """`num_slots` says how many requests the replicas of a model run at once; it is asked again all the time."""

    def __init__(self, config: QueuesConfig, num_slots: Callable[[str], int]) -> None:
        self._limits = (config.max_waiting, config.max_waiting_flex)
        self._num_slots = num_slots
        self._rooms: dict[str, _ModelRoom] = {}

    @asynccontextmanager
    async def place(self, model: str, key: str, priority: Priority, num_prompt_tokens: int) -> AsyncIterator[Place]:
        """Around one answer. Raises `ApiError`: 429 where this key alone fills the room, 503 where all together do.
        Both come at once; whoever waits is served, or is pushed out by a key with fewer requests (429)."""
        room = self._rooms.get(model)
        if room is None:
            room = self._rooms[model] = _ModelRoom(model, self._limits, lambda: self._num_slots(model))
        place = Place(num_prompt_tokens)
        ticket = await room.enter(key, _ROOMS[priority], place.first_cost)
        started_at = time.monotonic()
        try:
            yield place
        finally:
            room.finish(ticket, place.cost, time.monotonic() - started_at)

    def sizes(self) -> dict[str, tuple[int, int]]:
        """Of each model: requests that run and that wait."""
        return {model: (room.queue.num_running, room.queue.num_waiting) for model, room in self._rooms.items()}


class _ModelRoom:
    def __init__(self, model: str, limits: tuple[int, ...], num_slots: Callable[[], int]) -> None:
        self._model = model
        self._num_slots = num_slots
        self._answer_s = 1.0
        self._is_looking = False
        self.queue = FairQueue(limits, self._num_places())

    async def enter(self, key: str, priority: int, cost: float) -> Ticket:
        """Returns when the request may begin."""
        turn = _Turn()
        ticket = Ticket(key, cost, turn.call)
        self.queue.num_places = self._num_places()
        try:
            self.queue.enter(ticket, priority)
        except RoomFull as full:
            raise self._refusal(is_own_doing=full.is_own_doing) from None
        if turn.may_begin is None:
            self._look_later()
        try:
            await turn.called.wait()
        except asyncio.CancelledError:
            if turn.may_begin:
                self.queue.finish(ticket, 0.0)
            elif turn.may_begin is None:
                self.queue.leave(ticket, priority)
            raise
        if not turn.may_begin:
            raise self._refusal(is_own_doing=True)
        return ticket

    def finish(self, ticket: Ticket, cost: float, seconds: float) -> None:
        self._answer_s += _NEWS * (seconds - self._answer_s)
        self.queue.num_places = self._num_places()
        self.queue.finish(ticket, cost)

    def _num_places(self) -> int:
        num_slots = max(1, self._num_slots())
        return num_slots + max(1, num_slots // 4)

    def _look_later(self) -> None:
        """While somebody waits: a new replica has slots that no end of an answer announces."""
        if not self._is_looking:
            self._is_looking = True
            asyncio.get_running_loop().call_later(_LOOK_S, self._look)

    def _look(self) -> None:
        self._is_looking = False
        self.queue.num_places = self._num_places()
        self.queue.call_next()
        if self.queue.num_waiting:
            self._look_later()

    def _refusal(self, *, is_own_doing: bool) -> ApiError:
        wait_s = (self.queue.num_waiting + 1) * self._answer_s / self.queue.num_places
        retry_s = min(_LONGEST_RETRY_S, max(1, math.ceil(wait_s)))
        if is_own_doing:
            message = (
                f"Too many requests of this api key wait for the model '{self._model}' already. "
                f"Try again in {retry_s} s."
            )
            return ApiError(429, "requests", "too_many_waiting", message, retry_after_s=retry_s)
        return unavailable(
            f"The model '{self._model}' is overloaded: {self.queue.num_waiting} requests wait for it already. "
            f"Try again in {retry_s} s.",
            code="overloaded",
            retry_after_s=retry_s,
        )


class _Turn:
    """What a waiting request hears, also one whose client is just leaving."""

    def __init__(self) -> None:
        self.called = asyncio.Event()
        self.may_begin: bool | None = None

    def call(self, may_begin: bool) -> None:
        self.may_begin = may_begin
        self.called.set()
