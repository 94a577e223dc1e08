"""One generation on one replica: when its silence counts, and when it no longer does."""

import asyncio
import time
from collections.abc import Callable
from typing import Any, cast

import aiohttp
import pytest
from aiohttp.base_protocol import BaseProtocol

from services.discovery import ReplicaEndpoint
from services.frame_stream import FrameStream, ReplicaLost
from services.frames import FrameKind, encode_end, encode_frame

LOOK_S = 0.02
USAGE = {"num_prompt_tokens": 1, "num_completion_tokens": 1}


class Response:
    """An answer whose bytes the test feeds, into the reader that real answers have."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.connection = BaseProtocol(loop)
        self.connection.connection_made(asyncio.Transport())
        self.content = aiohttp.StreamReader(self.connection, 1 << 16, loop=loop)
        self.is_closed = False

    async def read(self) -> bytes:
        return await self.content.read()

    def close(self) -> None:
        self.is_closed = True


def stream_of(response: Response, why_leave: Callable[[float, bool], str | None]) -> FrameStream:
    replica = ReplicaEndpoint("r1", "llm-tiny", "http://127.0.0.1:1", pid=1, model="tiny")
    return FrameStream(
        cast("Any", response), replica, on_close=lambda: None, look_s=LOOK_S, why_leave=why_leave, has_tokens=True
    )


async def test_an_answer_whose_end_comes_as_it_is_found_silent_is_complete() -> None:
    """On a busy machine both come in one turn of the event loop, the bytes first."""
    response = Response()
    stream = stream_of(response, lambda _seconds, _has_tokens: "it was silent")
    reading = asyncio.create_task(stream.read())
    await asyncio.sleep(0)
    asyncio.get_running_loop().call_soon(response.content.feed_data, encode_end("stop", USAGE))
    time.sleep(2 * LOOK_S)  # noqa: ASYNC251  # the look is due in the same turn
    assert await reading == []
    assert response.content.exception() is not None
    await stream.close()
    assert stream.end is not None
    assert response.is_closed


async def test_after_the_end_nobody_waits_for_a_token() -> None:
    response = Response()
    stream = stream_of(response, lambda _seconds, _has_tokens: "it was silent")
    response.content.feed_data(encode_end("stop", USAGE))
    await stream.read()
    stream._look()
    assert response.content.exception() is None
    response.content.feed_eof()
    await stream.close()
    assert not response.is_closed


async def test_a_silent_replica_is_lost_with_the_reason() -> None:
    response = Response()
    stream = stream_of(response, lambda seconds, _has_tokens: "it was silent" if seconds >= LOOK_S else None)
    response.content.feed_data(encode_frame(FrameKind.DATA, b"a", (1,), 1))
    await stream.read()
    with pytest.raises(ReplicaLost, match="it was silent") as lost:
        await stream.read()
    assert lost.value.hangs
    await stream.close()


async def test_a_connection_that_ended_without_a_word_is_a_lost_replica() -> None:
    response = Response()
    stream = stream_of(response, lambda _seconds, _has_tokens: None)
    response.connection.connection_lost(None)
    with pytest.raises(ReplicaLost, match="Connection closed"):
        await stream.read()
    await stream.close()
