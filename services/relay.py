"""The way from the endpoint to a model replica: pick one, post the generation, hand its frames through.

A replica that is lost is replaced by another one: before its first token it gets the same request, later the request
for what is missing. Where that cannot be, the answer ends with an explicit error, never as if it were complete.
Payloads are not parsed here.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import fields
from functools import partial
from typing import Any, Protocol

import aiohttp

from cluster.engine import GenerationChunk, GenerationRequest, SamplingParams, TokenLogprob, Usage
from services.config import StreamsConfig
from services.continuation import ContinuedStream, Journey
from services.discovery import ReplicaEndpoint
from services.errors import ApiError, conflict, not_found, unavailable
from services.frame_stream import ENGINE_DEAD, FrameStream, ReplicaLost
from services.frames import Frame, FrameKind
from services.prompt_prefix import Fingerprint
from services.replica_picker import ReplicaPicker
from services.token_meter import TokenMeter

INTERNAL_HEADER = "x-windfarm-internal"
# Below the listener's own limit, so that no request is sent into a connection that the replica is just closing.
_IDLE_CONNECTION_S = 30
# A replica sends keep-alive frames while it works; silence of this length means that it or the network is gone.
_SILENCE_S = 60
# Between two looks at whether a silent replica is still there.
_LOOK_S = 1.0
_TRY_AGAIN_S = 0.25
_SAMPLING_FIELDS = tuple(field.name for field in fields(SamplingParams))
# Requests for a model whose last replica has ended, because its configuration changes, wait for the next one.
_CHANGE_WAIT_S = 600
_WAIT_LOOK_S = 0.1
# The request has not reached the replica, so it cannot have been what ended it.
_NOT_CONNECTED = (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError)


class ReplicaSource(Protocol):
    """Who serves what; the directory of announced replicas."""

    def replicas(self, model: str) -> list[ReplicaEndpoint]: ...

    def models(self) -> list[str]: ...

    def is_alive(self, replica_id: str) -> bool: ...

    def seconds_away(self, model: str) -> float | None:
        """For how long no replica of the model has been there; none: there never was one."""

    def report_failure(self, replica_id: str) -> None: ...


class ModelStates(Protocol):
    """What is configured, also where nothing runs yet."""

    def configured_models(self) -> list[str]: ...

    def starts_on_demand(self, model: str) -> bool:
        """Whether a request starts the model that has no replica; it waits meanwhile."""

    def is_deploying(self, model: str) -> bool:
        """Whether the model is new or changed, and its replicas are being started."""

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


class ModelPool:
    """All replicas of all models, as the endpoint sees them."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        replicas: ReplicaSource,
        states: ModelStates,
        config: StreamsConfig | None = None,
        on_moved: Callable[[str], None] = lambda _model: None,
    ) -> None:
        """`on_moved` hears of each answer that went on at another replica of the model."""
        self._session = session
        self._replicas = replicas
        self._states = states
        self._config = config or StreamsConfig()
        self._on_moved = on_moved
        self.picker = ReplicaPicker(replicas.is_alive)

    def info(self, model: str) -> Mapping[str, Any]:
        """What the model's replicas say of it. Raises 404 or 503 where there is none."""
        return self._candidates(model)[0].info

    def require(self, model: str) -> None:
        """Raises 404 or 503 where no replica of the model is there or about to come."""
        if not self.sleeps(model) and not self._is_coming(model):
            self._candidates(model)

    def sleeps(self, model: str) -> bool:
        """Whether the model has no replica, and requests for it are what starts one."""
        return not self._replicas.replicas(model) and self._states.starts_on_demand(model)

    def why_not_ready(self, model: str) -> str:
        """What Ray Serve says of a model without a replica."""
        return self._states.why_not_ready(model)

    async def until_there(self, model: str) -> None:
        """Returns when the model has a replica, or when nobody should wait for one any longer: a model that is being
        changed or restarted is away for some seconds, and that shall fail no request."""
        while self._is_coming(model):  # noqa: ASYNC110  # three parties change it
            await asyncio.sleep(_WAIT_LOOK_S)

    def _is_coming(self, model: str) -> bool:
        """Whether the model was there, has no replica at the moment, and is on its way back."""
        away_s = self._replicas.seconds_away(model)
        if not away_s or model not in self._states.configured_models():
            return False
        return away_s < (_CHANGE_WAIT_S if self._states.is_deploying(model) else self._config.move_wait_s)

    def num_slots(self, model: str) -> int:
        """Generations that the model's replicas run at once; 0 while there is none."""
        return sum(int(replica.info.get("max_concurrency", 1)) for replica in self._replicas.replicas(model))

    async def generate(self, model: str, body: Mapping[str, Any]) -> ContinuedStream:
        """Start a generation on the replica that suits it best; on another one where that one is lost, also later."""

        async def open_stream(body: Mapping[str, Any], journey: Journey) -> FrameStream:
            return await self._open(model, body, journey, prompt)

        journey = Journey()
        prompt = await self.picker.fingerprint(body, len(self._replicas.replicas(model)))
        try:
            first = await open_stream(body, journey)
        except ApiError as refusal:
            if refusal.status not in (502, 503) or not self.sleeps(model):
                raise
            # The last replica went while the request was on its way there.
            await self._wait_for_replica(model)
            first = await open_stream(body, journey)
        return ContinuedStream(
            first,
            body,
            journey,
            open_stream,
            self._config,
            on_lost=self._note_loss,
            on_moved=lambda: self._on_moved(model),
        )

    async def _wait_for_replica(self, model: str) -> None:
        """Of a model that is started for requests, as long as an answer would wait to go on elsewhere."""
        loop = asyncio.get_running_loop()
        until = loop.time() + self._config.move_wait_s
        while self.sleeps(model) and loop.time() < until:  # noqa: ASYNC110  # nothing announces it
            await asyncio.sleep(_TRY_AGAIN_S)

    async def _open(self, model: str, body: Mapping[str, Any], journey: Journey, prompt: Fingerprint) -> FrameStream:
        response, replica = await self._post(model, "/generate", body, journey, prompt)
        return FrameStream(
            response,
            replica,
            on_close=lambda: self.picker.leave(replica.replica_id),
            look_s=min(_LOOK_S, self._config.stall_s / 2),
            why_leave=partial(self._why_leave, model, replica, journey),
            has_tokens="delivered" in body,
        )

    def _note_loss(self, stream: FrameStream, lost: ReplicaLost) -> None:
        replica_id = stream.replica.replica_id
        self._replicas.report_failure(replica_id)
        if lost.hangs:
            self.picker.shun(replica_id)

    def _why_leave(
        self, model: str, replica: ReplicaEndpoint, journey: Journey, silent_s: float, has_tokens: bool
    ) -> str | None:
        """Why a silent stream shall go elsewhere. Where it cannot, it is better to wait."""
        if has_tokens and silent_s >= self._config.stall_s:
            identity = replica.info.get("identity", "")
            if any(other.info.get("identity", "") == identity for other in self._others(model, replica, journey)):
                return f"it gave no token for {silent_s:.1f} s"
        if silent_s >= _LOOK_S and self._is_gone(model, replica, journey):
            return "it does not announce itself any more"
        return None

    def _is_gone(self, model: str, replica: ReplicaEndpoint, journey: Journey) -> bool:
        """Whether a replica stopped to announce itself while others go on. Where all are silent, it is the directory
        that is away."""
        return not self._replicas.is_alive(replica.replica_id) and bool(self._others(model, replica, journey))

    def _others(self, model: str, replica: ReplicaEndpoint, journey: Journey) -> list[ReplicaEndpoint]:
        """Where the request could go from this replica."""
        if journey.num_lost >= self._config.max_moves:
            return []
        left = {*journey.left, replica.replica_id}
        return [other for other in self._replicas.replicas(model) if other.replica_id not in left]

    async def count_tokens(self, model: str, body: Mapping[str, Any]) -> int:
        response, replica = await self._post(model, "/count_tokens", body, Journey())
        try:
            async with response:
                return int((await response.json())["num_tokens"])
        finally:
            self.picker.leave(replica.replica_id)

    async def _post(
        self, model: str, path: str, body: Mapping[str, Any], journey: Journey, prompt: Fingerprint = ()
    ) -> tuple[aiohttp.ClientResponse, ReplicaEndpoint]:
        """The beginning of the answer, and whose it is: it counts there until it leaves."""
        data = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
        found, tried = self._candidates(model), set(journey.left)
        refusal = unavailable(
            f"No replica of the model '{model}' can be reached; it may be restarting. Try again in a moment.",
            code="model_unreachable",
        )
        while journey.num_lost <= self._config.max_moves:
            if found and not journey.silent and not any(journey.fits(replica.info) for replica in found):
                raise _changed(model)
            candidates = [each for each in found if each.replica_id not in tried and journey.fits(each.info)]
            if not candidates:
                break
            replica = self.picker.pick(candidates, prompt)
            tried.add(replica.replica_id)
            self.picker.enter(replica.replica_id, prompt)
            response = None
            try:
                response = await self._ask(replica, path, data, partial(self._is_gone, model, replica, journey))
            except (aiohttp.ClientError, OSError, TimeoutError) as error:
                self._replicas.report_failure(replica.replica_id)
                if not isinstance(error, _NOT_CONNECTED):
                    journey.note_loss(replica.replica_id)
                found = self._replicas.replicas(model)  # others may have come meanwhile
                continue
            finally:
                if response is None or response.status != 200:
                    self.picker.leave(replica.replica_id)
            if response.status == 200:
                return response, replica
            refusal = await _refusal(response)
            if response.status not in (502, 503):  # those may be one replica's own trouble; the others are everybody's
                raise refusal
            if refusal.code == ENGINE_DEAD:
                journey.note_loss(replica.replica_id)
        raise refusal

    async def _ask(
        self, replica: ReplicaEndpoint, path: str, data: bytes, is_gone: Callable[[], bool]
    ) -> aiohttp.ClientResponse:
        """The beginning of the answer. Raises `TimeoutError` where the replica falls silent before that."""
        async with asyncio.timeout(None) as limit:
            watch = _Watch(limit, is_gone)
            try:
                headers = {"content-type": "application/json"}
                return await self._session.post(replica.url + path, data=data, headers=headers)
            finally:
                watch.stop()

    def _candidates(self, model: str) -> list[ReplicaEndpoint]:
        replicas = self._replicas.replicas(model)
        if replicas:
            return list(replicas)
        configured = sorted({*self._states.configured_models(), *self._replicas.models()})
        if model in configured:
            raise unavailable(self._states.why_not_ready(model), code="model_not_ready", retry_after_s=5)
        raise unknown_model(model, configured)


class _Watch:
    """Ends a time limit at once when a replica is gone; looked at every second."""

    def __init__(self, limit: asyncio.Timeout, is_gone: Callable[[], bool]) -> None:
        self._limit = limit
        self._is_gone = is_gone
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(_LOOK_S, self._look)

    def stop(self) -> None:
        self._timer.cancel()

    def _look(self) -> None:
        if self._is_gone():
            self._limit.reschedule(self._loop.time())
        else:
            self._timer = self._loop.call_later(_LOOK_S, self._look)


class PooledModel:
    """One model of the pool as the chat story wants it: parsed chunks, token counts."""

    def __init__(self, pool: ModelPool, model: str, meter: TokenMeter | None = None) -> None:
        self._pool = pool
        self._model = model
        self._meter = meter
        # As the story began: its replicas may be replaced while it searches.
        self._info = pool.info(model)

    @property
    def max_context(self) -> int:
        return int(self._info["max_context"])

    @property
    def template_knows_tools(self) -> bool:
        return bool(self._info.get("template_knows_tools", False))

    async def stream(self, request: GenerationRequest) -> AsyncIterator[GenerationChunk]:
        await self._pool.until_there(self._model)
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
        await self._pool.until_there(self._model)
        return await self._pool.count_tokens(self._model, wire_body(request, {"kind": "events"}))


def wire_body(request: GenerationRequest, render: Mapping[str, Any]) -> dict[str, Any]:
    """The body of a `/generate` request."""
    sampling = {
        name: value for name in _SAMPLING_FIELDS if (value := getattr(request.sampling, name)) not in (None, ())
    }
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


def _changed(model: str) -> ApiError:
    """No replica that will come knows what the client's token ids mean, so nobody waits for one."""
    return conflict(
        f"The model '{model}' was changed meanwhile: its replicas serve other weights or another tokenizer now.",
        code="model_changed",
    )


def _logprob(entry: Mapping[str, Any]) -> TokenLogprob:
    top = tuple((str(token), float(value)) for token, value in entry.get("top", ()))
    return TokenLogprob(entry["token_id"], entry["token"], entry["logprob"], top)


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
