"""A backend that does nothing: the same short answer to every request, at once. What stands in front of it is measured.

It speaks OpenAI's API (for proxies that want that, and for clients that ask it directly) and what a model replica
speaks to the endpoint (`/generate`: frames). Each answer has `NUM_TOKENS` tokens, a chunk or frame for each, and all of
its bytes come at once. Prints its address, then serves until its standard input is closed.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
from typing import Any

from cluster.engine import GenerationChunk, Usage
from services.frames import CONTENT_TYPE, FrameKind, encode_end, encode_frame
from services.model_wire import RenderOptions
from services.openai_api import usage_json
from services.openai_stream import make_renderer

MODEL = "noop"
NUM_TOKENS = 16
_USAGE = Usage(num_prompt_tokens=20, num_completion_tokens=NUM_TOKENS)
_CHUNKS = [
    *(GenerationChunk((number,), f" word{number}") for number in range(NUM_TOKENS)),
    GenerationChunk(finish_reason="stop", usage=_USAGE),
]
_HEAD_END = b"\r\n\r\n"
_CONTENT_LENGTH = re.compile(rb"content-length:\s*(\d+)", re.IGNORECASE)


def openai_answer() -> bytes:
    message = {"role": "assistant", "content": "".join(chunk.text for chunk in _CHUNKS), "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    answer = {"id": "chatcmpl-noop", "object": "chat.completion", "created": 1, "model": MODEL, "choices": [choice]}
    return json.dumps(answer | {"usage": usage_json(_USAGE)}).encode()


def openai_events() -> bytes:
    renderer = make_renderer(_render("chat"))
    return renderer.begin() + b"".join(map(renderer.chunk, _CHUNKS)) + b"data: [DONE]\n\n"


def frames(kind: str) -> bytes:
    """What a replica sends for a whole answer (`events`) or for a stream of chat chunks (`chat`)."""
    renderer = make_renderer(_render(kind))
    parts = [encode_frame(FrameKind.DATA, first)] if (first := renderer.begin()) else []
    parts += [encode_frame(FrameKind.DATA, renderer.chunk(each), each.token_ids, len(each.text)) for each in _CHUNKS]
    usage = {"num_prompt_tokens": _USAGE.num_prompt_tokens, "num_completion_tokens": NUM_TOKENS}
    return b"".join(parts) + encode_end("stop", usage)


def _render(kind: Any) -> RenderOptions:
    return RenderOptions(
        kind, id="chatcmpl-noop", model=MODEL, created=1, include_usage=False, first_role=kind == "chat"
    )


def _http(body: bytes, content_type: str, *, chunked: bool) -> bytes:
    head = f"HTTP/1.1 200 OK\r\ncontent-type: {content_type}\r\n".encode()
    if chunked:
        return head + b"transfer-encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    return head + b"content-length: %d\r\n\r\n%b" % (len(body), body)


class NoopServer(asyncio.Protocol):
    """One connection."""

    WHOLE = _http(openai_answer(), "application/json", chunked=False)
    EVENTS = _http(openai_events(), "text/event-stream", chunked=True)
    FRAMES = _http(frames("events"), CONTENT_TYPE, chunked=True)
    CHAT_FRAMES = _http(frames("chat"), CONTENT_TYPE, chunked=True)

    def __init__(self) -> None:
        self._data = b""
        self._transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._data += data
        while (answer := self._next()) is not None:
            self._transport.write(answer)

    def _next(self) -> bytes | None:
        """The answer to the next request that came whole."""
        head, found, rest = self._data.partition(_HEAD_END)
        if not found:
            return None
        length = _CONTENT_LENGTH.search(head)
        size = int(length.group(1)) if length else 0
        if len(rest) < size:
            return None
        body, self._data = rest[:size], rest[size:]
        if head.startswith(b"POST /generate "):
            return self.CHAT_FRAMES if b'"kind":"chat"' in body else self.FRAMES
        return self.EVENTS if re.search(rb'"stream":\s*true', body) else self.WHOLE


async def serve() -> None:
    server = await asyncio.get_running_loop().create_server(NoopServer, "127.0.0.1", 0)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    server.close()


if __name__ == "__main__":
    import uvloop

    uvloop.run(serve())
