"""The limits of api keys at the edge of the endpoint: a request is let in or refused before a model hears of it, and
booked when its answer has ended, failed or was cut. Keys without limits pass by.

Refusals and headers are OpenAI's, so that its clients wait and try again by themselves.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from services.config import LimitsConfig
from services.errors import ApiError
from services.event_stream import ClientGone
from services.limit_book import Verdict
from services.limit_client import LimitClient
from services.limits import Limits, Refusal, Standing
from services.metrics import Metrics
from services.routing import Call, Permit
from services.token_meter import Estimate, TokenMeter

_BOOKED_WITHIN_S = 0.5
_log = logging.getLogger(__name__)


class KeyLimits:
    """One per endpoint process."""

    def __init__(self, config: LimitsConfig, client: LimitClient, metrics: Metrics) -> None:
        self._defaults = Limits(config.requests_per_minute, config.tokens_per_minute, config.concurrent_streams)
        self._lets_through = config.when_unavailable == "allow"
        self._client = client
        self._metrics = metrics

    @asynccontextmanager
    async def admitted(self, call: Call, estimate: Callable[[], Estimate]) -> AsyncIterator[None]:
        """Around the whole answer. Raises `ApiError` 429 where the key has used up a limit, 503 where nobody knows.
        `estimate` is only asked for keys with a limit of tokens."""
        limits = call.actor.limits.over(self._defaults)
        if limits.is_unlimited:
            yield
            return
        permit = await self._admit(call, limits, Estimate() if limits.tokens_per_minute is None else estimate())
        call.permit = permit
        try:
            yield
        except (ClientGone, asyncio.CancelledError):
            permit.close()
            raise
        except Exception:
            await permit.settle(has_failed=True)
            raise
        await permit.settle()

    async def _admit(self, call: Call, limits: Limits, estimate: Estimate) -> Permit:
        key_id, meter = call.actor.key_id, TokenMeter(estimate.num_prompt_tokens)
        try:
            lease_id, verdict = await self._client.ask(key_id, limits, estimate.total)
        except ApiError:
            self._metrics.limit_refused("unavailable")
            if not self._lets_through:
                raise
            _log.warning("The limits of %s are not checked: nobody counts them now, and the file says allow.", key_id)
            return _Permit(self._client, self._client.begin_unasked(key_id, estimate.total), meter)
        call.answer_headers |= standing_headers(verdict.standing)
        if verdict.refusal is not None:
            self._refuse(call, verdict)
        return _Permit(self._client, lease_id, meter)

    def _refuse(self, call: Call, verdict: Verdict) -> None:
        refusal = verdict.refusal
        assert refusal is not None
        self._metrics.limit_refused(refusal.reason)
        if refusal.retry_after_s is None:
            call.answer_headers["x-should-retry"] = "false"  # OpenAI's clients would send it again and again
        raise refused(refusal)


class _Permit(Permit):
    """A request that was let in. Closing it twice does nothing more."""

    def __init__(self, client: LimitClient, lease_id: str, meter: TokenMeter) -> None:
        self.meter = meter
        self._client = client
        self._lease_id = lease_id
        self._booked: asyncio.Event | None = None

    def close(self, *, has_failed: bool = False) -> None:
        """Book what was used, without waiting for it."""
        if self._booked is None:
            self._booked = self._client.end(self._lease_id, self.meter.total(has_failed=has_failed))

    async def settle(self, *, has_failed: bool = False) -> None:
        """Book what was used before the client sees the end: what it sends next, to any relay, finds the place free.
        An end is not held up for long by a limiter that does not answer; it is booked all the same, later."""
        self.close(has_failed=has_failed)
        assert self._booked is not None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_BOOKED_WITHIN_S):
                await self._booked.wait()


def refused(refusal: Refusal) -> ApiError:
    """OpenAI's 429: `code` is `rate_limit_exceeded`, `type` the limit that was met."""
    of = {
        "requests": "requests per minute",
        "tokens": "tokens per minute",
        "request_too_large": "tokens per minute",
        "concurrent_streams": "answers at once",
    }[refusal.reason]
    numbers = f"limit {refusal.limit}, used {refusal.used}, requested {refusal.requested}"
    if refusal.retry_after_s is None:
        message = (
            f"This request is too large for the {of} of this api key: limit {refusal.limit}, requested "
            f"{refusal.requested} (prompt and longest answer). Shorten the prompt or name a smaller 'max_tokens'."
        )
        return ApiError(429, "tokens", "rate_limit_exceeded", message)
    wait_s = max(1, math.ceil(refusal.retry_after_s))
    message = f"This api key has reached its limit of {of}: {numbers}. Try again in {wait_s} s."
    return ApiError(429, refusal.reason, "rate_limit_exceeded", message, retry_after_s=wait_s)


def standing_headers(standing: Standing) -> dict[str, str]:
    """OpenAI's headers for the limits that the key has."""
    headers = {}
    limits = standing.limits
    if limits.requests_per_minute is not None:
        headers["x-ratelimit-limit-requests"] = str(limits.requests_per_minute)
        headers["x-ratelimit-remaining-requests"] = str(standing.remaining_requests)
        headers["x-ratelimit-reset-requests"] = duration(standing.requests_reset_s)
    if limits.tokens_per_minute is not None:
        headers["x-ratelimit-limit-tokens"] = str(limits.tokens_per_minute)
        headers["x-ratelimit-remaining-tokens"] = str(standing.remaining_tokens)
        headers["x-ratelimit-reset-tokens"] = duration(standing.tokens_reset_s)
    return headers


def duration(seconds: float) -> str:
    """As OpenAI writes it: 20ms, 1.5s, 1m0s. Rounded up, so that nobody comes too early."""
    milliseconds = math.ceil(seconds * 1000)
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    if milliseconds < 60_000:
        return f"{milliseconds / 1000:g}s"
    minutes, rest = divmod(math.ceil(milliseconds / 1000), 60)
    return f"{minutes}m{rest}s"
