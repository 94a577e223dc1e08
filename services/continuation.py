"""An answer that outlives the replica that began it: where a replica is lost, another one goes on after the last token
that was sent.

While all goes well this counts token ids and characters and looks at nothing else. After a loss the next replica gets
the request again together with both; it sends what comes after them, so nothing has to be cut or joined here.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from services.config import StreamsConfig
from services.errors import ApiError
from services.frame_stream import FrameStream, ReplicaLost
from services.frames import Frame, unpack_token_ids

_TRY_AGAIN_S = 0.25
_TRANSIENT = (502, 503)
_log = logging.getLogger("windfarm.streams")


@dataclass(slots=True)
class Journey:
    """The replicas that one request has seen the end of. It may have been the cause, so their number is bounded."""

    left: set[str] = field(default_factory=set)
    """Ids of replicas that it does not go to again."""
    silent: set[str] = field(default_factory=set)
    """Those among them that only gave no token for too long: a machine under load does that too."""
    num_lost: int = 0
    identity: str | None = None
    """Of the model whose token ids the client has; none: it has none yet."""

    def note_loss(self, replica_id: str, *, hangs: bool = False) -> None:
        self.left.add(replica_id)
        if hangs:
            self.silent.add(replica_id)
        self.num_lost += 1

    def fits(self, info: Mapping[str, Any]) -> bool:
        """Whether a replica that says this of itself could take the token ids for what they are."""
        return self.identity is None or info.get("identity", "") == self.identity

    def forgive(self) -> bool:
        """The last resort: let it go back to those that were only silent. False where there are none."""
        is_any = bool(self.silent)
        self.left -= self.silent
        self.silent.clear()
        return is_any


class Opener(Protocol):
    """Starts one generation on one replica that the journey has not left. Raises `ApiError`."""

    async def __call__(self, body: Mapping[str, Any], journey: Journey) -> FrameStream: ...


class ContinuedStream:
    """Frames of one answer, from as many replicas as it takes. Iterate it, or close it to cancel."""

    def __init__(
        self,
        first: FrameStream,
        body: Mapping[str, Any],
        journey: Journey,
        reopen: Opener,
        config: StreamsConfig,
        *,
        on_lost: Callable[[FrameStream, ReplicaLost], None],
        on_moved: Callable[[], None],
    ) -> None:
        self._stream = first
        self._body = body
        self._journey = journey
        self._reopen = reopen
        self._config = config
        self._on_lost = on_lost
        self._on_moved = on_moved
        self._token_ids = bytearray()
        self._num_characters = 0
        self._has_begun = False

    @property
    def end(self) -> dict[str, Any] | None:
        """`finish_reason` and `usage`; set when, and only when, the answer is complete."""
        return self._stream.end

    @property
    def num_tokens(self) -> int:
        """Token ids that came so far."""
        return len(self._token_ids) // 4

    async def batches(self) -> AsyncIterator[list[Frame]]:
        """Data and keep-alive frames, as many as came together. Raises `ApiError` where the answer cannot be brought to
        its end."""
        while self._stream.end is None:
            try:
                frames = await self._stream.read()
            except ReplicaLost as lost:
                await self._move(lost)
                continue
            for frame in frames:
                self._token_ids += frame.packed_token_ids
                self._num_characters += frame.num_characters
                self._has_begun = self._has_begun or bool(frame.payload)
            yield frames

    async def __aiter__(self) -> AsyncIterator[Frame]:
        """The same, one by one."""
        async for frames in self.batches():
            for frame in frames:
                yield frame

    async def close(self) -> None:
        """Cancel what still runs. Safe to call twice."""
        await self._stream.close()

    async def _move(self, lost: ReplicaLost) -> None:
        """Go on elsewhere, or raise what the client shall hear."""
        stream = self._stream
        await stream.close()
        self._on_lost(stream, lost)
        self._journey.note_loss(stream.replica.replica_id, hangs=lost.hangs)
        if why := self._why_not(stream.replica.info):
            raise _explained(lost.error, why)
        if self._token_ids:
            self._journey.identity = str(stream.replica.info.get("identity", ""))
        self._stream = await self._open_again(lost)
        self._on_moved()
        _log.warning(
            "Request %s went on at %s after %d tokens: %s was lost (%s)",
            self._body.get("request_id"),
            self._stream.replica.replica_id,
            self.num_tokens,
            stream.replica.replica_id,
            lost.reason,
        )

    def _why_not(self, info: Mapping[str, Any]) -> str | None:
        """Why the answer cannot go on elsewhere; none: it can."""
        if self._journey.num_lost > self._config.max_moves:
            return f"{self._journey.num_lost} replicas were lost while they worked on it, so it is not tried further"
        if not self._token_ids:
            return None if not self._num_characters else "its engine tells no token ids"
        if not info.get("continues_answers"):
            return "its engine cannot continue an answer"
        sampling = self._body.get("sampling", {})
        is_guided = sampling.get("json_schema") is not None or sampling.get("grammar") is not None
        if is_guided and not info.get("continues_guided_answers"):
            return "it is bound to a grammar, and its engine cannot bring a grammar to the middle of an answer"
        return None

    async def _open_again(self, lost: ReplicaLost) -> FrameStream:
        """On another replica, as soon as one takes it; in the end on one that was silent."""
        loop = asyncio.get_running_loop()
        until, body = loop.time() + self._config.move_wait_s, self._rest()
        while True:
            try:
                return await self._reopen(body, self._journey)
            except ApiError as refusal:
                if refusal.status not in _TRANSIENT:
                    raise _explained(lost.error, refusal.message) from refusal
                if self._journey.num_lost > self._config.max_moves:
                    raise lost.error from refusal
                if loop.time() >= until:
                    if not self._journey.forgive():
                        raise lost.error from refusal
                    continue
            await asyncio.sleep(_TRY_AGAIN_S)

    def _rest(self) -> dict[str, Any]:
        """The request for what is missing."""
        body = dict(self._body)
        if self._has_begun:
            body["render"] = {**body["render"], "first_role": False}
        if self._token_ids:
            ids = unpack_token_ids(self._token_ids)
            body["delivered"] = {"token_ids": ids, "num_characters": self._num_characters}
        return body


def _explained(error: ApiError, why: str) -> ApiError:
    return ApiError(
        error.status,
        error.type,
        error.code,
        f"{error.message} It could not go on elsewhere: {why.rstrip('.')}.",
        error.param,
        error.retry_after_s,
    )
