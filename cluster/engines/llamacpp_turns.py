"""Long prompts let shorter ones go first in llama.cpp, which by itself computes one prompt after the other.

llama.cpp fills each batch slot by slot, so a short prompt in a later slot would wait until all of a long one is
computed. Here the prompt with the least left goes first, as in shortest remaining processing time: after each batch of
a prompt its thread asks whether another one should be computed instead; then its request is taken back, which leaves
what it has computed in its slot's cache, and is sent again when its turn has come. A prompt that nobody waits behind is
never interrupted.

How much of a prompt is left is known after its first batch, since only llama.cpp knows what it has cached; so each
new prompt gets one batch at once. Whoever gives way waits only for those who were there then, so every prompt gets its
next batch however many short ones come.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Mapping
from typing import Any


class Prompt:
    """One prompt that is not computed yet."""

    def __init__(self, number: int) -> None:
        self.number = number
        """Who came first has the lower one, and goes first among those with as much left."""
        self.remaining: int | None = None
        """Tokens still to compute; none before its first batch."""
        self.is_over = False
        """It is computed, or nobody wants it any more."""

    def goes_before(self, other: Prompt) -> bool:
        return not self.is_over and (self.remaining or 0, self.number) < (other.remaining or 0, other.number)


class Turns:
    """All prompts of one engine that are not computed yet. Its methods may be called in any thread."""

    def __init__(self) -> None:
        self._open: list[Prompt] = []
        self._numbers = itertools.count()
        self._changed = threading.Condition()

    def enter(self) -> Prompt:
        with self._changed:
            prompt = Prompt(next(self._numbers))
            self._open.append(prompt)
        return prompt

    def leave(self, prompt: Prompt) -> None:
        """It is computed, or nobody wants it any more; may be said twice."""
        with self._changed:
            if not prompt.is_over:
                prompt.is_over = True
                self._open.remove(prompt)
                self._changed.notify_all()

    def note(self, prompt: Prompt, progress: Mapping[str, Any]) -> bool:
        """After each batch, with llama.cpp's own words on it; true where another prompt should be computed now."""
        with self._changed:
            prompt.remaining = max(0, progress["total"] - progress["processed"])
            self._changed.notify_all()
            return bool(self._before(prompt))

    def wait(self, prompt: Prompt) -> None:
        """Returns when those who go first now have gone, or `prompt` is over itself."""
        with self._changed:
            first = self._before(prompt)
            self._changed.wait_for(lambda: prompt.is_over or not any(other.goes_before(prompt) for other in first))

    def _before(self, prompt: Prompt) -> list[Prompt]:
        return [other for other in self._open if other.goes_before(prompt)]
