"""Limits of one api key, exact over any 60 seconds: requests, tokens, and answers under way at once. No clock, no I/O.

Each request is a lease. A request counts for `WINDOW_S` from its admission. Its tokens count as reserved while it runs
(what it may use at most, as far as that is known before) and as used for `WINDOW_S` from its end. So at every moment
what runs and what ended within the last 60 seconds stays within the limit, however long a stream takes. A reservation
that was too small is corrected at the end; what it was short of keeps later requests out instead.

Windows slide over single leases (a sliding-window log) rather than over buckets: no burst of twice the limit at the
border of two minutes.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from dataclasses import dataclass
from typing import Literal

WINDOW_S = 60.0
NO_LIMIT = 0
"""As a key's own value: no limit, whatever the defaults say. (None: the default holds.)"""
UNKNOWN_WAIT_S = 1.0
"""Named as the time to wait where only the end of a running answer makes room: nobody knows when that is."""

Reason = Literal["requests", "tokens", "request_too_large", "concurrent_streams"]
_LAST_ID = "\U0010ffff"


@dataclass(frozen=True, slots=True)
class Limits:
    """What a key may do; None: no limit (in a key's own values: the default holds)."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent_streams: int | None = None

    @property
    def is_unlimited(self) -> bool:
        return self.requests_per_minute is None and self.tokens_per_minute is None and self.concurrent_streams is None

    def over(self, defaults: Limits) -> Limits:
        """These own values of a key over the defaults for all keys: the limits that hold."""
        return Limits(
            _resolve(self.requests_per_minute, defaults.requests_per_minute),
            _resolve(self.tokens_per_minute, defaults.tokens_per_minute),
            _resolve(self.concurrent_streams, defaults.concurrent_streams),
        )


INHERITED = Limits()
"""A key without values of its own."""


def _resolve(own: int | None, default: int | None) -> int | None:
    if own is None:
        return default
    return None if own == NO_LIMIT else own


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request cannot begin now. `retry_after_s`: None where waiting cannot help."""

    reason: Reason
    limit: int
    used: int
    requested: int
    retry_after_s: float | None


@dataclass(frozen=True, slots=True)
class Standing:
    """What a key has left at one moment. Resets: seconds until all of its limit is there again, if nothing follows."""

    limits: Limits
    remaining_requests: int = 0
    remaining_tokens: int = 0
    requests_reset_s: float = 0.0
    tokens_reset_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Lease:
    """One request. Times in seconds of one clock; `tokens`: reserved while it runs, used when it has ended."""

    admitted_at: float
    tokens: int
    ended_at: float | None = None


class KeyUsage:
    """What one key does and did within the last 60 seconds. `now` must never go back."""

    def __init__(self) -> None:
        self._leases: dict[str, Lease] = {}
        # Sorted by time. Lists, not deques: a report after a restart brings leases from the past.
        self._admitted: list[tuple[float, str]] = []
        self._ended: list[tuple[float, str]] = []
        self._num_running = 0
        self._reserved = 0
        self._used = 0

    def admit(self, lease_id: str, limits: Limits, tokens: int, now: float) -> Refusal | None:
        """Begin a request that may use `tokens`, or say why not. The same id again is the same request."""
        self._prune(now)
        if lease_id in self._leases:
            return None
        refusals = [refusal for refusal in self._refusals(limits, tokens, now) if refusal is not None]
        if refusals:
            return max(refusals, key=lambda refusal: _wait(refusal.retry_after_s))
        self._insert(lease_id, Lease(now, tokens))
        return None

    def put(self, lease_id: str, lease: Lease, now: float) -> None:
        """What became of a request: ended with its true tokens, or running although it was thought to have ended. An
        unknown one is taken in as it is, a known one keeps the time of its admission."""
        self._prune(now)
        known = self._leases.get(lease_id)
        if known is not None:
            self.drop(lease_id)
            lease = Lease(known.admitted_at, lease.tokens, lease.ended_at)
        elif lease.ended_at is not None and lease.ended_at + WINDOW_S <= now:
            return
        self._insert(lease_id, lease)

    def drop(self, lease_id: str) -> None:
        """Forget a request as if it had never been: its client was refused after all."""
        lease = self._leases.pop(lease_id)
        _discard(self._admitted, (lease.admitted_at, lease_id))
        if lease.ended_at is None:
            self._num_running -= 1
            self._reserved -= lease.tokens
        else:
            _discard(self._ended, (lease.ended_at, lease_id))
            self._used -= lease.tokens

    def running(self) -> list[str]:
        return [lease_id for lease_id, lease in self._leases.items() if lease.ended_at is None]

    def lease(self, lease_id: str) -> Lease | None:
        return self._leases.get(lease_id)

    def is_idle(self, now: float) -> bool:
        """Whether nothing is left to remember."""
        self._prune(now)
        return not self._leases

    def standing(self, limits: Limits, now: float) -> Standing:
        self._prune(now)
        last_request = self._admitted[-1][0] + WINDOW_S - now if self._admitted else 0.0
        last_tokens = self._ended[-1][0] + WINDOW_S - now if self._ended else 0.0
        return Standing(
            limits,
            remaining_requests=max(0, (limits.requests_per_minute or 0) - len(self._admitted)),
            remaining_tokens=max(0, (limits.tokens_per_minute or 0) - self._reserved - self._used),
            requests_reset_s=last_request,
            tokens_reset_s=WINDOW_S if self._num_running else last_tokens,
        )

    def _refusals(self, limits: Limits, tokens: int, now: float) -> tuple[Refusal | None, ...]:
        return (
            self._refuse_tokens(limits.tokens_per_minute, tokens, now),
            self._refuse_request(limits.requests_per_minute, now),
            self._refuse_stream(limits.concurrent_streams),
        )

    def _refuse_request(self, limit: int | None, now: float) -> Refusal | None:
        used = len(self._admitted)
        if limit is None or used < limit:
            return None
        return Refusal("requests", limit, used, 1, self._admitted[used - limit][0] + WINDOW_S - now)

    def _refuse_tokens(self, limit: int | None, tokens: int, now: float) -> Refusal | None:
        used = self._reserved + self._used
        if limit is None or used + tokens <= limit:
            return None
        if tokens > limit:
            return Refusal("request_too_large", limit, used, tokens, None)
        missing = used + tokens - limit
        for ended_at, lease_id in self._ended:
            missing -= self._leases[lease_id].tokens
            if missing <= 0:
                return Refusal("tokens", limit, used, tokens, ended_at + WINDOW_S - now)
        return Refusal("tokens", limit, used, tokens, UNKNOWN_WAIT_S)

    def _refuse_stream(self, limit: int | None) -> Refusal | None:
        if limit is None or self._num_running < limit:
            return None
        return Refusal("concurrent_streams", limit, self._num_running, 1, UNKNOWN_WAIT_S)

    def _insert(self, lease_id: str, lease: Lease) -> None:
        self._leases[lease_id] = lease
        insort(self._admitted, (lease.admitted_at, lease_id))
        if lease.ended_at is None:
            self._num_running += 1
            self._reserved += lease.tokens
        else:
            insort(self._ended, (lease.ended_at, lease_id))
            self._used += lease.tokens

    def _prune(self, now: float) -> None:
        """Let go of what has left the window: admissions of all leases, tokens of those that ended."""
        border = (now - WINDOW_S, _LAST_ID)
        if self._admitted and self._admitted[0] <= border:
            del self._admitted[: bisect_right(self._admitted, border)]
        if self._ended and self._ended[0] <= border:
            count = bisect_right(self._ended, border)
            for _, lease_id in self._ended[:count]:
                self._used -= self._leases.pop(lease_id).tokens
            del self._ended[:count]


def _discard(entries: list[tuple[float, str]], entry: tuple[float, str]) -> None:
    index = bisect_left(entries, entry)
    if index < len(entries) and entries[index] == entry:
        del entries[index]


def _wait(retry_after_s: float | None) -> float:
    return float("inf") if retry_after_s is None else retry_after_s
