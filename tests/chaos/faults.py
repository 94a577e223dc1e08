"""What a fault of the contract is: a trial that makes it happen, and a limit for what a client notices of it.

Groups of faults live in modules of their own; `contract` joins them and knows the table.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx

from services.discovery import Directory


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one trial."""

    seconds: float
    """What the row's limit bounds: the longest silence of a stream, or the time until a client heard or was served."""
    seen: str
    """What the client saw."""
    problem: str | None = None
    """What was not as the contract says."""
    noticed_s: float | None = None
    """How much of it went by until the endpoint knew of the loss; none: nobody can see that here."""


Trial = Callable[[Path], Awaitable[Outcome]]
"""Gets an empty folder of its own."""
Series = Callable[[int], Awaitable[list[Outcome]]]
"""So many trials, one after the other."""


@dataclass(frozen=True, slots=True)
class Fault:
    row: str
    """The first cell of its row in the table."""
    at_most_s: float
    trial: Trial | None
    series: Series | None = None
    """In the place of `trial`, where all trials share what takes long to start."""
    num_trials: int = 10
    run_together: bool = False
    """The trials mostly wait, so they run side by side."""
    needs: str | None = None
    """A part of the machine (see tests/parts.py) without which it cannot be tried."""

    async def try_once(self, *, is_timed: bool = True) -> Outcome:
        """One trial; an error in it is its outcome. Not `is_timed`: however long it took, for tests, which may run
        beside anything."""
        assert self.trial is not None
        with tempfile.TemporaryDirectory(prefix="windfarm-chaos-") as folder:
            try:
                outcome = await self.trial(Path(folder))
            except Exception as error:  # noqa: BLE001  # a campaign goes on
                return _failed(error)
        return self._in_time(outcome) if is_timed else outcome

    async def try_often(self, num_trials: int) -> list[Outcome]:
        if self.series is not None:
            try:
                return [self._in_time(outcome) for outcome in await self.series(num_trials)]
            except Exception as error:  # noqa: BLE001  # a campaign goes on
                return [_failed(error)]
        if self.run_together:
            return list(await asyncio.gather(*(self.try_once() for _ in range(num_trials))))
        return [await self.try_once() for _ in range(num_trials)]

    def _in_time(self, outcome: Outcome) -> Outcome:
        if outcome.problem is None and not outcome.seconds <= self.at_most_s:
            return replace(outcome, problem=f"took {outcome.seconds:.2f} s, the contract says {self.at_most_s:g}")
        return outcome


def _failed(error: Exception) -> Outcome:
    return Outcome(float("nan"), "-", f"{type(error).__name__}: {error}")


class LossWatch:
    """Notes when an endpoint finds its replicas lost."""

    def __init__(self, directory: Directory) -> None:
        self._times: list[float] = []
        report = directory.report_failure

        def note(replica_id: str) -> None:
            self._times.append(time.monotonic())
            report(replica_id)

        directory.report_failure = note  # type: ignore[method-assign]

    def seconds_after(self, fault_at: float) -> float | None:
        """From the fault, at this moment of the monotonic clock, until the first loss after it."""
        return next((at - fault_at for at in self._times if at >= fault_at), None)


@dataclass
class Heard:
    """One answer as its client heard it."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: str = ""
    longest_silence_s: float = 0.0
    """Between two events, or between the request and the first one. Comments are no events."""
    seconds: float = 0.0
    was_cut: bool = False
    """The connection ended in the middle of the answer."""

    @property
    def is_complete(self) -> bool:
        return self.status == 200 and self.body.rstrip().endswith("data: [DONE]")

    @property
    def error(self) -> dict[str, Any]:
        """The error that it ends with; empty: with none."""
        last = self.body.strip().rpartition("data: ")[2] if self.status == 200 else self.body
        try:
            return dict(json.loads(last).get("error") or {})
        except (ValueError, AttributeError):
            return {}


async def hear(http: httpx.AsyncClient, body: dict[str, Any], heard: Heard | None = None) -> Heard:
    """Ask for a chat and listen to its end. `heard` is filled while the answer comes."""
    heard = heard or Heard()
    started = last = time.monotonic()
    try:
        async with http.stream("POST", "/v1/chat/completions", json=body) as answer:
            heard.status, heard.headers = answer.status_code, dict(answer.headers)
            async for part in answer.aiter_text():
                heard.body += part
                if "data: " in part:
                    now = time.monotonic()
                    heard.longest_silence_s, last = max(heard.longest_silence_s, now - last), now
    except httpx.TransportError:
        heard.was_cut = True
    heard.seconds = time.monotonic() - started
    heard.longest_silence_s = max(heard.longest_silence_s, time.monotonic() - last)
    return heard


async def until(condition: Callable[[], Any], limit_s: float = 30.0) -> None:
    """For states that nothing announces."""
    async with asyncio.timeout(limit_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def seconds_of(awaitable: Awaitable[Any]) -> tuple[float, Any]:
    started = time.monotonic()
    result = await awaitable
    return time.monotonic() - started, result
