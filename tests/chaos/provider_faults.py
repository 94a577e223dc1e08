"""Faults of a remote provider, through the whole way: endpoint, replica, `remote` engine, sockets.

An answer is complete or ends with an error, and the next one after the fault is complete."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from cluster.engine import Engine
from cluster.engines.choice import EngineChoice, make_engine
from cluster.engines.settings import EngineSettings
from tests.chaos.faults import Fault, Heard, Outcome, hear
from tests.chaos.provider import RETRY_AFTER_S, WORDS, Provider, ProviderFault, running_provider
from tests.services.harness import Running, events_of, running_endpoint

BODY = {"model": "tiny", "messages": [{"role": "user", "content": "Count."}], "stream": True, "max_tokens": 20}
SILENCE_S = 1.0
"""The limit that the trials set; a provider's default is two minutes."""


def faults(_quick: bool) -> list[Fault]:
    return [
        Fault("provider answers 429", 5, partial(misbehave, fault="429", status=503, code="engine_busy")),
        Fault("provider resets", 5, partial(misbehave, fault="reset", status=500, code="generation_failed")),
        Fault("provider cuts in the middle", 5, partial(misbehave, fault="cut", code="generation_failed")),
        Fault("provider stalls", SILENCE_S + 5, partial(misbehave, fault="stall", code="generation_failed")),
        Fault("provider sends a malformed chunk", 5, partial(misbehave, fault="malformed", code="generation_failed")),
        Fault("provider sends no `[DONE]`", 5, partial(misbehave, fault="no [DONE]", code="generation_failed")),
        Fault("provider flaps", 5, flap),
    ]


@asynccontextmanager
async def before_provider(folder: Path, **surroundings: Any) -> AsyncIterator[tuple[Running, Provider]]:
    """An endpoint whose one model is at a provider."""
    async with running_provider() as provider, running_endpoint(folder, **surroundings) as running:
        await running.add_model(engine_at(provider))
        yield running, provider


def engine_at(provider: Provider) -> Engine:
    options = {"silence_s": SILENCE_S}
    settings = EngineSettings(model="tiny", location=provider.url, parallel_requests=4, options=options)
    return make_engine(EngineChoice("remote", None, uses_gpu=False), settings)


async def misbehave(folder: Path, *, fault: ProviderFault, code: str, status: int = 200) -> Outcome:
    """The time until the client has heard of it."""
    async with before_provider(folder) as (running, provider):
        provider.fault = fault
        heard = await hear(running.http, BODY)
        provider.fault = None
        after = await hear(running.http, BODY)
        load = running.services[0].load
    seen = f"{heard.status} with the error {heard.error.get('code')}"
    problem = _why_wrong(heard, status, code) or _why_wrong(after, 200, None)
    if problem is None and fault == "429" and heard.headers.get("retry-after") != str(RETRY_AFTER_S):
        problem = f"Retry-After is {heard.headers.get('retry-after')}, the provider's is {RETRY_AFTER_S}"
    if problem is None and (fault == "stall") != bool(provider.num_left):
        problem = "the provider's connection was left open"
    if problem is None and load[:2] != (0, 0):
        problem = f"a slot is taken for ever: {load}"
    return Outcome(heard.seconds, seen, problem)


async def flap(folder: Path) -> Outcome:
    """Every second request is reset. Each answer is whole or an error, and those between the faults are whole."""
    slowest, problem = 0.0, None
    async with before_provider(folder) as (running, provider):
        for number in range(10):
            is_down = number % 2 == 0
            provider.fault = "reset" if is_down else None
            heard = await hear(running.http, BODY)
            slowest = max(slowest, heard.seconds)
            expected: tuple[int, str | None] = (500, "generation_failed") if is_down else (200, None)
            problem = problem or _why_wrong(heard, *expected)
    return Outcome(slowest, "errors while it is down, whole answers while it is up", problem)


def _why_wrong(heard: Heard, status: int, code: str | None) -> str | None:
    """`code`: of the error that it has to end with; none: it has to be whole."""
    if heard.status != status or heard.error.get("code") != code:
        return f"status {heard.status}, error {heard.error}, expected {status} and {code}"
    if heard.is_complete != (code is None):
        return f"an answer that is {'not ' if code is None else ''}complete: {heard.body[-200:]!r}"
    return _why_other_words(heard) if status == 200 else None


def _why_other_words(heard: Heard) -> str | None:
    chunks: list[dict[str, Any]] = [event for event in events_of(heard.body) if isinstance(event, dict)]
    deltas = [choice["delta"] for chunk in chunks for choice in chunk.get("choices", ())]
    text, whole = "".join(delta.get("content") or "" for delta in deltas), "".join(WORDS)
    is_right = text == whole if heard.is_complete else whole.startswith(text)
    return None if is_right else f"the text is {text!r}"
