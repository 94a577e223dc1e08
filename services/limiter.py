"""The process that counts limited keys: one named actor of Ray for all relays, made when the first limited key asks.

An actor and no Serve deployment: nobody pays for it who limits no key, it outlives every change of the applications
and of the relays, and a call to it takes one hop. Ray starts it anew when it dies; it then decides nothing for some
seconds, until the relays have told it again what runs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from services.calls import ServeCalls
from services.limit_book import RECOVERY_S, LimitBook, Message, Reply

# The number changes with the messages: relays of new code then get an actor of new code.
ACTOR_NAME = "windfarm-limiter-1"
NAMESPACE = "windfarm"
_CALL_WITHIN_S = 3.0


class Limiter:
    """What runs in the actor. `exchange` never waits, so one message is decided after the other."""

    def __init__(self) -> None:
        import ray

        was_here_before = ray.get_runtime_context().was_current_actor_reconstructed
        self._book = LimitBook(recovery_s=RECOVERY_S if was_here_before else 0.0)

    async def exchange(self, message: Message) -> Reply:
        return self._book.exchange(message)


class LimiterCalls:
    """Calls to the one limiter of this windfarm; the first one makes it. For processes that are connected to Ray."""

    def __init__(self, find: Callable[[], Any] | None = None, *, within_s: float = _CALL_WITHIN_S) -> None:
        self._find = find or find_limiter
        self._within_s = within_s
        self._calls: ServeCalls | None = None

    async def call(self, method: str, /, *args: Any, **kwargs: Any) -> Any:
        if self._calls is None:
            handle = await asyncio.to_thread(self._find)
            self._calls = ServeCalls(handle, lambda: None, self._within_s)
        calls = self._calls
        try:
            return await calls.call(method, *args, **kwargs)
        except Exception:
            self._calls = None  # perhaps it is gone for good; the next call looks for it or makes another
            raise


def find_limiter() -> Any:
    """Blocks. The handle of the actor, which is made where there is none; two relays get the same."""
    import ray

    from services.resources import HEAD_MARK

    actor = ray.remote(Limiter)
    return actor.options(
        name=ACTOR_NAME,
        namespace=NAMESPACE,
        get_if_exists=True,
        lifetime="detached",
        max_restarts=-1,
        num_cpus=0,
        resources={HEAD_MARK: 0.001},  # no network lies between it and the head, without which nothing runs anyway
    ).remote()
