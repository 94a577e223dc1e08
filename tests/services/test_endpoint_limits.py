"""Limits of api keys at the public endpoint: what clients see, and what is booked however an answer ends."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from cluster.engine import GenerationChunk, Usage
from cluster.errors import EngineBusy, EngineFailed
from services.config import LimitsConfig, PlatformConfig
from services.limits import NO_LIMIT, Limits
from tests.services.harness import (
    HELLO,
    BookCalls,
    Running,
    ScriptedEngine,
    chat_body,
    error_of,
    events_of,
    running_endpoint,
    wait_until,
    words,
)

STORY = {"windfarm_tools": ["calculator"]}
"""Makes a chat go through the story instead of being relayed."""
HELLO_TOKENS = 6
"""The estimate for `HELLO`: two for its five bytes, four for the message."""


@asynccontextmanager
async def key_of(running: Running, limits: Limits) -> AsyncIterator[httpx.AsyncClient]:
    """A client with a key of its own."""
    owner = running.accounts.owner_id()
    assert owner is not None
    key = running.accounts.create_key(owner, "limited", limits)
    headers = {"authorization": f"Bearer {key}"}
    async with httpx.AsyncClient(base_url=running.url, headers=headers, timeout=60, trust_env=False) as client:
        yield client


async def chat(client: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    return await client.post("/v1/chat/completions", json=chat_body(**fields))


def remaining_tokens(running: Running, tokens: int) -> int:
    """What the book has left of a limit of the one key in it; nothing is asked for."""
    (usage,) = running.limiter.book._keys.values()
    return usage.standing(Limits(None, tokens, None), running.limiter.book._now).remaining_tokens


def num_running(running: Running) -> int:
    return sum(len(usage.running()) for usage in running.limiter.book._keys.values())


async def test_openais_client_sees_a_rate_limit_error_and_how_long_to_wait(tmp_path: Path) -> None:
    async with running_endpoint(tmp_path, ScriptedEngine(*words("Hel", "lo"))) as running:
        owner = running.accounts.owner_id()
        assert owner is not None
        key = running.accounts.create_key(owner, "limited", Limits(requests_per_minute=2))
        client = running.openai.with_options(api_key=key)
        raw = await client.chat.completions.with_raw_response.create(model="tiny", messages=HELLO)  # type: ignore[arg-type]
        assert raw.headers["x-ratelimit-limit-requests"] == "2"
        assert raw.headers["x-ratelimit-remaining-requests"] == "1"
        assert raw.headers["x-ratelimit-reset-requests"] == "1m0s"
        assert "x-ratelimit-limit-tokens" not in raw.headers
        await client.completions.create(model="tiny", prompt="Once")
        with pytest.raises(openai.RateLimitError) as refused:
            await client.chat.completions.create(model="tiny", messages=HELLO)  # type: ignore[arg-type]
    assert (refused.value.code, refused.value.type) == ("rate_limit_exceeded", "requests")
    assert 55 <= int(refused.value.response.headers["retry-after"]) <= 60
    assert refused.value.response.headers["x-ratelimit-remaining-requests"] == "0"
    assert "limit of requests per minute: limit 2, used 2, requested 1. Try again in" in refused.value.message


@pytest.mark.parametrize("fields", [{}, STORY])
@pytest.mark.parametrize("stream", [False, True])
async def test_answers_are_booked_with_their_usage_and_carry_the_headers(
    tmp_path: Path, fields: dict[str, Any], stream: bool
) -> None:
    async with (
        running_endpoint(tmp_path, ScriptedEngine(*words("Hel", "lo"))) as running,
        key_of(running, Limits(9, 1000, 3)) as client,
    ):
        first = await chat(client, max_tokens=100, stream=stream, **fields)
        second = await chat(client, max_tokens=100, stream=stream, **fields)
        assert remaining_tokens(running, 1000) == 1000 - 2 * 5  # words() says 3 tokens of prompt and 2 of answer
    reserved = HELLO_TOKENS + 100
    assert first.headers["x-ratelimit-limit-tokens"] == second.headers["x-ratelimit-limit-tokens"] == "1000"
    assert first.headers["x-ratelimit-remaining-tokens"] == str(1000 - reserved)
    assert second.headers["x-ratelimit-remaining-tokens"] == str(1000 - 5 - reserved)
    assert [answer.headers["x-ratelimit-remaining-requests"] for answer in (first, second)] == ["8", "7"]
    assert first.headers["x-ratelimit-reset-tokens"] == "1m0s"
    if stream:
        assert events_of(first.text)[-1] == "[DONE]"


async def test_completions_and_embeddings_are_booked_too(tmp_path: Path) -> None:
    engine = ScriptedEngine(*words("Hel", "lo"))
    async with running_endpoint(tmp_path, engine) as running, key_of(running, Limits(9, 1000, 3)) as client:
        for stream in (False, True):
            body = {"model": "tiny", "prompt": "Once", "max_tokens": 7, "stream": stream}
            assert (await client.post("/v1/completions", json=body)).status_code == 200
        assert remaining_tokens(running, 1000) == 1000 - 2 * 5
        answer = await client.post("/v1/embeddings", json={"model": "embed", "input": ["x" * 40, "x" * 50]})
        assert remaining_tokens(running, 1000) == 1000 - 2 * 5 - 90
    assert answer.headers["x-ratelimit-remaining-requests"] == "6"


@pytest.mark.parametrize("fields", [{}, STORY])
async def test_a_stream_that_its_client_cuts_is_booked_and_frees_its_place(
    tmp_path: Path, fields: dict[str, Any]
) -> None:
    engine = ScriptedEngine(
        GenerationChunk((1, 2, 3), "Hel"), GenerationChunk((4,), "lo"), GenerationChunk((5,), "!"), asyncio.Event()
    )
    async with (
        running_endpoint(tmp_path, engine) as running,
        key_of(running, Limits(None, 5000, 1)) as client,
    ):
        async with client.stream("POST", "/v1/chat/completions", json=chat_body(stream=True, **fields)) as answer:
            lines = answer.aiter_lines()
            while "!" not in await anext(lines):
                pass
            refused = await chat(client)
            assert (refused.status_code, error_of(refused)["type"]) == (429, "concurrent_streams")
            assert refused.headers["retry-after"] == "1"
        await wait_until(lambda: not num_running(running))
        assert remaining_tokens(running, 5000) == 5000 - HELLO_TOKENS - 5


@pytest.mark.parametrize("fields", [{}, STORY])
async def test_a_stream_that_fails_in_the_middle_is_booked_with_what_came(
    tmp_path: Path, fields: dict[str, Any]
) -> None:
    engine = ScriptedEngine(GenerationChunk((1, 2, 3), "Hel"), EngineFailed("broken"))
    async with running_endpoint(tmp_path, engine) as running, key_of(running, Limits(None, 1000, 1)) as client:
        answer = await chat(client, stream=True, **fields)
        assert events_of(answer.text)[-1]["error"]["message"] == "broken"
        assert num_running(running) == 0
        assert remaining_tokens(running, 1000) == 1000 - HELLO_TOKENS - 3


@pytest.mark.parametrize("fields", [{}, {"stream": True}, STORY, {**STORY, "stream": True}])
async def test_what_failed_before_its_first_token_costs_no_tokens(tmp_path: Path, fields: dict[str, Any]) -> None:
    async with (
        running_endpoint(tmp_path, ScriptedEngine(EngineBusy("full"))) as running,
        key_of(running, Limits(5, 1000, 1)) as client,
    ):
        answer = await chat(client, **fields)
        assert (answer.status_code, answer.headers["x-ratelimit-remaining-requests"]) == (503, "4")
        assert num_running(running) == 0
        assert remaining_tokens(running, 1000) == 1000


async def test_usage_of_the_prompt_replaces_the_estimate_over_all_generations_of_a_story(tmp_path: Path) -> None:
    chunk = GenerationChunk((1,), "x")
    engine = ScriptedEngine(chunk, GenerationChunk(finish_reason="stop", usage=Usage(300, 1)))
    async with running_endpoint(tmp_path, engine) as running, key_of(running, Limits(None, 800, None)) as client:
        assert (await chat(client, **STORY)).status_code == 200
        assert remaining_tokens(running, 800) == 499
        refused = await chat(client)  # 512 tokens of answer are reserved where the client names no limit
    assert (refused.status_code, error_of(refused)["type"]) == (429, "tokens")
    assert 55 <= int(refused.headers["retry-after"]) <= 60


async def test_what_can_never_fit_is_refused_without_a_time_to_wait(tmp_path: Path) -> None:
    async with (
        running_endpoint(tmp_path, ScriptedEngine(*words("x"))) as running,
        key_of(running, Limits(None, 100, None)) as client,
    ):
        refused = await chat(client, max_tokens=95)
        assert (await chat(client, max_tokens=100 - HELLO_TOKENS)).status_code == 200
    assert (refused.status_code, error_of(refused)["code"]) == (429, "rate_limit_exceeded")
    assert "limit 100, requested 101" in error_of(refused)["message"]
    assert "retry-after" not in refused.headers
    assert refused.headers["x-should-retry"] == "false"


async def test_requests_that_are_wrong_anyway_are_not_counted(tmp_path: Path) -> None:
    async with (
        running_endpoint(tmp_path, ScriptedEngine(*words("x"))) as running,
        key_of(running, Limits(requests_per_minute=1)) as client,
    ):
        assert (await chat(client, model="nope")).status_code == 404
        assert (await chat(client, temperature=9)).status_code == 400
        assert (await client.get("/v1/models")).status_code == 200
        assert (await chat(client)).status_code == 200
        assert (await chat(client)).status_code == 429


@asynccontextmanager
async def two_relays(home: Path, engine: Callable[[], ScriptedEngine]) -> AsyncIterator[tuple[Running, Running]]:
    """Two endpoints on one database and one limiter."""
    limiter = BookCalls()
    async with (
        running_endpoint(home, engine(), limiter=limiter) as one,
        running_endpoint(home, engine(), limiter=limiter) as other,
    ):
        yield one, other


async def test_two_relays_let_exactly_the_limit_in(tmp_path: Path) -> None:
    async with (
        two_relays(tmp_path, lambda: ScriptedEngine(*words("x"))) as (one, other),
        key_of(one, Limits(requests_per_minute=13)) as client,
    ):
        urls = [one.url, other.url] * 20
        answers = await asyncio.gather(
            *(client.post(f"{url}/v1/chat/completions", json=chat_body()) for url in urls),
        )
    statuses = [answer.status_code for answer in answers]
    assert (statuses.count(200), statuses.count(429)) == (13, 27)


async def test_who_saw_the_end_finds_the_place_free_on_any_relay(tmp_path: Path) -> None:
    async with (
        two_relays(tmp_path, lambda: ScriptedEngine(*words("x", "y"))) as (one, other),
        key_of(one, Limits(concurrent_streams=1)) as client,
    ):
        for url, fields in itertools.product([one.url, other.url] * 4, [{}, STORY]):
            body = chat_body(stream=True, **fields)
            assert (await client.post(f"{url}/v1/chat/completions", json=chat_body(**fields))).status_code == 200
            async with client.stream("POST", f"{url}/v1/chat/completions", json=body) as answer:
                assert answer.status_code == 200
                async for line in answer.aiter_lines():
                    if line == "data: [DONE]":
                        break


async def test_without_a_limiter_limited_keys_hear_to_try_again_and_others_notice_nothing(tmp_path: Path) -> None:
    async with (
        running_endpoint(tmp_path, ScriptedEngine(*words("x"))) as running,
        key_of(running, Limits(requests_per_minute=1)) as client,
    ):
        running.limiter.is_away = True
        refused = await chat(client, stream=True)
        assert (refused.status_code, error_of(refused)["code"]) == (503, "limits_unavailable")
        assert refused.headers["retry-after"] == "2"
        assert (await running.chat()).status_code == 200
        running.limiter.is_away = False
        assert (await chat(client)).status_code == 200
        assert (await chat(client)).status_code == 429


async def test_a_stream_ends_and_is_booked_later_when_the_limiter_is_lost_meanwhile(tmp_path: Path) -> None:
    go_on = asyncio.Event()
    engine = ScriptedEngine(GenerationChunk((1,), "Hel"), go_on, *words("lo"))
    async with (
        running_endpoint(tmp_path, engine) as running,
        key_of(running, Limits(None, 5000, 1)) as client,
    ):
        async with client.stream("POST", "/v1/chat/completions", json=chat_body(stream=True)) as answer:
            lines = answer.aiter_lines()
            while "Hel" not in await anext(lines):
                pass
            running.limiter.is_away = True
            running.limiter.restart()
            go_on.set()
            rest = [line async for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        running.limiter.is_away = False
        await wait_until(lambda: running.limiter.book.num_keys)
        assert num_running(running) == 0
        assert remaining_tokens(running, 5000) == 5000 - 4


async def test_where_the_file_says_so_limited_keys_pass_without_a_limiter_and_are_counted_later(
    tmp_path: Path,
) -> None:
    config = PlatformConfig(limits=LimitsConfig(when_unavailable="allow"))
    async with (
        running_endpoint(tmp_path, ScriptedEngine(*words("x")), config=config) as running,
        key_of(running, Limits(requests_per_minute=3)) as client,
    ):
        running.limiter.is_away = True
        assert [(await chat(client)).status_code for _ in range(2)] == [200, 200]
        running.limiter.is_away = False
        assert [(await chat(client)).status_code for _ in range(2)] == [200, 429]
        text = (await running.http.get("/metrics")).text
    assert 'windfarm_limit_refusals_total{reason="unavailable"} 2.0' in text


async def test_a_key_without_limits_never_asks(tmp_path: Path) -> None:
    engine = ScriptedEngine(*words("x"))
    async with running_endpoint(tmp_path, engine) as running:
        answer = await running.chat(stream=True)
        assert running.limiter.num_calls == 0
    assert not [name for name in answer.headers if name.startswith("x-ratelimit")]


async def test_defaults_hold_for_keys_without_values_of_their_own(tmp_path: Path) -> None:
    config = PlatformConfig(limits=LimitsConfig(requests_per_minute=1))
    async with (
        running_endpoint(tmp_path, ScriptedEngine(*words("x")), config=config) as running,
        key_of(running, Limits(requests_per_minute=NO_LIMIT)) as unlimited,
        key_of(running, Limits(requests_per_minute=2)) as other,
    ):
        assert [(await running.chat()).status_code for _ in range(2)] == [200, 429]
        assert [(await chat(other)).status_code for _ in range(3)] == [200, 200, 429]
        assert [(await chat(unlimited)).status_code for _ in range(3)] == [200, 200, 200]


async def test_refusals_are_counted_by_reason_and_not_by_key(tmp_path: Path) -> None:
    async with (
        running_endpoint(tmp_path, ScriptedEngine(*words("x"))) as running,
        key_of(running, Limits(1, 100, 1)) as client,
    ):
        for max_tokens in (9, 9, 95):
            await chat(client, max_tokens=max_tokens)
        lines = (await running.http.get("/metrics")).text.splitlines()
    counted = {line for line in lines if line.startswith("windfarm_limit_refusals_total")}
    assert counted == {
        'windfarm_limit_refusals_total{reason="requests"} 1.0',
        'windfarm_limit_refusals_total{reason="request_too_large"} 1.0',
    }
