"""A model replica: one engine behind its own internal listener, streaming frames to the endpoint.

Plain ASGI without Ray, on loopback unless another address of the node is named. Every path demands the internal
secret. A client that goes away cancels its generation; a service that stops lets running streams finish first.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import os
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict
from typing import Any

from cluster.engine import Engine, EngineLoad, GenerationChunk
from cluster.errors import EngineDead, InvalidRequest
from services.beats import BeatStore
from services.discovery import Beacon, ReplicaEndpoint
from services.error_responses import error_body, error_headers, is_expected, to_api_error
from services.event_stream import ClientGone, Receive, Send, until_client_leaves
from services.frames import CONTENT_TYPE, KEEP_ALIVE_FRAME, FrameKind, encode_end, encode_error, encode_frame
from services.gang import GangSeat, WatchPoint
from services.gang_loss import GangLost
from services.listener import Listener, start_listener
from services.model_wire import parse_generation, parse_object
from services.openai_stream import StreamRenderer, make_renderer

SECRET_HEADER = b"x-windfarm-internal"
KEEP_ALIVE_S = 10.0
DRAIN_S = 30.0
# For the last words of streams whose engine is lost; whoever ends this process waits no longer.
GIVE_UP_S = 1.0
MAX_BODY_BYTES = 256 << 20
# The directory of every endpoint is refreshed each second; only then nobody sends new requests here.
_NOTICE_S = 1.5

_log = logging.getLogger(__name__)


class ModelService:
    """An engine as an ASGI application, announced while it runs."""

    def __init__(
        self,
        engine: Engine,
        secret: str,
        *,
        app: str,
        replica_id: str,
        beats: BeatStore,
        host: str = "127.0.0.1",
        seat: GangSeat | None = None,
    ) -> None:
        self._engine = engine
        self._seat = seat
        self._watch_point = WatchPoint()
        self._loss: EngineDead | None = None
        self._workers: set[asyncio.Task[Any]] = set()
        self._secret = secret.encode()
        self._app = app
        self._replica_id = replica_id
        self._beats = beats
        self._host = host
        self._listener: Listener | None = None
        self._beacon: Beacon | None = None
        self._num_streams = 0
        self._is_idle = asyncio.Event()
        self._is_idle.set()

    @property
    def url(self) -> str:
        assert self._listener is not None, "the service has not been started"
        return self._listener.url

    @property
    def load(self) -> EngineLoad:
        """What the engine works on now."""
        return EngineLoad(*self._engine.load)

    async def start(self) -> None:
        """Load the model, listen, and announce that requests are welcome."""
        try:
            await self._start()
        except BaseException:
            await self.stop(drain_s=0)
            raise

    async def _start(self) -> None:
        await self._engine.start()
        self._listener = await start_listener(self, self._host)
        endpoint = ReplicaEndpoint(
            replica_id=self._replica_id,
            app=self._app,
            url=self._listener.url,
            pid=os.getpid(),
            model=self._engine.info.model,
            info=asdict(self._engine.info),
            gang=self._seat.gang if self._seat else "",
            rank=self._seat.rank if self._seat else 0,
            gang_size=self._seat.size if self._seat else 1,
        )
        self._beacon = Beacon(self._beats, endpoint, lambda: self.load)
        await self._beacon.start()

    async def stop(self, drain_s: float = DRAIN_S) -> None:
        """Say that no new requests are welcome, let running ones finish for `drain_s`, then end. Safe to call twice."""
        beacon, self._beacon = self._beacon, None
        listener, self._listener = self._listener, None
        if beacon is not None:
            await beacon.set_state("draining")
            if drain_s > 0:
                await asyncio.sleep(min(_NOTICE_S, drain_s))
                await self._wait_until_idle(drain_s)
        self._watch_point.say_goodbye()
        if listener is not None:
            await listener.stop()
        await self._engine.stop()
        if beacon is not None:
            await beacon.stop()

    async def give_up(self, loss: EngineDead) -> None:
        """End every running stream with this error and take no more: the engine cannot generate any longer."""
        self._loss = loss
        beacon, self._beacon = self._beacon, None
        for worker in self._workers:
            worker.cancel()
        if beacon is not None:
            await beacon.stop()
        await self._wait_until_idle(GIVE_UP_S)

    async def check_health(self) -> None:
        """Raises when the engine is dead or nobody could reach it any more; Serve then replaces this replica."""
        if self._loss is not None:
            raise self._loss
        if self._listener is None or not self._listener.is_running:
            raise EngineDead("The replica's listener is not running.")
        await self._engine.check_health()

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        if not self._knows(scope):
            await _answer(send, 401, b"", {})
            return
        try:
            await self._route(scope["method"], scope["path"], receive, send)
        except ClientGone:
            return
        except Exception as error:  # noqa: BLE001  # every request gets an answer
            await _answer_error(send, error)

    def _knows(self, scope: Mapping[str, Any]) -> bool:
        given = next((value for name, value in scope["headers"] if name == SECRET_HEADER), b"")
        return hmac.compare_digest(given, self._secret)

    async def _route(self, method: str, path: str, receive: Receive, send: Send) -> None:
        match method, path:
            case "POST", "/generate":
                await self._generate(receive, send)
            case "POST", "/count_tokens":
                request, _ = parse_generation(await _read_body(receive))
                await _answer_json(send, {"num_tokens": await self._engine.count_prompt_tokens(request)})
            case "POST", "/tokenize":
                body = parse_object(await _read_body(receive))
                if not isinstance(body.get("text"), str):
                    raise InvalidRequest("text is missing or no string.", param="text")
                await _answer_json(send, {"token_ids": await self._engine.tokenize(body["text"])})
            case "GET", "/experts":
                load = await self._engine.expert_load()
                await _answer_json(send, {"has_experts": load is not None, "load": load and load.to_json()})
            case "GET", "/gang/watch":
                await self._be_watched(receive, send)
            case "GET", "/health":
                await self._engine.check_health()
                await _answer_json(send, {"status": "ok"})
            case _:
                await _answer(send, 404, b"", {})

    async def _be_watched(self, receive: Receive, send: Send) -> None:
        await _read_body(receive)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})

        async def beat() -> None:
            async for data in self._watch_point.beats():
                await send({"type": "http.response.body", "body": data, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        await until_client_leaves(receive, beat())

    async def _generate(self, receive: Receive, send: Send) -> None:
        if self._loss is not None:
            raise self._loss
        request, options = parse_generation(await _read_body(receive))
        frames = _FrameStream(send, make_renderer(options))
        self._enter()
        try:
            await until_client_leaves(
                receive, self._relay(self._engine.generate(request), frames), frames.keep_alive(KEEP_ALIVE_S)
            )
        except ClientGone:
            raise
        except Exception as error:
            if not frames.has_begun:
                raise  # refused before the first frame: a plain answer with a status
            await frames.fail(self._in_gang(error))
        finally:
            self._leave()

    def _in_gang(self, error: Exception) -> Exception:
        """A rank whose engine dies takes its gang with it, whichever of the ranks was first."""
        if self._seat is None or not isinstance(error, EngineDead) or isinstance(error, GangLost):
            return error
        return GangLost(
            f"The engine of rank {self._seat.rank} ended in the middle of this answer, and its gang {self._seat.gang} "
            "restarts as a whole. What came so far is incomplete; ask again."
        )

    async def _relay(self, chunks: Any, frames: _FrameStream) -> None:
        worker = asyncio.current_task()
        assert worker is not None
        self._workers.add(worker)
        try:
            async for chunk in chunks:
                await frames.send_chunk(chunk)
        except asyncio.CancelledError:
            if self._loss is not None:
                raise self._loss from None
            raise
        finally:
            self._workers.discard(worker)
            if self._loss is None:  # nothing answers any more where an abort could be sent
                await chunks.aclose()

    def _enter(self) -> None:
        self._num_streams += 1
        self._is_idle.clear()

    def _leave(self) -> None:
        self._num_streams -= 1
        if self._num_streams == 0:
            self._is_idle.set()

    async def _wait_until_idle(self, limit_s: float) -> None:
        try:
            await asyncio.wait_for(self._is_idle.wait(), limit_s)
        except TimeoutError:
            _log.warning("Ending %d streams that did not finish within %.0f seconds.", self._num_streams, limit_s)


class _FrameStream:
    """The answer to one `/generate`. Nothing is sent before the first chunk, so that a refusal can have a status."""

    def __init__(self, send: Send, renderer: StreamRenderer) -> None:
        self._send = send
        self._renderer = renderer
        self._last_at = time.monotonic()
        self.has_begun = False

    async def send_chunk(self, chunk: GenerationChunk) -> None:
        frames = b""
        if not self.has_begun:
            await self._begin()
        payload = self._renderer.chunk(chunk)
        if payload or chunk.token_ids:
            frames = encode_frame(FrameKind.DATA, payload, chunk.token_ids, len(chunk.text))
        if chunk.finish_reason is not None:
            assert chunk.usage is not None, "the last chunk has usage"
            frames += encode_end(chunk.finish_reason, asdict(chunk.usage))
        if frames:
            await self._write(frames, is_last=chunk.finish_reason is not None)

    async def fail(self, error: Exception) -> None:
        """End the stream with an error frame."""
        _log_unexpected(error)
        api = to_api_error(error)
        await self._write(encode_error(api.type, api.message, code=api.code, param=api.param), is_last=True)

    async def keep_alive(self, every_s: float) -> None:
        """A frame whenever nothing was sent for that long; runs until it is cancelled."""
        while True:
            silent_s = time.monotonic() - self._last_at
            if silent_s < every_s:
                await asyncio.sleep(every_s - silent_s)
                continue
            if not self.has_begun:
                await self._begin()
            await self._write(KEEP_ALIVE_FRAME)

    async def _begin(self) -> None:
        self.has_begun = True
        headers = [(b"content-type", CONTENT_TYPE.encode()), (b"cache-control", b"no-store")]
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        if first := self._renderer.begin():
            await self._write(encode_frame(FrameKind.DATA, first))

    async def _write(self, data: bytes, *, is_last: bool = False) -> None:
        self._last_at = time.monotonic()
        await self._send({"type": "http.response.body", "body": data, "more_body": not is_last})


async def _read_body(receive: Callable[[], Awaitable[Any]]) -> bytes:
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        chunk = message.get("body", b"")
        size += len(chunk)
        if size > MAX_BODY_BYTES:
            raise InvalidRequest(f"The body is longer than {MAX_BODY_BYTES >> 20} MiB.")
        chunks.append(chunk)
        if not message.get("more_body", False):
            return b"".join(chunks)


async def _answer_json(send: Send, value: Any) -> None:
    await _answer(send, 200, json.dumps(value).encode(), {"content-type": "application/json"})


async def _answer_error(send: Send, error: Exception) -> None:
    _log_unexpected(error)
    api = to_api_error(error)
    headers = {"content-type": "application/json", **error_headers(api)}
    await _answer(send, api.status, json.dumps(error_body(api), ensure_ascii=False).encode(), headers)


async def _answer(send: Send, status: int, body: bytes, headers: Mapping[str, str]) -> None:
    raw = [(b"content-length", str(len(body)).encode())]
    raw += [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


def _log_unexpected(error: Exception) -> None:
    if not is_expected(error):
        _log.error("A request failed", exc_info=error)
