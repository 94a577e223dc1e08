"""How far the running jobs are, what they wait for, and how fast the work goes. Kept in memory: a restart begins anew.

The speed is that of the last minute of work; pauses between jobs do not count.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

_WINDOW_S = 60.0
_SHORTEST_S = 0.5
"""Below this much work a speed would be a guess."""


@dataclass(frozen=True, slots=True)
class Rates:
    """Work per second: tokens of passages, files that ended, bytes of the files as they were uploaded."""

    tokens: float
    files: float
    bytes: float


@dataclass(frozen=True, slots=True)
class _Event:
    at: float
    tokens: int
    files: int
    num_bytes: float


class RateMeter:
    """Counts work over a sliding window of time."""

    def __init__(self, window_s: float = _WINDOW_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._window_s = window_s
        self._clock = clock
        self._events: deque[_Event] = deque()
        self._since: float | None = None

    def begin(self) -> None:
        """Work goes on from now; repeated calls change nothing."""
        if self._since is None:
            self._since = self._clock()

    def rest(self) -> None:
        """There is nothing to do: the next work is measured anew."""
        self._since = None
        self._events.clear()

    def add(self, *, tokens: int = 0, files: int = 0, num_bytes: float = 0.0) -> None:
        self._events.append(_Event(self._clock(), tokens, files, num_bytes))

    def rates(self) -> Rates | None:
        """None while nothing runs or too little is known."""
        # Asked from other threads than the worker's, so on a copy.
        now, since, events = self._clock(), self._since, list(self._events)
        if since is None or now - since < _SHORTEST_S:
            return None
        first = max(since, now - self._window_s)
        while self._events and self._events[0].at < first:
            self._events.popleft()
        recent = [event for event in events if event.at >= first]
        if not recent:
            return None
        seconds = now - first
        return Rates(
            tokens=sum(event.tokens for event in recent) / seconds,
            files=sum(event.files for event in recent) / seconds,
            bytes=sum(event.num_bytes for event in recent) / seconds,
        )


@dataclass(frozen=True, slots=True)
class LiveState:
    """The running jobs at one moment: the part that is done (0 to 1), and what they wait for, by their ids. Whoever
    joins it with rows of the database takes it first: a job that ends in between is then ended, not back at 0."""

    progress: Mapping[str, float]
    waiting_for: Mapping[str, str]


class LiveJobs:
    """Of each running job the part that is done (0 to 1) and, where it cannot go on, what it waits for."""

    def __init__(self) -> None:
        self.meter = RateMeter()
        self._progress: dict[str, float] = {}
        self._waiting_for: dict[str, str] = {}

    def begin(self, job_id: str) -> None:
        self._progress[job_id] = 0.0
        self.meter.begin()

    def end(self, job_id: str) -> None:
        self._progress.pop(job_id, None)
        self._waiting_for.pop(job_id, None)

    def state(self) -> LiveState:
        return LiveState(dict(self._progress), dict(self._waiting_for))

    def advance(self, job_id: str, progress: float) -> None:
        self._progress[job_id] = progress
        self._waiting_for.pop(job_id, None)

    def waits(self, job_id: str, what_for: str) -> None:
        self._waiting_for[job_id] = what_for

    def goes_on(self, job_id: str) -> None:
        self._waiting_for.pop(job_id, None)
