"""Calls from the endpoint to the store and the embedding model, as plain awaits with plain errors.

Behind them are Ray Serve handles; whatever Ray wraps around an error of the other side is taken off here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Protocol

from services.error_responses import unwrap
from services.errors import ApiError, unavailable

_ANSWER_WITHIN_S = 120.0
_LASTING = {"tune": 600.0}
"""Methods that take as long as their input is: so many seconds, at least."""
_CHANGE_WAIT_S = 60.0
_LOOK_S = 0.1


class Calls(Protocol):
    """One other part of windfarm. `call("search", ...)` awaits its method `search`."""

    async def call(self, method: str, /, *args: Any, **kwargs: Any) -> Any: ...


class ServeCalls:
    """Calls through a handle of Ray Serve. `why_not_ready` says what Serve says where nobody answers. While
    `is_changing` (the next version is on its way), calls wait for up to `change_wait_s`. `on_answer` hears of each
    answer: Serve's own word that a replica runs again comes later."""

    def __init__(
        self,
        handle: Any,
        why_not_ready: Callable[[], str | None],
        timeout_s: float = _ANSWER_WITHIN_S,
        *,
        is_changing: Callable[[], bool] = lambda: False,
        change_wait_s: float = _CHANGE_WAIT_S,
        on_answer: Callable[[], None] = lambda: None,
    ) -> None:
        self._handle = handle
        self._why_not_ready = why_not_ready
        self._timeout_s = timeout_s
        self._is_changing = is_changing
        self._change_wait_s = change_wait_s
        self._on_answer = on_answer

    async def call(self, method: str, /, *args: Any, **kwargs: Any) -> Any:
        await self._until_changed()
        if reason := self._why_not_ready():
            raise unavailable(reason, code="not_ready", retry_after_s=5)
        timeout_s = max(self._timeout_s, _LASTING.get(method, 0.0))
        try:
            async with asyncio.timeout(timeout_s):
                answer = await getattr(self._handle, method).remote(*args, **kwargs)
        except TimeoutError:
            raise unavailable(
                f"No answer within {timeout_s:.0f} seconds. Try again; `windfarm status` shows what is busy.",
                code="timeout",
            ) from None
        except Exception as error:
            if _is_lost_actor(error):
                raise unavailable(
                    "The part of windfarm that does this is restarting. Try again.", code="restarting"
                ) from error
            cause = unwrap(error)
            if isinstance(cause, ApiError) or cause is not error:
                raise cause from None
            raise
        self._on_answer()
        return answer

    async def _until_changed(self) -> None:
        until = asyncio.get_running_loop().time() + self._change_wait_s
        while self._is_changing() and asyncio.get_running_loop().time() < until:  # noqa: ASYNC110  # Serve tells nobody
            await asyncio.sleep(_LOOK_S)


def _is_lost_actor(error: Exception) -> bool:
    from ray.exceptions import ActorDiedError, ActorUnavailableError

    return isinstance(error, ActorDiedError | ActorUnavailableError)
