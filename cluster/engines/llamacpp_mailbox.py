"""How what llama.cpp says in its threads reaches the event loop: one mailbox, where a wake-up serves several tokens."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from cluster.engines.llamacpp_turns import Turns
from cluster.errors import ClusterError, EngineDead, EngineFailed

# After a delivery the event loop is left alone for this long. llama.cpp computes on all cores and its threads wait for
# each other, so every wake-up of another thread stops the computation; first and last words never wait.
DELIVERY_PAUSE_S = 0.03


@dataclass(slots=True)
class End:
    """The engine left; `error` when it failed."""

    error: ClusterError | None = None


class Call:
    """One blocking call into llama.cpp, in a thread, with its items collected for the event loop."""

    def __init__(self, mailbox: Mailbox, turns: Turns, note_token: Callable[[], None]) -> None:
        self._mailbox = mailbox
        self._turns = turns
        self._prompt = turns.enter()
        self._note_token = note_token
        self._is_cancelled = False
        self._gives_way = False
        self._has_begun = False
        self._items: list[Any] = []
        self._has_items = asyncio.Event()

    def run(self, handle: Callable[..., Any], body: dict[str, Any]) -> None:
        """In the thread: returns when llama.cpp is done with the request."""
        end = End()
        try:
            while not self._is_cancelled:
                self._gives_way = False
                handle(body, self._on_item)
                if not self._gives_way:
                    break
                self._turns.wait(self._prompt)
        except (RuntimeError, ValueError) as error:
            end.error = EngineFailed(f"llama.cpp failed: {error}")
        finally:
            self._turns.leave(self._prompt)
        self._mailbox.post(self, end, is_urgent=True)

    def _on_item(self, item: Any) -> bool:
        """In the thread, for each batch of the prompt and each token; true takes the request back."""
        self._note_token()
        if self._is_cancelled or self._gives_way:
            return True
        if "prompt_progress" in item:
            self._gives_way = self._turns.note(self._prompt, item["prompt_progress"])
        else:
            self._turns.leave(self._prompt)
        is_first, self._has_begun = not self._has_begun, self._has_begun or "choices" in item
        self._mailbox.post(self, item, is_urgent=is_first or is_last(item))
        return self._gives_way

    def cancel(self) -> None:
        self._is_cancelled = True
        self._turns.leave(self._prompt)
        self._mailbox.forget(self)

    def deliver(self, item: Any) -> None:
        """In the event loop."""
        self._items.append(item)
        self._has_items.set()

    async def next_items(self) -> list[Any]:
        """All that came since the last call, at least one item."""
        await self._has_items.wait()
        self._has_items.clear()
        items, self._items = self._items, []
        return items


class Mailbox:
    """Brings items of all calls from their threads into the event loop, many with one wake-up."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._posted: deque[tuple[Call, Any]] = deque()
        self._will_look = False
        self._is_urgent = False
        self._open_calls: set[Call] = set()

    def post(self, call: Call, item: Any, *, is_urgent: bool) -> None:
        """In any thread. Urgent items, and all posted before them, are not held back by the pause."""
        self._posted.append((call, item))
        if is_urgent and not self._is_urgent:
            self._is_urgent = True
            wake(self._loop, self._deliver)
        elif not self._will_look:
            self._will_look = True
            wake(self._loop, self._deliver_and_pause)

    def forget(self, call: Call) -> None:
        self._open_calls.discard(call)

    def open(self, call: Call) -> None:
        self._open_calls.add(call)

    def close(self, reason: str) -> None:
        """End all open calls with an error."""
        for call in list(self._open_calls):
            call.deliver(End(EngineDead(reason)))
            call.cancel()

    def _deliver_and_pause(self) -> None:
        if self._posted:
            self._deliver()
            self._loop.call_later(DELIVERY_PAUSE_S, self._deliver_and_pause)
            return
        self._will_look = False
        # An item posted before that line saw no need to wake the loop.
        self._deliver()

    def _deliver(self) -> None:
        # Cleared first: an urgent item posted from now on wakes the loop again, so none is ever left behind.
        self._is_urgent = False
        while self._posted:
            call, item = self._posted.popleft()
            call.deliver(item)


def is_last(item: Mapping[str, Any]) -> bool:
    return "error" in item or ("choices" in item and item["choices"][0]["finish_reason"] is not None)


def wake(loop: asyncio.AbstractEventLoop, function: Callable[[], None]) -> None:
    """Call `function` in the loop; nothing is left to do where the loop is closed already."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(function)
