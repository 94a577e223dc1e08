"""Finds stop strings in streamed text, so that no part of one is ever shown. Pure."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Feed text piece by piece; what comes back is safe to show.

    Text that could be the beginning of a stop string is held back until the next piece decides.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.matched: str | None = None

    def feed(self, text: str) -> str:
        """The text that can be shown now. Sets `matched` when a stop string is complete; the rest is dropped."""
        if not self._stops or self.matched is not None:
            return text if self.matched is None else ""
        text = self._held + text
        found = [(at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            at, self.matched = min(found, key=lambda pair: (pair[0], -len(pair[1])))
            self._held = ""
            return text[:at]
        size = self._num_held(text)
        self._held = text[len(text) - size :]
        return text[: len(text) - size]

    def finish(self) -> str:
        """The generation ended otherwise: what was held back is plain text after all."""
        held, self._held = self._held, ""
        return held

    def _num_held(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = max(len(stop) for stop in self._stops) - 1
        for size in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._stops):
                return size
        return 0
