"""A remote API that misbehaves is an error, never an answer that looks complete."""

import asyncio
import json

import pytest

from cluster.engine import Engine
from cluster.engines.choice import EngineChoice, make_engine
from cluster.engines.sse import MAX_EVENT_BYTES, SseDecoder
from cluster.errors import (
    ClusterError,
    ContextTooLong,
    EngineBusy,
    EngineDead,
    EngineFailed,
    InvalidRequest,
    ModelNotFound,
)
from services.listener import start_listener
from tests.cluster.engines.conftest import chat, settings

MODELS = {"data": [{"id": "tiny", "max_model_len": 64}]}


def event(text: str | None = None, finish_reason: str | None = None, **extra) -> bytes:
    choice = {"index": 0, "delta": {} if text is None else {"content": text}, "finish_reason": finish_reason}
    return b"data: " + json.dumps({"choices": [choice]} | extra).encode() + b"\n\n"


USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2}}\n\n'
DONE = b"data: [DONE]\n\n"


class FaultyApi:
    """Answers `/models` properly, and a generation with whatever it is told; then it may cut the line."""

    def __init__(self, *pieces: bytes, status: int = 200, models=MODELS, models_status: int = 200) -> None:
        self.pieces = pieces
        self.status = status
        self.models = models
        self.models_status = models_status
        self.requests: list[dict] = []
        self.client_left = asyncio.Event()
        self.stays_open = False

    async def __call__(self, scope, receive, send) -> None:
        if scope["path"].endswith("/models"):
            await send({"type": "http.response.start", "status": self.models_status, "headers": []})
            await send({"type": "http.response.body", "body": json.dumps(self.models).encode()})
            return
        self.requests.append(json.loads((await receive())["body"]))
        await send({"type": "http.response.start", "status": self.status, "headers": []})
        for piece in self.pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        if self.stays_open:
            while (await receive())["type"] != "http.disconnect":
                pass
            self.client_left.set()
        await send({"type": "http.response.body", "body": b""})


class Remote:
    """The engine before such an API."""

    def __init__(self, api: FaultyApi, **changes) -> None:
        self.api = api
        self.changes = {"max_context": None} | changes

    async def __aenter__(self) -> Engine:
        self.listener = await start_listener(self.api)
        self.engine = make_engine(
            EngineChoice("remote", None, uses_gpu=False), settings(f"{self.listener.url}/v1", **self.changes)
        )
        try:
            await self.engine.start()
        except ClusterError:
            await self.listener.stop()
            raise
        return self.engine

    async def __aexit__(self, *_: object) -> None:
        await self.engine.stop()
        await self.listener.stop()


async def collect(engine: Engine, **sampling) -> list:
    return [chunk async for chunk in engine.generate(chat("Hello", **sampling))]


async def test_a_proper_stream_comes_through_however_it_is_cut() -> None:
    stream = b": comment\r\n\r\n" + event("H\u00e9") + event("llo") + event(None, "stop") + USAGE + DONE
    for size in (1, 7, len(stream)):
        async with Remote(FaultyApi(*(stream[at : at + size] for at in range(0, len(stream), size)))) as engine:
            chunks = await collect(engine)
        assert "".join(chunk.text for chunk in chunks) == "H\u00e9llo"
        assert chunks[-1].finish_reason == "stop"
        assert (chunks[-1].usage.num_prompt_tokens, chunks[-1].usage.num_completion_tokens) == (3, 2)
        assert engine.info.max_context == 64


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([event("a")], r"without \[DONE\]"),
        ([event("a"), event(None, "stop"), USAGE], r"without \[DONE\]"),
        ([event("a"), USAGE, DONE], "the reason None"),
        ([event("a"), event(None, "content_filter"), USAGE, DONE], "content_filter"),
        ([event("a"), event(None, "stop"), DONE], "no usage"),
        ([event("a"), b"data: {broken\n\n"], "malformed chunk"),
        ([event("a"), b"data: [1]\n\n"], "malformed chunk"),
        ([event("a"), b"data: \xff\n\n"], "malformed stream"),
        ([event("a"), b'data: {"error": {"message": "out of memory"}}\n\n'], "out of memory"),
    ],
)
async def test_an_incomplete_or_broken_stream_is_an_error(pieces: list[bytes], message: str) -> None:
    async with Remote(FaultyApi(*pieces)) as engine:
        with pytest.raises(EngineFailed, match=message):
            await collect(engine)
        assert engine.load == (0, 0)


@pytest.mark.parametrize(
    ("status", "body", "error", "message"),
    [
        (400, {"error": {"message": "bad top_p", "param": "top_p"}}, InvalidRequest, "bad top_p"),
        (400, {"error": {"message": "long", "code": "context_length_exceeded"}}, ContextTooLong, "long"),
        (401, {"error": {"message": "no"}}, EngineFailed, "remote_key_env"),
        (429, {"error": {"message": "slow down"}}, EngineBusy, "slow down"),
        (503, "overloaded", EngineBusy, "overloaded"),
        (500, {"error": "oops"}, EngineFailed, "oops"),
        (502, "", EngineFailed, "502"),
    ],
)
async def test_refusals_become_our_errors(status: int, body, error: type, message: str) -> None:
    async with Remote(FaultyApi(json.dumps(body).encode(), status=status)) as engine:
        with pytest.raises(error, match=message):
            await collect(engine)


@pytest.mark.parametrize("silence_s", [0, -1, "long", True])
def test_a_limit_of_silence_that_is_none_is_refused(silence_s: object) -> None:
    with pytest.raises(ClusterError, match="silence_s is a number of seconds above 0"):
        make_engine(
            EngineChoice("remote", None, uses_gpu=False), settings("http://x/v1", options={"silence_s": silence_s})
        )


async def test_a_lost_or_absent_server_is_an_error_and_unhealthy() -> None:
    remote = Remote(FaultyApi(event("a")))
    async with remote as engine:
        await engine.check_health()
        await remote.listener.stop()
        with pytest.raises(EngineFailed, match="cannot be reached"):
            await collect(engine)
        with pytest.raises(EngineDead):
            await engine.check_health()


async def test_closing_the_stream_closes_the_connection() -> None:
    api = FaultyApi(event("a"))
    api.stays_open = True
    async with Remote(api) as engine:
        stream = engine.generate(chat("Hello"))
        await anext(stream)
        await stream.aclose()
        await api.client_left.wait()
        assert engine.load == (0, 0)


@pytest.mark.parametrize(
    ("api", "error", "message"),
    [
        (FaultyApi(models={"data": [{"id": "other"}]}), ModelNotFound, "it has: other"),
        (FaultyApi(models={"data": [{"id": "tiny"}]}), ClusterError, "Set max_context"),
        (FaultyApi(models=["no"]), EngineFailed, "up to /v1"),
        (FaultyApi(models={"error": {"message": "who"}}, models_status=401), EngineFailed, "remote_key_env"),
    ],
)
async def test_a_wrong_configuration_is_told_at_the_start(api: FaultyApi, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        async with Remote(api):
            pass


async def test_only_fields_that_were_given_are_sent() -> None:
    api = FaultyApi(event("a"), event(None, "stop"), USAGE, DONE)
    async with Remote(api, options={"stream_options": False}, remote_model="tiny") as engine:
        await collect(engine, max_tokens=5, stop=("x",), json_schema={"type": "object"}, logit_bias={3: -1.0})
    (body,) = api.requests
    assert body == {
        "model": "tiny",
        "stream": True,
        "max_tokens": 5,
        "stop": ["x"],
        "logit_bias": {"3": -1.0},
        "messages": [{"role": "user", "content": "Hello"}],
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": {"type": "object"}, "strict": True},
        },
    }


def test_events_of_several_lines_are_joined_and_endless_ones_refused() -> None:
    assert SseDecoder().feed(b"event: x\ndata: a\ndata:b\n\ndata: c\n\n") == ["a\nb", "c"]
    with pytest.raises(ValueError, match="longer than"):
        SseDecoder().feed(b"data: " + b"x" * MAX_EVENT_BYTES)
