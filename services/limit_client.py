"""A relay's side of the limits: asks the one book before a request begins, tells it what became of the request.

One message is under way at a time; what comes up meanwhile goes with the next one, so that a busy relay sends few large
messages. The journal (requests that run or ended within the last 60 seconds) is kept here: whenever an answer did not
come, or the book is new, all of it is told again. While there is anything in it, the book hears from this relay every
second. A relay without limited requests says nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from services.calls import Calls
from services.error_responses import is_expected
from services.errors import ApiError, unavailable
from services.limit_book import Ask, Message, Record, Reply, Verdict
from services.limits import WINDOW_S, Lease, Limits

SYNC_S = 1.0
ANSWER_WITHIN_S = 5.0
_LAST_WORD_S = 2.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Asked:
    ask: Ask
    verdict: asyncio.Future[Verdict]


@dataclass(frozen=True, slots=True)
class _Entry:
    key_id: str
    lease: Lease


class LimitClient:
    """One per endpoint process. Its task starts with the first limited request."""

    def __init__(
        self,
        limiter: Calls,
        *,
        sync_s: float = SYNC_S,
        answer_within_s: float = ANSWER_WITHIN_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limiter = limiter
        self._sync_s = sync_s
        self._answer_within_s = answer_within_s
        self._clock = clock
        self._relay = secrets.token_hex(8)
        self._number = 0
        self._epoch: str | None = None  # None: what the book knows of this relay is not known
        self._owes_report = False
        self._looked_back_at = clock()
        self._journal: dict[str, _Entry] = {}
        self._changed: set[str] = set()
        self._asked: list[_Asked] = []
        self._wake = asyncio.Event()
        self._told: asyncio.Event = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def ask(self, key_id: str, limits: Limits, tokens: int) -> tuple[str, Verdict]:
        """Whether a request may begin; its lease where it may. Raises `ApiError` 503 where nobody decides."""
        ask = Ask(secrets.token_hex(12), key_id, limits, tokens)
        asked = _Asked(ask, asyncio.get_running_loop().create_future())
        self._asked.append(asked)
        self._say_something()
        try:
            async with asyncio.timeout(self._answer_within_s):
                return ask.lease_id, await asked.verdict
        except BaseException as error:
            if ask.lease_id in self._journal:  # admitted in the very moment in which its client gave up
                self.end(ask.lease_id, 0)
            if isinstance(error, TimeoutError):
                raise limits_unavailable() from None
            raise

    def begin_unasked(self, key_id: str, tokens: int) -> str:
        """Note a request that begins although nobody decided; the book hears of it as soon as there is one."""
        lease_id = secrets.token_hex(12)
        self._note(lease_id, _Entry(key_id, Lease(self._clock(), tokens)))
        return lease_id

    def end(self, lease_id: str, tokens: int) -> asyncio.Event:
        """Book the end of a request with the tokens that it used; set when the book was told, or did not answer."""
        entry = self._journal[lease_id]
        lease = replace(entry.lease, tokens=tokens, ended_at=self._clock())
        self._note(lease_id, _Entry(entry.key_id, lease))
        return self._told

    async def stop(self) -> None:
        """Tell what is left and fall silent."""
        if self._task is None:
            return
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        self._task = None
        if self._changed or self._owes_report:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LAST_WORD_S):
                    await self._exchange()

    def _note(self, lease_id: str, entry: _Entry) -> None:
        self._journal[lease_id] = entry
        self._changed.add(lease_id)
        self._say_something()

    def _say_something(self) -> None:
        self._wake.set()
        if self._task is None:
            self._task = asyncio.create_task(self._talk(), name="limits")

    async def _talk(self) -> None:
        while True:
            await self._until_there_is_something_to_say()
            await self._exchange()

    async def _until_there_is_something_to_say(self) -> None:
        self._forget_what_left_the_window()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._sync_s if self._journal or self._owes_report else None):
                await self._wake.wait()
        self._wake.clear()

    async def _exchange(self) -> None:
        """One message with all that came up, and its answer. After a failure all is told anew, a moment later."""
        asked, self._asked = [each for each in self._asked if not each.verdict.done()], []
        changed, self._changed = self._changed, set()
        told, self._told = self._told, asyncio.Event()
        asks = [each.ask for each in asked]
        # Until an answer is here nobody knows whether this message arrives.
        epoch, self._epoch, self._owes_report = self._epoch, None, True
        try:
            reply = await self._send(epoch, changed, asks) if epoch is not None else None
            if reply is None or reply.verdicts is None:
                reply = await self._send("", None, asks)
            if reply.verdicts is None:
                raise limits_unavailable()
            self._epoch, self._owes_report = reply.epoch, False
            self._decide(asked, reply)
        except Exception as error:  # noqa: BLE001  # whatever it is, those who asked get an answer
            if not is_expected(error):
                _log.exception("The limiter failed.")
            for each in asked:
                _fail(each, limits_unavailable())
        finally:
            told.set()
            for each in asked:  # this task was cancelled
                _fail(each, limits_unavailable())

    async def _send(self, epoch: str, changed: set[str] | None, asks: list[Ask]) -> Reply:
        """`changed` None: the whole journal."""
        self._number += 1
        now = self._clock()
        ids = self._journal.keys() if changed is None else changed & self._journal.keys()
        records = [_record(lease_id, self._journal[lease_id], now) for lease_id in ids]
        message = Message(self._relay, self._number, epoch, changed is None, records, asks)
        reply = await self._limiter.call("exchange", message)
        assert isinstance(reply, Reply)
        return reply

    def _decide(self, asked: list[_Asked], reply: Reply) -> None:
        assert reply.verdicts is not None
        if reply.recovering_s:
            for each in asked:
                _fail(each, limits_unavailable(reply.recovering_s))
            return
        now = self._clock()
        for each, verdict in zip(asked, reply.verdicts, strict=True):
            if verdict.refusal is None:
                self._journal[each.ask.lease_id] = _Entry(each.ask.key_id, Lease(now, each.ask.tokens))
            if not each.verdict.done():
                each.verdict.set_result(verdict)
            elif verdict.refusal is None:  # its client has gone meanwhile
                self.end(each.ask.lease_id, 0)

    def _forget_what_left_the_window(self) -> None:
        now = self._clock()
        if now - self._looked_back_at < self._sync_s:
            return
        self._looked_back_at, border = now, now - WINDOW_S
        left = [
            lease_id
            for lease_id, entry in self._journal.items()
            if entry.lease.ended_at is not None and entry.lease.ended_at <= border and lease_id not in self._changed
        ]
        for lease_id in left:
            del self._journal[lease_id]


def limits_unavailable(retry_after_s: float = 2.0) -> ApiError:
    return unavailable(
        "The limits of this api key cannot be checked at the moment: what counts them is restarting. Try again.",
        code="limits_unavailable",
        retry_after_s=max(1, int(-(-retry_after_s // 1))),
    )


def _fail(asked: _Asked, error: ApiError) -> None:
    if not asked.verdict.done():
        asked.verdict.set_exception(error)


def _record(lease_id: str, entry: _Entry, now: float) -> Record:
    lease = entry.lease
    ended_age_s = None if lease.ended_at is None else now - lease.ended_at
    return Record(lease_id, entry.key_id, lease.tokens, now - lease.admitted_at, ended_age_s)
