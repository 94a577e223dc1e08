"""A remote provider of models that misbehaves on demand: sockets and bytes, because that is where it goes wrong."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Literal

ProviderFault = Literal["429", "reset", "cut", "stall", "malformed", "no [DONE]"]
WORDS = ("One", " two", " three", " four", " five", ".")
RETRY_AFTER_S = 7


class Provider:
    """`fault` is what happens to the next requests; none: they are answered. While it `is_away` it resets every
    connection, also those that ask which models there are."""

    def __init__(self) -> None:
        self.fault: ProviderFault | None = None
        self.is_away = False
        self.num_requests = 0
        self.num_left = 0
        """Clients that went away while a stalled answer was open."""
        self._server: asyncio.Server | None = None

    @property
    def url(self) -> str:
        assert self._server is not None
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/v1"

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            if self.is_away:
                _reset(writer)
                return
            if head.startswith("GET"):
                _write(writer, 200, json.dumps({"data": [{"id": "tiny", "max_model_len": 4096}]}).encode())
            else:
                length = next(line for line in head.lower().split("\r\n") if line.startswith("content-length:"))
                await reader.readexactly(int(length.partition(":")[2]))
                self.num_requests += 1
                await self._answer(reader, writer)
            await writer.drain()
        writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        fault = self.fault
        if fault == "reset":
            _reset(writer)
            return
        if fault == "429":
            _write(writer, 429, b'{"error": {"message": "Rate limit reached."}}', f"retry-after: {RETRY_AFTER_S}\r\n")
            return
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n")
        for number, word in enumerate(WORDS):
            writer.write(_event({"choices": [{"index": 0, "delta": {"content": word}, "finish_reason": None}]}))
            await writer.drain()
            if number == 1 and fault is not None and fault != "no [DONE]":
                await asyncio.sleep(0.05)  # what came is read before the end of it is noticed
                await self._break(fault, reader, writer)
                return
        writer.write(_event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}))
        writer.write(_event({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": len(WORDS)}}))
        if fault != "no [DONE]":
            writer.write(b"data: [DONE]\n\n")

    async def _break(self, fault: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if fault == "cut":
            _reset(writer)
        elif fault == "malformed":
            writer.write(b'data: {"choices": [{"index": 0, "delta": {"cont\n\n')
        else:
            await reader.read()  # until the other side gives up
            self.num_left += 1


@asynccontextmanager
async def running_provider() -> AsyncIterator[Provider]:
    provider = Provider()
    await provider.start()
    try:
        yield provider
    finally:
        await provider.stop()


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data).encode() + b"\n\n"


def _write(writer: asyncio.StreamWriter, status: int, body: bytes, more: str = "") -> None:
    head = f"HTTP/1.1 {status} -\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n{more}"
    writer.write(head.encode() + b"connection: close\r\n\r\n" + body)


def _reset(writer: asyncio.StreamWriter) -> None:
    """The connection ends as that of a crashed machine does: RST, no goodbye."""
    sock: socket.socket = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
