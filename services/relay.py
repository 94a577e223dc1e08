"""The way from the endpoint to a model replica: pick one, post the generation, hand its frames through.

A replica that cannot be reached before its first frame is replaced by another one; after the first frame a lost
replica is an explicit error, never a short answer that looks complete. Closing a stream closes the connection, and
that cancels the generation over there. Payloads are not parsed here.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import asdict
from typing import Any, Protocol

import aiohttp

from cluster.engine import GenerationChunk, GenerationRequest, TokenLogprob, Usage
from services.discovery import ReplicaEndpoint
from services.errors import ApiError, not_found, unavailable
from services.frames import Frame, FrameDecoder, FrameError, FrameKind
from services.gang_loss import GANG_LOST
from services.token_meter import TokenMeter

INTERNAL_HEADER = "x-windfarm-internal"
# Below the listener's own limit, so that no request is sent into a connection that the replica is just closing.
_IDLE_CONNECTION_S = 30
# A replica sends keep-alive frames while it works; silence of this length means that it or the network is gone.
_SILENCE_S = 60
_LAST_BYTES_S = 1


class ReplicaSource(Protocol):
    """Who serves what; the directory of announced replicas."""

    def replicas(self, model: str) -> list[ReplicaEndpoint]: ...

    def models(self) -> list[str]: ...

    def report_failure(self, replica_id: str) -> None: ...


class ModelStates(Protocol):
    """What is configured, also where nothing runs yet."""

    def configured_models(self) -> list[str]: ...

    def why_not_ready(self, model: str) -> str:
        """A sentence: what Serve says about a configured model without a ready replica."""


def open_session(secret: str, connect_timeout_s: float) -> aiohttp.ClientSession:
    """Connections to replicas. Must be called inside the running loop."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_IDLE_CONNECTION_S),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=connect_timeout_s, sock_read=_SILENCE_S),
        headers={INTERNAL_HEADER: secret},
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        trust_env=False,
    )


class FrameStream:
    """One running generation on one replica. Iterate it, or close it to cancel."""

    def __init__(
        self,
        response: aiohttp.ClientResponse,
        on_close: Callable[[], None],
        on_lost: Callable[[], None],
        lost: ApiError,
    ) -> None:
        self._response = response
        self._lost = lost
        self._on_lost = on_lost
        self._on_close: Callable[[], None] | None = on_close
        self._decoder = FrameDecoder()
        self._pending: list[Frame] = []
        self.end: dict[str, Any] | None = None
        """`finish_reason` and `usage`; set when, and only when, the stream is complete."""

    async def batches(self) -> AsyncIterator[list[Frame]]:
        """Data and keep-alive frames, as many as came together. Raises `ApiError` where the replica reports an error
        or is lost."""
        while self.end is None:
            frames = await self._read()
            if frames and frames[-1].kind is FrameKind.END:
                self.end = frames.pop().json()
            failed = next((frame for frame in frames if frame.kind is FrameKind.ERROR), None)
            yield frames[: frames.index(failed)] if failed else frames
            if failed:
                error = _reported(failed.json())
                if error.code == GANG_LOST:
                    self._on_lost()
                raise error

    async def __aiter__(self) -> AsyncIterator[Frame]:
        """The same, one by one."""
        async for frames in self.batches():
            for frame in frames:
                yield frame

    async def _read(self) -> list[Frame]:
        try:
            data = await self._response.content.readany()
            if not data:
                self._decoder.finish()
                raise FrameError("The replica closed the connection before the end of the answer.")
            return self._decoder.feed(data)
        except (aiohttp.ClientError, FrameError, OSError, TimeoutError) as error:
            self._on_lost()
            raise self._lost from error

    async def close(self) -> None:
        """Cancel what still runs; after the end the connection goes back for the next request. Safe to call twice."""
        if self._on_close is None:
            return
        self._on_close()
        self._on_close = None
        if self.end is None:
            self._response.close()
            return
        try:
            async with asyncio.timeout(_LAST_BYTES_S):
                await self._response.read()
        except (aiohttp.ClientError, OSError, TimeoutError):
            self._response.close()


class ModelPool:
    """All replicas of all models, as the endpoint sees them."""

    def __init__(self, session: aiohttp.ClientSession, replicas: ReplicaSource, states: ModelStates) -> None:
        self._session = session
        self._replicas = replicas
        self._states = states
        self._in_flight: Counter[str] = Counter()

    def info(self, model: str) -> Mapping[str, Any]:
        """What the model's replicas say of it. Raises 404 or 503 where there is none."""
        return self._candidates(model)[0].info

    def max_context(self, model: str) -> int:
        return int(self.info(model)["max_context"])

    async def generate(self, model: str, body: Mapping[str, Any]) -> FrameStream:
        """Start a generation on the least busy replica; on another one where that fails before the first frame."""
        response, replica = await self._post(model, "/generate", body)
        self._in_flight[replica.replica_id] += 1
        return FrameStream(
            response,
            on_close=lambda: self._leave(replica.replica_id),
            on_lost=lambda: self._replicas.report_failure(replica.replica_id),
            lost=gang_lost(replica) if replica.gang else stream_lost(),
        )

    async def count_tokens(self, model: str, body: Mapping[str, Any]) -> int:
        response, _ = await self._post(model, "/count_tokens", body)
        async with response:
            return int((await response.json())["num_tokens"])

    async def _post(
        self, model: str, path: str, body: Mapping[str, Any]
    ) -> tuple[aiohttp.ClientResponse, ReplicaEndpoint]:
        data = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
        candidates = self._candidates(model)
        refusal: ApiError | None = None
        while candidates:
            replica = self._least_busy(candidates)
            candidates.remove(replica)
            try:
                response = await self._session.post(
                    replica.url + path, data=data, headers={"content-type": "application/json"}
                )
            except (aiohttp.ClientError, OSError, TimeoutError):
                self._replicas.report_failure(replica.replica_id)
                refusal = unavailable(
                    f"No replica of the model '{model}' can be reached; it may be restarting. Try again in a moment.",
                    code="model_unreachable",
                )
                continue
            if response.status == 200:
                return response, replica
            refusal = await _refusal(response)
            if response.status not in (502, 503):  # those may be one replica's own trouble; the others are everybody's
                raise refusal
        assert refusal is not None
        raise refusal

    def _candidates(self, model: str) -> list[ReplicaEndpoint]:
        replicas = self._replicas.replicas(model)
        if replicas:
            return list(replicas)
        configured = sorted({*self._states.configured_models(), *self._replicas.models()})
        if model in configured:
            raise unavailable(self._states.why_not_ready(model), code="model_not_ready", retry_after_s=5)
        raise unknown_model(model, configured)

    def _least_busy(self, candidates: list[ReplicaEndpoint]) -> ReplicaEndpoint:
        """The less busy of two random ones: near the best choice, without herding to one between two beats."""
        pair = random.sample(candidates, 2) if len(candidates) > 1 else candidates
        return min(pair, key=self._load)

    def _load(self, replica: ReplicaEndpoint) -> int:
        # The beat counts everybody's requests but is up to a second old; our own count is exact.
        return max(self._in_flight[replica.replica_id], replica.running + replica.queued)

    def _leave(self, replica_id: str) -> None:
        self._in_flight[replica_id] -= 1
        if self._in_flight[replica_id] <= 0:
            del self._in_flight[replica_id]


class PooledModel:
    """One model of the pool as the chat story wants it: parsed chunks, token counts."""

    def __init__(self, pool: ModelPool, model: str, meter: TokenMeter | None = None) -> None:
        self._pool = pool
        self._model = model
        self._meter = meter

    @property
    def max_context(self) -> int:
        return self._pool.max_context(self._model)

    @property
    def template_knows_tools(self) -> bool:
        return bool(self._pool.info(self._model).get("template_knows_tools", False))

    async def stream(self, request: GenerationRequest) -> AsyncIterator[GenerationChunk]:
        stream, meter = await self._pool.generate(self._model, wire_body(request, {"kind": "events"})), self._meter
        if meter is not None:
            meter.begin()
        try:
            async for frame in stream:
                if frame.kind is FrameKind.DATA:
                    if meter is not None:
                        meter.add(frame.num_token_ids)
                    yield parse_chunk(frame)
        finally:
            await stream.close()
        assert stream.end is not None
        usage = Usage(**stream.end["usage"])
        if meter is not None:
            meter.finish(usage)
        yield GenerationChunk(finish_reason=stream.end["finish_reason"], usage=usage)

    async def count_tokens(self, request: GenerationRequest) -> int:
        return await self._pool.count_tokens(self._model, wire_body(request, {"kind": "events"}))


def wire_body(request: GenerationRequest, render: Mapping[str, Any]) -> dict[str, Any]:
    """The body of a `/generate` request."""
    sampling = {name: value for name, value in asdict(request.sampling).items() if value not in (None, ())}
    body: dict[str, Any] = {"request_id": request.request_id, "sampling": sampling, "render": dict(render)}
    for name in ("messages", "prompt_text", "prompt_token_ids", "tools"):
        if (value := getattr(request, name)) is not None:
            body[name] = value
    return body


def parse_chunk(frame: Frame) -> GenerationChunk:
    """A chunk from a frame that was rendered as an event. Finish reason and usage come with the end frame."""
    data = frame.json()
    logprobs = data.get("logprobs")
    return GenerationChunk(
        token_ids=frame.token_ids,
        text=data.get("text", ""),
        logprobs=None if logprobs is None else tuple(_logprob(entry) for entry in logprobs),
    )


def unknown_model(model: str, known: list[str]) -> ApiError:
    listed = f"There are: {', '.join(known)}." if known else "No model is configured."
    return not_found(f"There is no model '{model}'. {listed}", code="model_not_found", param="model")


def stream_lost() -> ApiError:
    return ApiError(
        502,
        "server_error",
        "stream_lost",
        "The model's process was lost in the middle of this answer. What came so far is incomplete; ask again.",
    )


def gang_lost(replica: ReplicaEndpoint) -> ApiError:
    """The end of a stream whose rank was ended with its gang before it could say so itself."""
    return ApiError(
        502,
        "server_error",
        GANG_LOST,
        f"The model's gang {replica.gang} lost a rank in the middle of this answer and restarts as a whole. What came "
        "so far is incomplete; ask again.",
    )


def _logprob(entry: Mapping[str, Any]) -> TokenLogprob:
    top = tuple((str(token), float(value)) for token, value in entry.get("top", ()))
    return TokenLogprob(entry["token_id"], entry["token"], entry["logprob"], top)


def _reported(error: Mapping[str, Any]) -> ApiError:
    """An error that came in the middle of a stream."""
    return ApiError(500, error.get("type") or "server_error", error.get("code"), error["message"], error.get("param"))


async def _refusal(response: aiohttp.ClientResponse) -> ApiError:
    """The replica's own refusal, made before the first frame."""
    async with response:
        retry_after = response.headers.get("retry-after", "")
        retry_after_s = int(retry_after) if retry_after.isdecimal() else None
        try:
            error = (await response.json(content_type=None))["error"]
            return ApiError(
                response.status, error["type"], error.get("code"), error["message"], error.get("param"), retry_after_s
            )
        except (TimeoutError, ValueError, KeyError, TypeError, aiohttp.ClientError):
            return unavailable(
                f"The model's replica answered with status {response.status}. Try again; its log says why.",
                code="replica_failed",
            )
