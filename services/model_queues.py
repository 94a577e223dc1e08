"""The waiting rooms of all models at the endpoint: who may begin, who waits, and who is refused at once.

As many requests begin as the model's replicas have slots, and a few more, so that a slot that becomes free finds its
next request there. All others wait here, where keys can be told apart; the replicas cannot. Requests for a model that
was scaled to zero wait here too: that they do is what starts it. Searches have a room like a model's, and so
have tunings. Each endpoint process has rooms of its own.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Literal, Protocol

from services.answer_pace import AnswerPace
from services.config import QueuesConfig
from services.demand import ModelDemand
from services.errors import ApiError, unavailable
from services.fair_queue import FairQueue, RoomFull, Ticket

Priority = Literal["default", "flex"]
SEARCHES = "(searches)"
"""The room of searches; no model can be called so."""
TUNINGS = "(tunings)"
"""The room of those that fit a collection to its questions: each is as many searches, one after the other."""
_CALLED = {SEARCHES: "search", TUNINGS: "tuning"}
_ROOMS: dict[Priority, int] = {"default": 0, "flex": 1}
_LOOK_S = 1.0
_LONGEST_RETRY_S = 60
# Of a model that is being started: nobody knows how long that takes.
_RETRY_START_S = 30
# What is left of an answer under way, as a share of a whole one: about half, at a moment that nobody chose.
_LEFT = 0.5


class Models(Protocol):
    """What is there of each model; asked again all the time."""

    def num_slots(self, model: str) -> int:
        """How many requests its replicas run at once."""

    def sleeps(self, model: str) -> bool:
        """Whether it has no replica, and requests that wait start one."""

    def why_not_ready(self, model: str) -> str:
        """A sentence on a model without a replica."""


class Place:
    """A request that may run. `cost` is what its key is charged in the end, in tokens."""

    def __init__(self, num_prompt_tokens: int, on_first_token: Callable[[], None] = lambda: None) -> None:
        self._on_first_token = on_first_token
        self.first_token_at: float | None = None
        """On the monotonic clock."""
        # Charged at the beginning. The answer is charged when it is known: an estimate that is corrected downwards
        # later would give a key that was there before an advance over those that came meanwhile.
        self.first_cost = self.cost = 1 + num_prompt_tokens

    def note_token(self) -> None:
        """Something of the answer came. Only the first call counts."""
        if self.first_token_at is None:
            self.first_token_at = time.monotonic()
            self._on_first_token()

    def note_answer(self, num_tokens: int) -> None:
        """The answer has ended or was cut after so many tokens."""
        self.cost = self.first_cost + num_tokens


class ModelQueues:
    """`on_sleeper` hears that a request waits for a model that has to be started."""

    def __init__(self, config: QueuesConfig, models: Models, on_sleeper: Callable[[], None] = lambda: None) -> None:
        self._config = config
        self._models = models
        self._on_sleeper = on_sleeper
        self._rooms: dict[str, _ModelRoom] = {}

    @asynccontextmanager
    async def place(self, model: str, key: str, priority: Priority, num_prompt_tokens: int) -> AsyncIterator[Place]:
        """Around one answer. Raises `ApiError`: 429 where this key alone fills the room, 503 where all together do.
        Both come at once; whoever waits is served, or is pushed out by a key with fewer requests (429), or hears 503
        where the model that it waits for cannot be started (in time)."""
        room = self._rooms.get(model)
        if room is None:
            room = self._rooms[model] = _ModelRoom(model, self._config, self._models)
        came_at, pace = time.monotonic(), room.pace
        is_woken = self._models.sleeps(model)
        if is_woken:
            self._on_sleeper()

        def note_first_token() -> None:
            if not is_woken:  # the start of a model says nothing about whether it has enough replicas
                pace.note_first_token(time.monotonic() - came_at)

        place = Place(num_prompt_tokens, note_first_token)
        ticket = await room.enter(key, _ROOMS[priority], place.first_cost)
        started_at = time.monotonic()
        try:
            yield place
        finally:
            pace.note_answer(place.first_cost, place.cost - place.first_cost, time.monotonic() - started_at)
            room.finish(ticket, place.cost)

    def sizes(self) -> dict[str, tuple[int, int]]:
        """Of each model: requests that run and that wait."""
        return {model: (room.queue.num_running, room.queue.num_waiting) for model, room in self._rooms.items()}

    def demand(self) -> dict[str, ModelDemand]:
        """What the scaling of each model wants to know."""
        return {model: room.demand() for model, room in self._rooms.items()}


class _ModelRoom:
    def __init__(self, model: str, config: QueuesConfig, models: Models) -> None:
        self._model = model
        self._models = models
        self._wake_wait_s = config.wake_wait_s
        self._is_looking = False
        self._patience: dict[_Turn, float] = {}
        """Until when each of those that wait does so where the model sleeps."""
        self.pace = AnswerPace()
        self.queue = FairQueue((config.max_waiting, config.max_waiting_flex), self._num_places())

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
            self._patience[turn] = time.monotonic() + self._wake_wait_s
            self._look_later()
        try:
            await turn.called.wait()
        except asyncio.CancelledError:
            if turn.may_begin:
                self.queue.finish(ticket, 0.0)
            elif turn.may_begin is None:
                self.queue.leave(ticket, priority)
            raise
        finally:
            self._patience.pop(turn, None)
        if turn.refusal is not None and turn.may_begin is None:
            self.queue.leave(ticket, priority)
            raise turn.refusal
        if not turn.may_begin:
            raise self._refusal(is_own_doing=True)
        return ticket

    def finish(self, ticket: Ticket, cost: float) -> None:
        self.queue.num_places = self._num_places()
        self.queue.finish(ticket, cost)

    def demand(self) -> ModelDemand:
        queue, pace = self.queue, self.pace
        return ModelDemand(
            num_waiting=queue.num_waiting,
            waiting_tokens=queue.waiting_cost + queue.num_waiting * pace.answer_tokens,
            num_begun=queue.num_running,
            begun_tokens=queue.num_running * pace.answer_tokens * _LEFT,
            seconds_per_token=pace.seconds_per_token,
            first_tokens=pace.first_tokens(),
        )

    def _num_places(self) -> int:
        if self._models.sleeps(self._model):
            return 0
        num_slots = max(1, self._models.num_slots(self._model))
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
        if self._models.sleeps(self._model):
            self._end_patience()
        if self.queue.num_waiting:
            self._look_later()

    def _end_patience(self) -> None:
        """Of those who wait longer for the model than anybody should."""
        now = time.monotonic()
        for turn in [turn for turn, until in self._patience.items() if until <= now]:
            turn.refuse(
                unavailable(
                    f"The model '{self._model}' had been scaled to zero and was not there again within "
                    f"{self._wake_wait_s:g} s (queues.wake_wait_s). {self._models.why_not_ready(self._model)}",
                    code="model_not_started",
                    retry_after_s=_RETRY_START_S,
                )
            )

    def _refusal(self, *, is_own_doing: bool) -> ApiError:
        wait_s = (self.queue.num_waiting + 1) * self.pace.answer_s / max(1, self.queue.num_places)
        retry_s = min(_LONGEST_RETRY_S, max(1, math.ceil(wait_s)))
        what = _CALLED.get(self._model) or f"model '{self._model}'"
        if is_own_doing:
            message = f"Too many requests of this api key wait for the {what} already. Try again in {retry_s} s."
            return ApiError(429, "requests", "too_many_waiting", message, retry_after_s=retry_s)
        return unavailable(
            f"The {what} is overloaded: {self.queue.num_waiting} requests wait for it already. "
            f"Try again in {retry_s} s.",
            code="overloaded",
            retry_after_s=retry_s,
        )


class _Turn:
    """What a waiting request hears, also one whose client is just leaving."""

    def __init__(self) -> None:
        self.called = asyncio.Event()
        self.may_begin: bool | None = None
        self.refusal: ApiError | None = None

    def call(self, may_begin: bool) -> None:
        self.may_begin = may_begin
        self.called.set()

    def refuse(self, refusal: ApiError) -> None:
        """It has not been called, and shall not wait any longer."""
        self.refusal = refusal
        self.called.set()
