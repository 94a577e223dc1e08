"""One generation on one replica, as the endpoint reads it: frames until the end, an error, a loss or a hang.

Closing the stream closes the connection, and that cancels the generation over there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

import aiohttp

from services.discovery import ReplicaEndpoint
from services.errors import ApiError
from services.frames import Frame, FrameDecoder, FrameError, FrameKind
from services.gang_loss import GANG_LOST

ENGINE_DEAD = "engine_dead"
_LAST_BYTES_S = 1


class ReplicaLost(Exception):
    """This replica will say no more of the answer; another one may. `error` is for the client where none does; `hangs`:
    the replica is there and silent."""

    def __init__(self, error: ApiError, reason: str, *, hangs: bool = False) -> None:
        super().__init__(reason)
        self.error = error
        self.reason = reason
        self.hangs = hangs


class _Silent(Exception):
    """No token came for too long; the message says more."""


WhyLeave = Callable[[float, bool], str | None]
"""From the seconds without a token and whether one has ever come: why the stream counts as lost, or none."""


class FrameStream:
    """`why_leave` is asked every `look_s` seconds while a token is awaited. Time in which nobody reads does not count,
    so a slow client makes no replica suspect."""

    def __init__(
        self,
        response: aiohttp.ClientResponse,
        replica: ReplicaEndpoint,
        on_close: Callable[[], None],
        *,
        look_s: float,
        why_leave: WhyLeave,
        has_tokens: bool = False,
    ) -> None:
        """`has_tokens`: the answer has some already, from another replica."""
        self.replica = replica
        self.end: dict[str, Any] | None = None
        """`finish_reason` and `usage`; set when, and only when, the stream is complete."""
        self._response = response
        self._on_close: Callable[[], None] | None = on_close
        self._decoder = FrameDecoder()
        self._failure: Exception | None = None
        self._loop = asyncio.get_running_loop()
        self._look_s = look_s
        self._why_leave = why_leave
        self._silent_since: float | None = None
        """Since when a token is awaited; none while nobody reads."""
        self._has_tokens = has_tokens
        self._timer = self._loop.call_later(look_s, self._look)

    async def read(self) -> list[Frame]:
        """Data and keep-alive frames, as many as came together. Raises `ReplicaLost` where another replica may help,
        `ApiError` for any other failure that the replica reports."""
        if self._failure is not None:
            raise self._failure
        if self._silent_since is None:
            self._silent_since = self._loop.time()
        frames = await self._receive()
        if not frames:
            return frames
        kind = frames[-1].kind
        if kind is FrameKind.END:
            self.end, self._silent_since = frames.pop().json(), None
        elif kind is FrameKind.ERROR:
            self._failure = self._reported(frames.pop().json())
        if any(frame.packed_token_ids for frame in frames):
            self._silent_since, self._has_tokens = None, True
        return frames

    async def _receive(self) -> list[Frame]:
        try:
            data = await self._response.content.readany()
            if not data:
                self._decoder.finish()
                raise FrameError("The replica closed the connection before the end of the answer.")
            return self._decoder.feed(data)
        except _Silent as silent:
            raise ReplicaLost(stream_lost(), str(silent), hangs=True) from None
        except (aiohttp.ClientError, FrameError, OSError, TimeoutError, RuntimeError) as error:
            # A RuntimeError is aiohttp's word for a connection that was lost without a word before it was read.
            lost = gang_lost(self.replica) if self.replica.gang else stream_lost()
            raise ReplicaLost(lost, str(error) or type(error).__name__) from error

    def _reported(self, error: Mapping[str, Any]) -> Exception:
        """An error that came in the middle of a stream."""
        api = ApiError(
            500, error.get("type") or "server_error", error.get("code"), error["message"], error.get("param")
        )
        return ReplicaLost(api, api.message) if api.code in (ENGINE_DEAD, GANG_LOST) else api

    def _look(self) -> None:
        """One timer for the whole stream: setting one for each token would cost more than the rest of the relay."""
        self._timer = self._loop.call_later(self._look_s, self._look)
        if self._silent_since is None:
            return
        why = self._why_leave(self._loop.time() - self._silent_since, self._has_tokens)
        if why is not None:
            self._response.content.set_exception(_Silent(why))

    async def close(self) -> None:
        """Cancel what still runs; after the end the connection goes back for the next request. Safe to call twice."""
        if self._on_close is None:
            return
        self._on_close()
        self._on_close = None
        self._timer.cancel()
        if self.end is None:
            self._response.close()
            return
        try:
            async with asyncio.timeout(_LAST_BYTES_S):
                await self._response.read()
        except (aiohttp.ClientError, OSError, TimeoutError, _Silent):  # it can be found silent as its last bytes come
            self._response.close()


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
